"""Models whose parameters are spread over the processes: how a look gets at their head, and puts all back."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from diffsensor.capture.zero3 import ZeRO3, is_zero3
from diffsensor.checksums import as_sharded
from diffsensor.errors import CaptureError


@runtime_checkable
class Holding(Protocol):
    """How the processes hold a model's parameters, as far as a look at it must know."""

    @property
    def is_shared(self) -> bool:
        """Whether all processes make each forward pass together, so that all must make as many."""
        ...

    @property
    def device(self) -> torch.device | None:
        """Where inputs go; None for wherever the parameters lie."""
        ...

    def show_head(self) -> None:
        """After a forward pass: make the head's parameters whole, as plain tensors, until the look is over.

        To be called by all processes.
        """
        ...


class Replicated:
    """Every process has the whole model, as under DDP, or there is but one process."""

    is_shared = False
    device: torch.device | None = None

    def show_head(self) -> None:
        pass


class FullySharded:
    """A model that `fully_shard` (FSDP2) has cut along the first dimension of its parameters.

    A look enters through the root module, as training does, which gathers one group of parameters after the other. The
    group that the head belongs to is gathered for the passes over the head, as a training step does for its logits.
    """

    is_shared = True

    def __init__(self, root: nn.Module, head: nn.Module | None) -> None:
        owners = dict(_groups(root))
        if not owners:
            raise CaptureError(
                f"{type(root).__name__} has parameters of which each process holds a part, and fully_shard was not "
                "called on it. Models cut by tensor parallelism alone cannot be read: use fully_shard, or DDP."
            )
        if "" not in owners:
            raise CaptureError(
                f"{type(root).__name__} has sharded parameters and is not sharded itself, so its forward cannot be "
                "entered. Call fully_shard(model) on the language model itself, after its blocks."
            )
        path = next((name for name, module in root.named_modules() if module is head), "")
        self._owner = owners[max((name for name in owners if _is_in(path, name)), key=len)]
        parameter = next(sharded for each in root.parameters() if (sharded := as_sharded(each)) is not None)
        kind = parameter.device_mesh.device_type
        # Where it computes; the shards themselves may be kept in the CPU's memory.
        place = f":{torch.get_device_module(kind).current_device()}" if kind != "cpu" else ""
        self.device: torch.device | None = torch.device(kind + place)

    def show_head(self) -> None:
        self._owner.unshard()  # type: ignore[operator]


def holding_of(root: nn.Module, head: nn.Module | None) -> Holding:
    """How the model is held. Raises `CaptureError` for ways in which it cannot be read."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in root.modules()):
        raise CaptureError(
            f"{type(root).__name__} is sharded by FullyShardedDataParallel (FSDP1), which cannot be read. Use "
            "fully_shard (FSDP2): fsdp_version=2 in accelerate, ModelParallelStrategy in Lightning."
        )
    if is_zero3(root):
        return ZeRO3(root, head)
    if all(as_sharded(parameter) is None for parameter in root.parameters()):
        return Replicated()
    return FullySharded(root, head)


@contextlib.contextmanager
def sharded_again(model: nn.Module) -> Iterator[None]:
    """Whatever was sharded before is sharded afterwards.

    A forward pass leaves the root's group of parameters whole until a backward pass. Without one, the next training
    step would go on with these copies, which no optimizer updates.
    """
    before = [
        group
        for _, group in _groups(model)
        if any(as_sharded(parameter) is not None for parameter in _own_parameters(group))
    ]
    try:
        yield
    finally:
        for group in before:
            group.reshard()  # type: ignore[operator]


def _groups(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was never imported, there is none
    if fsdp is not None:
        yield from ((name, each) for name, each in model.named_modules() if isinstance(each, fsdp.FSDPModule))


def _own_parameters(group: nn.Module) -> Iterator[nn.Parameter]:
    """Those that are gathered with this group, and not with one inside it."""
    inner = {id(parameter) for name, each in _groups(group) if name for parameter in each.parameters()}
    return (parameter for parameter in group.parameters() if id(parameter) not in inner)


def _is_in(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def class_name(module: nn.Module) -> str:
    """The name of its class; of a sharded one, which gets a class of its own, what it was before."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if any(each is module for _, each in _groups(module)) else name
