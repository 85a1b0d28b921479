"""Drift readings inside a Lightning run: `Trainer(callbacks=[DriftMonitor(probes, every_n_train_steps=50)])`."""

from diffsensor_lightning.drift_monitor import DriftMonitor as DriftMonitor
from diffsensor_lightning.follow import FollowVerdicts as FollowVerdicts

__all__ = ["DriftMonitor", "FollowVerdicts"]
