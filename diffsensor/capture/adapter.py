"""Models with adapters (LoRA and the like): without them they are the model that training began with."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import nn

from diffsensor.errors import ReferenceMismatchError

#: Initialisations of LoRA that move a part of the base weights into the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@runtime_checkable
class SwitchesAdapter(Protocol):
    """A model with adapters that can be switched off, as PEFT's can."""

    def disable_adapter(self) -> AbstractContextManager[object]: ...


@runtime_checkable
class TakesAdapters(Protocol):
    """A model that can take adapters into itself, as those of transformers do by `add_adapter`."""

    def disable_adapters(self) -> None: ...

    def enable_adapters(self) -> None: ...


@contextlib.contextmanager
def adapter_off(root: nn.Module, *, leave_on: bool = False) -> Iterator[None]:
    """The model without its adapters, where it has any that can be switched off."""
    if leave_on:
        off: AbstractContextManager[object] = contextlib.nullcontext()
    elif isinstance(root, SwitchesAdapter):
        off = root.disable_adapter()
    elif isinstance(root, TakesAdapters) and has_adapter(root):
        off = _taken_in_adapters_off(root)
    else:
        off = contextlib.nullcontext()
    # Switching back on makes adapter parameters trainable that the user had frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        with off:
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _taken_in_adapters_off(root: TakesAdapters) -> Iterator[None]:
    assert isinstance(root, nn.Module)
    if any(getattr(module, "disable_adapters", None) is True for module in root.modules()):
        yield  # they are off already, and stay so
        return
    root.disable_adapters()
    try:
        yield
    finally:
        root.enable_adapters()


def refuse_changed_base(root: nn.Module, instead: str) -> None:
    """Raise where switching the adapter off would not give the model that training began with."""
    for name, config in getattr(root, "peft_config", {}).items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise ReferenceMismatchError(
                f"The adapter {name!r} was initialised with init_lora_weights={init!r}, which takes a part out of the "
                "base weights: with the adapter off this is not the model that training began with. Take the model "
                f"as it is before the first step instead: {instead}."
            )


def trained_beside(root: nn.Module) -> list[str]:
    """The parameters outside the adapters that train: with the adapter off, they are as they are now."""
    of_adapters = adapter_names(root)
    return [
        name for name, each in root.named_parameters() if each.requires_grad and not of_adapters & set(name.split("."))
    ]


def adapter_names(root: nn.Module) -> set[str]:
    """The sub-modules in which adapters keep their weights, each by the last part of its name."""
    # What PEFT's layers name as theirs, and what they wrap a copy of a whole module in.
    return {"modules_to_save"}.union(*(getattr(module, "adapter_layer_names", ()) for module in root.modules()))


def has_adapter(root: nn.Module) -> bool:
    """Whether there is an adapter that `adapter_off` can switch off."""
    return isinstance(root, SwitchesAdapter) or bool(
        isinstance(root, TakesAdapters) and getattr(root, "peft_config", 0)
    )
