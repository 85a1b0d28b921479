"""A copy in memory of everything that training changes, to go back to."""

import copy
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from diffsensor.checksums import as_partitioned
from diffsensor.control.wrapped import bare_optimizer
from diffsensor.errors import ConfigError, RefusedError


@dataclass(frozen=True, slots=True)
class _Copied:
    """A copied tensor, and where the original was."""

    tensor: Tensor
    device: torch.device


@final
class Kept:
    """What training changes, copied: trainable parameters, buffers, optimizer and scaler states, random states.

    What comes after `restore` is bit for bit what came after `keep`, given the same data and learning rates. Not
    copied, and so left as they are: frozen parameters; learning rates and whatever else an optimizer has in its
    parameter groups; schedulers; the position in the data; gradients; plain attributes of modules. To be called
    between two updates. It costs `num_bytes`: with AdamW three times the trainable parameters. Sharded parameters
    (FSDP, ZeRO-3) are refused with a `ConfigError`.

    Arguments:
        model: the module that is trained.
        optimizers: all optimizers of it.
        scaler: the gradient scaler, where there is one.
        on: "host" keeps the copy in the computer's memory, "device" beside each tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: GradScaler | None = None,
        *,
        on: Literal["host", "device"] = "host",
    ) -> None:
        if on not in ("host", "device"):
            raise ConfigError(f"Kept was given on={on!r}, expected 'host' or 'device'.")
        self._model, self._scaler, self._on = model, scaler, on
        self._optimizers = [bare_optimizer(optimizer) for optimizer in optimizers]
        self._step: int | None = None
        self._copies: Any = None
        self._random: dict[str, Any] = {}
        if any(map(_is_sharded, self._trained())):
            raise ConfigError(
                "The model's parameters are sharded over processes, and a copy of them in memory is not supported. "
                "Roll back by hand from a checkpoint, or train without sharding."
            )

    @property
    def step(self) -> int | None:
        """The step that was kept; None where there is nothing to go back to."""
        return self._step

    @property
    def num_bytes(self) -> int:
        """What the copy takes; before the first `keep`, what it would take now."""
        return sum(tensor.nbytes for tensor in _tensors(self._now() if self._copies is None else self._copies))

    def keep(self, step: int) -> None:
        """Copy everything as it is now, into the memory of the last copy where it fits."""
        self._step = None  # a copy that was broken off is none
        with torch.inference_mode(mode=False), torch.no_grad():
            self._copies = _copied(self._now(), self._copies, self._on == "host")
        self._random = _random_states()
        self._step = step

    def restore(self) -> int:
        """Put everything back, in place, and return the step that it was kept at.

        Raises `RefusedError` where nothing was kept, or where parameters train now that did not then.
        """
        if self._step is None:
            raise RefusedError("Nothing has been kept, so there is no state to go back to.")
        kept = self._copies
        if new := [parameter for parameter in self._trained() if parameter not in kept["parameters"]]:
            names = {parameter: name for name, parameter in self._model.named_parameters()}
            raise RefusedError(
                f"{len(new)} parameters train now that did not at step {self._step} and were not kept, such as "
                f"{names.get(new[0], 'one outside the model')!r}. The run goes on from where it is."
            )
        with torch.no_grad():
            for parameter, copied in kept["parameters"].items():
                parameter.copy_(copied.tensor)
            buffers = dict(self._model.named_buffers())
            for name, copied in kept["buffers"].items():
                path, _, leaf = name.rpartition(".")
                setattr(self._model.get_submodule(path), leaf, _put_back(copied, buffers.get(name)))
            for optimizer, states in zip(self._optimizers, kept["optimizers"], strict=True):
                _put_back(states, optimizer.state)
        if self._scaler is not None:
            self._scaler.load_state_dict(_put_back(kept["scaler"], None))
        # Within one autocast block, the weights that were cast at their first use are used again.
        torch.clear_autocast_cache()
        _set_random_states(self._random)
        return self._step

    def _trained(self) -> dict[nn.Parameter, nn.Parameter]:
        """All parameters that train, or that an optimizer has; by themselves, for they have no name in common."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        return {each: each for each in (*trained, *(each for group in groups for each in group["params"]))}

    def _now(self) -> dict[str, Any]:
        return {
            "parameters": self._trained(),
            "buffers": dict(self._model.named_buffers()),
            "optimizers": [optimizer.state for optimizer in self._optimizers],
            "scaler": {} if self._scaler is None else self._scaler.state_dict(),
        }


def _copied(now: Any, earlier: Any, to_host: bool) -> Any:
    """A copy of `now`, however nested, into the memory of an earlier copy where that fits."""
    if isinstance(now, Tensor):
        if not isinstance(earlier, _Copied) or not _fits(now, earlier.tensor) or now.device != earlier.device:
            # Pinned memory is copied to at full speed.
            new = torch.empty_like(now, device="cpu", pin_memory=now.is_cuda) if to_host else torch.empty_like(now)
            earlier = _Copied(new, now.device)
        earlier.tensor.copy_(now)
        return earlier
    if isinstance(now, Mapping):
        known = earlier if isinstance(earlier, Mapping) else {}
        return {key: _copied(value, known.get(key), to_host) for key, value in now.items()}
    if isinstance(now, list):
        old = earlier if isinstance(earlier, list) and len(earlier) == len(now) else [None] * len(now)
        return [_copied(value, before, to_host) for value, before in zip(now, old, strict=True)]
    return copy.deepcopy(now)


def _put_back(kept: Any, now: Any) -> Any:
    """What was copied, put into the very tensors and dicts of `now` where they fit, else into new ones."""
    if isinstance(kept, _Copied):
        if isinstance(now, Tensor) and _fits(kept.tensor, now) and now.device == kept.device:
            return now.copy_(kept.tensor)
        return kept.tensor.to(kept.device, copy=True)
    if isinstance(kept, dict):
        here = now if isinstance(now, dict) else {}
        put = {key: _put_back(value, here.get(key)) for key, value in kept.items()}
        here.clear()
        here.update(put)
        return here
    if isinstance(kept, list):
        old = now if isinstance(now, list) and len(now) == len(kept) else [None] * len(kept)
        return [_put_back(value, before) for value, before in zip(kept, old, strict=True)]
    return copy.deepcopy(kept)


def _fits(tensor: Tensor, other: Tensor) -> bool:
    return other.shape == tensor.shape and other.dtype == tensor.dtype


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, _Copied):
        yield tree.tensor
    elif isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _tensors(value)


def _is_sharded(parameter: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # slow to import, and there already where it is in use
    is_cut = tensors is not None and isinstance(parameter, tensors.DTensor)
    return is_cut or as_partitioned(parameter) is not None


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
