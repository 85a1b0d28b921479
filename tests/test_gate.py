"""The gate: one criterion that is not met is enough, and what is not known is not a pass."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from diffsensor.errors import ConfigError, CorruptFileError
from diffsensor.gate import Gate, read_verdict, write_verdict
from diffsensor.types import Findings, Scope, Verdict

Outcome = Literal["pass", "fail", "unknown"]


class Fixed:
    """A criterion that always says the same."""

    def __init__(self, outcome: Outcome, name: str = "fixed") -> None:
        self.outcome, self.name = outcome, name
        self.metrics = frozenset({name})
        self.checked: list[Scope] = []

    def check(self, scope: Scope) -> None:
        self.checked.append(scope)

    def verdict(self, findings: Findings) -> Verdict:
        return Verdict(step=findings.step, outcome=self.outcome, reason=f"{self.name} says so.", rule=self.name)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["pass"], "pass"),
        (["pass", "pass"], "pass"),
        (["pass", "unknown", "pass"], "unknown"),
        (["unknown", "fail", "pass"], "fail"),
        (["fail", "unknown"], "fail"),
    ],
)
def test_the_worst_criterion_decides(outcomes: list[Outcome], expected: Outcome) -> None:
    gate = Gate(*(Fixed(outcome, f"criterion {number}") for number, outcome in enumerate(outcomes)))
    verdict = gate.verdict(Findings(step=3))
    assert (verdict.outcome, verdict.step) == (expected, 3)
    assert verdict.rule == f"criterion {outcomes.index(expected)}"


def test_others_that_are_not_met_either_are_named() -> None:
    gate = Gate(Fixed("fail", "one"), Fixed("pass", "two"), Fixed("fail", "three"))
    assert gate.verdict(Findings(step=3)).reason == "one says so. So with three."
    assert gate.metrics == {"one", "two", "three"}
    for outcomes in (("pass", "pass"), ("fail", "unknown")):
        gate = Gate(*(Fixed(outcome, name) for outcome, name in zip(outcomes, ("one", "two"), strict=True)))
        assert gate.verdict(Findings(step=3)).reason == "one says so."


def test_criteria_are_checked() -> None:
    criterion = Fixed("pass")
    scope = Scope(metrics={}, groups={})
    Gate(criterion).check(scope)
    assert criterion.checked == [scope]


def test_a_gate_that_would_pass_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="no criterion, so it would pass everything"):
        Gate()


def test_a_rule_that_cannot_judge_one_look_is_refused(unchecked: None) -> None:
    class Warns:
        name, metrics = "warns", frozenset[str]()

        def update(self, findings: Findings) -> Mapping[str, Any]:
            return {}

    with pytest.raises(ConfigError, match=r"cannot judge one checkpoint by itself.*a Limit"):
        Gate(Warns())


def test_a_verdict_comes_back_from_its_file_whatever_that_is_called(tmp_path: Path) -> None:
    verdict = Verdict(step=3, outcome="fail", reason="too far", value=0.4, threshold=0.3)
    write_verdict(tmp_path / "one.json", verdict)
    (tmp_path / "one.json").rename(tmp_path / "two.json")
    found = read_verdict(tmp_path / "two.json")
    assert (found.outcome, found.value, found.threshold) == ("fail", 0.4, 0.3)
    assert math.isnan(found.stderr)


def test_the_verdict_on_a_checkpoint_is_found_in_it_or_beside_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "step=40.ckpt").write_bytes(b"weights")
    for place in (tmp_path / "checkpoint-40", tmp_path / "step=40.ckpt"):
        assert read_verdict(place).outcome == "unknown"
    write_verdict(
        tmp_path / "checkpoint-40" / "diffsensor-verdict.json", Verdict(step=40, outcome="fail", reason="far")
    )
    write_verdict(tmp_path / "step=40.ckpt.verdict.json", Verdict(step=40, outcome="pass", reason="near"))
    assert read_verdict(tmp_path / "checkpoint-40").outcome == "fail"
    assert read_verdict(tmp_path / "step=40.ckpt").outcome == "pass"


def test_a_missing_verdict_is_unknown_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    missing = read_verdict(tmp_path / "none.json")
    assert missing.outcome == "unknown"
    assert "unknown is not a pass" in missing.reason
    write_verdict(tmp_path / "one.json", Verdict(step=3, outcome="fail", reason="too far"))
    text = (tmp_path / "one.json").read_text()
    (tmp_path / "one.json").write_text(text.replace('"fail"', '"pass"'))
    with pytest.raises(CorruptFileError, match="was changed"):
        read_verdict(tmp_path / "one.json")
