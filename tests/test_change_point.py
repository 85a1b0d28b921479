"""`ChangePoint`: its bets against plain loops and scipy, what it finds, and that a resumed run is judged the same."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from diffsensor.errors import ConfigError
from diffsensor.protocols import Rule
from diffsensor.rules.change_point import MEMORY, SHIFTS, ChangePoint, e_values, whitened
from diffsensor.types import Findings, Judgement, MetricInfo, Reading, Scope

METRIC = "relative_l2"
EVIDENCE = f"{METRIC}_change_point_evidence"


def info(name: str, low: float = 0.0, at: str = "outputs") -> MetricInfo:
    where = "hookpoints" if at == "hookpoints" else "outputs"
    return MetricInfo(name=name, unit="1", low=low, high=math.inf, direction="", estimator="", at=where)


def scope(hookpoints: Sequence[str] = ("a", "b")) -> Scope:
    metrics = [info(METRIC, at="hookpoints"), info("kl_ref_live"), info("nll_change", low=-math.inf)]
    return Scope(
        metrics={metric.name: metric for metric in metrics},
        groups={"code": 3, "chat": 2},
        hookpoints=tuple(hookpoints),
        progress=("loss",),
    )


def look(step: int, noise_floor: float = math.nan, **values: float) -> Findings:
    """One look, with the value at each hookpoint."""
    return Findings(
        step=step,
        readings=tuple(
            Reading(
                step=step,
                sensor="activations",
                metric=METRIC,
                value=value,
                unit="1",
                hookpoint=at,
                noise_floor=noise_floor,
            )
            for at, value in values.items()
        ),
    )


def drift(num_looks: int, *, seed: int = 0, change: int | None = None, shift: float = 0.04) -> list[float]:
    """A drift that grows by chance, and from look `change` on by `shift` a look as well."""
    growth = 0.02 * np.random.default_rng(seed).standard_normal(num_looks)
    if change is not None:
        growth[change:] += shift
    return [float(value) for value in 0.1 * np.exp(np.cumsum(growth))]


def judged(rule: ChangePoint, values: Sequence[float]) -> list[Judgement]:
    return [rule.update(look(step, a=value)) for step, value in enumerate(values)]


def naive_evidence(values: Sequence[float], run_length: float, warm_up: int) -> list[float]:
    """The same by plain loops, and with the bets' densities as they are in the docstring."""
    growths: list[float] = []
    stakes = [0.0] * len(SHIFTS)
    told = []
    for previous, value in zip([None, *values], values, strict=False):
        if previous is not None:
            past = growths[-MEMORY:]
            growth = math.log(value) - math.log(previous)
            if len(past) - 1 >= warm_up:
                mean = sum(past) / len(past)
                above = sum((past[i] - mean) * (past[i + 1] - mean) for i in range(len(past) - 1))
                below = sum((past[i] - mean) ** 2 for i in range(len(past) - 1))
                phi = above / below
                phi = max(-0.95, min(0.99, phi + (1 + 3 * phi) / len(past)))
                series = [*past, growth]
                residuals = [series[i + 1] - phi * series[i] for i in range(len(series) - 1)]
                rank = sum(residual < residuals[-1] for residual in residuals[:-1])
                n = len(residuals)
                cell = norm.ppf([rank / n, (rank + 1) / n])
                for number, shift in enumerate(SHIFTS):
                    e = n * (norm.sf(cell[0], loc=shift) - norm.sf(cell[1], loc=shift))
                    stakes[number] = (stakes[number] + 1) * e
            growths.append(growth)
        total = sum(stakes) / len(stakes)
        told.append(min(1.0, math.log(1 + total) / math.log(1 + run_length)))
        if total >= run_length:
            growths, stakes = [], [0.0] * len(SHIFTS)
    return told


def test_it_is_a_rule_that_only_warns() -> None:
    rule = ChangePoint("kl_ref_live")
    assert isinstance(rule, Rule)
    assert not rule.may_stop
    assert rule.metrics == {"kl_ref_live"}
    assert rule.name == "kl_ref_live grows faster"


@pytest.mark.parametrize("num", [2, 7, 21, 200])
def test_where_all_ranks_are_alike_a_bet_pays_1_on_average(num: int) -> None:
    of_each = np.array([e_values(below, num) for below in range(num)])
    assert of_each.mean(0) == pytest.approx(np.ones(len(SHIFTS)), rel=1e-12)
    assert (np.diff(of_each, axis=0) > 0).all()


def test_the_evidence_is_that_of_plain_loops() -> None:
    values = drift(330, seed=1, change=270)
    rule = ChangePoint(METRIC, hookpoint="*", run_length=500, warm_up=15)
    judgements = judged(rule, values)
    told = [judgement.evidence[0].value for judgement in judgements]
    assert told == pytest.approx(naive_evidence(values, 500, 15), rel=1e-9)
    assert [judgement.signals[0].state == "breach" for judgement in judgements] == [value == 1 for value in told]
    assert 1 in told


def test_whitening_takes_an_ar_1_series_apart() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(200)
    series = [0.0]
    for one in noise:
        series.append(0.9 * series[-1] + one)
    left = whitened(series[:-1], series[-1])
    assert np.corrcoef(left[1:], left[:-1])[0, 1] == pytest.approx(0, abs=0.1)
    assert np.corrcoef(left, noise)[0, 1] > 0.98
    assert whitened([0.5] * 30, 0.7).tolist() == [0.5] * 29 + [0.7]


def test_a_faster_growth_is_told_with_what_where_and_since_when() -> None:
    rule = ChangePoint(METRIC, hookpoint="*")
    rule.check(scope())
    still, moved = drift(160, seed=2), drift(160, seed=3, change=120)
    judgements = [
        rule.update(look(10 * step, a=one, b=other)) for step, (one, other) in enumerate(zip(still, moved, strict=True))
    ]
    breaches = [judgement for judgement in judgements if judgement.signals[0].state == "breach"]
    signal = breaches[0].signals[0]
    assert signal.reading is not None
    assert 1200 < signal.reading.step <= 1300
    assert 1190 <= signal.since <= signal.reading.step
    assert signal.subject == f"diffsensor/{METRIC}/at=*"
    assert f"most in diffsensor/{METRIC}/at=b" in signal.what
    assert "by a factor of 1.0" in signal.what
    assert signal.threshold == signal.reading.value == 1
    assert signal.reading.key == f"diffsensor/{EVIDENCE}/at=*"


def test_after_an_alarm_it_learns_anew() -> None:
    rule = ChangePoint(METRIC, hookpoint="*", warm_up=20)
    judgements = judged(rule, drift(110, seed=4, change=60, shift=0.1))
    alarms = [step for step, judgement in enumerate(judgements) if judgement.signals[0].state == "breach"]
    # The drift goes on growing faster, and that is usual now.
    assert len(alarms) == 1
    after = judgements[alarms[0] + 1 : alarms[0] + 21]
    assert all(judgement.evidence[0].value == 0 for judgement in after)
    assert "is learnt: " in after[5].signals[0].what


def test_a_drift_that_slows_down_raises_no_alarm() -> None:
    steps = np.arange(1, 400)
    noise = np.exp(0.03 * np.random.default_rng(5).standard_normal(len(steps)))
    judgements = judged(ChangePoint(METRIC, hookpoint="*"), [*(0.3 * (1 - np.exp(-steps / 60)) * noise)])
    assert {judgement.signals[0].state for judgement in judgements} == {"quiet"}


def test_a_mean_over_hookpoints_is_the_mean_of_their_evidence() -> None:
    one, other = drift(60, seed=6), drift(60, seed=7)
    both = ChangePoint(METRIC, hookpoint="*")
    single = {at: ChangePoint(METRIC, hookpoint=at) for at in "ab"}
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        findings = look(step, a=a, b=b)
        m = {at: math.expm1(rule.update(findings).evidence[0].value * math.log(2001)) for at, rule in single.items()}
        together = math.expm1(both.update(findings).evidence[0].value * math.log(2001))
        assert together == pytest.approx((m["a"] + m["b"]) / 2, rel=1e-9, abs=1e-12)


def test_an_unmoved_model_and_what_is_below_the_noise_are_left_out() -> None:
    values = drift(80, seed=8)
    plain, gaps = ChangePoint(METRIC, hookpoint="*"), ChangePoint(METRIC, hookpoint="*")
    for step, value in enumerate(values):
        wanted = plain.update(look(step, a=value)).evidence
        gaps.update(look(step, a=0.0))
        gaps.update(look(step, a=-1e-9))
        gaps.update(look(step, a=1e-7, noise_floor=5e-8))
        told = gaps.update(look(step, noise_floor=1e-9, a=value))
        assert told.evidence == wanted
        assert told.signals[0].state == "quiet"


def test_a_missing_reading_is_unknown_and_changes_nothing() -> None:
    rule = ChangePoint(METRIC, hookpoint="*")
    rule.check(scope())
    for step, value in enumerate(drift(40)):
        rule.update(look(step, a=value, b=value))
    before = json.dumps(rule.state_dict())
    for findings in (look(40), look(40, a=math.nan, b=math.inf)):
        signal = rule.update(findings).signals[0]
        assert signal.state == "unknown"
        assert "was not read or is not finite" in signal.what
        assert json.dumps(rule.state_dict()) == before
    kept = rule.state_dict()["streams"]
    assert rule.update(look(41, a=0.2)).signals[0].state == "unknown"
    now = rule.state_dict()["streams"]
    assert now[f"diffsensor/{METRIC}/at=b"] == kept[f"diffsensor/{METRIC}/at=b"]
    assert now[f"diffsensor/{METRIC}/at=a"] != kept[f"diffsensor/{METRIC}/at=a"]


def test_a_run_that_goes_on_from_any_look_gives_the_same_signals() -> None:
    values = drift(120, seed=9, change=80)
    # Ties draw a rank, and a resumed run must draw the same.
    values[40:60] = [values[40]] * 20
    whole = ChangePoint(METRIC, hookpoint="*")
    states, judgements = [], []
    for step, value in enumerate(values):
        states.append(json.loads(json.dumps(whole.state_dict())))
        judgements.append(whole.update(look(step, a=value)))
    assert any(judgement.signals[0].state == "breach" for judgement in judgements)
    for start in range(len(values)):
        resumed = ChangePoint(METRIC, hookpoint="*")
        resumed.load_state_dict(states[start])
        went_on = [resumed.update(look(step, a=values[step])) for step in range(start, len(values))]
        assert went_on == judgements[start:]


def test_a_loaded_state_is_not_written_to() -> None:
    rule = ChangePoint(METRIC, hookpoint="*")
    judged(rule, drift(30))
    state = rule.state_dict()
    as_it_was = json.dumps(state)
    rule.load_state_dict(state)
    judged(rule, drift(30, seed=1))
    assert json.dumps(state) == as_it_was


def test_its_state_does_not_grow_without_end() -> None:
    rule = ChangePoint(METRIC, hookpoint="*")
    judged(rule, drift(2 * MEMORY + 50))
    (stream,) = rule.state_dict()["streams"].values()
    assert len(stream["growths"]) == MEMORY


def test_equal_growths_are_ranked_by_chance() -> None:
    """Where all are tied, no rank may be preferred, or a model that stands still would raise an alarm or hide one."""
    rule = ChangePoint(METRIC, hookpoint="*", run_length=1e12)
    seen = []
    for step in range(400):
        before = rule.state_dict()["streams"].get(f"diffsensor/{METRIC}/at=a", {"bets": [0.0]})["bets"][-1]
        rule.update(look(step, a=0.1))
        stream = rule.state_dict()["streams"][f"diffsensor/{METRIC}/at=a"]
        if len(stream["growths"]) == MEMORY:
            seen.append(stream["bets"][-1] / (before + 1))
    # The bet's median under uniform ranks is exp(-2) for a shift of 2.
    assert np.median(seen) == pytest.approx(math.exp(-2), rel=0.5)
    assert len(set(seen)) > 50


@settings(max_examples=25)
@given(st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_the_unit_of_the_metric_does_not_matter(power: int, seed: int) -> None:
    values = drift(60, seed=seed, change=40)
    # Growths that are all the same must be ties in any unit.
    values += [values[-1] * 2.0**number for number in range(1, 20)]
    states = [
        [judgement.evidence[0].value for judgement in judged(ChangePoint(METRIC, hookpoint="*"), scaled)]
        for scaled in (values, [value * 2.0**power for value in values], [value * 3.7 for value in values])
    ]
    assert states[0] == states[1] == states[2]


@settings(max_examples=25)
@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 2**32 - 1))
def test_the_order_of_the_hookpoints_does_not_matter(order: list[str], seed: int) -> None:
    of_each = {at: drift(50, seed=seed + number, change=35) for number, at in enumerate("abcd")}
    rules = ChangePoint(METRIC, hookpoint="*"), ChangePoint(METRIC, hookpoint="*")
    for step in range(50):
        one = rules[0].update(look(step, **{at: values[step] for at, values in of_each.items()}))
        other = rules[1].update(look(step, **{at: of_each[at][step] for at in order}))
        assert one.evidence[0].value == pytest.approx(other.evidence[0].value, rel=1e-12)
        assert one.signals[0].state == other.signals[0].state


def test_a_metric_that_may_be_negative_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it may be negative .* Did you mean 'kl_ref_live'\?"):
        ChangePoint("nll_change").check(scope())


def test_a_metric_that_is_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'kl_ref_live'"):
        ChangePoint("kl_ref_liv").check(scope())
    ChangePoint("loss").check(scope())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_length": 1}, "give at least 2, such as 2000"),
        ({"run_length": math.inf}, "Give a finite number"),
        ({"warm_up": 2}, "at least 5"),
        ({"warm_up": MEMORY}, f"it remembers {MEMORY} looks"),
        ({"cooldown": -1}, "at least 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChangePoint("kl_ref_live", **arguments)  # type: ignore[arg-type]
