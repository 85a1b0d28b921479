"""What follows from a look: when an alert is told, when it is withheld, what is asked of the run and when again."""

import json
import logging
import math
from typing import Any

import pytest
import torch

from diffsensor import DriftBudget
from diffsensor.actions import (
    Log,
    Response,
    Rollback,
    SaveCheckpoint,
    ScaleLearningRate,
    SetKLCoefficient,
    Stop,
)
from diffsensor.errors import ConfigError
from diffsensor.gate import Gate
from diffsensor.oversight import Oversight
from diffsensor.rules import Limit
from diffsensor.types import (
    ActionTaken,
    Alert,
    Findings,
    Judgement,
    MetricInfo,
    Scope,
    State,
)
from tiny_rules import Run, Scripted, reading

KL = MetricInfo(name="kl_ref_live", unit="nats/token", low=0, high=math.inf, direction="", estimator="", scale="log")


def findings(step: int, value: float = 0.1) -> Findings:
    return Findings(step=step, readings=(reading(step, value=value),))


def scope(**changes: object) -> Scope:
    return Scope(**({"metrics": {"kl_ref_live": KL}, "groups": {}} | changes))


def oversight(*rules: object, errors: list[str] | None = None, **parts: object) -> Oversight:
    def contain(name: str, error: Exception) -> None:
        assert errors is not None, error
        errors.append(name)

    return Oversight(rules, contain=contain, **parts)


def look(
    watching: Oversight, run: Run | None = None, *, step: int = 0, value: float = 0.1
) -> tuple[list[Alert], list[ActionTaken]]:
    found = watching.judge(findings(step, value))
    taken: list[ActionTaken] = []
    watching.act(run, taken.append)
    return list(found.alerts), taken


def alerts(watching: Oversight, num: int) -> list[Alert]:
    return [alert for step in range(num) for alert in look(watching, step=10 * step)[0]]


# Alerts


def test_a_breach_is_told_once_and_again_when_it_begins_again() -> None:
    watching = oversight(Scripted("quiet", "breach", "breach", "quiet", "breach", "breach"))
    told = alerts(watching, 6)
    assert [(alert.step, alert.first_step, alert.suppressed) for alert in told] == [(10, 10, 0), (40, 40, 0)]
    assert told[0].message == "it is off, since step 10. Look at it."
    assert (told[0].rule, told[0].severity, told[0].subject) == ("scripted", "warning", "it")


def test_each_subject_is_told_of_by_itself() -> None:
    watching = oversight(Scripted({"a": "breach", "b": "quiet"}, {"a": "breach", "b": "breach"}))
    assert [(alert.step, alert.subject) for alert in alerts(watching, 2)] == [(0, "a"), (10, "b")]


def test_within_the_cooldown_alerts_are_counted_and_a_lasting_breach_is_told_after_it() -> None:
    rule = Scripted(*["breach", "quiet"] * 3, *["breach"] * 4, cooldown=7)
    told = alerts(oversight(rule), 10)
    # Looks 2, 4 and 6 begin breaches that are withheld; the last one still lasts when the cool-down is over.
    assert [(alert.step, alert.first_step, alert.suppressed) for alert in told] == [(0, 0, 0), (80, 60, 3)]
    assert "3 earlier alerts on this were withheld." in told[1].message


def test_a_look_that_cannot_tell_neither_ends_a_breach_nor_begins_one() -> None:
    watching = oversight(Scripted("breach", "unknown", "breach", "quiet", "unknown", "quiet"))
    assert [alert.step for alert in alerts(watching, 6)] == [0]


def test_a_rule_that_cannot_tell_twice_in_a_row_is_told_of_once() -> None:
    told = alerts(oversight(Scripted("quiet", "unknown", "unknown", "unknown", "quiet", "unknown", "unknown")), 7)
    assert [(alert.step, alert.subject, alert.first_step) for alert in told] == [
        (20, "unjudged", 10),
        (60, "unjudged", 50),
    ]
    assert "'scripted' cannot be judged (it is off), since step 10" in told[0].message


def test_a_rule_that_can_tell_of_some_subjects_is_judged() -> None:
    assert not alerts(oversight(Scripted(*[{"small": "unknown", "large": "quiet"}] * 4)), 4)


def test_a_rule_that_raises_is_contained_and_told_of() -> None:
    errors: list[str] = []
    rules = Scripted(ZeroDivisionError("1"), ZeroDivisionError("2")), Scripted("quiet", "breach", name="other")
    told = alerts(oversight(*rules, errors=errors), 2)
    assert errors == ["rule 'scripted'"] * 2
    assert [(alert.rule, alert.subject) for alert in told] == [("scripted", "unjudged"), ("other", "it")]


def test_evidence_becomes_readings() -> None:
    found = oversight(Scripted("quiet")).judge(findings(5))
    assert [each.metric for each in found.readings] == ["kl_ref_live", "evidence"]


def test_an_alert_that_was_on_record_before_is_marked() -> None:
    watching = oversight(Scripted({"a": "breach", "b": "breach"}))
    found = watching.judge(findings(5), told={("scripted", "a", 5), ("scripted", "b", 6)})
    assert [alert.is_repeat for alert in found.alerts] == [True, False]


# Actions


def test_actions_come_at_the_alert_in_order_and_are_told_with_what_became_of_them() -> None:
    run = Run(refuse=["scale"])
    watching = oversight(Response(Scripted("quiet", "breach", "breach"), Log(), ScaleLearningRate(0.5), Stop()))
    assert look(watching, run, step=0)[1] == []
    taken = look(watching, run, step=7)[1]
    assert [(each.step, each.rule, each.action, each.outcome) for each in taken] == [
        (7, "scripted", "log(warning)", "done"),
        (7, "scripted", "scale_learning_rate(0.5)", "refused"),
        (7, "scripted", "stop", "done"),
    ]
    assert taken[1].detail == "No scale now."
    assert run.asked == ["stop"]


def test_an_action_that_fails_is_contained_and_the_next_one_comes_all_the_same() -> None:
    errors: list[str] = []
    run = Run(fail=["scale"])
    watching = oversight(Response(Scripted("breach"), ScaleLearningRate(0.5), Stop()), errors=errors)
    taken = look(watching, run)[1]
    assert [each.outcome for each in taken] == ["failed", "done"]
    assert taken[0].detail == "ZeroDivisionError: scale"
    assert (errors, run.asked) == (["action scale_learning_rate(0.5)"], ["stop"])


def test_a_stop_rule_that_cannot_be_judged_twice_in_a_row_stops_the_run() -> None:
    run = Run()
    watching = oversight(Response(Scripted("quiet", "unknown", "unknown"), Stop()))
    for step in range(3):
        told, taken = look(watching, run, step=step)
    assert run.asked == ["stop"]
    assert [(alert.severity, alert.subject) for alert in told] == [("critical", "unjudged")]
    assert [each.action for each in taken] == ["stop"]


def test_a_stop_is_asked_for_again_while_the_breach_lasts_also_in_a_run_that_was_started_again() -> None:
    def make() -> Oversight:
        return oversight(Response(Scripted(*["breach"] * 3, "quiet", "breach", "breach"), Log(), Stop(), patience=1))

    first, run = make(), Run()
    for step in range(2):
        look(first, run, step=step)
    assert run.asked == ["stop"]
    second, later = make(), Run()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    asked = [len(look(second, later, step=step)[1]) for step in range(2, 6)]
    assert later.asked == ["stop", "stop"]  # at step 2, and at the top of the ladder that begins anew at step 4
    assert asked == [1, 0, 1, 1]


def test_an_action_is_told_the_numbers_of_its_own_step() -> None:
    reasons: list[str] = []

    class Told(Run):
        def stop(self, reason: str) -> str:
            reasons.append(reason)
            return "stops"

    limit = Limit("kl_ref_live", above=0.2, for_=1)
    watching, run = oversight(Response(limit, Log(), Stop(), patience=2)), Told()
    for step, value in enumerate((0.3, 0.4, 0.5)):
        look(watching, run, step=10 * step, value=value)
    (reason,) = reasons
    assert "step 20" in reason
    assert "is 0.5 nats/token" in reason
    assert "since step 0" in reason


def test_what_was_done_to_the_run_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    look(oversight(Response(Scripted("breach"), Log(), ScaleLearningRate(0.5))), Run(), step=7)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "diffsensor.oversight"]
    assert line == "step 7, scale_learning_rate(0.5), as 'scripted' asks for: did scale"


def test_what_was_asked_for_is_not_asked_for_again_and_what_was_not_is() -> None:
    """The state is taken between the look and its actions, as it is when a run is killed there; and after them."""
    for is_killed_before in (True, False):
        first, run = oversight(Response(Scripted("breach", "breach"), ScaleLearningRate(0.5))), Run()
        first.judge(findings(0))
        if not is_killed_before:
            first.act(run, lambda taken: None)
        state = json.loads(json.dumps(first.state_dict()))
        second, later = oversight(Response(Scripted("breach", "breach"), ScaleLearningRate(0.5))), Run()
        second.load_state_dict(state)
        assert second.has_to_act == is_killed_before
        second.act(later, lambda taken: None)
        second.act(later, lambda taken: None)
        assert run.asked + later.asked == [("scale", 0.5)]


def test_a_checkpoint_that_an_action_saves_is_gone_on_with_after_that_action() -> None:
    def make() -> Oversight:
        return oversight(Response(Scripted("breach"), ScaleLearningRate(0.5), SaveCheckpoint(), SetKLCoefficient(0.5)))

    saved: list[dict[str, Any]] = []

    class Saves(Run):
        def save_checkpoint(self, reason: str) -> str:
            saved.append(json.loads(json.dumps(watching.state_dict())))
            return super().save_checkpoint(reason)

    watching, run, later = make(), Saves(), Run()
    look(watching, run)
    assert run.asked == [("scale", 0.5), "save_checkpoint", ("set", 0.5)]
    again = make()
    again.load_state_dict(saved[0])
    again.act(later, lambda taken: None)
    assert later.asked == [("set", 0.5)]


def test_what_passed_is_kept_for_a_rollback_and_nothing_else() -> None:
    run = Run()
    watching = oversight(Response(Scripted("quiet", "breach", "unknown", "quiet"), Rollback()))
    for step in range(4):
        look(watching, run, step=step)
    assert run.asked == [("keep", 0), "rollback", ("keep", 3)]
    run = Run()
    watching = oversight(Response(Scripted("quiet", "quiet"), Log()))
    look(watching, run)
    assert run.asked == []


def test_a_rule_that_only_warns_and_cannot_tell_does_not_keep_a_copy_from_being_kept() -> None:
    for may_stop, kept in ((False, [("keep", 0)]), (True, [])):
        run, rule = Run(), Scripted("unknown", name="warns", may_stop=may_stop)
        look(oversight(rule, Response(Scripted("quiet"), Rollback())), run)
        assert run.asked == kept


def test_with_a_gate_only_what_it_passes_is_kept() -> None:
    run = Run()
    gate = Gate(Limit("kl_ref_live", above=0.2))
    watching = oversight(Response(Scripted("quiet", "quiet"), Rollback()), gate=gate)
    look(watching, run, step=0, value=0.3)
    look(watching, run, step=1, value=0.1)
    assert run.asked == [("keep", 1)]


def test_the_coefficient_that_was_set_is_set_again_when_a_run_goes_on() -> None:
    first, run = oversight(Response(Scripted("breach"), SetKLCoefficient(0.25))), Run()
    look(first, run)
    second, later = oversight(Response(Scripted("breach"), SetKLCoefficient(0.25))), Run()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.begin(later)
    assert later.coefficient == 0.25
    fresh, untouched = oversight(Response(Scripted("breach"), SetKLCoefficient(0.25))), Run()
    fresh.begin(untouched)
    assert untouched.asked == []


def test_a_budget_moves_the_coefficient_and_each_move_is_told() -> None:
    budget, run = DriftBudget(0.2), Run()
    watching = oversight(budget=budget)
    watching.begin(run)
    begun = run.coefficient
    found = watching.judge(findings(0, value=0.4))
    taken: list[ActionTaken] = []
    watching.act(run, taken.append)
    assert run.coefficient > begun == DriftBudget(0.2).coefficient
    assert [(each.rule, each.outcome) for each in taken] == [("drift budget", "done")]
    assert found.readings[-1].value == run.coefficient
    again, later = oversight(budget=DriftBudget(0.2)), Run()
    again.load_state_dict(json.loads(json.dumps(watching.state_dict())))
    again.begin(later)
    assert later.coefficient == run.coefficient


def test_the_same_rule_may_serve_several_monitors() -> None:
    rule = Response(Scripted("quiet", "breach"), Stop())
    for _ in range(2):
        run, watching = Run(), oversight(rule)
        assert [alert.step for alert in (look(watching, run, step=0)[0] + look(watching, run, step=1)[0])] == [1]
        assert run.asked == ["stop"]


# What is refused


def test_two_rules_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Two rules are named 'scripted'.*name='scripted 2'"):
        oversight(Scripted(), Response(Scripted(), Log()))


def test_what_is_no_rule_gate_or_budget_is_refused(unchecked: None) -> None:
    for parts, sentence in (
        ({"budget": 0.3}, r"budget=0.3 was given, expected a budget, such as DriftBudget\(0.3\)"),
        ({"gate": Limit("kl", above=1)}, r"gate=.* was given, expected a gate: Gate\(Limit"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            oversight(**parts)
    with pytest.raises(ConfigError, match=r"rules holds 0.3, expected rules and responses"):
        oversight(0.3)
    with pytest.raises(ConfigError, match=r"rules holds .*Limit'>, expected rules"):
        oversight(Limit)


def test_what_the_run_cannot_do_is_refused_at_attach() -> None:
    watching = oversight(Response(Scripted(name="mine"), Stop()))
    with pytest.raises(
        ConfigError, match=r"response to 'mine' asks for stop, which this run cannot do. It has no stop"
    ):
        watching.check(scope(), Run(unable=["stop"]))
    with pytest.raises(ConfigError, match=r"asks for stop, and nothing here can carry it out.*LoopController"):
        watching.check(scope(), None)
    watching.check(scope(), Run())
    oversight(Response(Scripted(), Log())).check(scope(), None)
    with pytest.raises(ConfigError, match=r"drift budget moves.*has no set_kl_coefficient"):
        oversight(budget=DriftBudget(0.2)).check(scope(), Run(unable=["set_kl_coefficient"]))
    with pytest.raises(ConfigError, match=r"A drift budget was given, and nothing here"):
        oversight(budget=DriftBudget(0.2)).check(scope(), None)


def test_every_rule_and_criterion_is_checked_against_what_will_be_read() -> None:
    watching = oversight(Scripted(), Response(Scripted(name="inner"), Log()))
    watching.check(scope(), None)
    assert [rule.checked for rule in watching.rules] == [[scope()]] * 2
    with pytest.raises(ConfigError, match="kl_ref_liv"):
        oversight(gate=Gate(Limit("kl_ref_liv", above=1))).check(scope(), None)


@pytest.mark.parametrize("bank_is_sealed", [True, False])
def test_what_is_sealed_may_alert_but_never_drive_anything(bank_is_sealed: bool) -> None:
    sealed = MetricInfo(name="kl", unit="", low=0, high=1, direction="", estimator="", sealed=not bank_is_sealed)
    rule = Scripted(metrics=["kl"])
    oversight(rule).refuse_sealed({"kl": sealed}, bank_is_sealed=bank_is_sealed)
    for parts, who in (
        ({"rules": [Response(rule, Log())]}, "The response to 'scripted'"),
        ({"gate": Gate(Limit("kl", above=0.1))}, "The gate"),
        ({"budget": DriftBudget(0.2, metric="kl")}, "The drift budget"),
    ):
        watching = oversight(*parts.pop("rules", []), **parts)
        with pytest.raises(ConfigError, match=f"{who} would act on.*sealed.*training target"):
            watching.refuse_sealed({"kl": sealed}, bank_is_sealed=bank_is_sealed)


def test_what_looks_at_everything_and_may_act_is_not_shown_what_is_sealed() -> None:
    seen: list[list[str]] = []

    class Looks(Scripted):
        def update(self, findings: Findings) -> Judgement:
            seen.append([reading.metric for reading in findings.readings] + list(findings.by_probe))
            return Judgement()

    secret = MetricInfo(name="secret", unit="", low=0, high=1, direction="", estimator="", sealed=True)
    watching = oversight(Looks(name="alone"), Response(Looks(name="acts"), Log()), gate=Gate(Limit("kl", above=1)))
    watching.refuse_sealed({"secret": secret}, bank_is_sealed=False)
    watching.judge(Findings(step=0, readings=(reading(0), reading(0, "secret")), by_probe={"secret": torch.zeros(1)}))
    assert seen == [["kl_ref_live", "secret", "secret"], ["kl_ref_live"]]


def test_evidence_of_what_is_sealed_is_sealed_too() -> None:
    secret = MetricInfo(name="secret", unit="", low=0, high=1, direction="", estimator="", sealed=True)
    for metrics, expected in ((["secret"], {"evidence"}), ([], {"evidence"}), (["kl_ref_live"], set())):
        watching = oversight(Scripted("quiet", metrics=metrics))
        watching.refuse_sealed({"secret": secret, "kl_ref_live": KL}, bank_is_sealed=False)
        watching.judge(findings(0))
        assert watching.sealed_evidence == expected


# A run that goes on


def test_a_run_that_goes_on_at_any_look_alerts_and_acts_as_the_uninterrupted_one() -> None:
    looks: list[State] = ["quiet", "breach", "breach", "quiet", "unknown", "unknown", "breach", "quiet", "breach"] * 3

    def make() -> Oversight:
        rule = Scripted(*looks, cooldown=4)
        return oversight(Response(rule, Log(), ScaleLearningRate(0.5), Rollback(), Stop(), patience=1, cooldown=2))

    def stream(stop_at: int | None) -> tuple[list[Alert], list[ActionTaken], list[object]]:
        watching, run = make(), Run()
        told: list[Alert] = []
        done: list[ActionTaken] = []
        for step in range(len(looks)):
            if step == stop_at:
                state = json.loads(json.dumps(watching.state_dict()))
                watching = make()
                watching.load_state_dict(state)
            new, taken = look(watching, run, step=step)
            told += new
            done += taken
        return told, done, run.asked

    expected = stream(None)
    assert len(expected[0]) > 3
    assert {each.action for each in expected[1]} == {"log(warning)", "scale_learning_rate(0.5)", "rollback", "stop"}
    for stop_at in range(len(looks)):
        assert repr(stream(stop_at)) == repr(expected)


def test_a_rule_that_is_new_or_gone_is_named_when_a_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    first = oversight(Scripted("breach", name="old"), Scripted("breach", name="both"))
    alerts(first, 1)
    second = oversight(Scripted(*["breach"] * 2, name="both"), Scripted("breach", name="new"))
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert "did not have the rules new: they begin now" in caplog.text
    assert "had the rules old, which are not given any more" in caplog.text
    assert [alert.rule for alert in alerts(second, 1)] == ["new"]  # of the other one it was told before
