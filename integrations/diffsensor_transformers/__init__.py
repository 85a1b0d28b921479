"""Drift readings inside a run of transformers' Trainer or of TRL's: `callbacks=[DriftMonitorCallback(probes)]`."""

from diffsensor_transformers.callback import DriftMonitorCallback as DriftMonitorCallback

__all__ = ["DriftMonitorCallback"]
