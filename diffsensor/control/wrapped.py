"""Accelerate and Lightning hand out wrappers of optimizers and schedulers. What changes a run is inside them."""

from typing import Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@runtime_checkable
class WrapsOptimizer(Protocol):
    """An optimizer around another one."""

    optimizer: Optimizer


@runtime_checkable
class WrapsScheduler(Protocol):
    """A scheduler around another one."""

    scheduler: LRScheduler


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The innermost optimizer."""
    while isinstance(optimizer, WrapsOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def bare_scheduler(scheduler: object) -> object:
    """The innermost scheduler."""
    while not isinstance(scheduler, LRScheduler) and isinstance(scheduler, WrapsScheduler):
        scheduler = scheduler.scheduler
    return scheduler
