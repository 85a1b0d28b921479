"""What actions ask of a run, and which arguments are refused."""

import json
import logging
from typing import Any

import pytest

from diffsensor.actions import (
    Log,
    Pause,
    Rollback,
    SaveCheckpoint,
    ScaleKLCoefficient,
    ScaleLearningRate,
    SetKLCoefficient,
    Stop,
)
from diffsensor.errors import ConfigError, RefusedError
from diffsensor.protocols import Action, Controller
from diffsensor.types import Ability, Alert

ALERT = Alert(step=40, rule="limit", severity="critical", subject="kl", message="KL is 0.4.", first_step=30)


class Asked:
    """A controller that writes down what it is asked for."""

    def __init__(self, coefficient: float = 1.0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.coefficient = coefficient

    def cannot(self, ability: Ability) -> str:
        return ""

    def stop(self, reason: str) -> str:
        self.asked.append(("stop", reason))
        return "stopped"

    def save_checkpoint(self, reason: str) -> str:
        self.asked.append(("save_checkpoint", reason))
        return "saved"

    def scale_learning_rate(self, factor: float) -> str:
        self.asked.append(("scale_learning_rate", factor))
        return "scaled"

    def kl_coefficient(self) -> float:
        return self.coefficient

    def set_kl_coefficient(self, value: float) -> str:
        self.asked.append(("set_kl_coefficient", value))
        return "set"

    def keep(self, step: int) -> None:
        self.asked.append(("keep", step))

    def rollback(self, reason: str) -> str:
        self.asked.append(("rollback", reason))
        return "rolled back"

    def pause(self, reason: str) -> str:
        self.asked.append(("pause", reason))
        return "paused"


REASON = "limit, step 40: KL is 0.4."
ASKS: list[tuple[Action, str, tuple[Any, ...], str]] = [
    (Stop(), "stop", ("stop", REASON), "stopped"),
    (SaveCheckpoint(), "save_checkpoint", ("save_checkpoint", REASON), "saved"),
    (ScaleLearningRate(0.5), "scale_learning_rate(0.5)", ("scale_learning_rate", 0.5), "scaled"),
    (SetKLCoefficient(0.25), "set_kl_coefficient(0.25)", ("set_kl_coefficient", 0.25), "set"),
    (ScaleKLCoefficient(4), "scale_kl_coefficient(4)", ("set_kl_coefficient", 4.0), "set"),
    (Rollback(), "rollback", ("rollback", REASON), "rolled back"),
    (Pause(), "pause", ("pause", REASON), "paused"),
]


@pytest.mark.parametrize(("action", "name", "asked", "did"), ASKS, ids=lambda each: getattr(each, "name", None))
def test_an_action_asks_for_what_it_needs_once_and_tells_what_was_done(
    action: Action, name: str, asked: tuple[Any, ...], did: str
) -> None:
    run = Asked()
    assert isinstance(run, Controller)
    assert isinstance(action, Action)
    assert action(ALERT, run) == did
    assert run.asked == [asked]
    assert (action.name, action.needs) == (name, asked[0])
    json.dumps(action.name)


def test_only_a_rollback_is_limited_in_number() -> None:
    assert {action.name: action.at_most for action, *_ in ASKS if action.at_most is not None} == {"rollback": 3}
    assert Rollback(at_most=7).at_most == 7


def test_log_writes_the_alert_at_its_level_and_needs_nothing_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    run = Asked()
    with caplog.at_level(logging.DEBUG):
        assert Log("error")(ALERT, run) == "logged as error"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", REASON)]
    assert Log().name == "log(warning)"
    assert Log().needs is None
    assert not run.asked


def test_a_scaled_kl_coefficient_ends_at_100_and_does_not_begin_at_0() -> None:
    run = Asked(60.0)
    ScaleKLCoefficient(2)(ALERT, run)
    assert run.asked == [("set_kl_coefficient", 100.0)]
    with pytest.raises(RefusedError, match="is 100 already"):
        ScaleKLCoefficient(2)(ALERT, Asked(100.0))
    with pytest.raises(RefusedError, match="use SetKLCoefficient"):
        ScaleKLCoefficient(2)(ALERT, Asked(0.0))
    ScaleKLCoefficient(0.5)(ALERT, lower := Asked(200.0))
    assert lower.asked == [("set_kl_coefficient", 100.0)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), "0.5", True, None])
@pytest.mark.parametrize("action", [ScaleLearningRate, ScaleKLCoefficient])
def test_a_factor_that_is_no_factor_is_refused(action: Any, factor: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a finite number above 0: 0\.5 halves"):
        action(factor)


@pytest.mark.parametrize("action", [ScaleLearningRate, ScaleKLCoefficient])
def test_a_factor_of_1_is_refused(action: Any) -> None:
    with pytest.raises(ConfigError, match="changes nothing"):
        action(1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: SetKLCoefficient(-0.1), "from 0 .no penalty. to 100"),
        (lambda: SetKLCoefficient(101), "value=101"),
        (lambda: SetKLCoefficient(float("nan")), "value=nan"),
        (lambda: Rollback(at_most=0), "at_most=0. It counts"),
        (lambda: Rollback(at_most=2.5), "at_most=2.5"),
        (lambda: Rollback(at_most=True), "at_most=True"),
        (lambda: Log("warn"), "No log level is named 'warn'. Did you mean 'warning'?"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(build: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build()
