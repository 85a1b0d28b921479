"""Scaling every learning rate of a run, so that the following steps have `factor` times what they would have had.

Scaling `param_groups` alone does not last: at its next step a scheduler computes the rate from rates of its own, such
as `base_lrs` or `eta_min`. What torch's schedulers compute is of the first degree in all of these together, so all of
them are scaled.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from diffsensor.control.wrapped import bare_optimizer, bare_scheduler
from diffsensor.errors import RefusedError

#: The entries of a parameter group that are learning rates: OneCycleLR and SWALR keep theirs here.
_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")

#: The attributes of each scheduler that are learning rates, or a least change of one.
_IN_SCHEDULERS: dict[type, tuple[str, ...]] = {
    torch_schedulers.LambdaLR: ("base_lrs",),
    torch_schedulers.MultiplicativeLR: ("base_lrs",),
    torch_schedulers.StepLR: ("base_lrs",),
    torch_schedulers.MultiStepLR: ("base_lrs",),
    torch_schedulers.ConstantLR: ("base_lrs",),
    torch_schedulers.LinearLR: ("base_lrs",),
    torch_schedulers.ExponentialLR: ("base_lrs",),
    torch_schedulers.PolynomialLR: ("base_lrs",),
    torch_schedulers.CosineAnnealingLR: ("base_lrs", "eta_min"),
    torch_schedulers.CosineAnnealingWarmRestarts: ("base_lrs", "eta_min"),
    torch_schedulers.CyclicLR: ("base_lrs", "max_lrs"),
    torch_schedulers.OneCycleLR: ("base_lrs",),
    torch_schedulers.ReduceLROnPlateau: ("min_lrs", "default_min_lr", "eps"),
    SWALR: ("base_lrs",),
    torch_schedulers.SequentialLR: (),
    torch_schedulers.ChainedScheduler: (),
}
_NESTED = (torch_schedulers.SequentialLR, torch_schedulers.ChainedScheduler)
#: A subclass that replaces one of these computes its rates in a way of its own.
_COMPUTES = ("get_lr", "step", "_update_lr", "_get_closed_form_lr", "_reduce_lr")


def cannot_scale(optimizers: Sequence[Optimizer], schedulers: Sequence[object] = ()) -> str:
    """Why the learning rates of these cannot be scaled for good, as a sentence with the remedy; "" where they can."""
    known = [bare_scheduler(scheduler) for scheduler in schedulers]
    # The optimizer of a scheduler may be a wrapper, too.
    scheduled = {id(bare_optimizer(scheduler.optimizer)) for scheduler in known if isinstance(scheduler, LRScheduler)}
    for optimizer in map(bare_optimizer, optimizers):
        name = type(optimizer).__name__
        for number, group in enumerate(optimizer.param_groups):
            if group.get("lr") is None:
                return (
                    f"Parameter group {number} of {name} has no learning rate of its own (lr=None), so there is "
                    "nothing to scale. Give the optimizer a learning rate."
                )
            if "initial_lr" in group and id(optimizer) not in scheduled:
                return (
                    f"The learning rate of {name} is made by a scheduler, which was not given; it would undo what is "
                    "scaled at its next step. Give the scheduler too."
                )
    for scheduler in (inner for outer in known for inner in _with_inner(outer)):
        if _kind(scheduler) is None:
            return (
                f"{type(scheduler).__name__} computes learning rates in a way of its own, from numbers that are not "
                "known here, and could undo what is scaled. Use one of torch's schedulers; a LambdaLR can follow any "
                "curve."
            )
    return ""


@torch.no_grad()
def scale_learning_rate(optimizers: Sequence[Optimizer], schedulers: Sequence[object], factor: float) -> str:
    """Multiply every learning rate, and all from which schedulers make them, by `factor`, tensors in place.

    Returns what it did, as a clause. Raises `RefusedError` where it would not last.
    """
    if reason := cannot_scale(optimizers, schedulers):
        raise RefusedError(reason)
    groups = [group for optimizer in optimizers for group in bare_optimizer(optimizer).param_groups]
    before = [float(group["lr"]) for group in groups]
    scaled: set[int] = set()
    for group in groups:
        for name in _IN_GROUPS:
            if name in group:
                group[name] = _times(group[name], factor, scaled)
    for scheduler in (inner for outer in schedulers for inner in _with_inner(bare_scheduler(outer))):
        kind = _kind(scheduler)
        assert isinstance(scheduler, LRScheduler) and kind is not None
        # What it says of the last rate follows suit, so that loggers show the one that is in force.
        for name in (*_IN_SCHEDULERS[kind], "_last_lr"):
            if name in vars(scheduler):
                vars(scheduler)[name] = _times(vars(scheduler)[name], factor, scaled)
    after = [float(group["lr"]) for group in groups]
    changes = list(dict.fromkeys(f"{old:.4g} -> {new:.4g}" for old, new in zip(before, after, strict=True)))
    shown = ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    return f"learning rate {shown} in {len(groups)} {'group' if len(groups) == 1 else 'groups'}"


def _times(value: object, factor: float, scaled: set[int]) -> object:
    """`value` times `factor`. One tensor may stand in several places and is scaled once."""
    if isinstance(value, Tensor):
        if id(value) not in scaled:
            scaled.add(id(value))
            value.mul_(factor)
        return value
    if isinstance(value, list):
        # In place as well: `_last_lr` of a SequentialLR is the very list of its member.
        if id(value) not in scaled:
            scaled.add(id(value))
            value[:] = [_times(each, factor, scaled) for each in value]
        return value
    assert value is None or isinstance(value, (int, float))
    return None if value is None else value * factor


def _with_inner(scheduler: object) -> Iterator[object]:
    """A scheduler and those that it calls."""
    yield scheduler
    if isinstance(scheduler, _NESTED):
        for inner in scheduler._schedulers:
            yield from _with_inner(inner)


def _kind(scheduler: object) -> type | None:
    """Which of the known schedulers this is or, as a subclass, computes its rates like; None where it is neither."""
    for kind in _IN_SCHEDULERS:
        own, known = type(scheduler), kind
        if isinstance(scheduler, kind) and all(getattr(own, m, None) is getattr(known, m, None) for m in _COMPUTES):
            return kind
    return None
