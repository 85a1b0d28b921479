import json
import math
from dataclasses import replace
from typing import Any, get_args

import pytest

from diffsensor.errors import ConfigError
from diffsensor.protocols import Criterion, Rule
from diffsensor.rules.invariant import Invariant
from diffsensor.types import WORST_GROUP, Fault, Findings, Reading, Scope

KINDS: tuple[Any, ...] = get_args(Fault.__annotations__["kind"])
KL = Reading(step=0, sensor="outputs", metric="kl_ref_live", value=0.1, unit="nats/token", num_probes=8)
LOSS = Reading(step=0, sensor="progress", metric="loss", value=2.0, unit="as given")


def states(rule: Invariant, *readings: Reading, faults: tuple[Fault, ...] = ()) -> dict[str, str]:
    judgement = rule.update(Findings(step=0, readings=readings, faults=faults))
    return {signal.subject: signal.state for signal in judgement.signals}


def test_it_is_a_rule_and_a_criterion_and_looks_at_everything() -> None:
    rule = Invariant()
    assert isinstance(rule, Rule)
    assert isinstance(rule, Criterion)
    assert rule.metrics == frozenset()
    assert rule.may_stop
    rule.check(Scope(metrics={}, groups={}))


def test_every_kind_of_fault_is_a_subject_and_quiet_without_a_fault() -> None:
    assert states(Invariant(), KL, LOSS) == dict.fromkeys(KINDS, "quiet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_a_breach_at_once_and_of_its_kind_only(kind: Any) -> None:
    rule = Invariant()
    fault = Fault(kind=kind, subject="embed.weight", detail="embed.weight moved by 0.1")
    judged = rule.update(Findings(step=0, readings=(KL,), faults=(fault,)))
    breached = {signal.subject: signal for signal in judged.signals if signal.state == "breach"}
    assert list(breached) == [kind]
    assert breached[kind].what == "embed.weight moved by 0.1"
    assert breached[kind].advice.endswith(".")
    assert states(rule, KL) == dict.fromkeys(KINDS, "quiet")


def test_many_faults_are_counted() -> None:
    faults = tuple(Fault(kind="frozen", subject=f"w{number}", detail=f"w{number} moved") for number in range(7))
    (signal,) = (one for one in Invariant().update(Findings(step=0, faults=faults)).signals if one.state == "breach")
    assert signal.what == "w0 moved; w1 moved; w2 moved; and 4 more"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_not_finite_is_found_by_the_rule_itself(value: float) -> None:
    for reading in (KL, LOSS):
        broken = replace(reading, value=value)
        (signal, *others) = Invariant().update(Findings(step=0, readings=(broken,))).signals
        assert (signal.subject, signal.state) == ("nonfinite", "breach")
        assert signal.reading is broken
        assert signal.what == f"diffsensor/{reading.metric} reads {value}"
        assert {other.state for other in others} == {"quiet"}


def test_a_nan_where_no_probe_counts_is_no_fault() -> None:
    assert states(Invariant(), replace(KL, value=math.nan, num_probes=0, group="empty"))["nonfinite"] == "quiet"
    assert states(Invariant(), replace(KL, stderr=math.nan))["nonfinite"] == "quiet"


def test_the_worst_group_is_not_told_twice() -> None:
    group = replace(KL, value=math.nan, group="code")
    signal = Invariant().update(Findings(step=0, readings=(group, replace(group, group=WORST_GROUP)))).signals[0]
    assert signal.what.count("reads nan") == 1


def test_what_is_allowed_is_not_judged() -> None:
    rule = Invariant(allow=["sensor", "nonfinite"])
    fault = Fault(kind="sensor", subject="outputs", detail="failed")
    assert states(rule, replace(KL, value=math.nan), faults=(fault,)) == dict.fromkeys(
        ("frozen", "fingerprint", "replicas"), "quiet"
    )
    assert rule.verdict(Findings(step=0, readings=(KL,), faults=(fault,))).outcome == "pass"


def test_a_verdict_fails_on_any_fault_and_cannot_tell_without_a_sensor() -> None:
    rule = Invariant()
    sensor = Fault(kind="sensor", subject="outputs", detail="failed")
    frozen = Fault(kind="frozen", subject="embed", detail="moved")

    def verdict(*faults: Fault, readings: tuple[Reading, ...] = (KL,)) -> tuple[str, str]:
        found = rule.verdict(Findings(step=4, readings=readings, faults=faults))
        assert found.reason.endswith(".")
        return found.outcome, found.subject

    assert verdict() == ("pass", "")
    assert verdict(sensor) == ("unknown", "sensor")
    assert verdict(sensor, frozen) == ("fail", "frozen")
    assert verdict(readings=(replace(KL, value=math.nan),)) == ("fail", "nonfinite")
    assert verdict(readings=()) == ("unknown", "")
    assert verdict(readings=(LOSS,)) == ("unknown", "")


def test_it_has_nothing_to_remember() -> None:
    rule = Invariant()
    states(rule, replace(KL, value=math.nan))
    state = json.loads(json.dumps(rule.state_dict()))
    other = Invariant()
    other.load_state_dict(state)
    assert states(other, KL) == states(rule, KL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"allow": ["frosen"]}, "Did you mean 'frozen'"),
        ({"allow": "frozen"}, r"allow=\['frozen'\]"),
        ({"allow": KINDS}, "judges nothing"),
        ({"severity": "criticl"}, "Did you mean 'critical'"),
        ({"cooldown": -1}, "at least 0"),
        ({"name": 3}, "Give a text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_means_nothing_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Invariant(**arguments)
