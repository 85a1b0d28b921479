"""What may be asked of a run, and the responses that ask for it when a rule is breached."""

from diffsensor.actions.requests import Log as Log
from diffsensor.actions.requests import Pause as Pause
from diffsensor.actions.requests import Rollback as Rollback
from diffsensor.actions.requests import SaveCheckpoint as SaveCheckpoint
from diffsensor.actions.requests import ScaleKLCoefficient as ScaleKLCoefficient
from diffsensor.actions.requests import ScaleLearningRate as ScaleLearningRate
from diffsensor.actions.requests import SetKLCoefficient as SetKLCoefficient
from diffsensor.actions.requests import Stop as Stop
from diffsensor.actions.response import UNKNOWN_LOOKS as UNKNOWN_LOOKS
from diffsensor.actions.response import Response as Response
from diffsensor.actions.response import state_of as state_of
