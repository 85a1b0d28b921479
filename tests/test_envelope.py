"""An envelope alarms on healthy runs as seldom as it says, on hand-solved cases where it must, and refuses the rest."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsensor.errors import ConfigError, CorruptFileError, StorageError
from diffsensor.protocols import Criterion, Rule
from diffsensor.rules.envelope import Envelope
from diffsensor.rules.pilots import (
    Curves,
    PilotRun,
    Pilots,
    calibration_for,
    gather,
    pilots_for,
    read_pilots,
    split,
    write_pilots,
)
from diffsensor.types import Findings, MetricInfo, Reading, Scale, Scope, Signal

KL = MetricInfo(name="kl_ref_live", unit="nats/token", low=0.0, high=math.inf, direction="", estimator="", scale="log")
DRIFT = replace(KL, name="nll_change", low=-math.inf, scale="linear")
CKA = replace(KL, name="cka_distance", unit="", high=1.0, scale="linear", at="hookpoints", by_group=False)
SCOPE = Scope(
    metrics={"kl_ref_live": KL, "nll_change": DRIFT, "cka_distance": CKA},
    groups={"a": 8, "b": 8},
    hookpoints=("first", "last"),
    probes="p" * 64,
    reference="r" * 64,
    schedule="every(10)",
    recipe={"learning_rate": 1e-3, "betas": (0.9, 0.95)},
)


def reading(
    value: float,
    step: int = 0,
    *,
    metric: str = "kl_ref_live",
    group: str = "",
    hookpoint: str = "",
    scale: Scale = "log",
) -> Reading:
    return Reading(
        step=step, sensor="outputs", metric=metric, value=value, unit="nats/token", group=group, hookpoint=hookpoint,
        scale=scale,
    )  # fmt: skip


def look(step: int, *readings: Reading) -> Findings:
    return Findings(step=step, readings=tuple(replace(one, step=step) for one in readings))


def pilots_by_hand(values: Sequence[Sequence[float]], *, scale: Scale = "linear", num_centre: int = 2) -> Pilots:
    """A row for each pilot, a column for each of the steps 0, 10, 20, ..."""
    metric = "kl_ref_live" if scale == "log" else "nll_change"
    steps = tuple(range(0, 10 * len(values[0]), 10))
    rows = tuple(tuple(map(float, row)) for row in values)
    curves = Curves(metric=metric, group="", hookpoint="", scale=scale, steps=steps, values=rows)
    names = tuple(f"run-{number}" for number in range(len(values)))
    return Pilots(
        reference=SCOPE.reference, probes=SCOPE.probes, schedule=SCOPE.schedule, recipe=SCOPE.recipe, names=names,
        fingerprints=names, num_centre=num_centre, left_out=(), curves={f"diffsensor/{metric}": curves},
    )  # fmt: skip


def run(name: str, readings: Sequence[Reading], **differently: Any) -> PilotRun:
    members: dict[str, Any] = {
        "reference": SCOPE.reference, "probes": SCOPE.probes, "schedule": SCOPE.schedule, "recipe": SCOPE.recipe,
    }  # fmt: skip
    return PilotRun(name=name, readings=tuple(readings), **{**members, **differently})


def healthy(draw: np.random.Generator, groups: Sequence[str] = ("",)) -> list[Reading]:
    """A drift that saturates, with a speed of its own and noise that hangs together; 0 at the first step."""
    speed = draw.normal()
    readings = []
    for group in groups:
        noise = np.cumsum(draw.normal(size=6)) / 3
        for number, step in enumerate(range(0, 60, 10)):
            value = 0.0 if step == 0 else math.exp(0.3 * speed - 2 / step + 0.2 * noise[number])
            readings.append(reading(value, step, group=group))
    return readings


def gathered(draw: np.random.Generator, number: int = 9, groups: Sequence[str] = ("",)) -> Pilots:
    return gather([run(f"run-{each}", healthy(draw, groups)) for each in range(number)])


def looks_of(readings: Sequence[Reading]) -> list[Findings]:
    steps = sorted({one.step for one in readings})
    return [look(step, *(one for one in readings if one.step == step)) for step in steps]


def ever_breaches(rule: Envelope, readings: Sequence[Reading]) -> bool:
    return any(signal.state == "breach" for each in looks_of(readings) for signal in rule.update(each).signals)


def only(rule: Envelope, findings: Findings) -> Signal:
    (signal,) = rule.update(findings).signals
    return signal


# The two pilots of the centre line have mean 2 and variance 2, so the scale is sqrt(2); the others deviate by 0, 2 and
# 1 over that, so the threshold is sqrt(2) and the limit 2 + sqrt(2) sqrt(2) = 4.
BY_HAND = pilots_by_hand([[1.0], [3.0], [2.0], [4.0], [3.0]])


def test_it_is_a_rule_and_a_criterion() -> None:
    rule = Envelope(BY_HAND, "nll_change")
    assert isinstance(rule, Rule)
    assert isinstance(rule, Criterion)
    assert rule.metrics == {"nll_change"}


@pytest.mark.parametrize(
    ("options", "outside", "inside", "level"),
    [
        ({}, 4.01, 3.99, 1 / 4),
        ({"level": 0.5}, 3.01, 2.99, 2 / 4),
        # Either way 0, 2 and 1 again; downwards 0, -2 and -1, so the pilot at the centre is the furthest down.
        ({"side": "both"}, -0.01, 0.01, 1 / 4),
        ({"side": "below"}, 1.99, 2.01, 1 / 4),
    ],
)
def test_the_threshold_is_the_one_solved_by_hand(
    options: dict[str, Any], outside: float, inside: float, level: float
) -> None:
    rule = Envelope(BY_HAND, "nll_change", **options)
    rule.check(SCOPE)
    assert rule.level == pytest.approx(level)
    for value, state, outcome in ((inside, "quiet", "pass"), (outside, "breach", "fail")):
        findings = look(0, reading(value, metric="nll_change", scale="linear"))
        assert rule.verdict(findings).outcome == outcome
        assert only(rule, findings).state == state


def test_on_a_log_scale_the_threshold_is_that_of_the_logarithms() -> None:
    values = [[math.exp(value) for value in row] for row in [[1.0], [3.0], [2.0], [4.0], [3.0]]]
    rule = Envelope(pilots_by_hand(values, scale="log"))
    signal = only(rule, look(0, reading(math.exp(4.01))))
    assert signal.state == "breach"
    assert signal.threshold == pytest.approx(math.exp(4.0))
    assert only(Envelope(pilots_by_hand(values, scale="log")), look(0, reading(math.exp(3.99)))).state == "quiet"


def test_the_scale_at_a_step_is_half_its_own_and_half_that_of_all_steps() -> None:
    # Variances of the centre line 2 and 8, overall 5: scales sqrt(3.5) and sqrt(6.5). The deviations of the other
    # pilots are at most 1/sqrt(3.5), and 1/sqrt(6.5) is less.
    rule = Envelope(pilots_by_hand([[1, 8], [3, 12], [3, 11], [2, 10], [2, 10]]), "nll_change")
    assert rule.threshold == pytest.approx(1 / math.sqrt(3.5))


def test_a_healthy_run_breaches_as_often_as_promised_and_no_more(rng: np.random.Generator) -> None:
    number = 800
    alarms = 0
    for _ in range(number):
        rule = Envelope(gathered(rng))
        assert rule.level == pytest.approx(1 / 6)
        alarms += ever_breaches(rule, healthy(rng))
    # Exactly 1/6 where no two scores are equal; four standard deviations of a share of 800.
    assert alarms / number == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / number))


def test_over_several_groups_the_level_holds_for_the_rule_as_a_whole(rng: np.random.Generator) -> None:
    number, groups = 300, ("a", "b")
    alarms = sum(
        ever_breaches(Envelope(gathered(rng, groups=groups), group="*"), healthy(rng, groups)) for _ in range(number)
    )
    assert alarms / number == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / number))


def test_pilots_that_set_both_line_and_threshold_would_promise_too_much(rng: np.random.Generator) -> None:
    """What must not be done, beside what is: five pilots for both, or five for the threshold and four for the line."""
    number = 1500
    in_sample = split_apart = 0
    for _ in range(number):
        rows = rng.normal(size=(10, 20))

        def largest(row: Any, line: Any) -> Any:
            own = line.var(0, ddof=1)
            return ((row - line.mean(0)) / np.sqrt((own + own.mean()) / 2)).max()

        threshold, line, live = rows[:5], rows[5:9], rows[9]
        in_sample += largest(live, threshold) > max(largest(row, threshold) for row in threshold)
        split_apart += largest(live, line) > max(largest(row, line) for row in threshold)
    assert in_sample / number > 1 / 6 + 0.2
    assert split_apart / number == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / number))


def test_the_numbers_are_those_of_a_second_implementation(rng: np.random.Generator) -> None:
    pilots = gathered(rng, 11)
    rows = np.log(np.array(pilots.curves["diffsensor/kl_ref_live"].values)[:, 1:])
    centre, rest = rows[: pilots.num_centre], rows[pilots.num_centre :]
    own = centre.var(0, ddof=1)
    scores = sorted(((rest - centre.mean(0)) / np.sqrt((own + own.mean()) / 2)).max(1), reverse=True)
    assert Envelope(pilots).threshold == pytest.approx(scores[0])
    assert Envelope(pilots, level=0.3).threshold == pytest.approx(scores[1])


def test_its_evidence_is_the_largest_deviation() -> None:
    rule = Envelope(BY_HAND, "nll_change")
    (evidence,) = rule.update(look(0, reading(5.0, metric="nll_change", scale="linear"))).evidence
    assert evidence.value == pytest.approx(3 / math.sqrt(2))
    assert evidence.key == "diffsensor/nll_change_deviation"
    assert rule.update(look(0)).evidence == ()


def test_a_breach_ends_when_the_deviation_is_well_within_again() -> None:
    rule = Envelope(BY_HAND, "nll_change")
    states = [
        only(rule, look(0, reading(value, metric="nll_change", scale="linear"))).state
        for value in (4.1, 3.9, 4.1, 3.81, 3.79, 3.9)
    ]
    assert states == ["breach", "breach", "breach", "breach", "quiet", "quiet"]


def test_a_step_that_the_pilots_did_not_read_is_unknown_and_says_so() -> None:
    rule = Envelope(BY_HAND, "nll_change")
    findings = look(30, reading(99.0, metric="nll_change", scale="linear"))
    signal = only(rule, findings)
    assert signal.state == "unknown"
    assert "at step 30, which not every pilot read" in signal.what
    assert rule.verdict(findings).outcome == "unknown"


@pytest.mark.parametrize("value", [math.nan, None])
def test_what_was_not_read_or_is_no_number_is_unknown_and_ends_no_breach(value: float | None) -> None:
    rule = Envelope(BY_HAND, "nll_change")
    rule.check(SCOPE)
    assert only(rule, look(0, reading(9.0, metric="nll_change", scale="linear"))).state == "breach"
    findings = look(0, *([] if value is None else [reading(value, metric="nll_change", scale="linear")]))
    assert only(rule, findings).state == "unknown"
    assert rule.verdict(findings).outcome == "unknown"
    # Not outside, but not well within either: still the same breach.
    assert only(rule, look(0, reading(3.9, metric="nll_change", scale="linear"))).state == "breach"


def test_where_the_pilots_read_0_a_0_is_quiet_and_more_is_unknown() -> None:
    values = [[0.0, math.exp(value)] for value in (1, 3, 2, 4, 3)]
    rule = Envelope(pilots_by_hand(values, scale="log"))
    assert only(rule, look(0, reading(0.0))).state == "quiet"
    assert only(rule, look(0, reading(0.1))).state == "unknown"
    assert only(rule, look(10, reading(0.0))).state == "quiet"
    assert only(rule, look(10, reading(math.inf))).state == "breach"


def test_the_sentence_says_what_moved_how_far_and_with_which_chance() -> None:
    rule = Envelope(BY_HAND, "nll_change")
    signal = only(rule, look(0, reading(5.0, metric="nll_change", scale="linear")))
    assert signal.what == (
        "nll_change is 5 nats/token, above 4 (pilots at step 0: 2; a healthy run is there at some step with "
        "probability at most 25 %)"
    )
    assert signal.threshold == pytest.approx(4.0)
    assert signal.advice.endswith(".")
    verdict = rule.verdict(look(0, reading(5.0, metric="nll_change", scale="linear")))
    assert (verdict.value, verdict.unit, verdict.subject) == (5.0, "nats/token", "diffsensor/nll_change")


def test_of_several_groups_the_worst_decides_the_verdict(rng: np.random.Generator) -> None:
    rule = Envelope(gathered(rng, groups=("a", "b")), group="*")
    rule.check(SCOPE)
    high, low = reading(50.0, group="b"), reading(0.01, group="a")
    verdict = rule.verdict(look(20, low, high))
    assert (verdict.outcome, verdict.subject) == ("fail", "diffsensor/kl_ref_live/group=b")
    assert rule.verdict(look(20, reading(1.0, group="a"))).outcome == "unknown"
    assert rule.verdict(look(20, low, high)).outcome == "fail"
    assert {signal.subject: signal.state for signal in rule.update(look(20, low, high)).signals} == {
        "diffsensor/kl_ref_live/group=a": "quiet",
        "diffsensor/kl_ref_live/group=b": "breach",
    }


def test_hookpoints_are_judged_together(rng: np.random.Generator) -> None:
    def read(draw: np.random.Generator) -> list[Reading]:
        return [
            reading(draw.normal(), step, metric="cka_distance", hookpoint=where, scale="linear")
            for step in (0, 10)
            for where in ("first", "last")
        ]

    pilots = gather([run(f"run-{each}", read(rng)) for each in range(9)])
    rule = Envelope(pilots, "cka_distance", hookpoint="*")
    rule.check(SCOPE)
    assert len(rule.update(looks_of(read(rng))[0]).signals) == 2
    one = Envelope(pilots, "cka_distance", hookpoint="last")
    assert one.threshold <= rule.threshold


@given(st.data())
def test_saved_and_loaded_at_any_look_it_says_what_it_would_have_said(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([1.0, 3.5, 3.9, 4.5, math.nan]), min_size=2, max_size=12))
    cut = data.draw(st.integers(0, len(values)))
    stream = [look(0, reading(value, metric="nll_change", scale="linear")) for value in values]
    whole = Envelope(BY_HAND, "nll_change")
    expected = [only(whole, each).state for each in stream]
    before, after = Envelope(BY_HAND, "nll_change"), Envelope(BY_HAND, "nll_change")
    states = [only(before, each).state for each in stream[:cut]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    states += [only(after, each).state for each in stream[cut:]]
    assert states == expected


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_another_unit_changes_nothing_on_a_log_scale(factor: float, seed: int) -> None:
    def judged(factor: float) -> list[str]:
        draw = np.random.default_rng(seed)
        scaled: Callable[[list[Reading]], list[Reading]] = lambda readings: [  # noqa: E731
            replace(one, value=one.value * factor) for one in readings
        ]
        pilots = gather([run(str(each), scaled(healthy(draw))) for each in range(5)])
        # The split is by a hash of the numbers, which are others now: the same one for both.
        order = sorted(range(5), key=lambda each: pilots.names[each])
        rows = pilots.curves["diffsensor/kl_ref_live"].values
        rule = Envelope(pilots_by_hand([rows[each] for each in order], scale="log"))
        return [only(rule, each).state for each in looks_of(scaled(healthy(draw)))]

    assert judged(factor) == judged(1.0)


def test_the_order_in_which_pilots_are_given_does_not_matter(rng: np.random.Generator) -> None:
    runs = [run(f"run-{each}", healthy(rng)) for each in range(9)]
    assert gather(runs) == gather(runs[::-1])


def test_only_steps_that_every_pilot_read_are_judged(rng: np.random.Generator) -> None:
    runs = [run(f"run-{each}", healthy(rng)) for each in range(5)]
    short = replace(runs[0], readings=runs[0].readings[:4])
    pilots = gather([short, *runs[1:]])
    assert pilots.steps == (0, 10, 20, 30)
    assert pilots.left_out == (40, 50)
    assert only(Envelope(pilots), look(40, reading(1.0))).state == "unknown"


@pytest.mark.parametrize(("number", "centre", "percent"), [(5, 2, 25), (9, 4, 17), (28, 9, 5), (148, 49, 1)])
def test_the_level_that_so_many_pilots_allow(number: int, centre: int, percent: int) -> None:
    assert split(number) == centre
    assert round(100 / (number - centre + 1)) == percent


def test_so_many_pilots_are_needed_for_a_level() -> None:
    assert (calibration_for(0.05), pilots_for(0.05)) == (19, 28)
    assert (calibration_for(0.01), pilots_for(0.01)) == (99, 148)
    for percent in range(1, 60):
        number = pilots_for(percent / 100)
        assert 1 / (number - split(number) + 1) <= percent / 100
        assert number == 5 or 1 / (number - split(number - 1)) > percent / 100


def test_a_file_gives_the_pilots_back_and_shows_a_flipped_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    pilots = gathered(rng, groups=("", "a", "b"))
    write_pilots(tmp_path / "pilots.json", pilots)
    back = read_pilots(tmp_path / "pilots.json")
    assert replace(back, recipe={}) == replace(pilots, recipe={})
    rule = Envelope(tmp_path / "pilots.json", group="*")
    rule.check(SCOPE)  # though the recipe's tuple is a list now
    assert rule.threshold == Envelope(pilots, group="*").threshold
    data = bytearray((tmp_path / "pilots.json").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "pilots.json").write_bytes(data)
    with pytest.raises(CorruptFileError, match="changed"):
        Envelope(tmp_path / "pilots.json")


@pytest.mark.parametrize(
    ("differently", "complaint"),
    [
        ({"recipe": {"learning_rate": 3e-4, "betas": (0.9, 0.95)}}, "recipe has learning_rate = 0.0003 here, 0.001"),
        ({"recipe": {"betas": [0.9, 0.95]}}, "recipe has learning_rate = nothing here, 0.001 there"),
        ({"probes": "q" * 64}, "probes is qqqqqqqqqqqq here, pppppppppppp there"),
        ({"reference": "q" * 64}, "reference is qqqqqqqqqqqq here"),
        ({"schedule": "every(5)"}, r"schedule is every\(5\) here, every\(10\) there"),
        ({"metrics": {}}, "No metric that is read here is named 'kl_ref_live'"),
    ],
)
def test_pilots_of_another_kind_are_refused_with_the_difference(
    differently: dict[str, Any], complaint: str, rng: np.random.Generator
) -> None:
    rule = Envelope(gathered(rng))
    rule.check(SCOPE)
    with pytest.raises(ConfigError, match=complaint):
        rule.check(replace(SCOPE, **differently))


def test_what_the_pilots_lack_is_refused(rng: np.random.Generator) -> None:
    pilots = gathered(rng, groups=("a",))
    with pytest.raises(
        ConfigError, match=r"the pilots did not read kl_ref_live\. They have diffsensor/kl_ref_live/group=a"
    ):
        Envelope(pilots)
    with pytest.raises(ConfigError, match="is to judge diffsensor/kl_ref_live/group=b, which the pilots did not read"):
        Envelope(pilots, group="*").check(SCOPE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"level": 0.05}, "level=0.05, which needs 19 pilots for the threshold, 28 in all. There are 5 of 9"),
        ({"level": 1.5}, "level=1.5. Give a share such as 0.05"),
        ({"side": "up"}, "No side is named 'up'"),
        ({"severity": "fatal"}, "No severity is named 'fatal'"),
        ({"cooldown": -1}, "cooldown=-1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_argument_that_means_nothing_is_refused(
    options: dict[str, Any], complaint: str, rng: np.random.Generator
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Envelope(gathered(rng), **options)


def test_runs_that_cannot_be_pilots_together_are_refused(rng: np.random.Generator) -> None:
    runs = [run(f"run-{each}", healthy(rng)) for each in range(5)]
    with pytest.raises(ConfigError, match=r"Pilots given: 4. At least 5 are needed .* and 28 for one of 5 %"):
        gather(runs[:4])
    for differently, complaint in (
        ({"schedule": "every(5)"}, r"run-5 is not a pilot of the same recipe as run-0: schedule is every\(5\) there"),
        ({"recipe": {"learning_rate": 2e-3}}, "recipe has learning_rate = 0.002 there, 0.001 in run-0"),
        ({"probes": "q" * 64}, "probes is q+ there"),
        ({"reference": "q" * 64}, "reference is q+ there"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            gather([*runs, run("run-5", healthy(rng), **differently)])
    with pytest.raises(ConfigError, match="run-5 and run-2 hold the same numbers: they are one run"):
        gather([*runs, replace(runs[2], name="run-5")])
    with pytest.raises(ConfigError, match="run-5 holds no readings"):
        gather([*runs, run("run-5", [])])
    with pytest.raises(ConfigError, match="no step that all 6 pilots read"):
        gather([*runs, run("run-5", [reading(1.0, 7)])])
    with pytest.raises(ConfigError, match=r"named 'kl_ref_liv'\. Did you mean 'kl_ref_live'"):
        gather(runs, ["kl_ref_liv"])


def test_pilots_that_say_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="could never be breached"):
        Envelope(pilots_by_hand([[1], [1], [2], [1], [1]]), "nll_change")
    with pytest.raises(ConfigError, match="at each step some pilot reads 0"):
        Envelope(pilots_by_hand([[0], [1], [2], [1], [1]], scale="log"))


def test_pilots_that_always_agree_allow_no_deviation_at_all() -> None:
    """The learning rate of a fixed schedule: the same in each pilot."""
    rule = Envelope(pilots_by_hand([[1, 2]] * 5), "nll_change")
    assert only(rule, look(0, reading(1.0, metric="nll_change", scale="linear"))).state == "quiet"
    assert only(rule, look(10, reading(2.1, metric="nll_change", scale="linear"))).state == "breach"


def test_a_file_that_is_not_there_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no pilots at .*diffsensor calibrate RECORD"):
        Envelope(tmp_path / "pilots.json")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
