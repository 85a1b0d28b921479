"""Every number of the activations, against a second implementation; sinks; the vectors that are kept."""

import math
from pathlib import Path

import pytest
import torch

import naive
from diffsensor import Findings, Monitor, Reference
from diffsensor.metrics import ACTIVATION_METRICS, debiased_hsic
from tiny import Kept, Text, drifted, frozen_head, gpt2, llama, opt, probe_set, readings, texts

CLOSE = {"rel": 1e-4, "abs": 1e-7}


@pytest.mark.parametrize("make", [llama, gpt2, opt], ids=["llama", "gpt2", "opt"])
def test_every_number_agrees_with_a_plain_computation(make: object, tmp_path: Path) -> None:
    made, model = texts(), make()
    live = drifted(model)
    found = readings(model, live, probe_set(made), tmp_path, ["activations"])
    hookpoints = {reading.hookpoint for reading in found.values()}
    assert len(hookpoints) == 2
    for hookpoint in hookpoints:
        expected = naive.activation_readings(model, live, made, hookpoint)
        assert {metric for metric, _ in expected} == {"relative_l2", "cosine_distance", "mean_shift"}
        for (metric, group), (value, stderr) in expected.items():
            key = f"diffsensor/{metric}" + (f"/group={group}" if group else "") + f"/at={hookpoint}"
            assert found[key].value == pytest.approx(value, **CLOSE), key
            assert found[key].stderr == pytest.approx(stderr, **CLOSE), key
            assert found[key].value > 0


def test_tiny_changes_do_not_drown_in_rounding() -> None:
    ref = torch.randn(50, 64)
    live = ref + 1e-4 * torch.randn(50, 64)
    cosine = 1 - torch.nn.functional.cosine_similarity(ref.double(), live.double())
    found = ACTIVATION_METRICS["cosine_distance"].measure(ref, live)
    assert found.numpy() == pytest.approx(cosine.numpy(), rel=2e-3)
    assert float(found.mean()) == pytest.approx(float(cosine.mean()), rel=2e-4)


@pytest.mark.parametrize("name", ACTIVATION_METRICS)
def test_metrics_are_numbers_where_a_norm_is_0(name: str) -> None:
    ref, live = torch.zeros(3, 4), torch.zeros(3, 4)
    live[1, 0] = 1e-20
    values = ACTIVATION_METRICS[name].measure(ref, live)
    assert not values.isnan().any()
    assert values[0] == 0 == values[2]
    assert ACTIVATION_METRICS[name].measure(ref + 1, ref + 1).tolist() == [0, 0, 0]


def test_what_each_metric_is_blind_to() -> None:
    ref = torch.randn(20, 8)
    measure = {name: metric.measure for name, metric in ACTIVATION_METRICS.items()}
    assert measure["cosine_distance"](ref, 3 * ref).abs().max() < 1e-6
    assert measure["relative_l2"](ref, 3 * ref).numpy() == pytest.approx(2, rel=1e-5)
    assert measure["cosine_distance"](ref, -ref).numpy() == pytest.approx(2, rel=1e-5)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    for one in measure.values():
        assert one(ref @ turn, (ref + 0.1) @ turn).numpy() == pytest.approx(one(ref, ref + 0.1).numpy(), rel=1e-3)


def with_sinks() -> torch.nn.Module:
    """A model whose token 5 makes activations 50 times larger than all others."""
    model = frozen_head()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 200
    return model


def test_attention_sinks_are_left_out(tmp_path: Path) -> None:
    made = texts()
    made += [Text(ids=(5, *text.ids[1:]), counted=text.counted, group=text.group) for text in made[:3]]
    model = with_sinks()
    live = drifted(model)
    with torch.no_grad():  # a change at the sinks alone, which would be nearly all there is
        live.model.embed_tokens.weight[5] *= 1.5
    reference = Reference.build(model, probe_set(made), tmp_path)
    plan = reference.plan
    for hookpoint in reference.hookpoints:
        sinks = reference.sinks(hookpoint).tolist()
        tokens = {made[int(plan.probe[place])].ids[int(plan.offset[place])] for place in sinks}
        assert tokens == {5}
        assert len(sinks) >= 3
    found = readings(model, live, probe_set(made), tmp_path, ["activations"])
    for hookpoint in reference.hookpoints:
        expected = naive.activation_readings(model, live, made, hookpoint)
        for metric in ("relative_l2", "cosine_distance", "mean_shift"):
            value, stderr = expected[metric, ""]
            assert found[f"diffsensor/{metric}/at={hookpoint}"].value == pytest.approx(value, **CLOSE)
            assert found[f"diffsensor/{metric}/at={hookpoint}"].stderr == pytest.approx(stderr, **CLOSE)
        assert found[f"diffsensor/mean_shift/at={hookpoint}"].value < 5


def test_the_vectors_behind_mean_shift_are_kept_for_each_group(tmp_path: Path) -> None:
    model, probes, kept = llama(), probe_set(), Kept()
    live = drifted(model)
    monitor = Monitor(probes, Reference.build(model, probes, tmp_path), sensors=["activations"], sinks=[kept])
    found = {reading.key: reading for reading in monitor.read(live, 3)}
    (findings,) = kept.findings
    assert isinstance(findings, Findings)
    assert len(findings.tensors) == 2 * 3
    for key, vector in findings.tensors.items():
        assert vector.shape == (16,)
        shift = found[key.replace("mean_difference", "mean_shift")].value
        assert float(vector.norm()) == pytest.approx(shift, rel=1e-5)


def test_cka_needs_256_positions_and_is_read_over_so_many_of_all_probes(tmp_path: Path) -> None:
    model = llama()
    live = drifted(model)
    few = readings(model, live, probe_set(), tmp_path, ["activations"])
    assert not [key for key in few if "cka" in key]
    made = texts(num=40, longest=20)
    plan = Reference.build(model, probe_set(made), tmp_path).plan
    assert plan.num_positions > 400
    places = [(int(plan.probe[place]), int(plan.offset[place])) for place in range(plan.num_positions)]
    chosen = [places[round(i * (len(places) - 1) / 255)] for i in range(256)]
    found = readings(model, live, probe_set(made), tmp_path, ["activations"])
    cka = [reading for reading in found.values() if reading.metric == "cka_distance"]
    assert [reading.group for reading in cka] == ["", ""]
    for reading in cka:
        grams = []
        for each in (model, live):
            by_probe = naive.activations(each, made, reading.hookpoint)
            offsets = [naive.counted_positions(text) for text in made]
            x = torch.stack([by_probe[probe][offsets[probe].index(offset)] for probe, offset in chosen])
            grams.append(x @ x.T)
        expected = 1 - debiased_hsic(*grams) / math.sqrt(
            debiased_hsic(grams[0], grams[0]) * debiased_hsic(grams[1], grams[1])
        )
        assert reading.value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert 0 < reading.stderr < reading.value
        assert reading.num_probes == 40


def test_a_cka_below_its_noise_is_marked(tmp_path: Path) -> None:
    model, made = llama(), texts(num=40, longest=20)
    found = readings(model, drifted(model, 1e-4), probe_set(made), tmp_path, ["activations"])
    cka = [reading for reading in found.values() if reading.metric == "cka_distance"]
    assert all("unstable" in reading.note for reading in cka)
    assert len(cka) == 2
    found = readings(model, drifted(model, 0.1), probe_set(made), tmp_path, ["activations"])
    assert all(not reading.note for reading in found.values() if reading.metric == "cka_distance")
