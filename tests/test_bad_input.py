"""Bad input: each time a sentence that says what was given, what was expected and what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffsensor import Monitor, ProbeSet, Reference
from diffsensor.errors import CaptureError, ConfigError, DiffSensorError, ProbeError
from diffsensor.sensors import Outputs, resolve_sensors
from tiny import Letters, Text, llama, own_model, probe_set


def text(*ids: int, counted: bool = True) -> Text:
    return Text(ids=ids, counted=(counted,) * len(ids))


def refused(kind: type[DiffSensorError], *parts: str) -> Any:
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(kind, match=f"(?s){pattern}")


@pytest.mark.parametrize("empty", [[], torch.empty(0, 5, dtype=torch.int64)], ids=["texts", "tensors"])
def test_an_empty_probe_set(empty: Any) -> None:
    with refused(ProbeError, "probe set is empty", "Give at least one"):
        ProbeSet.from_texts(empty, Letters()) if isinstance(empty, list) else ProbeSet.from_tensors(empty)


def test_no_counted_position() -> None:
    with refused(ProbeError, "Probe '0' has no counted position", "none of its 4 tokens", "leave the probe out"):
        probe_set([text(3, 4, 5, 6, counted=False)])


def test_a_probe_longer_than_the_context(tmp_path: Path) -> None:
    probes = probe_set([text(3, 4, 5), text(*[7] * 65)])
    with refused(ProbeError, "Probe '1' has 65 tokens", "the model reads 64 at most", "max_length=64"):
        Reference.build(llama(), probes, tmp_path)
    with refused(ProbeError, "65 tokens"):
        Monitor(probes, cache_dir=tmp_path).read(llama(), 0)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_than_the_models(tmp_path: Path) -> None:
    probes = probe_set([text(3, 4, 5), text(3, 61, 5)])
    with refused(ProbeError, "61", "Build the probe set with the tokenizer of this model"):
        Reference.build(llama(), probes, tmp_path)
    with refused(ProbeError, "61", "Build the probe set with the tokenizer of this model"):
        Reference.build(own_model(), probes, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("ligth", ["No set of sensors is named 'ligth'", r"Did you mean 'light'\?", "Known: light, full"]),
        (["output"], ["No sensor is named 'output'", "Did you mean 'outputs'", "activations"]),
        ([], ["No sensor was given", "Expected 'light', 'full' or a list"]),
        (["outputs", "outputs"], ["'outputs' was given twice", "Give each sensor once"]),
        (["outputs", "outputs_full"], ["Two sensors read the metric 'entropy_change'", "outputs, outputs_full"]),
    ],
    ids=str,
)
def test_sensors_that_do_not_exist_or_collide(wanted: Any, parts: list[str]) -> None:
    with refused(ConfigError, *parts):
        resolve_sensors(wanted)
    with refused(ConfigError, *parts):
        Monitor(probe_set(), sensors=wanted)


@pytest.mark.usefixtures("unchecked")
def test_a_cost_that_does_not_exist() -> None:
    with refused(ConfigError, "cost='cheap'", "expected 'light' or 'full'"):
        Outputs("cheap")


def test_a_module_that_answers_with_something_else(tmp_path: Path) -> None:
    class Strange(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> str:
            return "hello"

    with refused(CaptureError, "returned a str", "expected a tensor"):
        Reference.build(Strange(), probe_set(), tmp_path)


def test_a_language_model_behind_two_heads(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.inner.lm_head

        def forward(self, *args: Any, **inputs: Any) -> Any:
            self.inner(*args, **inputs)
            return self.inner(*args, **inputs)

    with refused(CaptureError, "ran 2 times in one forward pass", "expected once", "model_path"):
        Reference.build(Twice(), probe_set(), tmp_path, hookpoints=[])


def test_a_head_that_is_no_linear_map(tmp_path: Path) -> None:
    model = llama()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 61), torch.nn.Tanh())
    with refused(CaptureError, "The output head Sequential does not give this model's own logits", "expected"):
        Reference.build(model, probe_set(), tmp_path)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]], ids=str)
def test_weights_that_mean_nothing(weights: list[float]) -> None:
    with refused(ProbeError, "weight"):
        ProbeSet.from_tensors(torch.tensor([[3, 4], [5, 6]]), weights=weights)


@pytest.mark.parametrize("name", ["worst", "*"])
def test_a_group_with_a_reserved_name(name: str) -> None:
    with refused(ConfigError, "worst", "Give the group another name"):
        ProbeSet.from_tensors(torch.tensor([[3, 4], [5, 6]]), groups=[name, "a"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"probes": ["a", "b"]}, ["probes is a list", "ProbeSet.from_texts"]),
        ({"schedule": 50}, ["schedule=50", r"every\(50\)"]),
        ({"hookpoints": 2}, ["hookpoints=2", "'auto' or a sequence"]),
        ({"sensors": ["kl_ref_live"]}, ["No sensor is named 'kl_ref_live'", "is a metric of the sensor 'outputs'"]),
    ],
    ids=["probes", "schedule", "hookpoints", "sensors"],
)
def test_an_argument_of_another_kind(given: dict[str, Any], parts: list[str]) -> None:
    probes: Any = probe_set([text(3, 4, 5)])
    with refused(ConfigError, *parts):
        Monitor(**({"probes": probes} | given))


@pytest.mark.usefixtures("unchecked")
def test_no_model() -> None:
    nothing: Any = None
    with refused(CaptureError, "is a NoneType", "expected a torch.nn.Module"):
        Monitor(probe_set([text(3, 4, 5)])).read(nothing, 0)
