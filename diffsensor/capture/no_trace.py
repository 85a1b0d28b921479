"""Looking without a trace: the same losses, weights, random numbers, modes and hooks as without the look."""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from diffsensor.capture.sharded import sharded_again
from diffsensor.capture.zero3 import partitioned_again


@contextlib.contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Everything in here runs in evaluation mode, without gradients, and changes nothing that training can notice.

    Kept and put back: the `training` flag of every single module (a user may hold some of them in eval),
    the random number generators of Python, NumPy, torch and every CUDA device in use. Autocast goes on as
    the caller has it, without its weight cache, whose entries would carry no gradient. Compiled models run
    eagerly, so that no graph is added and late hooks fire. Gradients are off by `no_grad`; tensors that
    `inference_mode` touches could not be saved for backward later, so it is switched off where it is on. Parameters
    that were sharded are sharded again.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states_kept())
        stack.callback(_set_modes, modes)
        stack.enter_context(sharded_again(model))
        stack.enter_context(partitioned_again(model))
        if "torch._dynamo" in sys.modules:  # nothing is compiled where it was never imported, and it is slow to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(
            torch.autocast(
                device.type,
                dtype=torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            )
        )
        for module, _ in modes:
            # Not module.eval(): some models override train() and would do more than set the flag.
            module.training = False
        yield


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """The generators of Python, NumPy, torch and every CUDA device in use are afterwards as they were before."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def autocast_now(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "off"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies, which is where its inputs go."""
    for parameter in model.parameters():
        return parameter.device
    return torch.device("cpu")
