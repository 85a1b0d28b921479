"""Looking at a model, and leaving no trace on it."""

from diffsensor.capture.adapter import adapter_names as adapter_names
from diffsensor.capture.adapter import adapter_off as adapter_off
from diffsensor.capture.adapter import has_adapter as has_adapter
from diffsensor.capture.adapter import refuse_changed_base as refuse_changed_base
from diffsensor.capture.adapter import trained_beside as trained_beside
from diffsensor.capture.copied import frozen_copy as frozen_copy
from diffsensor.capture.find import find_model as find_model
from diffsensor.capture.find import resolve_hookpoints as resolve_hookpoints
from diffsensor.capture.frozen import FrozenWeights as FrozenWeights
from diffsensor.capture.frozen import checksum_of_replica as checksum_of_replica
from diffsensor.capture.look import Capture as Capture
from diffsensor.capture.look import require_same_context as require_same_context
from diffsensor.capture.look import require_temperature as require_temperature
from diffsensor.capture.no_trace import leave_no_trace as leave_no_trace
from diffsensor.capture.no_trace import random_states_kept as random_states_kept
from diffsensor.capture.sharded import class_name as class_name
