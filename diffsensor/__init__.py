"""Sensors for how far, and in which way, a model moves while it is trained."""

from diffsensor.errors import ConfigError as ConfigError
from diffsensor.errors import DiffSensorError as DiffSensorError
from diffsensor.monitor import Monitor as Monitor
from diffsensor.probes import ProbeSet as ProbeSet
from diffsensor.protocols import Schedule as Schedule
from diffsensor.protocols import Sensor as Sensor
from diffsensor.protocols import Sink as Sink
from diffsensor.record import RecordContents as RecordContents
from diffsensor.record import read_record as read_record
from diffsensor.reference import Reference as Reference
from diffsensor.reference import cache_directory as cache_directory
from diffsensor.schedules import every as every
from diffsensor.schedules import log_spaced as log_spaced
from diffsensor.sensors import Activations as Activations
from diffsensor.sensors import Outputs as Outputs
from diffsensor.statistics import interval_of as interval_of
from diffsensor.types import Findings as Findings
from diffsensor.types import MetricInfo as MetricInfo
from diffsensor.types import Reading as Reading
from diffsensor.types import TokenShift as TokenShift
from diffsensor.types import log_key as log_key
