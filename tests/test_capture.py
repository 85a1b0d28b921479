"""Looking at a model: what is found, what is refused, and that nothing is left behind."""

import gc
import itertools
import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from diffsensor import Monitor, Reference
from diffsensor.capture import Capture, find_model, leave_no_trace, resolve_hookpoints
from diffsensor.errors import CaptureError, ConfigError, HookpointError
from tiny import HEADS, WIDTH, drifted, frozen_head, gpt2, llama, own_model, probe_set, readings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers


def state_of(model: nn.Module) -> list[object]:
    """All about a model and its surroundings that training could notice."""
    numpy = np.random.get_state()
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in model.modules()],
        [sorted(getattr(module, table)) for module in model.modules() for table in tables],
        [(name, p.requires_grad, p.grad is None, id(p)) for name, p in model.named_parameters()],
        [(name, id(buffer)) for name, buffer in model.named_buffers()],
        [tensor.flatten().tolist() for tensor in model.state_dict().values()],
        random.getstate(),
        (numpy[1].tolist(), numpy[2]),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    ]


class Restless(nn.Module):
    """What disturbs others at every forward pass: random numbers of all kinds, and running statistics."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(4)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, *args: object, **inputs: object) -> object:
        random.random()
        np.random.rand()
        self.norm(torch.randn(3, 4))
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.inner(*args, **inputs)


def restless_llama() -> nn.Module:
    model = llama(dropout=0.5)
    model.model.layers[0].mlp = Restless(model.model.layers[0].mlp)
    return model


@pytest.mark.usefixtures("unchecked")  # those checks draw from Python's generator themselves
@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("kind", ["trained", "frozen", "given logits", "unpacked", "restless"])
def test_a_reading_leaves_no_trace(kind: str, sensors: str, tmp_path: Path) -> None:
    model = restless_llama() if kind == "restless" else HEADS[kind]()
    some = list(model.modules())[3]
    some.eval()  # a part that the user keeps so
    before = state_of(model)
    monitor = Monitor(probe_set(), sensors=sensors, cache_dir=tmp_path)
    first = monitor.read(model, 0)
    assert state_of(model) == before
    again = monitor.read(model, 1)
    assert state_of(model) == before
    assert [reading.value for reading in first] == [0.0] * len(first) == [reading.value for reading in again]
    if kind == "restless":
        assert set(model.model.layers[0].mlp.seen) == {(False, False)}


@pytest.mark.usefixtures("unchecked")  # those checks draw from Python's generator themselves
def test_nothing_is_left_after_a_forward_pass_that_fails(tmp_path: Path) -> None:
    model = restless_llama()
    probes = probe_set()
    before = state_of(model)

    def stop_half_way() -> None:
        with leave_no_trace(model):
            for piece in Capture(model).pieces(probes.plan(True, row_tokens=64, batch_tokens=64)):
                assert piece.hidden.shape[1] == WIDTH
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_half_way()
    gc.collect()
    assert state_of(model) == before

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    for where in (model.model.layers[1], model.model.layers[0].mlp, model.lm_head):
        original, where.forward = where.forward, fail
        with pytest.raises(ZeroDivisionError):
            Reference.build(model, probes, tmp_path)
        where.forward = original
        assert state_of(model) == before


@pytest.mark.usefixtures("unchecked")  # those checks draw from Python's generator themselves
def test_training_goes_on_as_if_nobody_had_looked(tmp_path: Path) -> None:
    def train(monitor: Monitor | None) -> list[object]:
        torch.manual_seed(4)
        model = llama(dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses: list[object] = []
        for step in range(4):
            ids = torch.randint(3, 61, (4, 12))
            loss = model(ids, labels=ids, use_cache=False).loss
            if monitor is not None:
                monitor.read(model, step)  # between forward and backward, the worst place
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return [losses, [p.tolist() for p in model.parameters()]]

    assert train(None) == train(Monitor(probe_set(), sensors="full", cache_dir=tmp_path))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__)
def test_callers_may_be_in_any_gradient_mode(mode: type, tmp_path: Path) -> None:
    model = llama()
    with mode():
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        found = readings(model, drifted(model), probe_set(), tmp_path)
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (inference, grad)
    assert found["diffsensor/kl_ref_live"].value > 0.01
    model(torch.tensor([[4, 5]])).logits.sum().backward()  # nothing in the model is an inference tensor now


class Lazy(nn.Module):
    """Makes a buffer when it first runs, as masks and tables of positions are made."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("table", None, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(WIDTH)
        return self.inner(hidden * self.table)


def test_what_a_model_makes_at_first_sight_can_be_trained_with(tmp_path: Path) -> None:
    """A tensor that was made in inference mode could not be saved for backward."""
    model = llama()
    model.model.layers[0].mlp = Lazy(model.model.layers[0].mlp)
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    with torch.inference_mode():
        monitor.read(model, 0)
    model(torch.tensor([[4, 5]])).logits.sum().backward()


def test_dropout_is_off_during_a_reading(tmp_path: Path) -> None:
    model = llama(dropout=0.5)
    assert {reading.value for reading in readings(model, model, probe_set(), tmp_path).values()} == {0.0}
    assert model.training


# Finding the model


class Wrapper(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_a_language_model_is_found_by_itself_or_by_its_path() -> None:
    model = llama()
    assert find_model(model) is model
    assert find_model(Wrapper(policy=model, value=nn.Linear(2, 2))) is model
    deep = Wrapper(outer=Wrapper(policy=model))
    assert find_model(deep) is model
    two = Wrapper(policy=model, judge=llama())
    assert find_model(two, "policy") is model
    assert find_model(two, "judge") is two.judge
    plain = nn.Linear(2, 2)
    assert find_model(plain) is plain


def test_several_language_models_need_a_path() -> None:
    with pytest.raises(CaptureError, match=r"holds 2 language models: 'policy', 'judge'.*model_path='policy'"):
        find_model(Wrapper(policy=llama(), judge=llama()))
    with pytest.raises(CaptureError, match=r"No sub-module is named 'polici'. Did you mean 'policy'\?"):
        find_model(Wrapper(policy=llama(), judge=llama()), "polici")


def test_a_monitor_takes_the_path(tmp_path: Path) -> None:
    two = Wrapper(policy=llama(), judge=llama(seed=2))
    found = Monitor(probe_set(), cache_dir=tmp_path, model_path="judge").read(two, 0)
    assert {reading.value for reading in found} == {0.0}
    with pytest.raises(CaptureError, match="holds 2 language models"):
        Monitor(probe_set(), cache_dir=tmp_path).read(two, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_read_like_the_model_itself_and_gets_no_further_graph(how: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = llama(layers=1)
    live = drifted(plain)
    expected = readings(plain, live, probe_set(), tmp_path)
    # Without code generation, which needs a C++ compiler; graphs are found all the same.
    compiled = torch.compile(live, backend="eager") if how == "wrapped" else live
    if how == "in place":
        live.compile(backend="eager")
    ids = torch.tensor([[3, 4, 5, 6]])
    compiled(ids, use_cache=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = readings(plain, compiled, probe_set(), tmp_path)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert {key: reading.value for key, reading in found.items()} == {
        key: reading.value for key, reading in expected.items()
    }


# Hookpoints


def test_hookpoints_are_names_and_globs_in_the_order_of_the_model() -> None:
    model = llama(layers=4)
    found = list(resolve_hookpoints(model, ["model.layers.3", "model.layers.?.mlp", "model.norm"]))
    assert found == [
        "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3", "model.layers.3.mlp",
        "model.norm",
    ]  # fmt: skip
    assert list(resolve_hookpoints(model, [])) == []


@pytest.mark.parametrize(("layers", "expected"), [(1, 1), (2, 2), (8, 8), (9, 8), (20, 8)])
def test_auto_is_at_most_8_evenly_spaced_blocks_with_the_first_and_the_last(layers: int, expected: int) -> None:
    names = list(resolve_hookpoints(llama(layers=layers), "auto"))
    assert len(names) == expected
    assert names[0] == "model.layers.0"
    assert names[-1] == f"model.layers.{layers - 1}"
    numbers = [int(name.split(".")[-1]) for name in names]
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_other_models_have_blocks_under_other_names() -> None:
    assert list(resolve_hookpoints(gpt2(), "auto")) == ["transformer.h.0", "transformer.h.1"]
    assert list(resolve_hookpoints(own_model(), "auto")) == ["blocks.0", "blocks.1"]
    assert list(resolve_hookpoints(nn.Linear(2, 2), "auto")) == []


def test_an_unknown_hookpoint_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(HookpointError, match=r"'model.layer.1'. Did you mean 'model.layers.1'\?"):
        Reference.build(llama(), probe_set(), tmp_path, hookpoints=["model.layer.1"])
    with pytest.raises(HookpointError, match=r"No hookpoint is named 'blocks.\*'"):
        Monitor(probe_set(), cache_dir=tmp_path, hookpoints=["blocks.*"]).read(llama(), 0)
    with pytest.raises(ConfigError, match="hookpoints='all' is a string, expected 'auto' or a sequence"):
        Reference.build(llama(), probe_set(), tmp_path, hookpoints="all")
    assert list(tmp_path.iterdir()) == []


class Shared(nn.Module):
    """A block that two layers share, and one that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.skipped = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.block(self.block(self.embed(ids))))


@pytest.mark.parametrize(("name", "count"), [("block", 2), ("skipped", 0)])
def test_a_block_that_does_not_run_once_is_no_hookpoint(name: str, count: int, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=f"{name!r} ran {count} times in one forward pass, expected once"):
        Reference.build(Shared(), probe_set(), tmp_path, hookpoints=[name])
    assert Reference.build(Shared(), probe_set(), tmp_path, hookpoints=["embed"]).hookpoints == ("embed",)


# The head


class Doubling(nn.Module):
    """A model that does something to its logits that nothing says."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.inner, self.change = llama(), change
        self.config = self.inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, *args: object, **inputs: object) -> object:
        output = self.inner(*args, **inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [lambda z: 1.5 * z, lambda z: 3 * torch.tanh(z / 3), lambda z: z.index_fill(-1, torch.tensor([7]), -50.0),
     lambda z: torch.roll(z, 1, -1), lambda z: z + 0.01 * z.std()],
    ids=["scaled", "capped", "masked", "turned round", "shifted a little"],
)  # fmt: skip
def test_a_head_that_does_not_give_the_models_own_logits_is_refused(change: object, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"does not give this model's own logits.*expected at most"):
        Reference.build(Doubling(change), probe_set(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    reference = Reference.build(llama(), probe_set(), tmp_path, hookpoints=[])
    with pytest.raises(CaptureError, match="does not give this model's own logits"):
        Monitor(probe_set(), reference).read(Doubling(change), 0)


def test_a_wrapper_that_changes_nothing_is_read(tmp_path: Path) -> None:
    found = Monitor(probe_set(), cache_dir=tmp_path).read(Doubling(lambda z: z), 0)
    assert {reading.value for reading in found} == {0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_every_kind_passes_the_check_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    model = HEADS[kind]().to(dtype)
    with leave_no_trace(model):
        Capture(model).try_out(probe_set().first(), is_text=True)


# Adapters


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(3)
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"]} | options))
    model = peft.get_peft_model(llama(), config)
    return model.train()


def train_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "with a saved head"])
def test_a_reference_of_an_adapted_model_is_the_model_without_its_adapter(
    options: dict[str, object], tmp_path: Path
) -> None:
    model = adapted(**options)
    train_adapter(model)
    base = Reference.build(llama().requires_grad_(False), probe_set(), tmp_path / "base")
    monitor = Monitor(probe_set(), sensors="full", cache_dir=tmp_path / "adapter")
    found = {reading.key.split("/at=")[0]: reading.value for reading in monitor.read(model, 0)}
    expected = {
        reading.key.split("/at=")[0]: reading.value
        for reading in Monitor(probe_set(), base, sensors="full").read(model.merge_and_unload(), 0)
    }
    assert found["diffsensor/kl_ref_live"] > 0.001
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_fresh_adapter_reads_0_and_is_left_as_it_was(tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.requires_grad_(False)  # frozen by the user: switching the adapter on again would thaw it
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    active = model.active_adapters
    found = Monitor(probe_set(), cache_dir=tmp_path, sensors="full").read(model, 0)
    assert {reading.value for reading in found} == {0.0}
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert model.active_adapters == active == ["default"]
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    train_adapter(model)
    assert not torch.equal(model(torch.tensor([[4, 5]])).logits, llama()(torch.tensor([[4, 5]])).logits)


def test_a_trained_adapter_can_itself_be_the_reference(tmp_path: Path) -> None:
    model = adapted()
    train_adapter(model)
    reference = Reference.build(model, probe_set(), tmp_path, adapter=True)
    assert {reading.value for reading in Monitor(probe_set(), reference).read(model, 0)} == {0.0}
    assert reference.fingerprint != Reference.build(model, probe_set(), tmp_path).fingerprint


def test_another_adapter_beside_the_active_one_stays_what_it_is(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("default")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    Monitor(probe_set(), cache_dir=tmp_path).read(model, 0)
    assert model.active_adapters == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_the_reference_does_not_follow_the_model(tmp_path: Path) -> None:
    """As a reference that is silently synchronised to the policy would."""
    model = frozen_head()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    first = [reading.value for reading in monitor.read(model, 1)]
    assert first == [reading.value for reading in monitor.read(model, 2)]
    assert any(first)
