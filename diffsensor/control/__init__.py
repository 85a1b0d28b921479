"""What a run lets actions ask for, and how it is done: rates, copies to go back to, waiting, plain loops."""

from diffsensor.control.kept import Kept as Kept
from diffsensor.control.learning_rate import cannot_scale as cannot_scale
from diffsensor.control.learning_rate import scale_learning_rate as scale_learning_rate
from diffsensor.control.loop import LoopController as LoopController
from diffsensor.control.loop import Penalty as Penalty
from diffsensor.control.pause import PauseFile as PauseFile
