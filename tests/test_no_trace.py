"""Promise 1: a run with sensors is the run without them, bit for bit."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffsensor_lightning import DriftMonitor
from tiny_lightning import (
    VOCAB,
    TinyModule,
    data,
    differences,
    tiny_llama,
    tiny_probes,
    trace_of,
)

pytestmark = [
    # The checks of types draw random numbers of Python's generator, to choose which item of a list they look at.
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
    # torch's own, when it compiles.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch"),
]

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")) or sys.platform == "win32",
    reason="torch.compile on CPU needs a C++ compiler, and none is installed",
)


class BatchNormOfTokens(nn.Module):
    """A norm whose running statistics move at every forward pass in training mode."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


class Noise(nn.Module):
    """Draws random numbers in every mode, as routers and samplers do, from all three generators."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 1e-3 * torch.randn_like(hidden) * np.random.rand() * random.random()


def with_dropout() -> TinyModule:
    return TinyModule(tiny_llama(dropout=0.1))


def with_checkpointing() -> TinyModule:
    module = with_dropout()
    module.model.activation_checkpointing_enable()
    return module


# One of these is compiled to machine code, as users do it, which takes a while; the others stop before that.
def with_a_compiled_model() -> TinyModule:
    return TinyModule(torch.compile(tiny_llama(dropout=0.1)))


def with_a_model_compiled_in_place() -> TinyModule:
    module = with_dropout()
    module.model.compile(backend="aot_eager")
    return module


def compiled_step(module: TinyModule) -> Any:
    return torch.compile(module, backend="aot_eager")


def with_a_part_in_eval() -> TinyModule:
    module = with_dropout()
    module.model.model.layers[1].eval()
    return module


def with_batch_norm_inside() -> TinyModule:
    model = tiny_llama()
    model.model.layers[0].input_layernorm = BatchNormOfTokens(32)
    return TinyModule(model)


def with_noise() -> TinyModule:
    model = tiny_llama()
    model.model.layers[1].post_attention_layernorm = Noise()
    return TinyModule(model)


def with_batch_norm_beside() -> TinyModule:
    return TinyModule(around=nn.BatchNorm1d(VOCAB))


def with_a_frozen_head() -> TinyModule:
    module = with_dropout()
    module.model.lm_head.requires_grad_(False)
    return module


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"module": with_dropout},
    "frozen head": {"module": with_a_frozen_head},
    "gradient accumulation": {"module": with_dropout, "accumulate_grad_batches": 3, "max_epochs": 3},
    "gradient checkpointing": {"module": with_checkpointing},
    "bf16-mixed": {"module": with_dropout, "precision": "bf16-mixed"},
    "bf16-true": {"module": with_dropout, "precision": "bf16-true"},
    "64-true": {"module": with_dropout, "precision": "64-true"},
    "shuffling with two workers": {
        "module": with_dropout,
        "loader": lambda: data(shuffle=True, workers=2),
        "max_epochs": 2,
    },
    "shuffling in the main process": {"loader": lambda: data(shuffle=True), "max_epochs": 2},
    "a part kept in eval": {"module": with_a_part_in_eval},
    "BatchNorm inside": {"module": with_batch_norm_inside},
    "BatchNorm beside": {"module": with_batch_norm_beside},
    "noise in every mode": {"module": with_noise},
    "clipping": {"module": with_dropout, "gradient_clip_val": 0.1},
    "compiled model": {"module": with_a_compiled_model},
    "compiled in place": {"module": with_a_model_compiled_in_place},
    "compiled module": {"module": with_dropout, "wrap": compiled_step},
}


@pytest.mark.parametrize(
    "run", [pytest.param(name, marks=needs_compiler if name == "compiled model" else ()) for name in RUNS]
)
def test_a_run_with_readings_is_bit_identical_to_the_run_without(run: str, tmp_path: Path) -> None:
    monitor = DriftMonitor(tiny_probes(), every_n_train_steps=2, sensors="full", cache_dir=tmp_path)
    without = trace_of([], tmp_path, **RUNS[run])
    with_readings = trace_of([monitor], tmp_path, **RUNS[run])
    assert without["step"] >= 6
    assert ("compiled" in run) == (without["graphs"] > 0)
    assert monitor.state_dict()["read"] == without["step"]
    assert differences(without, with_readings) == []


def test_loading_another_model_as_the_reference_leaves_no_trace_either(tmp_path: Path) -> None:
    other = tiny_llama()
    weights = {name: weight for name, weight in other.state_dict().items() if "layers.1.mlp" not in name}
    other.save_pretrained(tmp_path / "other", state_dict=weights)  # what is missing is drawn when it is loaded
    monitor = DriftMonitor(tiny_probes(), 2, reference=tmp_path / "other", cache_dir=tmp_path / "cache")
    without = trace_of([], tmp_path, module=with_dropout)
    assert differences(without, trace_of([monitor], tmp_path, module=with_dropout)) == []


class Vandal(pl.Callback):
    """What a careless callback does to a run."""

    def __init__(self, harm: Callable[[pl.LightningModule], Any]) -> None:
        self.harm = harm

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            self.harm(pl_module)


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    one, other = (trace_of([Vandal(lambda _: None)], tmp_path, module=with_dropout) for _ in range(2))
    assert differences(one, other) == []


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda _: torch.rand(()), id="a random number of torch"),
        pytest.param(lambda _: np.random.rand(), id="a random number of NumPy"),
        pytest.param(lambda _: random.random(), id="a random number of Python"),
        pytest.param(lambda module: module.model.eval(), id="eval mode"),
        pytest.param(lambda module: module.model.model.norm.eval(), id="one part in eval mode"),
        pytest.param(lambda module: module.model.model.register_forward_hook(lambda *_: None), id="a hook"),
        pytest.param(lambda module: module.model.lm_head.requires_grad_(False), id="a frozen head"),
        pytest.param(lambda module: module.model.lm_head.weight.data.mul_(1 + 2**-20), id="a weight"),
        pytest.param(lambda module: module.zero_grad(), id="gradients"),
        pytest.param(lambda _: torch.set_grad_enabled(False), id="gradients switched off"),
    ],
)
def test_this_comparison_notices(harm: Callable[[pl.LightningModule], Any], tmp_path: Path) -> None:
    without = trace_of([], tmp_path, module=with_dropout)
    try:
        assert differences(without, trace_of([Vandal(harm)], tmp_path, module=with_dropout)) != []
    finally:
        torch.set_grad_enabled(True)
