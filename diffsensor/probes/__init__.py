"""The fixed inputs: what they are made of, how they are tokenised, and which of them run together."""

from diffsensor.probes.plan import checksum_of as checksum_of
from diffsensor.probes.plan import shares_of as shares_of
from diffsensor.probes.plan import split_otherwise as split_otherwise
from diffsensor.probes.probe_set import ProbeSet as ProbeSet
from diffsensor.probes.rolling import Held as Held
from diffsensor.probes.rolling import RollingProbes as RollingProbes
