"""Drift readings inside a Lightning run: `Trainer(callbacks=[DriftMonitor(probes, every_n_train_steps=50)])`."""

from diffsensor_lightning.drift_monitor import DriftMonitor as DriftMonitor

__all__ = ["DriftMonitor"]
