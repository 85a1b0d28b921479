"""What follows from a look: when an alert is told, when it is withheld, what is asked of the run and when again."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
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
from diffsensor.protocols import Controller
from diffsensor.rules import Limit
from diffsensor.types import (
    ActionTaken,
    Alert,
    Fault,
    Findings,
    Judgement,
    MetricInfo,
    Reading,
    Scope,
    Signal,
    State,
    TokenShift,
    Verdict,
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


def shift() -> TokenShift:
    return TokenShift(
        step=0, ranked_by="mass_moved", prefers="live", rank=0, token_id=1, token="token", mass_moved=0.1,
        mass_moved_stderr=0.1, logit_difference=0.1, probe="0", position=0, context="context",
    )  # fmt: skip


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


def test_a_rule_that_returns_no_judgement_is_contained(unchecked: None) -> None:
    class Forgets(Scripted):
        def update(self, findings: Findings) -> Judgement:
            return None

    errors: list[str] = []
    assert alerts(oversight(Forgets(), errors=errors), 1) == []
    assert errors == ["rule 'scripted'"]


class Says(Scripted):
    """A rule that gives the same signals at each look."""

    def __init__(self, *signals: Signal) -> None:
        super().__init__()
        self.signals = signals

    def update(self, findings: Findings) -> Judgement:
        return Judgement(signals=self.signals)


def test_an_alert_has_the_reading_that_decided_and_the_step_at_which_the_breach_began() -> None:
    decided = replace(reading(5, value=0.4), stderr=0.02)
    rule = Says(
        Signal(subject="read", state="breach", what="kl is 0.4", since=0, reading=decided, threshold=0.3),
        Signal(subject="bare", state="breach"),
    )
    told, bare = oversight(rule).judge(findings(5)).alerts
    assert (told.value, told.stderr, told.threshold, told.unit) == (0.4, 0.02, 0.3, "nats/token")
    assert (told.first_step, told.message) == (0, "kl is 0.4, since step 0.")
    assert (bare.first_step, bare.message) == (5, "bare breaks the rule 'scripted', since step 5.")
    assert math.isnan(bare.value)


def test_what_was_withheld_is_counted_from_the_last_alert_on() -> None:
    rule = Scripted(*["breach", "quiet"] * 6, cooldown=2)
    told = alerts(oversight(rule), 12)
    assert [(alert.step, alert.suppressed) for alert in told] == [(0, 0), (40, 1), (80, 1)]


def test_a_rule_without_a_response_that_cannot_tell_is_a_warning_and_says_what_could_not() -> None:
    rule = Says(Signal(subject="a", state="unknown", what=""), Signal(subject="b", state="unknown", what="no b"))
    (told,) = alerts(oversight(rule), 3)
    assert told.severity == "warning"
    assert "cannot be judged (no b), since step 0" in told.message


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


class Notes:
    """An action that notes the alert it is told."""

    name, needs, at_most = "notes", None, None

    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    def __call__(self, alert: Alert, controller: Controller) -> str:
        self.alerts.append(alert)
        return "noted"


def test_an_action_is_told_the_alert_it_answers_also_in_a_run_that_goes_on() -> None:
    notes = Notes()
    watching = oversight(Response(Scripted("breach", "breach"), notes, Log(), patience=1))
    (told,), _ = look(watching, step=3)
    assert notes.alerts == [told]
    second = Notes()
    again = oversight(Response(Scripted("breach", "breach"), Log(), second, patience=1))
    first = oversight(Response(Scripted("breach", "breach"), Log(), Notes(), patience=1))
    look(first, step=3)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    look(again, step=4)
    assert repr(second.alerts) == repr([replace(told, step=4)])


def test_a_breach_that_was_on_record_before_is_acted_on_again() -> None:
    """The run went on from an older checkpoint, in which nothing of it was done."""
    watching, run = oversight(Response(Scripted("breach"), Stop())), Run()
    watching.judge(findings(5), told={("scripted", "it", 5)})
    watching.act(run, lambda taken: None)
    assert run.asked == ["stop"]


def test_without_a_controller_an_action_is_refused() -> None:
    taken = look(oversight(Response(Scripted("breach"), Stop())))[1]
    assert [(each.outcome, each.detail) for each in taken] == [("refused", "There is no controller.")]


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


def test_a_stop_because_one_subject_cannot_be_judged_is_alerted_and_says_since_when() -> None:
    reasons: list[str] = []

    class Told(Run):
        def stop(self, reason: str) -> str:
            reasons.append(reason)
            return "stops"

    looks: list[dict[str, State]] = [{"a": "quiet", "b": state} for state in ("quiet", "unknown", "unknown")]
    watching, run = oversight(Response(Scripted(*looks), Stop())), Told()
    told = [alert for step in range(3) for alert in look(watching, run, step=step)[0]]
    assert [(alert.step, alert.subject, alert.severity, alert.first_step) for alert in told] == [
        (2, "unjudged", "critical", 1)
    ]
    (reason,) = reasons
    assert "cannot be judged (b is off), since step 1" in reason


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


def test_what_was_read_with_a_fault_or_is_rolled_back_is_not_kept() -> None:
    run = Run()
    watching = oversight(Response(Scripted("quiet"), Rollback()))
    watching.judge(replace(findings(0), faults=(Fault(kind="frozen", subject="w", detail="w has moved"),)))
    watching.act(run, lambda taken: None)
    assert run.asked == []
    run = Run()
    gate = Gate(Limit("kl_ref_live", above=0.2))  # it passes, and the rule does not
    watching = oversight(Response(Scripted("breach"), Rollback(), ScaleLearningRate(0.5)), gate=gate)
    look(watching, run)
    assert run.asked == ["rollback", ("scale", 0.5)]


def test_a_copy_that_cannot_be_kept_is_contained() -> None:
    errors: list[str] = []
    watching = oversight(Response(Scripted("quiet", "quiet"), Rollback()), errors=errors)
    look(watching, Run(fail=["keep"]))
    assert errors == ["keeping a copy to roll back to"]
    assert not watching.has_to_act


def test_with_a_gate_that_fails_nothing_passes() -> None:
    class Fails(Scripted):
        def verdict(self, findings: Findings) -> Verdict:
            raise ZeroDivisionError

    errors: list[str] = []
    run, gate = Run(), Gate(Fails())
    watching = oversight(Response(Scripted("quiet"), Rollback()), gate=gate, errors=errors)
    look(watching, run)
    assert run.asked == []
    assert watching.verdict(gate, findings(3)).outcome == "unknown"
    assert errors == ["gate"] * 2


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


def test_a_move_of_the_coefficient_that_is_refused_or_fails_is_told() -> None:
    failed = ["action set_kl_coefficient(1.5)"]
    for how, outcome, contained in (("refuse", "refused", []), ("fail", "failed", failed)):
        errors: list[str] = []
        watching = oversight(budget=DriftBudget(0.2), errors=errors)
        taken = look(watching, Run(**{how: ["set"]}), value=0.4)[1]
        assert [each.outcome for each in taken] == [outcome]
        assert errors == contained


class Steers:
    """A budget that looks at everything, and fails where it is told to."""

    metrics, coefficient = frozenset[str](), 1.0

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.seen = error, list[str]()

    def check(self, scope: Scope) -> None: ...

    def update(self, findings: Findings) -> float | None:
        if self.error is not None:
            raise self.error
        self.seen += [reading.metric for reading in findings.readings]
        return None

    def evidence(self, step: int) -> Reading:
        return reading(step, "coefficient")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def test_a_budget_that_fails_leaves_the_coefficient_as_it_is() -> None:
    errors: list[str] = []
    run = Run()
    told, taken = look(oversight(Scripted("breach"), budget=Steers(ZeroDivisionError()), errors=errors), run)
    assert (len(told), taken, run.asked, errors) == (1, [], [], ["drift budget"])


def test_a_budget_that_looks_at_everything_is_not_shown_what_is_sealed() -> None:
    secret = MetricInfo(name="secret", unit="", low=0, high=1, direction="", estimator="", sealed=True)
    watching = oversight(budget=Steers())
    watching.refuse_sealed({"secret": secret, "kl_ref_live": KL}, bank_is_sealed=False)
    watching.judge(Findings(step=0, readings=(reading(0), reading(0, "secret"))))
    assert watching.budget.seen == ["kl_ref_live"]


def test_a_gate_and_a_budget_may_serve_several_monitors() -> None:
    gate, budget = Gate(Limit("kl_ref_live", above=0.2)), DriftBudget(0.2)
    watching = oversight(gate=gate, budget=budget)
    assert watching.gate is not gate
    look(watching, Run(), value=0.4)
    assert budget.coefficient == DriftBudget(0.2).coefficient


def test_an_action_is_not_copied_as_it_may_be_bound_to_anything() -> None:
    notes = Notes()
    look(oversight(Response(Scripted("breach"), notes)))
    assert len(notes.alerts) == 1


def test_weights_that_do_not_train_are_looked_at_where_a_rule_or_a_gate_would_notice() -> None:
    assert oversight(Scripted()).looks_at_faults
    assert oversight(gate=Gate(Limit("kl_ref_live", above=0.2))).looks_at_faults
    assert not oversight(budget=DriftBudget(0.2)).looks_at_faults


def test_the_same_rule_may_serve_several_monitors() -> None:
    rule = Response(Scripted("quiet", "breach"), Stop())
    for _ in range(2):
        run, watching = Run(), oversight(rule)
        assert [alert.step for alert in (look(watching, run, step=0)[0] + look(watching, run, step=1)[0])] == [1]
        assert run.asked == ["stop"]


def test_a_coefficient_that_takes_the_place_of_another_one_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for before, told in ((0.1, 1), (1.0, 0)):
        run, watching = Run(), oversight(budget=DriftBudget(0.2, start=1.0))
        run.coefficient = before
        caplog.clear()
        watching.begin(run)
        assert (
            len([record for record in caplog.records if "begins with another one: did set" in record.getMessage()])
            == told
        )


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
    with pytest.raises(ConfigError, match="kl_ref_liv"):
        oversight(budget=DriftBudget(0.2, metric="kl_ref_liv")).check(scope(), Run())


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
            seen[-1] += [*findings.tensors, *(shift.token for shift in findings.token_shifts)]
            return Judgement(evidence=(reading(findings.step, f"{self.name}_evidence"),))

        def verdict(self, findings: Findings) -> Verdict:
            self.update(findings)
            return Verdict(step=findings.step, outcome="pass", reason="By hand.")

    secret = MetricInfo(name="secret", unit="", low=0, high=1, direction="", estimator="", sealed=True)
    gate = Gate(Looks(name="gate"))
    watching = oversight(Looks(name="alone"), Response(Looks(name="acts"), Log()), gate=gate)
    watching.refuse_sealed({"secret": secret}, bank_is_sealed=False)
    found = Findings(
        step=0,
        readings=(reading(0), reading(0, "secret")),
        by_probe={"secret": torch.zeros(1)},
        tensors={"vector": torch.zeros(1)},
        token_shifts=(shift(),),
    )
    watching.judge(found)
    assert seen == [
        ["kl_ref_live", "secret", "secret", "vector", "token"],
        ["kl_ref_live"],
        ["kl_ref_live", "acts_evidence"],
    ]
    assert watching.sealed_evidence == {"alone_evidence"}
    watching.verdict(gate, found)
    assert seen[3] == ["kl_ref_live"]


def test_what_is_sealed_does_not_decide_what_is_kept_for_a_rollback() -> None:
    secret = MetricInfo(name="secret", unit="", low=0, high=1, direction="", estimator="", sealed=True)
    asked = []
    for state in ("quiet", "breach"):
        run, watcher = Run(), Scripted(state, name="watches", metrics=["secret"])
        watching = oversight(Response(Scripted("quiet", metrics=["kl_ref_live"]), Rollback()), watcher)
        watching.refuse_sealed({"secret": secret, "kl_ref_live": KL}, bank_is_sealed=False)
        look(watching, run)
        asked.append(run.asked)
    assert asked == [[("keep", 0)]] * 2


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
    assert [alert.rule for alert in look(second, step=10)[0]] == ["new"]  # of the other one it was told before
    third = oversight(Scripted(*["breach"] * 2, name="both"))
    third.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [(alert.rule, alert.is_repeat) for alert in look(third, step=0)[0]] == [("both", True)]


def test_a_budget_goes_on_where_it_was_and_begins_anew_where_there_was_none() -> None:
    values = [0.4, 0.4, 0.3, 0.1, 0.1]

    def coefficients(watching: Oversight, values: list[float]) -> list[float]:
        return [watching.judge(findings(step, value)).readings[-1].value for step, value in enumerate(values)]

    whole = coefficients(oversight(budget=DriftBudget(0.2)), values)
    first, second = oversight(budget=DriftBudget(0.2)), oversight(budget=DriftBudget(0.2))
    coefficients(first, values[:2])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert coefficients(second, values[2:]) == whole[2:]
    fresh = oversight(budget=DriftBudget(0.2))
    fresh.load_state_dict(oversight().state_dict())
    assert coefficients(fresh, values) == whole


def test_a_move_of_the_coefficient_that_was_told_is_not_made_again() -> None:
    watching, run, saved = oversight(budget=DriftBudget(0.2)), Run(), list[dict[str, Any]]()
    watching.judge(findings(0, value=0.4))
    watching.act(run, lambda taken: saved.append(json.loads(json.dumps(watching.state_dict()))))
    again, later = oversight(budget=DriftBudget(0.2)), Run()
    again.load_state_dict(saved[0])
    again.act(later, lambda taken: None)
    assert (run.asked, later.asked) == ([("set", 1.5)], [])


def test_a_coefficient_that_an_action_set_outlasts_that_of_the_budget_when_a_run_goes_on() -> None:
    first, run = oversight(Response(Scripted("breach"), SetKLCoefficient(7)), budget=DriftBudget(0.2)), Run()
    first.begin(run)
    first.judge(Findings(step=0))  # nothing read, so the budget leaves it
    first.act(run, lambda taken: None)
    second, later = oversight(Response(Scripted("breach"), SetKLCoefficient(7)), budget=DriftBudget(0.2)), Run()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.begin(later)
    assert later.coefficient == 7


def test_what_is_to_be_done_is_done_though_another_response_is_new_or_gone() -> None:
    first = oversight(Response(Scripted("breach"), Stop()), Response(Scripted("breach", name="gone"), Log()))
    first.judge(findings(0))
    second = oversight(Response(Scripted("breach"), Stop()), Response(Scripted(name="new"), SaveCheckpoint()))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run = Run()
    second.act(run, lambda taken: None)
    assert run.asked == ["stop"]


def test_a_list_of_what_is_left_to_do_loses_what_is_gone() -> None:
    def make(*names: str) -> Oversight:
        return oversight(*(Response(Scripted("breach", name=name), SaveCheckpoint(), Log()) for name in names))

    saved: list[dict[str, Any]] = []

    class Saves(Run):
        def save_checkpoint(self, reason: str) -> str:
            saved.append(json.loads(json.dumps(watching.state_dict())))
            return super().save_checkpoint(reason)

    watching = make("one", "two")
    look(watching, Saves())
    again, later, taken = make("one"), Run(), list[ActionTaken]()
    again.load_state_dict(saved[0])
    again.act(later, taken.append)
    assert [(each.rule, each.action) for each in taken] == [("one", "log(warning)")]


def test_a_state_stays_as_it_was_taken_and_may_be_gone_on_with_twice() -> None:
    def make() -> Oversight:
        return oversight(Response(Scripted("breach"), ScaleLearningRate(0.5), Stop()))

    first = make()
    first.judge(findings(0))
    state = first.state_dict()
    for watching in (first, make(), make()):
        if watching is not first:
            watching.load_state_dict(state)
        run = Run()
        watching.act(run, lambda taken: None)
        assert run.asked == [("scale", 0.5), "stop"]


def test_what_a_step_told_stands_when_it_is_read_again() -> None:
    """On record the second look takes the place of the first, so it has to tell what that one told."""
    rules = Scripted("breach", "breach"), Scripted("quiet", "breach", name="other")
    for is_resumed in (True, False):
        watching = oversight(*rules)
        look(watching, step=5)
        if is_resumed:
            state = json.loads(json.dumps(watching.state_dict()))
            watching = oversight(*rules)
            watching.load_state_dict(state)
        told = look(watching, step=5)[0]
        assert [(alert.rule, alert.step, alert.is_repeat) for alert in told] == [
            ("scripted", 5, True),
            ("other", 5, False),
        ]
    watching = oversight(Scripted("breach", "quiet", "breach"))
    assert [len(look(watching, step=5)[0]) for _ in range(3)] == [1, 1, 1]
