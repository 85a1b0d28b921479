"""A loop of one's own, with and without Accelerate: ten lines, a record, and not a bit of the run changed."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffsensor import Monitor, ProbeSet, every, read_record
from diffsensor.errors import ConfigError, StorageError
from test_any_module import Digits
from tiny import VOCAB, Kept, llama, probe_set
from tiny_lightning import differences, num_hooks, random_state

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers

STEPS = 7


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(3, VOCAB, (STEPS, 4, 12), generator=generator))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def plain_run(monitor: Monitor | None) -> dict[str, Any]:
    """As a user writes it, and everything about it that could differ from another run."""
    torch.manual_seed(0)
    model = llama(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with monitor or nullcontext():
        for step, batch in enumerate(batches()):
            loss = loss_of(model, batch)
            if monitor is not None:
                monitor.observe(model, step, loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return trace(model, losses)


def accelerated_run(monitor: Monitor | None, precision: str, kind: str = "llama") -> dict[str, Any]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, unless it is told
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model: Any = llama(dropout=0.1) if kind == "llama" else Digits(VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(torch.stack(batches()), batch_size=None)
    )
    losses = []
    step = 0
    for batch in loader:
        with accelerator.accumulate(model):
            if kind == "llama":
                loss = loss_of(model, batch)
            else:
                loss = nn.functional.cross_entropy(
                    model(batch[:, :8, None].float().expand(4, 8, 8)[:, None]), batch[:, 0]
                )
            if monitor is not None and accelerator.sync_gradients:
                monitor.observe(model, step, loss=loss, lr=optimizer.param_groups[0]["lr"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        losses.append(loss.detach())
    return trace(accelerator.unwrap_model(model), losses)


def trace(model: nn.Module, losses: list[Tensor]) -> dict[str, Any]:
    return {
        "losses": losses,
        "weights": dict(model.state_dict()),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": num_hooks(model),
        "random": random_state(),
    }


def test_ten_lines_give_a_record_and_change_nothing(tmp_path: Path) -> None:
    monitor = Monitor(probe_set(), record=tmp_path / "drift", schedule=every(3), cache_dir=tmp_path / "cache")
    watched = plain_run(monitor)
    assert differences(plain_run(None), watched) == []
    record = read_record(tmp_path / "drift")
    losses = {reading.step: reading.value for reading in record.readings if reading.metric == "loss"}
    assert losses == {step: float(watched["losses"][step]) for step in (0, 3, 6)}
    kl = {r.step: r.value for r in record.readings if r.metric == "kl_ref_live" and not r.group}
    assert kl.keys() == losses.keys()
    assert kl[0] == 0.0 < kl[3] < kl[6]
    assert monitor.failures == {}


def test_leaving_the_loop_closes_the_record_also_by_an_error(tmp_path: Path) -> None:
    probes, cache = probe_set(), tmp_path / "cache"

    def interrupted() -> None:
        with Monitor(probes, record=tmp_path / "drift", cache_dir=cache) as monitor:
            monitor.observe(llama(), 0, loss=1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [r.value for r in read_record(tmp_path / "drift").readings if r.metric == "loss"] == [1.0]
    # Nobody has it open: the next run may go on with it.
    with Monitor(probes, record=tmp_path / "drift", cache_dir=cache, resume=True) as monitor:
        monitor.read(llama(), 50, loss=0.5)
    assert [r.value for r in read_record(tmp_path / "drift").readings if r.metric == "loss"] == [1.0, 0.5]
    with pytest.raises(StorageError, match="holds a record already"):
        Monitor(probes, record=tmp_path / "drift", cache_dir=cache).attach(llama())


def test_progress_is_a_reading_beside_the_others(tmp_path: Path) -> None:
    kept = Kept()
    monitor = Monitor(probe_set(), schedule=every(2), sinks=[kept], cache_dir=tmp_path, bank="held-out")
    model = llama()
    given = {"loss": torch.tensor(2.5, requires_grad=True), "lr": np.float64(1e-3), "epoch": 1, "reward": torch.ones(1)}
    found = monitor.observe(model, 0, **given)
    assert monitor.observe(model, 1, **given) == []
    told = {reading.metric: reading for reading in found if reading.sensor == "progress"}
    assert {name: reading.value for name, reading in told.items()} == {
        "loss": 2.5,
        "lr": 1e-3,
        "epoch": 1.0,
        "reward": 1.0,
    }
    loss = told["loss"]
    assert (loss.step, loss.unit, loss.key, loss.num_probes) == (0, "as given", "diffsensor/loss/bank=held-out", 0)
    assert math.isnan(loss.stderr)
    assert set(told.values()) <= set(kept.findings[0].readings)
    assert len(kept.findings) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_no_number_is_kept_as_such(value: float | Tensor, tmp_path: Path) -> None:
    with Monitor(probe_set(), record=tmp_path / "drift", cache_dir=tmp_path / "cache") as monitor:
        monitor.observe(llama(), 0, loss=value)
        assert monitor.failures == {}
    (loss,) = [r.value for r in read_record(tmp_path / "drift").readings if r.metric == "loss"]
    assert loss == pytest.approx(float(value), nan_ok=True)


@pytest.mark.parametrize(
    ("progress", "told"),
    [
        ({"loss": "2.5"}, r"loss='2.5', expected a number"),
        ({"loss": None}, r"loss=None, expected a number"),
        ({"loss": torch.ones(3)}, r"loss=a tensor of shape \[3\], expected a number, or a tensor of one"),
        ({"kl_ref_live": 1.0}, r"'kl_ref_live', which is a metric's name"),
    ],
)
def test_progress_that_is_no_number_is_refused_at_the_first_step(progress: Any, told: str, tmp_path: Path) -> None:
    monitor = Monitor(probe_set(), schedule=every(50), cache_dir=tmp_path)
    for step in (0, 7):  # also where nothing is due
        with pytest.raises(ConfigError, match=told):
            monitor.observe(llama(), step, **progress)


@pytest.mark.parametrize("kind", ["llama", "digits", "digits without hookpoints"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_of_accelerate_is_bit_identical_with_readings(precision: str, kind: str, tmp_path: Path) -> None:
    probes = probe_set() if kind == "llama" else ProbeSet.from_tensors(torch.rand(9, 1, 8, 8))
    monitor = Monitor(
        probes,
        sensors="full",
        record=tmp_path / "drift",
        schedule=every(1),
        hookpoints=() if kind.endswith("without hookpoints") else "auto",
        cache_dir=tmp_path / "cache",
    )
    with monitor:
        watched = accelerated_run(monitor, precision, kind)
    assert differences(accelerated_run(None, precision, kind), watched) == []
    assert monitor.failures == {}
    record = read_record(tmp_path / "drift")
    kl = [reading.value for reading in record.readings if reading.metric == "kl_ref_live" and not reading.group]
    assert len(kl) == 4
    assert kl[0] == 0.0 < kl[-1]
    assert record.manifest["context"]["autocast"] == ("off" if precision == "no" else "torch.bfloat16")
    assert {r.value for r in record.readings if r.metric == "lr"} == {1e-2}


@pytest.mark.parametrize("autocast", [nullcontext(), torch.autocast("cpu", torch.bfloat16)], ids=["plain", "autocast"])
def test_a_reading_costs_no_gradient(autocast: AbstractContextManager[object], tmp_path: Path) -> None:
    model, monitor = llama(), Monitor(probe_set(), cache_dir=tmp_path)
    with autocast:
        loss = loss_of(model, batches()[0])
        monitor.observe(model, 0, loss=loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
