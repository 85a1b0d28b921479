"""Drift readings inside a run of transformers' Trainer or of TRL's: `callbacks=[DriftMonitorCallback(probes)]`."""

from diffsensor_transformers.callback import DriftMonitorCallback as DriftMonitorCallback
from diffsensor_transformers.coefficient import set_kl_coefficient as set_kl_coefficient
from diffsensor_transformers.controller import TrainerController as TrainerController
from diffsensor_transformers.follow import FollowVerdicts as FollowVerdicts
from diffsensor_transformers.penalty import penalised as penalised

__all__ = ["DriftMonitorCallback", "FollowVerdicts", "TrainerController", "penalised", "set_kl_coefficient"]
