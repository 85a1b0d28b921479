"""What turns readings into signals. To add a rule: a file, a test and a line here."""

from diffsensor.rules.change_point import ChangePoint as ChangePoint
from diffsensor.rules.combine import AllOf as AllOf
from diffsensor.rules.combine import AnyOf as AnyOf
from diffsensor.rules.combine import KOf as KOf
from diffsensor.rules.envelope import Envelope as Envelope
from diffsensor.rules.group_shift import GroupShift as GroupShift
from diffsensor.rules.invariant import Invariant as Invariant
from diffsensor.rules.limit import Limit as Limit
from diffsensor.rules.own import Own as Own
from diffsensor.rules.pilots import Pilots as Pilots
from diffsensor.rules.pilots import read_pilots as read_pilots
