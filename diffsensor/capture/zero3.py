"""Models that DeepSpeed's ZeRO-3 has cut over the processes: each parameter is whole only while a module needs it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from diffsensor.checksums import Partitioned, as_partitioned


class ZeRO3:
    """A model with parameters of which ZeRO-3 has given each process a flat part.

    A look enters through the module itself: DeepSpeed's hooks on it and on what is inside gather the parameters in
    turn, as they do in training. They let go of the head's too, so these are gathered again for the passes over it.
    Nothing in here needs DeepSpeed to be imported.
    """

    is_shared = True
    #: An empty parameter lies on the device that it is gathered on.
    device: torch.device | None = None

    def __init__(self, root: nn.Module, head: nn.Module | None) -> None:
        self._root = root
        self._head = [] if head is None else list(_partitioned(head))

    def show_head(self) -> None:
        _settle(self._root)
        if self._head:
            self._head[0].all_gather(self._head)


def is_zero3(root: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the model's parameters. ZeRO-1 and ZeRO-2 leave them whole."""
    return next(_partitioned(root), None) is not None


@contextlib.contextmanager
def partitioned_again(model: nn.Module) -> Iterator[None]:
    """Parameters of which each process held its part only are so afterwards.

    Once DeepSpeed knows the order of the modules, a forward pass leaves whole what the backward pass is going to need,
    and has begun to gather more. Without a backward pass the whole model would stay in the memory of every process.
    """
    before = [parameter for parameter in _partitioned(model) if parameter.ds_status.name != "AVAILABLE"]
    try:
        yield
    finally:
        _settle(model)
        for parameter in before:
            # Those that a forward pass broke off with are in use, as DeepSpeed sees it; the next one lets go of them.
            if parameter.ds_status.name == "AVAILABLE" and not parameter.ds_active_sub_modules:
                parameter.partition()


def _settle(model: nn.Module) -> None:
    """Wait for what is still being gathered. That can be only where the model is what DeepSpeed was given itself."""
    on_their_way = getattr(model, "ds_inflight_param_registry", {})
    for parameter in list(on_their_way):
        on_their_way.pop(parameter).wait()


def _partitioned(model: nn.Module) -> Iterator[Partitioned]:
    return (held for parameter in model.parameters() if (held := as_partitioned(parameter)) is not None)
