"""`GroupShift`: its p against scipy, its promise for a whole run, and that a resumed run is judged the same."""

import json
import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from diffsensor.errors import ConfigError
from diffsensor.protocols import Rule
from diffsensor.rules.group_shift import HALF_SPENT, GroupShift
from diffsensor.types import Findings, Judgement, MetricInfo, Reading, Scope

METRIC = "kl_ref_live"


def info(name: str, low: float = 0.0, **more: object) -> MetricInfo:
    return MetricInfo(name=name, unit="nats/token", low=low, high=math.inf, direction="", estimator="", **more)  # type: ignore[arg-type]


def scope(group_of: Sequence[str]) -> Scope:
    metrics = [info(METRIC), info("nll_change", low=-math.inf), info("relative_l2", at="hookpoints")]
    return Scope(
        metrics={metric.name: metric for metric in metrics},
        groups={name: list(group_of).count(name) for name in dict.fromkeys(group_of) if name},
        group_of=tuple(group_of),
        hookpoints=("a",),
        progress=("loss",),
    )


def rule_on(group_of: Sequence[str], **arguments: object) -> GroupShift:
    rule = GroupShift(METRIC, **arguments)  # type: ignore[arg-type]
    rule.check(scope(group_of))
    return rule


def look(step: int, drift: Sequence[float], noise_floor: float = math.nan) -> Findings:
    whole = Reading(
        step=step,
        sensor="outputs",
        metric=METRIC,
        value=float(np.nanmean(drift)),
        unit="nats/token",
        noise_floor=noise_floor,
    )
    return Findings(step=step, readings=(whole,), by_probe={METRIC: torch.tensor(list(drift), dtype=torch.float64)})


def states(judgement: Judgement) -> dict[str, str]:
    return {signal.subject.removeprefix(f"diffsensor/{METRIC}/group="): signal.state for signal in judgement.signals}


def drifts(num_probes: int, seed: int = 0) -> list[float]:
    return [float(value) for value in 0.1 * np.exp(np.random.default_rng(seed).standard_normal(num_probes))]


def test_it_is_a_rule_that_only_warns() -> None:
    rule = GroupShift()
    assert isinstance(rule, Rule)
    assert not rule.may_stop
    assert rule.metrics == {METRIC}


def test_with_all_arrangements_the_p_is_that_of_scipy() -> None:
    """Two groups of different size: the larger z of the two is the two-sided statistic."""
    group_of = ["a", "b", "b", "a", "b", "a", "a", "b", "b", "b", "b"]
    values = drifts(len(group_of), seed=3)
    logs = np.log(values)
    a = np.array([group == "a" for group in group_of])

    def gap(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return one.mean(axis) - other.mean(axis)

    judgement = rule_on(group_of, level=0.4).update(look(0, values))
    told = {reading.group: reading.value for reading in judgement.evidence}
    observed = gap(logs[a], logs[~a], 0)
    found = permutation_test((logs[a], logs[~a]), gap, vectorized=True, n_resamples=np.inf, alternative="two-sided")
    both_tails = np.mean(np.abs(found.null_distribution) >= abs(observed) - 1e-12)
    assert told["a" if observed > 0 else "b"] == pytest.approx(both_tails)
    lower = np.mean(np.abs(found.null_distribution) >= -abs(observed) - 1e-12)
    assert told["b" if observed > 0 else "a"] == pytest.approx(lower)
    assert len(judgement.evidence) == 2


def test_the_p_of_many_groups_is_that_of_plain_loops() -> None:
    """max over groups of the pooled z, over arrangements drawn here by hand: equal up to chance."""
    group_of = [name for name in "abcd" for _ in range(6)] + [""] * 4
    values = drifts(len(group_of), seed=5)
    for number in range(6):
        values[number] *= 2.2
    logs = [math.log(value) for value in values]
    spread = np.std(logs, ddof=1)

    def z_of(labels: Sequence[str]) -> dict[str, float]:
        z = {}
        for name in "abcd":
            inside = [one for one, label in zip(logs, labels, strict=True) if label == name]
            outside = [one for one, label in zip(logs, labels, strict=True) if label != name]
            gap = sum(inside) / len(inside) - sum(outside) / len(outside)
            z[name] = gap / (spread * math.sqrt(1 / len(inside) + 1 / len(outside)))
        return z

    rng = np.random.default_rng(1)
    mine = z_of(group_of)
    largest = np.array([max(z_of([str(name) for name in rng.permutation(group_of)]).values()) for _ in range(3000)])
    judgement = rule_on(group_of).update(look(0, values))
    for reading in judgement.evidence:
        p = float(np.mean(largest >= mine[reading.group]))
        assert reading.value == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 3000) + 0.002)
    assert judgement.evidence[0].value < 0.2


def test_a_group_that_moved_more_is_told_with_how_much() -> None:
    group_of = ["code"] * 10 + ["chat"] * 10 + ["maths"] * 10
    rule = rule_on(group_of)
    values = [0.3] * 10 + [0.1] * 20
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(30))
    judgement = rule.update(look(7, [float(one) for one in values * noise]))
    assert states(judgement) == {"code": "breach", "chat": "quiet", "maths": "quiet"}
    signal = judgement.signals[0]
    assert signal.what.startswith("kl_ref_live in group 'code' is 3.")
    assert signal.since == 7
    assert signal.reading is not None
    assert signal.reading.key == f"diffsensor/{METRIC}_group_shift_p/group=code"
    # All alike again: the breach is over.
    assert states(rule.update(look(8, [float(one) for one in 0.1 * noise])))["code"] == "quiet"


def test_a_group_that_moved_less_is_not_told() -> None:
    group_of = ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(30))
    values = [float(one) for one in [*[0.03] * 10, *[0.1] * 20] * noise]
    assert states(rule_on(group_of).update(look(0, values)))["a"] == "quiet"


def test_no_more_arrangements_cross_than_the_level_allows_and_each_only_once() -> None:
    group_of = [name for name in "abc" for _ in range(6)]
    rule = rule_on(group_of, permutations=999)
    values = drifts(18)  # the same at each look, so that the same arrangements lie highest
    for step in range(1, 61):
        rule.update(look(step, values))
        crossed = rule.state_dict()["crossed"]
        assert len(set(crossed)) == len(crossed) <= math.floor(0.05 * 1000 * step / (step + HALF_SPENT))
    assert len(crossed) == 37


def test_over_all_arrangements_of_one_run_the_level_is_kept() -> None:
    """Every way to label the probes of one run in turn: at most a share `level` of them ever finds a group."""
    rng = np.random.default_rng(2)
    runs = np.cumsum(rng.standard_normal((40, 8)), axis=0)
    found = 0
    labelled = list(combinations(range(8), 4))
    for chosen in labelled:
        rule = rule_on(["a" if probe in chosen else "b" for probe in range(8)], level=0.2)
        judgements = [rule.update(look(step, [*map(float, np.exp(row))])) for step, row in enumerate(runs)]
        found += any("breach" in states(judgement).values() for judgement in judgements)
    assert 0 < found <= 0.2 * len(labelled)


def test_an_unmoved_model_and_what_is_below_the_noise_are_quiet() -> None:
    group_of = ["a"] * 8 + ["b"] * 8
    rule = rule_on(group_of)
    moved = [1e-8] * 8 + [1e-12] * 8
    for findings in (look(0, [0.0] * 16), look(1, [-1e-9] * 16), look(2, moved, noise_floor=1e-7)):
        judgement = rule.update(findings)
        assert set(states(judgement).values()) == {"quiet"}
        assert [reading.value for reading in judgement.evidence] == [1.0, 1.0]
    assert rule.state_dict()["looks"] == 0
    assert states(rule.update(look(3, moved, noise_floor=1e-12)))["a"] == "breach"


def test_a_drift_of_0_does_not_outweigh_the_others() -> None:
    values = [0.4] * 8 + [0.1] * 16
    for nothing in (0.0, -1e-9, 1e-30):
        values[0] = nothing
        p = rule_on(["a"] * 8 + ["b"] * 8 + ["c"] * 8).update(look(0, values)).evidence[0].value
        assert p < 0.01


def test_arrangements_that_differ_only_in_order_are_ties() -> None:
    """The same probes summed in another order give other last digits."""
    group_of = ["a"] * 5 + ["b"] * 5
    values = [*(30 * value for value in drifts(5)), *drifts(5, seed=1)]
    ps = [
        rule_on(group_of, permutations=250, seed=seed).update(look(0, values)).evidence[0].value for seed in range(60)
    ]
    # 2 of 252 arrangements put these five together; the one as it is is counted as well.
    assert np.mean(ps) == pytest.approx((1 + 250 * 2 / 252) / 251, rel=0.2)


def test_probes_without_a_number_are_left_out() -> None:
    group_of = ["a"] * 9 + ["b"] * 9
    values = drifts(18)
    values[0] = values[17] = math.nan
    with_gaps = rule_on(group_of, seed=1).update(look(0, values))
    without = rule_on(group_of[1:17], seed=1).update(look(0, values[1:17]))
    assert with_gaps.evidence == without.evidence
    rule = rule_on(group_of)
    rule.update(look(0, values))
    values[3] = math.inf
    assert set(states(rule.update(look(1, values))).values()) == {"unknown"}
    only_b = [math.nan] * 9 + values[9:17] + [0.1]
    assert states(rule_on(group_of).update(look(0, only_b))) == {"a": "unknown", "b": "unknown"}


def test_a_metric_that_was_not_read_is_unknown_and_changes_nothing() -> None:
    rule = rule_on(["a"] * 8 + ["b"] * 8)
    rule.update(look(0, drifts(16)))
    before = json.dumps(rule.state_dict())
    assert states(rule.update(Findings(step=1))) == {"a": "unknown", "b": "unknown"}
    assert json.dumps(rule.state_dict()) == before


def test_a_run_that_goes_on_from_any_look_gives_the_same_signals() -> None:
    group_of = [name for name in "abc" for _ in range(8)]
    rng = np.random.default_rng(4)
    logs = np.cumsum(0.3 * rng.standard_normal((40, 24)), axis=0)
    logs[20:30, :8] += 2
    values = [[float(one) for one in np.exp(row)] for row in logs]
    values = [[math.nan, *row[1:]] for row in values]
    whole = rule_on(group_of, permutations=500)
    kept, judgements = [], []
    for step, row in enumerate(values):
        kept.append(json.loads(json.dumps(whole.state_dict())))
        judgements.append(whole.update(look(step, row)))
    assert {"quiet", "breach"} <= {signal.state for judgement in judgements for signal in judgement.signals}
    for start in range(40):
        resumed = rule_on(group_of, permutations=500)
        resumed.load_state_dict(kept[start])
        assert [resumed.update(look(step, values[step])) for step in range(start, 40)] == judgements[start:]


@settings(max_examples=20)
@given(st.integers(-30, 30), st.integers(0, 2**32 - 1))
def test_the_unit_of_the_metric_does_not_matter(power: int, seed: int) -> None:
    group_of = [name for name in "abc" for _ in range(6)]
    values = drifts(18, seed=seed)
    one = rule_on(group_of, permutations=200).update(look(0, values))
    other = rule_on(group_of, permutations=200).update(look(0, [value * 3.7 * 2.0**power for value in values]))
    assert one.evidence == other.evidence
    assert states(one) == states(other)


@settings(max_examples=20)
@given(st.permutations(range(9)), st.integers(0, 2**32 - 1))
def test_the_order_of_the_probes_does_not_matter(order: list[int], seed: int) -> None:
    """With every arrangement counted; where they are drawn, another order draws others."""
    group_of = ["a"] * 4 + ["b"] * 5
    values = drifts(9, seed=seed)
    one = rule_on(group_of, level=0.3).update(look(0, values))
    other = rule_on([group_of[at] for at in order], level=0.3).update(look(0, [values[at] for at in order]))
    assert {e.group: e.value for e in one.evidence} == {e.group: e.value for e in other.evidence}
    assert states(one) == states(other)


def test_too_few_probes_for_the_level_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"never below 0\.029.*Give at least 5 probes in each of 2 groups"):
        rule_on(["a"] * 4 + ["b"] * 4)
    rule_on(["a"] * 5 + ["b"] * 5)


def test_a_group_that_is_too_small_is_unknown_beside_the_others() -> None:
    group_of = ["a"] * 12 + ["b"] * 12 + ["c"]
    judgement = rule_on(group_of).update(look(0, drifts(25)))
    assert states(judgement) == {"a": "quiet", "b": "quiet", "c": "unknown"}
    assert "group 'c' has 1 of 25 probes, so that its p is never below 0.04" in judgement.signals[2].what


def test_probes_without_a_group_are_compared_with_but_not_judged() -> None:
    judgement = rule_on(["a"] * 8 + [""] * 8).update(look(0, [0.5] * 8 + [0.1] * 8))
    assert states(judgement) == {"a": "breach"}


def test_what_cannot_be_compared_is_refused() -> None:
    groups = ["a"] * 8 + ["b"] * 8
    for metric, message in (
        ("nll_change", "may be negative .* Metrics of which it can: kl_ref_live"),
        ("loss", "compares the drift of single probes, and loss has none"),
        ("relative_l2", "hookpoint"),
        ("kl_ref_liv", "Did you mean 'kl_ref_live'"),
    ):
        with pytest.raises(ConfigError, match=message):
            GroupShift(metric).check(scope(groups))
    with pytest.raises(ConfigError, match="no groups"):
        rule_on([""] * 9)
    with pytest.raises(ConfigError, match="only one"):
        rule_on(["a"] * 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 0.0}, "Give a share between 0 and 1"),
        ({"permutations": 20}, "Give at least 39"),
        ({"permutations": -1}, "Give a whole number"),
        ({"seed": -1}, "Give a whole number"),
        ({"cooldown": -1}, "at least 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupShift(**arguments)  # type: ignore[arg-type]
