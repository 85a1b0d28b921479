"""A run that obeys the verdicts of a watch."""

import os
from pathlib import Path
from typing import Any

import pytest

from diffsensor import ConfigError, FollowedVerdicts, Verdict, write_verdict
from diffsensor.actions import ScaleLearningRate, Stop
from diffsensor.control import LoopController
from diffsensor.gate import VERDICT_BESIDE, VERDICT_IN
from tiny_rules import Run


def verdict(place: Path, step: int, outcome: Any = "fail") -> None:
    (place / f"checkpoint-{step}").mkdir(exist_ok=True)
    found = Verdict(step=step, outcome=outcome, reason="It moved too far.", value=0.4, threshold=0.3)
    write_verdict(place / f"checkpoint-{step}" / VERDICT_IN, found)


def test_a_failed_checkpoint_stops_the_run_once(tmp_path: Path) -> None:
    verdicts, controller = FollowedVerdicts(tmp_path, every=5), LoopController()
    verdicts.begin(controller)
    verdict(tmp_path, 10, "pass")
    assert [(each.verdict.outcome, each.actions) for each in verdicts.look(15, controller)] == [("pass", ())]
    assert not controller.should_stop
    verdict(tmp_path, 20)
    assert verdicts.look(21, controller) == []  # not due
    (found,) = verdicts.look(25, controller)
    assert found.checkpoint == tmp_path / "checkpoint-20"
    assert [(taken.action, taken.outcome) for taken in found.actions] == [("stop", "done")]
    assert controller.should_stop
    assert "checkpoint-20 of step 20 does not pass: It moved too far." in controller.stop_reason
    assert verdicts.look(30, controller) == []


def test_verdicts_beside_files_are_followed_too(tmp_path: Path) -> None:
    verdicts, controller = FollowedVerdicts(tmp_path, every=1), LoopController()
    verdicts.begin(controller)
    write_verdict(tmp_path / f"step=3.ckpt{VERDICT_BESIDE}", Verdict(step=3, outcome="fail", reason="No."))
    assert [each.checkpoint.name for each in verdicts.look(4, controller)] == ["step=3.ckpt"]


def test_what_was_there_before_is_history_until_it_is_written_anew(tmp_path: Path) -> None:
    verdict(tmp_path, 10)
    verdict(tmp_path, 40)
    verdicts, controller = FollowedVerdicts(tmp_path, every=1), LoopController()
    verdicts.begin(controller)
    assert verdicts.look(1, controller) == []
    os.utime(tmp_path / "checkpoint-40" / VERDICT_IN, ns=(1, 1))
    assert [each.verdict.step for each in verdicts.look(2, controller)] == [40]
    assert verdicts.look(3, controller) == []


@pytest.mark.parametrize("strict", [False, True])
def test_what_could_not_be_told_asks_for_something_only_where_it_counts_as_a_failure(
    tmp_path: Path, strict: bool
) -> None:
    verdicts, controller = FollowedVerdicts(tmp_path, every=1, unknown_is_fail=strict), LoopController()
    verdicts.begin(controller)
    verdict(tmp_path, 1, "unknown")
    verdicts.look(2, controller)
    assert controller.should_stop is strict


def test_several_actions_are_asked_in_order_and_a_failing_one_is_contained(tmp_path: Path) -> None:
    class Breaking:
        name, needs, at_most = "breaking", None, None

        def __call__(self, alert: object, controller: object) -> str:
            raise ZeroDivisionError("by hand")

    run = Run()
    verdicts = FollowedVerdicts(tmp_path, [Breaking(), ScaleLearningRate(0.5), Stop()], every=1)
    verdicts.begin(run)
    verdict(tmp_path, 1)
    (found,) = verdicts.look(1, run)
    assert [taken.outcome for taken in found.actions] == ["failed", "done", "done"]


def test_what_the_run_cannot_do_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Failed verdicts ask for scale_learning_rate"):
        FollowedVerdicts(tmp_path, [ScaleLearningRate(0.5)]).begin(LoopController())


def test_a_verdict_that_was_changed_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    verdicts, controller = FollowedVerdicts(tmp_path, every=1), LoopController()
    verdicts.begin(controller)
    verdict(tmp_path, 1)
    file = tmp_path / "checkpoint-1" / VERDICT_IN
    file.write_bytes(file.read_bytes().replace(b"fail", b"pass"))
    assert verdicts.look(1, controller) == []
    assert "cannot be read" in caplog.text
    assert not controller.should_stop


@pytest.mark.parametrize("arguments", [{"every": 0}, {"actions": [Stop]}])
def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, arguments: dict[str, Any], unchecked: None) -> None:
    with pytest.raises(ConfigError):
        FollowedVerdicts(tmp_path, **arguments)
