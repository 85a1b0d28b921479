import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffsensor.errors import ConfigError
from diffsensor.metrics import ACTIVATION_METRICS, OUTPUT_METRICS
from diffsensor.protocols import Criterion, Rule
from diffsensor.rules.limit import Limit
from diffsensor.types import WORST_GROUP, Findings, Judgement, MetricInfo, Reading, Scope

METRICS: dict[str, MetricInfo] = {name: metric.info for name, metric in OUTPUT_METRICS.items()}
METRICS |= {name: metric.info for name, metric in ACTIVATION_METRICS.items()}
SCOPE = Scope(metrics=METRICS, groups={"code": 8, "prose": 8}, hookpoints=("h.0", "h.1"), progress=("loss",))
KL = Reading(
    step=0, sensor="outputs", metric="kl_ref_live", value=0.0, stderr=math.nan, num_probes=32, unit="nats/token",
    scale="log",
)  # fmt: skip


def kl(value: float, stderr: float = math.nan, **changes: Any) -> Reading:
    return replace(KL, value=value, stderr=stderr, **changes)


def looks(values: Iterable[float], **changes: Any) -> list[Findings]:
    return [Findings(step=step, readings=(kl(float(value), **changes),)) for step, value in enumerate(values)]


def states(rule: Limit, findings: Iterable[Findings]) -> list[str]:
    return [rule.update(look).signals[0].state for look in findings]


def last(rule: Limit, findings: Iterable[Findings]) -> Any:
    return [rule.update(look) for look in findings][-1].signals[0]


def num_breaches(said: Sequence[str]) -> int:
    """Edges from quiet to breach; what could not be told changes nothing."""
    told = ["quiet", *(state for state in said if state != "unknown")]
    return sum(before == "quiet" and now == "breach" for before, now in pairwise(told))


def noise(length: int, autocorrelation: float, seed: int) -> Any:
    """Gaussian noise of variance 1."""
    fresh = np.random.default_rng(seed).standard_normal(length)
    for step in range(1, length):
        fresh[step] = autocorrelation * fresh[step - 1] + math.sqrt(1 - autocorrelation**2) * fresh[step]
    return fresh


def test_a_limit_is_a_rule_and_a_criterion() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    assert isinstance(rule, Rule)
    assert isinstance(rule, Criterion)
    assert rule.metrics == {"kl_ref_live"}
    assert rule.may_stop


def test_a_breach_begins_at_the_second_look_beyond_and_ends_once_the_value_is_back_past_clear() -> None:
    values = [0.1, 0.31, 0.29, 0.31, 0.32, 0.32, 0.28, 0.28, 0.31, 0.1, 0.1, 0.1]
    expected = ["quiet"] * 4 + ["breach"] * 6 + ["quiet"] * 2
    assert states(Limit("kl_ref_live", above=0.3), looks(values)) == expected


def test_a_limit_from_below_is_the_same_with_the_sign_turned() -> None:
    values = [0.1, 0.31, 0.29, 0.31, 0.32, 0.32, 0.28, 0.28, 0.31, 0.1, 0.1, 0.1]
    above = states(Limit("entropy_change", above=0.3), looks(values, metric="entropy_change", scale="linear"))
    turned = looks([-value for value in values], metric="entropy_change", scale="linear")
    assert states(Limit("entropy_change", below=-0.3), turned) == above


def test_a_breach_is_told_since_its_first_look_beyond_the_limit() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    signals = [rule.update(look).signals[0] for look in looks([0.4, 0.1, 0.4, 0.4, 0.29, 0.4])]
    assert [signal.since for signal in signals] == [-1, -1, -1, 2, 2, 2]


def test_one_look_is_enough_where_it_is_asked_for() -> None:
    assert states(Limit("kl_ref_live", above=0.3, for_=1), looks([0.31])) == ["breach"]


def test_the_bound_over_probes_is_judged_and_not_the_value() -> None:
    t = stats.t.ppf(0.95, 31)
    for scale in ("linear", "log"):
        value = float(0.3 + t * 0.02) if scale == "linear" else 0.3 * math.exp(t * 0.02 / 0.34)
        stderr = 0.02 if scale == "linear" else value * 0.02 / 0.34
        just_below = looks([value * (1 - 1e-6)] * 3, stderr=stderr, scale=scale)
        just_above = looks([value * (1 + 1e-6)] * 3, stderr=stderr, scale=scale)
        rule = Limit("kl_ref_live", above=0.3)
        assert states(rule, just_below) == ["quiet"] * 3
        assert states(rule, just_above) == ["quiet", "breach", "breach"]


def test_a_higher_confidence_asks_for_more() -> None:
    seen = looks([0.34] * 2, stderr=0.02, scale="linear")
    assert states(Limit("kl_ref_live", above=0.3), seen)[-1] == "breach"
    assert states(Limit("kl_ref_live", above=0.3, confidence=0.99), seen)[-1] == "quiet"


def test_what_the_bound_of_a_reading_leaves_open_counts_on_the_upper_side_only() -> None:
    seen = looks([0.29] * 2, bound=0.1)
    assert states(Limit("kl_ref_live", above=0.3), seen)[-1] == "quiet"
    low = looks([-0.35] * 2, bound=0.1, metric="nll_change", scale="linear")
    assert states(Limit("nll_change", below=-0.3), low)[-1] == "quiet"
    assert states(Limit("nll_change", below=-0.2), low)[-1] == "breach"


def test_a_reading_below_three_noise_floors_is_no_breach() -> None:
    rule = Limit("kl_ref_live", above=1e-7)
    assert states(rule, looks([2e-7] * 3, noise_floor=1e-7)) == ["quiet"] * 3
    assert states(rule, looks([4e-7] * 3, noise_floor=1e-7))[-1] == "breach"
    assert rule.verdict(looks([2e-7], noise_floor=1e-7)[0]).outcome == "unknown"


def test_a_look_without_the_subject_neither_counts_nor_resets() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    rule.check(SCOPE)
    empty = Findings(step=1)
    seen = [*looks([0.4]), empty, *looks([math.nan]), *looks([0.4]), empty, *looks([0.4])]
    assert states(rule, seen) == ["quiet", "unknown", "unknown", "breach", "unknown", "breach"]


def test_an_infinite_reading_is_beyond_a_limit_on_its_side_and_unknown_on_the_other() -> None:
    assert states(Limit("kl_ref_live", above=0.3), looks([math.inf] * 2)) == ["quiet", "breach"]
    assert states(Limit("nll_change", below=-0.3), looks([math.inf] * 2, metric="nll_change")) == ["unknown"] * 2
    assert Limit("kl_ref_live", above=0.3).verdict(looks([math.inf])[0]).outcome == "fail"
    verdict = Limit("nll_change", below=-0.3).verdict(looks([math.inf], metric="nll_change")[0])
    assert verdict.outcome == "unknown"


def test_each_group_is_a_subject_of_its_own() -> None:
    rule = Limit("kl_ref_live", above=0.3, group="*")
    rule.check(SCOPE)
    look = Findings(
        step=0, readings=(kl(0.5), kl(0.4, group="code"), kl(0.1, group="prose"), kl(0.4, group=WORST_GROUP))
    )
    rule.update(look)
    judged = {signal.subject: signal.state for signal in rule.update(look).signals}
    assert judged == {"diffsensor/kl_ref_live/group=code": "breach", "diffsensor/kl_ref_live/group=prose": "quiet"}
    missing = rule.update(Findings(step=1, readings=(kl(0.4, group="code"),)))
    assert [signal.state for signal in missing.signals] == ["breach", "unknown"]


def test_each_hookpoint_is_a_subject_of_its_own() -> None:
    rule = Limit("relative_l2", above=0.3, hookpoint="*")
    rule.check(SCOPE)
    look = Findings(step=0, readings=tuple(kl(0.4, metric="relative_l2", hookpoint=at) for at in ("h.0", "h.1")))
    assert [signal.subject for signal in rule.update(look).signals] == [
        "diffsensor/relative_l2/at=h.0",
        "diffsensor/relative_l2/at=h.1",
    ]


def test_a_signal_says_what_moved_how_far_against_which_limit_and_what_to_do() -> None:
    rule = Limit("kl_ref_live", above=0.3, group="*")
    signal = last(rule, looks([0.34] * 2, stderr=0.02, group="code"))
    assert signal.what == (
        "kl_ref_live of group 'code' is 0.34 nats/token (at least 0.308 with 95 % confidence), above the limit 0.3"
    )
    assert signal.threshold == 0.3
    assert signal.reading == kl(0.34, 0.02, group="code")
    assert signal.advice.startswith("Look at the token table")


def test_a_clause_says_how_things_stand_in_each_state() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    assert last(rule, looks([0.4])).what.endswith("above the limit 0.3 for 1 of 2 looks")
    assert last(rule, looks([0.2])).what.endswith("is 0.2 nats/token, within the limit 0.3")
    assert last(rule, looks([0.4, 0.4, 0.28])).what.endswith(
        "after it was above the limit 0.3, and not back at 0.27 for long enough"
    )
    close = last(Limit("kl_ref_live", above=0.3), looks([0.32], stderr=0.02))
    assert close.what.endswith("not shown to be above the limit 0.3")
    assert last(Limit("kl_ref_live", above=0.3), looks([0.3004])).what.startswith("kl_ref_live is 0.3004 ")
    assert last(Limit("kl_ref_live", above=0.3), looks([math.nan])).what.startswith("kl_ref_live is nan")


def test_advice_is_that_for_the_kind_of_metric() -> None:
    hooked = last(Limit("relative_l2", above=0.3, hookpoint="*"), looks([1] * 2, metric="relative_l2", hookpoint="h.0"))
    assert "hookpoints" in hooked.advice
    told = last(Limit("loss", above=3), looks([4] * 2, metric="loss", sensor="progress", unit="as given", num_probes=0))
    assert "batches" in told.advice
    assert told.what == "loss is 4, above the limit 3"


def test_names_are_readable_and_differ_with_the_arguments() -> None:
    rules = [
        Limit("kl_ref_live", above=0.3),
        Limit("kl_ref_live", above=0.3, group="*"),
        Limit("kl_ref_live", above=0.3, group="worst"),
        Limit("kl_ref_live", above=0.3, group="code"),
        Limit("kl_ref_live", above=0.5),
        Limit("kl_ref_live", above=0.3, for_=3),
        Limit("kl_ref_live", above=0.3, clear=0.1),
        Limit("kl_ref_live", above=0.3, confidence=0.9),
        Limit("kl_ref_live", above=0.3, severity="critical"),
        Limit("kl_ref_live", above=0.3, cooldown=3),
        Limit("entropy_change", below=-0.3),
        Limit("relative_l2", above=0.3, hookpoint="*"),
        Limit("relative_l2", above=0.3, hookpoint="h.0"),
        Limit("kl_ref_live", above=0.3000001),
    ]
    assert rules[1].name == "kl_ref_live in each group above 0.3"
    assert len({rule.name for rule in rules}) == len(rules)


def test_clear_is_a_tenth_of_the_limit_on_its_good_side() -> None:
    for arguments, still, back in (
        ({"above": 0.3}, 0.28, 0.269),
        ({"above": -2.0}, -2.1, -2.21),
        ({"below": -0.3}, -0.28, -0.269),
        ({"below": 2.0}, 2.1, 2.21),
        ({"above": 0.0}, 0.01, 0.0),
    ):
        sign = 1 if "above" in arguments else -1
        (limit,) = arguments.values()
        beyond = [limit + sign] * 12  # so that no jump is usual
        rule = Limit("loss", **arguments)
        assert states(rule, looks([*beyond, still, still], metric="loss"))[-1] == "breach"
        assert states(rule, looks([back, back], metric="loss")) == ["breach", "quiet"]


def test_a_breach_that_is_truly_over_ends_at_once_and_the_next_one_is_found() -> None:
    values = 0.02 * noise(60, 0.0, 1) + np.where(np.arange(60) % 20 < 10, 0.6, 0.1)
    assert num_breaches(states(Limit("kl_ref_live", above=0.3), looks(values))) == 3


def test_between_the_noise_and_the_limit_a_breach_ends_after_ten_looks() -> None:
    zigzag = [0.4, 0.32] * 5
    inside = [0.26, 0.24] * 6
    said = states(Limit("kl_ref_live", above=0.3), looks(zigzag + inside))
    assert said[1:] == ["breach"] * 18 + ["quiet"] * 3


@pytest.mark.parametrize("autocorrelation", [0.0, 0.5])
@pytest.mark.parametrize("spread", [0.01, 0.05, 0.1, 0.2])
def test_hovering_at_the_limit_gives_few_alerts(autocorrelation: float, spread: float) -> None:
    alerts, plain = [], []
    for seed in range(4):
        values = 0.3 * (1 + spread * noise(500, autocorrelation, seed))
        alerts.append(num_breaches(states(Limit("kl_ref_live", above=0.3), looks(values))))
        plain.append(num_breaches(["breach" if value > 0.3 else "quiet" for value in values]))
    assert np.mean(alerts) <= 2.5
    assert np.mean(plain) > 60


@pytest.mark.parametrize("stderr", [math.nan, 0.003])
def test_a_real_breach_is_found_one_look_after_a_plain_threshold(stderr: float) -> None:
    for size in (1.1, 1.5, 3.0):
        values = np.where(np.arange(60) < 30, 0.2, 0.3 * size) * (1 + 0.01 * noise(60, 0.0, 3))
        said = states(Limit("kl_ref_live", above=0.3), looks(values, stderr=stderr))
        assert said.index("breach") == int((values > 0.3).argmax()) + 1


def shown(judgement: Judgement) -> list[Any]:
    return [repr(signal) for signal in judgement.signals]  # in which a NaN equals itself


def test_saved_and_loaded_after_any_look_it_goes_on_as_if_nothing_had_happened() -> None:
    values = 0.3 * (1 + 0.1 * noise(80, 0.5, 5))
    values[[10, 40]] = math.nan
    seen = looks(values, stderr=0.01)
    seen[20] = Findings(step=20)
    whole = Limit("kl_ref_live", above=0.3)
    uninterrupted = [shown(whole.update(look)) for look in seen]
    assert "breach" in str(uninterrupted)
    for cut in range(len(seen)):
        first, second = Limit("kl_ref_live", above=0.3), Limit("kl_ref_live", above=0.3)
        begun = [shown(first.update(look)) for look in seen[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [shown(second.update(look)) for look in seen[cut:]] == uninterrupted


def test_the_state_holds_finite_numbers_whatever_was_read() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    states(rule, looks([0.1, math.inf, math.nan, 0.2, -math.inf, 0.3]))
    json.dumps(rule.state_dict(), allow_nan=False)


def test_a_loaded_state_is_not_changed_by_going_on() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    states(rule, looks([0.4, 0.5]))
    state = rule.state_dict()
    kept = json.dumps(state)
    rule.load_state_dict(state)
    states(rule, looks([0.1, 0.2, 0.3]))
    assert json.dumps(state) == kept


@given(
    st.lists(st.tuples(st.just(0.0) | st.floats(1e-3, 2.0), st.just(0.0) | st.floats(1e-3, 0.5)), max_size=30),
    st.integers(-30, 30),
    st.floats(0.01, 2.0),
    st.sampled_from(["linear", "log"]),
    st.sampled_from(["above", "below"]),
)
def test_states_do_not_depend_on_the_unit(
    seen: list[tuple[float, float]], power: int, limit: float, scale: str, side: str
) -> None:
    factor = 2.0**power  # such a factor rounds nothing

    def said(factor: float) -> tuple[list[str], list[str]]:
        rule = Limit("kl_ref_live", **{side: limit * factor})
        each = [kl(value * factor, stderr * factor, scale=scale) for value, stderr in seen]
        findings = [Findings(step=step, readings=(reading,)) for step, reading in enumerate(each)]
        return states(rule, findings), [rule.verdict(look).outcome for look in findings]

    assert said(factor) == said(1.0)


@given(st.permutations(["code", "prose", "maths", "chat"]), st.lists(st.floats(0.0, 1.0), min_size=8, max_size=8))
def test_states_do_not_depend_on_the_order_of_readings(order: list[str], values: list[float]) -> None:
    def said(groups: Sequence[str]) -> dict[str, str]:
        rule = Limit("kl_ref_live", above=0.3, group="*")
        for step in range(2):
            of = dict(zip(["code", "prose", "maths", "chat"], values[4 * step :], strict=False))
            judged = rule.update(Findings(step=step, readings=tuple(kl(of[name], group=name) for name in groups)))
        return {signal.subject: signal.state for signal in judged.signals}

    assert said(order) == said(["code", "prose", "maths", "chat"])


def test_a_verdict_fails_passes_or_cannot_tell() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    failed, passed, open_ = (rule.verdict(looks([value], stderr=0.02)[0]) for value in (0.4, 0.2, 0.28))
    assert (failed.outcome, passed.outcome, open_.outcome) == ("fail", "pass", "unknown")
    assert failed.reason == "kl_ref_live is 0.4 nats/token (at least 0.367 with 95 % confidence), above the limit 0.3."
    assert passed.reason == "kl_ref_live is 0.2 nats/token (at most 0.237 with 95 % confidence), within the limit 0.3."
    assert open_.reason == (
        "kl_ref_live is 0.28 nats/token with 95 % bounds 0.248 and 0.316, which does not tell whether it is above 0.3; "
        "more probes would narrow them."
    )
    assert (failed.rule, failed.subject, failed.value, failed.stderr, failed.threshold, failed.unit) == (
        rule.name, "diffsensor/kl_ref_live", 0.4, 0.02, 0.3, "nats/token",
    )  # fmt: skip


def test_a_verdict_does_not_ask_what_came_before() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    states(rule, looks([0.4] * 5))
    assert rule.verdict(looks([0.2])[0]).outcome == "pass"
    assert Limit("kl_ref_live", above=0.3).verdict(looks([0.4])[0]).outcome == "fail"


def test_a_verdict_without_a_reading_is_unknown() -> None:
    rule = Limit("kl_ref_live", above=0.3, group="*")
    assert rule.verdict(Findings(step=3)).outcome == "unknown"
    rule.check(SCOPE)
    verdict = rule.verdict(Findings(step=3, readings=(kl(0.1, 0.001, group="code"),)))
    assert (verdict.outcome, verdict.reason) == ("unknown", "diffsensor/kl_ref_live/group=prose was not read.")


def test_a_verdict_on_a_nan_is_unknown() -> None:
    assert Limit("kl_ref_live", above=0.3).verdict(looks([math.nan])[0]).outcome == "unknown"


def test_without_a_standard_error_the_value_and_what_it_leaves_open_decide() -> None:
    rule = Limit("kl_ref_live", above=0.3)
    assert rule.verdict(looks([0.29])[0]).outcome == "pass"
    assert rule.verdict(looks([0.31])[0]).outcome == "fail"
    verdict = rule.verdict(looks([0.29], bound=0.1)[0])
    assert verdict.outcome == "unknown"
    assert "may be up to 0.39" in verdict.reason


def test_the_worst_subject_decides_the_verdict() -> None:
    rule = Limit("kl_ref_live", above=0.3, group="*")

    def verdict(**values: float) -> tuple[str, str]:
        readings = tuple(kl(value, 0.01, group=name) for name, value in values.items())
        found = rule.verdict(Findings(step=0, readings=readings))
        return found.outcome, found.subject.rpartition("=")[2]

    assert verdict(code=0.1, prose=0.2) == ("pass", "prose")
    assert verdict(code=0.1, prose=0.3) == ("unknown", "prose")
    assert verdict(code=0.4, prose=0.3) == ("fail", "code")
    assert verdict(code=0.4, prose=0.5) == ("fail", "prose")
    assert verdict(code=0.4, prose=math.nan) == ("fail", "code")
    assert verdict(code=math.nan, prose=0.3) == verdict(prose=0.3, code=math.nan) == ("unknown", "prose")


def test_a_group_no_probe_of_which_counts_does_not_hold_up_a_verdict() -> None:
    rule = Limit("kl_ref_live", above=0.3, group="*")
    rule.check(SCOPE)
    readings = (kl(0.1, 0.01, group="code"), kl(math.nan, group="prose", num_probes=0))
    assert rule.verdict(Findings(step=0, readings=readings)).outcome == "pass"
    signals = rule.update(Findings(step=0, readings=readings)).signals
    assert [(signal.subject, signal.state) for signal in signals] == [("diffsensor/kl_ref_live/group=code", "quiet")]


@given(st.floats(-1.0, 1.0), st.floats(0.0, 0.5), st.floats(0.0, 0.2), st.sampled_from([-1, 1]))
def test_a_verdict_is_that_of_two_one_sided_tests(value: float, stderr: float, bound: float, sign: int) -> None:
    """Against scipy's t quantile."""
    reading = kl(value, stderr, bound=bound, scale="linear", num_probes=9, metric="nll_change")
    rule = Limit("nll_change", above=0.3) if sign > 0 else Limit("nll_change", below=-0.3)
    half = float(stats.t.ppf(0.95, 8)) * stderr
    low, high = value - half, value + half + bound
    near, far = (low, high) if sign > 0 else (-high, -low)
    if min(abs(near - 0.3), abs(far - 0.3)) > 1e-9:
        expected = "fail" if near > 0.3 else "pass" if far < 0.3 else "unknown"
        assert rule.verdict(Findings(step=0, readings=(reading,))).outcome == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "above=None, below=None"),
        ({"above": 0.3, "below": 0.1}, "Give one of the two"),
        ({"above": math.nan}, "finite number"),
        ({"above": math.inf}, "finite number"),
        ({"above": "0.3"}, "finite number"),
        ({"above": 0.3, "for_": 0}, "at least 1"),
        ({"above": 0.3, "for_": 1.5}, "whole number"),
        ({"above": 0.3, "cooldown": -1}, "at least 0"),
        ({"above": 0.3, "severity": "warn"}, "'warning'"),
        ({"above": 0.3, "confidence": 0.5}, "above 0.5"),
        ({"above": 0.3, "confidence": 95}, "such as 0.95"),
        ({"above": 0.3, "clear": 0.4}, "such as 0.27"),
        ({"below": -0.3, "clear": -0.4}, "such as -0.27"),
        ({"above": 0.3, "clear": math.nan}, "finite number"),
        ({"above": 0.3, "group": None}, "Give a text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_means_nothing_is_refused_when_the_limit_is_built(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Limit("kl_ref_live", **arguments)


@pytest.mark.parametrize(
    ("metric", "arguments", "words"),
    [
        ("kl_ref_liv", {"above": 0.3}, "Did you mean 'kl_ref_live'"),
        ("kl_ref_live", {"above": 0.3, "group": "cod"}, "Did you mean 'code'"),
        ("relative_l2", {"above": 0.3, "hookpoint": "h.2"}, "Did you mean 'h"),
        ("relative_l2", {"above": 0.3}, "needs a hookpoint"),
        ("top1_flip", {"above": 30}, r"between 0 and 1 .* Did you mean above=0\.3\?"),
        ("top1_flip", {"above": 1.0}, "between 0 and 1"),
        ("js", {"above": 0.8}, r"Give a limit between 0 and 0\.693"),
        ("kl_ref_live", {"below": 0.3}, r"unchanged model.* Did you mean above=0\.3\?"),
        ("kl_ref_live", {"above": -0.3}, r"Did you mean above=0\.3\?"),
        ("kl_ref_live", {"below": -0.3}, r"Did you mean above=0\.3\?"),
        ("kl_ref_live", {"below": 0}, "between 0 and inf"),
        ("entropy_change", {"above": -0.3}, r"Did you mean below=-0\.3\?"),
        ("entropy_change", {"below": 0.3}, r"Did you mean above=0\.3\?"),
        ("kl_ref_live", {"above": 0.3, "clear": -0.1}, r"no breach would ever end\. Give one between 0 and 0\.3"),
        ("entropy_change", {"above": 0.3, "group": "worst"}, r"group='\*'"),
        ("nll_change", {"below": -0.3, "group": "worst"}, r"group='\*'"),
    ],
)
def test_a_limit_that_makes_no_sense_here_is_refused(metric: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Limit(metric, **arguments).check(SCOPE)


@pytest.mark.parametrize(
    ("metric", "arguments"),
    [
        ("kl_ref_live", {"above": 0.3, "group": "worst"}),
        ("kl_ref_live", {"above": 0.0}),
        ("entropy_change", {"below": -0.3, "group": "*"}),
        ("nll_change", {"above": 0.3, "group": "worst"}),
        ("relative_l2", {"above": 0.3, "group": "*", "hookpoint": "*"}),
        ("loss", {"below": 0.3}),
        ("loss", {"above": -30}),
    ],
)
def test_a_limit_that_makes_sense_is_taken(metric: str, arguments: dict[str, Any]) -> None:
    Limit(metric, **arguments).check(SCOPE)
