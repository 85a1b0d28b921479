"""Every number of the outputs, against a second implementation and against what must be 0."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import naive
from diffsensor import Monitor, ProbeSet, Reference
from diffsensor.types import Plan
from tiny import HEADS, VOCAB, Text, drifted, frozen_head, llama, own_model, probe_set, readings, scaled, texts

LIGHT = {"kl_ref_live", "nll_change", "entropy_change", "top1_flip", "mass_moved", "max_token_gain"}
FULL = LIGHT | {"kl_live_ref", "js", "tv", "kl_ref_live_p95", "kl_ref_live_worst1"}
#: What the models' own rounding in float32 leaves, where the second implementation runs them in float64.
CLOSE = {"rel": 1e-4, "abs": 2e-6}


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("kind", HEADS)
def test_every_number_agrees_with_a_plain_computation(kind: str, sensors: str, tmp_path: Path) -> None:
    made = texts()
    reference = HEADS[kind]()
    live = drifted(reference)
    expected = naive.output_readings(reference, live, made)
    found = readings(reference, live, probe_set(made), tmp_path, sensors)
    outputs = [reading for reading in found.values() if not reading.hookpoint]
    assert {reading.metric for reading in outputs} == (LIGHT if sensors == "light" else FULL)
    assert {reading.group for reading in outputs} == {"", "letters", "poems", "worst"}
    for reading in outputs:
        if reading.group == "worst":
            continue
        value, stderr = expected[reading.metric, reading.group]
        if reading.metric == "max_token_gain":
            assert reading.value - 1e-5 <= value <= reading.value + reading.bound + 1e-5
            if sensors == "full":
                assert reading.bound == 0.0
                assert reading.value == pytest.approx(value, **CLOSE)
        else:
            assert reading.bound == 0.0
            assert reading.value == pytest.approx(value, **CLOSE), reading.key
        if not math.isnan(stderr):
            assert reading.stderr == pytest.approx(stderr, **CLOSE), reading.key
        members = [text for text in made if not reading.group or text.group == reading.group]
        assert reading.num_probes == len(members)


@pytest.mark.parametrize("sensors", ["light", "full"])
def test_the_worst_group_is_the_one_furthest_off(sensors: str, tmp_path: Path) -> None:
    found = readings(llama(), drifted(llama()), probe_set(), tmp_path, sensors)
    for reading in found.values():
        if reading.group != "worst":
            continue
        groups = {name: found[reading.key.replace("group=worst", f"group={name}")] for name in ("letters", "poems")}
        name = max(groups, key=lambda name: abs(groups[name].value))
        assert reading.note == f"group {name!r}"
        assert reading.value == groups[name].value
        assert reading.stderr == groups[name].stderr or math.isnan(reading.stderr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_the_same_weights_read_exactly_0(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = HEADS[kind]().to(dtype)
    probes = probe_set(texts(num=30, longest=20))
    for _ in range(2):  # built, then opened from disk
        reference = Reference.build(model, probes, tmp_path)
        for sensors in ("light", "full"):
            monitor = Monitor(probes, reference, sensors=sensors)
            found = monitor.read(model, 0)
            assert len(found) > 20
            assert {reading.key: reading.value for reading in found if reading.value != 0.0} == {}
            assert {reading.key: reading.bound for reading in found if reading.bound != 0.0} == {}
            assert monitor.failures == {}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("sensors", ["light", "full"])
def test_the_same_weights_read_exactly_0_where_a_probe_is_next_to_impossible(
    frozen: bool, sensors: str, tmp_path: Path
) -> None:
    model = HEADS["frozen" if frozen else "trained"]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(300)  # the next token's probability is far below float32's end
    found = readings(model, model, probe_set(texts()), tmp_path, sensors)
    nonzero = {key: reading.value for key, reading in found.items() if reading.value != 0 or reading.bound != 0}
    assert not nonzero


def test_thinned_probes_are_read_where_they_count(tmp_path: Path) -> None:
    made = texts()
    thinned = []
    for text in made:
        counted = [place for place, yes in enumerate(text.counted) if yes and place > 0][::3]
        marks = tuple(place in counted for place in range(len(text.ids)))
        thinned.append(Text(ids=text.ids, counted=marks, group=text.group, weight=text.weight))
    model = frozen_head()
    live = drifted(model)
    found = readings(model, live, probe_set(made).thin(3), tmp_path, "light")
    expected = naive.output_readings(model, live, thinned)
    for metric in ("kl_ref_live", "nll_change", "mass_moved"):
        for group in ("", "letters", "poems"):
            key = f"diffsensor/{metric}" + (f"/group={group}" if group else "")
            assert found[key].value == pytest.approx(expected[metric, group][0], **CLOSE)


def test_padding_and_prompts_do_not_count(tmp_path: Path) -> None:
    """One probe beside a far longer one, of which only two tokens count: the mean is over three positions."""
    made = [
        Text(ids=(5, 6), counted=(True, True)),
        Text(ids=tuple(range(3, 33)), counted=(False,) * 28 + (True, True)),
    ]
    model = llama()
    live = drifted(model)
    found = readings(model, live, probe_set(made), tmp_path)
    pairs = zip(naive.log_probabilities(model, made), naive.log_probabilities(live, made), strict=True)
    each = [log_q - log_p for log_q, log_p in pairs]
    expected = [each[0][0, 6], each[1][27, 31], each[1][28, 32]]
    assert found["diffsensor/nll_change"].value == pytest.approx(float(sum(expected) / 3), **CLOSE)


def test_swapping_the_models_swaps_the_two_divergences(tmp_path: Path) -> None:
    one = llama()
    other = drifted(one, 0.2)
    there = readings(one, other, probe_set(), tmp_path)
    back = readings(other, one, probe_set(), tmp_path)
    for mine, theirs in (("kl_ref_live", "kl_live_ref"), ("kl_live_ref", "kl_ref_live"), ("js", "js"), ("tv", "tv")):
        assert there[f"diffsensor/{mine}"].value == pytest.approx(back[f"diffsensor/{theirs}"].value, rel=1e-4)
    assert there["diffsensor/kl_ref_live"].value != pytest.approx(there["diffsensor/kl_live_ref"].value, rel=1e-2)
    for signed in ("entropy_change", "nll_change"):
        assert there[f"diffsensor/{signed}"].value == pytest.approx(-back[f"diffsensor/{signed}"].value, rel=1e-4)
    assert 0 <= there["diffsensor/js"].value <= math.log(2)


def test_models_that_have_nothing_in_common_stay_in_range(tmp_path: Path) -> None:
    model = llama()
    live = drifted(model, 3.0)
    with torch.no_grad():
        live.lm_head.weight.mul_(10)
    found = readings(model, live, probe_set(), tmp_path)
    for reading in found.values():
        if reading.metric in ("js", "tv", "max_token_gain", "mass_moved", "top1_flip"):
            assert 0 < reading.value <= (math.log(2) if reading.metric == "js" else 1) + 1e-6
    assert found["diffsensor/kl_ref_live"].value > 5


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("factor", [30.0, 1000.0])
def test_logits_so_large_that_exponentials_overflow_are_read_right(
    factor: float, frozen: bool, sensors: str, tmp_path: Path
) -> None:
    """Log partition functions hundreds or thousands of nats apart."""
    reference = llama()
    with torch.no_grad():
        reference.model.norm.weight.mul_(0.5 if factor > 100 else 3)
    reference.lm_head.requires_grad_(not frozen)
    live = drifted(reference)
    with torch.no_grad():
        live.model.norm.weight.mul_(factor)
    made = texts()
    expected = naive.output_readings(reference, live, made)
    found = readings(reference, live, probe_set(made), tmp_path, sensors)
    for metric in ("kl_ref_live", "nll_change", "entropy_change", "mass_moved"):
        assert found[f"diffsensor/{metric}"].value == pytest.approx(expected[metric, ""][0], rel=2e-4), metric
    gain = found["diffsensor/max_token_gain"]
    assert gain.value - 1e-5 <= expected["max_token_gain", ""][0] <= gain.value + gain.bound + 1e-5
    if sensors == "full":
        for metric in ("kl_live_ref", "js", "tv", "kl_ref_live_p95"):
            assert found[f"diffsensor/{metric}"].value == pytest.approx(expected[metric, ""][0], rel=2e-4), metric


def mean_kl_of_the_same_hidden_states(
    reference: nn.Module, live: nn.Module, made: list[Text], plan: Plan
) -> tuple[float, float]:
    """The truth from the hidden states that these bodies really make, in float64 from there on; and that from the
    models' own logits. In the batches of the plan, because in bfloat16 another layout moves the numbers."""
    exact, own = [], []
    weights = torch.tensor([text.weight for text in made], dtype=torch.float64)[plan.probe]
    for model in (reference, live):
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            outputs = [
                (model.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.index],
                 model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.index])
                for batch in plan.batches
            ]  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            hidden = torch.cat([state for state, _ in outputs])
            exact.append((hidden.double() @ model.lm_head.weight.double().T).log_softmax(1))
            own.append(torch.cat([logits for _, logits in outputs]).log_softmax(1).double())
    means = [float((log_q.exp() * (log_q - log_p)).sum(1) @ weights / weights.sum()) for log_q, log_p in (exact, own)]
    return means[0], means[1]


@pytest.mark.parametrize("size", [0.3, 1, 10])
@pytest.mark.parametrize("sensors", ["light", "full"])
def test_a_bfloat16_model_is_read_to_1_percent_where_its_own_logits_are_far_off(
    sensors: str, size: float, tmp_path: Path
) -> None:
    reference = frozen_head(llama().to(torch.bfloat16))
    live = copy.deepcopy(reference)
    with torch.no_grad():
        # A few weights only: bfloat16 knows no relative change below 2^-8.
        weight = live.model.layers[1].mlp.down_proj.weight
        some = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < size / 10
        weight[some] *= 1 + 2**-6
    made = texts(num=40, longest=40)
    built = Reference.build(reference, probe_set(made), tmp_path)
    truth, wrong = mean_kl_of_the_same_hidden_states(reference, live, made, built.plan)
    kl = readings(reference, live, probe_set(made), tmp_path, sensors)["diffsensor/kl_ref_live"].value
    assert 5e-6 < truth < 1e-3
    assert kl == pytest.approx(truth, rel=0.01)
    assert wrong != pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("sensors", ["light", "full"])
def test_neither_autocast_nor_a_lower_matmul_precision_harms_the_head(sensors: str, tmp_path: Path) -> None:
    """The body runs as the caller has it, products of the head are float32."""
    model = frozen_head()
    live = drifted(model, 0.01)
    made = texts()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = readings(model, live, probe_set(made), tmp_path, sensors)
            same = readings(model, model, probe_set(made), tmp_path, sensors)
            plan = Reference.build(model, probe_set(made), tmp_path).plan
            truth, wrong = mean_kl_of_the_same_hidden_states(model, live, made, plan)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert {reading.value for reading in same.values()} == {0.0}
    assert found["diffsensor/kl_ref_live"].value == pytest.approx(truth, rel=1e-3)
    assert wrong != pytest.approx(truth, rel=1e-2)


def test_vocabularies_larger_than_one_tile_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsensor import reference as reference_module
    from diffsensor.metrics import tiles

    small = tiles.TileShape(rows=5, columns=7)
    monkeypatch.setattr(tiles, "tile_shape", lambda _device: small)
    monkeypatch.setattr(reference_module, "tile_shape", lambda _device: small)
    made = texts()
    for kind, sensors in (("frozen", "light"), ("trained", "full"), ("given logits", "full")):
        model = HEADS[kind]()
        live = drifted(model)
        expected = naive.output_readings(model, live, made)
        found = readings(model, live, probe_set(made), tmp_path, sensors)
        for key, reading in found.items():
            if not reading.hookpoint and reading.group != "worst" and reading.metric != "max_token_gain":
                assert reading.value == pytest.approx(expected[reading.metric, reading.group][0], **CLOSE), key
        same = readings(model, model, probe_set(made), tmp_path, sensors)
        assert {reading.value for reading in same.values()} | {reading.bound for reading in same.values()} == {0.0}


def test_a_classifier_is_read_without_next_tokens(tmp_path: Path) -> None:
    from diffsensor import ProbeSet

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    live = drifted(model, 0.3)
    rows = torch.randn(70, 6)
    groups = ["even" if number % 2 == 0 else "odd" for number in range(70)]
    probes = ProbeSet.from_tensors(rows, groups=groups)
    found = {
        reading.key: reading
        for reading in Monitor(probes, Reference.build(model, probes, tmp_path, hookpoints=["0"]), sensors="full").read(
            live, 0
        )
    }
    assert "diffsensor/nll_change" not in found
    with torch.no_grad():
        log_q, log_p = (m.double()(rows.double()).log_softmax(1) for m in (model, live))
    metrics = [naive.output_metrics(a, b, 0) for a, b in zip(log_q, log_p, strict=True)]
    for metric in ("kl_ref_live", "kl_live_ref", "js", "tv", "entropy_change", "top1_flip"):
        for group, key in (("", f"diffsensor/{metric}"), ("even", f"diffsensor/{metric}/group=even")):
            values = [[each[metric]] for each in metrics]
            weights = [1.0 if group in ("", name) else 0.0 for name in groups]
            value, stderr = naive.mean_with_error(values, weights)
            assert found[key].value == pytest.approx(value, **CLOSE)
            assert found[key].stderr == pytest.approx(stderr, **CLOSE)
    assert found["diffsensor/relative_l2/at=0"].value > 0


def test_a_probe_of_weight_0_changes_nothing(tmp_path: Path) -> None:
    made = texts()
    silent = Text(ids=(9, 8, 7, 6, 5), counted=(True,) * 5, group="letters", weight=0.0)
    model = frozen_head()
    live = drifted(model)
    found = readings(model, live, probe_set(made), tmp_path)
    more = readings(model, live, probe_set([*made, silent]), tmp_path)
    for key, reading in found.items():
        assert more[key].value == pytest.approx(reading.value, rel=1e-5, abs=1e-7), key
        assert more[key].num_probes == reading.num_probes
        if not math.isnan(reading.stderr):
            assert more[key].stderr == pytest.approx(reading.stderr, rel=1e-5, abs=1e-7), key


def test_one_probe_alone_has_no_standard_error(tmp_path: Path) -> None:
    made = [Text(ids=(5, 6, 7, 8), counted=(True,) * 4, group="only")]
    found = readings(llama(), drifted(llama()), probe_set(made), tmp_path)
    assert found["diffsensor/kl_ref_live"].value > 0
    assert all(math.isnan(reading.stderr) for reading in found.values())


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "frozen and scaled"])
def test_the_largest_gain_lies_within_its_bound(kind: str, sensors: str, tmp_path: Path) -> None:
    """Over many sizes of drift, and more positions than are searched."""
    made = texts(num=24, longest=24)
    model = HEADS[kind]()
    for seed, size in enumerate((1e-4, 1e-2, 1.0)):
        live = drifted(model, size, seed)
        expected = naive.output_readings(model, live, made)
        found = readings(model, live, probe_set(made), tmp_path, sensors)
        for group in ("", "letters", "poems"):
            gain = found["diffsensor/max_token_gain" + (f"/group={group}" if group else "")]
            truth = expected["max_token_gain", group][0]
            assert gain.value <= truth + 3e-6 + 1e-3 * truth
            assert truth <= gain.value + gain.bound + 3e-6 + 1e-3 * truth
            if sensors == "full":
                assert gain.bound == 0
                assert gain.value == pytest.approx(truth, rel=1e-3, abs=3e-6)


def test_logit_scale_and_own_models_are_among_the_cases() -> None:
    assert scaled().config.logit_scale == 0.5
    assert not hasattr(own_model(), "get_output_embeddings")
    assert len({make().__class__ for make in HEADS.values()}) > 6
    assert VOCAB > 50


@pytest.mark.parametrize("sensors", ["light", "full"])
def test_a_group_of_weight_0_has_no_numbers_and_takes_none_from_the_others(sensors: str, tmp_path: Path) -> None:
    model = llama()
    tokens = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    groups = ["in", "in", "out", "out"]
    probes = ProbeSet.from_tensors(tokens, groups=groups, weights=[1.0, 1.0, 0.0, 0.0])
    monitor = Monitor(probes, Reference.build(model, probes, tmp_path), sensors=sensors)
    found = {reading.key: reading.value for reading in monitor.read(drifted(model), 0)}
    assert monitor.failures == {}
    assert math.isnan(found["diffsensor/kl_ref_live/group=out"])
    assert found["diffsensor/kl_ref_live/group=in"] == found["diffsensor/kl_ref_live"] > 0
    assert found["diffsensor/kl_ref_live/group=worst"] == found["diffsensor/kl_ref_live"]
    assert found["diffsensor/max_token_gain/group=in"] == found["diffsensor/max_token_gain"] > 0


def test_a_head_that_moved_is_not_taken_for_still_where_the_hidden_states_are_the_same(tmp_path: Path) -> None:
    model = llama()
    probes = ProbeSet.from_tensors(torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0)))
    reference = Reference.build(model, probes, tmp_path)
    live = copy.deepcopy(model)
    with torch.no_grad():
        live.lm_head.weight[7] += 1e-6
    (gain,) = [each for each in Monitor(probes, reference).read(live, 0) if each.metric == "max_token_gain"]
    assert gain.value + gain.bound > 0
