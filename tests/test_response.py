"""Which actions a response asks for, when; how it fails closed, goes on after a resume, and what it refuses."""

import copy
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from diffsensor.actions import (
    Log,
    Pause,
    Response,
    Rollback,
    SaveCheckpoint,
    ScaleKLCoefficient,
    ScaleLearningRate,
    SetKLCoefficient,
    Stop,
    state_of,
)
from diffsensor.errors import ConfigError
from diffsensor.protocols import Rule
from diffsensor.types import Findings, Judgement, Scope, Severity, Signal, State


class Told:
    """A rule of which only its name and what it may do matter here."""

    severity: Severity = "warning"
    cooldown = 0

    def __init__(self, may_stop: bool = True, metrics: frozenset[str] = frozenset({"kl"})) -> None:
        self.name = "told"
        self.may_stop = may_stop
        self.metrics = metrics

    def check(self, scope: Scope) -> None: ...

    def update(self, findings: Findings) -> Judgement:
        return Judgement()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


STATES: dict[str, State] = {".": "quiet", "x": "breach", "!": "breach", "?": "unknown"}
HALVE = ScaleLearningRate(0.5)


def asked(response: Response, looks: str, first: int = 0) -> list[str]:
    """What is asked for at each look: . quiet, x breach, ! breach with an alert, ? unknown. One letter per action."""
    return [
        "".join(action.name[:2] for action in response.due(10 * number, STATES[look], look == "!"))
        for number, look in enumerate(looks, first)
    ]


def test_without_patience_all_actions_come_at_each_alert() -> None:
    response = Response(Told(), SaveCheckpoint(), HALVE)
    assert asked(response, ".!xx.!?!") == ["", "sasc", "", "", "", "sasc", "", "sasc"]


def test_a_ladder_climbs_while_the_breach_lasts_and_ends_on_its_last_rung() -> None:
    response = Response(Told(), Log(), HALVE, Stop(), patience=3)
    assert asked(response, ".!xxxxxxxxx") == ["", "lo", "", "", "sc", "", "", "st", "st", "st", "st"]


def test_a_ladder_begins_anew_after_a_quiet_look() -> None:
    response = Response(Told(), Log(), Stop(), patience=3)
    assert asked(response, "!xx.!xxx") == ["lo", "", "", "", "lo", "", "", "st"]


def test_a_ladder_with_a_cooldown_begins_anew_after_so_many_quiet_looks_only() -> None:
    response = Response(Told(), Log(), HALVE, Stop(), patience=2, cooldown=3)
    # Two quiet looks are too few: it goes on from where it was. Three are enough.
    assert asked(response, "!..xx..x...!xx") == ["lo", "", "", "", "sc", "", "", "", "", "", "", "lo", "", ""]
    assert asked(Response(Told(), Log(), Stop(), patience=2, cooldown=3), "!..xx") == ["lo", "", "", "", "st"]


def test_a_ladder_does_not_take_a_look_that_could_not_tell_for_quiet() -> None:
    response = Response(Told(), Log(), HALVE, patience=3)
    assert asked(response, "!??x") == ["lo", "", "", "sc"]


def test_a_ladder_begins_without_its_alert_where_that_is_withheld() -> None:
    response = Response(Told(), Log(), HALVE, patience=3)
    assert asked(response, "xxxxxxx") == ["", "", "", "lo", "", "", "sc"]


def test_after_it_has_acted_it_does_not_act_again_within_its_cooldown() -> None:
    response = Response(Told(), SaveCheckpoint(), cooldown=3)
    assert asked(response, "!.!.!.") == ["sa", "", "", "", "sa", ""]


def test_an_alert_within_the_cooldown_is_answered_afterwards_if_the_breach_lasts() -> None:
    assert asked(Response(Told(), SaveCheckpoint(), cooldown=3), "!.!xxx") == ["sa", "", "", "", "sa", ""]
    assert asked(Response(Told(), SaveCheckpoint(), cooldown=3), "!.!...") == ["sa", "", "", "", "", ""]
    assert asked(Response(Told(), SaveCheckpoint(), cooldown=3), "!.!??x") == ["sa", "", "", "", "", "sa"]


def test_an_action_comes_at_most_so_often_and_then_the_ladder_skips_it() -> None:
    assert asked(Response(Told(), Rollback(at_most=2), SaveCheckpoint()), "!.!.!") == ["rosa", "", "rosa", "", "sa"]
    ladder = Response(Told(), Rollback(at_most=1), Stop(), patience=2)
    assert asked(ladder, "!.!.") == ["ro", "", "st", ""]


def test_asked_twice_about_one_step_each_action_comes_once() -> None:
    for patience in (None, 2):
        once, twice = (Response(Told(), Log(), HALVE, patience=patience) for _ in range(2))
        for step, look in enumerate(".!xx??x.!xx"):
            first = once.due(step, STATES[look], look == "!")
            assert twice.due(step, STATES[look], look == "!") == first
            assert twice.due(step, STATES[look], look == "!") == []
            assert once.state_dict() == twice.state_dict()


def test_a_step_that_is_read_again_and_alerts_only_then_is_answered() -> None:
    response = Response(Told(), Log())
    assert response.due(5, "quiet", False) == []
    assert response.due(5, "breach", True) == [Log()]


def test_a_response_that_may_stop_fails_closed_after_two_looks_that_could_not_tell() -> None:
    assert asked(Response(Told(), Stop()), ".?.??") == ["", "", "", "", "st"]
    assert asked(Response(Told(), Log(), Stop(), patience=2), "??????") == ["", "lo", "", "st", "st", "st"]
    response = Response(Told(), SaveCheckpoint(), Stop())
    response.due(0, "unknown", False)
    assert not response.fails_closed
    response.due(1, "unknown", False)
    assert response.fails_closed
    response.due(2, "quiet", False)
    assert not response.fails_closed


def test_a_response_that_fails_closed_within_its_cooldown_acts_afterwards() -> None:
    assert asked(Response(Told(), SaveCheckpoint(), Stop(), cooldown=4), "!.????") == ["sast", "", "", "", "", "sast"]


def test_a_response_that_cannot_stop_waits_for_a_reading() -> None:
    assert asked(Response(Told(), SaveCheckpoint()), "????????") == [""] * 8


def test_a_rule_as_a_whole_is_what_its_worst_subject_is() -> None:
    def judged(*states: State) -> Judgement:
        return Judgement(signals=tuple(Signal(subject=str(n), state=state) for n, state in enumerate(states)))

    assert state_of(judged("quiet", "unknown", "breach")) == "breach"
    assert state_of(judged("quiet", "unknown")) == "unknown"
    assert state_of(judged("quiet", "quiet")) == "quiet"
    assert state_of(judged()) == "quiet"
    assert state_of(None) == "unknown"


LADDERS: list[tuple[Sequence[Any], dict[str, Any]]] = [
    ([SaveCheckpoint(), Stop()], {}),
    ([Rollback(at_most=2), Stop()], {"cooldown": 2}),
    ([Log(), HALVE, Rollback(at_most=1), Stop()], {"patience": 2}),
    ([Log(), ScaleLearningRate(0.25), HALVE], {"patience": 3, "cooldown": 4}),
]


@pytest.mark.parametrize(("actions", "options"), LADDERS)
def test_saved_and_loaded_at_any_look_it_asks_for_the_same(actions: Sequence[Any], options: dict[str, Any]) -> None:
    looks = "!xxx....!xxx..x....!x" + "".join(random.choices(".x!?", weights=(3, 3, 1, 1), k=40))
    whole = asked(Response(Told(), *actions, **options), looks)
    assert sum(map(bool, whole)) >= 3
    for at in range(len(looks)):
        before = Response(Told(), *actions, **options)
        assert asked(before, looks[:at]) == whole[:at]
        after = Response(Told(), *actions, **options)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert asked(after, looks[at:], at) == whole[at:]


def test_a_state_of_other_actions_is_refused() -> None:
    state = Response(Told(), Log(), Stop()).state_dict()
    with pytest.raises(ConfigError, match=r"had the actions log\(warning\), stop for the rule 'told'; given were stop"):
        Response(Told(), Stop()).load_state_dict(state)


@pytest.mark.parametrize(
    ("actions", "options", "complaint"),
    [
        ([], {}, "was given no action"),
        ([Stop(), SaveCheckpoint()], {}, "holds save_checkpoint after stop, where there is no run left"),
        ([Log(), Stop(), HALVE], {"patience": 2}, r"holds scale_learning_rate\(0.5\) after stop"),
        ([Stop(), Stop()], {"patience": 2}, "holds stop after stop"),
        ([HALVE, ScaleLearningRate(2)], {"patience": 2}, "both raises and lowers the learning rate"),
        ([ScaleKLCoefficient(2), ScaleKLCoefficient(0.5)], {"patience": 2}, "both raises and lowers the KL coef"),
        ([SetKLCoefficient(2), SetKLCoefficient(1), SetKLCoefficient(3)], {"patience": 2}, "both raises and lowers"),
        ([SetKLCoefficient(2), SetKLCoefficient(1), ScaleKLCoefficient(3)], {"patience": 2}, "both raises and lowers"),
        ([HALVE, ScaleLearningRate(0.5)], {}, "asked for what was asked for before"),
        ([SetKLCoefficient(2), SetKLCoefficient(3)], {}, "asked for what was asked for before"),
        ([Stop()], {"patience": 0}, "patience=0. It counts looks"),
        ([Stop()], {"cooldown": -1}, "cooldown=-1. It counts looks"),
    ],
)
def test_a_response_without_sense_is_refused(actions: list[Any], options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Response(Told(), *actions, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("action", [Stop, "stop", None])
def test_what_is_no_action_is_refused(action: Any) -> None:
    with pytest.raises(ConfigError, match="is not an action"):
        Response(Told(), action)


def test_a_ladder_may_take_the_same_step_twice() -> None:
    assert asked(Response(Told(), HALVE, HALVE, Stop(), patience=1), "!xx") == ["sc", "sc", "st"]


@pytest.mark.parametrize("action", [Stop(), Pause(), Rollback()])
def test_a_rule_that_only_warns_neither_stops_nor_turns_back_a_run(action: Any) -> None:
    with pytest.raises(ConfigError, match=f"holds {action.name}, but that rule warns, never stops by itself"):
        Response(Told(may_stop=False), Log(), action, patience=2)
    Response(Told(may_stop=False), Log(), SaveCheckpoint(), HALVE)


def test_a_response_says_what_the_run_must_be_able_to_do() -> None:
    assert isinstance(Told(), Rule)
    assert Response(Told(), Log(), HALVE, Stop(), patience=1).needs == {"scale_learning_rate", "stop"}


def test_a_copy_goes_on_by_itself_with_the_same_actions() -> None:
    response = Response(Told(), HALVE, Stop(), patience=2)
    assert asked(response, "!x") == ["sc", ""]
    copied = copy.deepcopy(response)
    assert copied.rule is not response.rule
    assert all(one is other for one, other in zip(copied.actions, response.actions, strict=True))
    assert asked(copied, "x", first=2) == asked(response, "x", first=2) == ["st"]
