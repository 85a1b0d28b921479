"""Readings, token tables, alerts and verdicts in Weights & Biases, and a dashboard for them."""

from diffsensor_wandb.sink import RunError as RunError
from diffsensor_wandb.sink import WandbSink as WandbSink
