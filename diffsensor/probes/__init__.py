"""The fixed inputs: what they are made of, how they are tokenised, and which of them run together."""

from diffsensor.probes.probe_set import ProbeSet as ProbeSet
