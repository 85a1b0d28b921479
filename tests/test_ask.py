"""`diffsensor ask`: what a record answers, in sentences and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffsensor import cli
from diffsensor.ask_command import QUESTIONS
from diffsensor.record import Record
from diffsensor.types import Alert, Findings, Reading, TokenShift, Verdict

NASTY = "\x1b[31m<script>\n"


def reading(step: int, value: float, **more: Any) -> Reading:
    named = {"sensor": "outputs", "metric": "kl_ref_live", "unit": "nats/token", "stderr": 0.01, "noise_floor": 0.001}
    return Reading(step=step, value=value, **(named | more))


def shift(step: int, rank: int, token: str, prefers: Any = "live") -> TokenShift:
    return TokenShift(
        step=step, ranked_by="mass_moved", prefers=prefers, rank=rank, token_id=rank, token=token, mass_moved=0.1,
        mass_moved_stderr=0.01, logit_difference=1.0, probe="p", position=3, context="",
    )  # fmt: skip


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Five looks: nothing measurable, a lone blip, nothing, then drift that stays."""
    path = tmp_path / "record"
    with Record(path, manifest={"reference": "r" * 64, "probes": "p" * 64}) as written:
        for step, value in {0: 0.0, 10: 0.02, 20: 0.001, 30: 0.1, 40: 0.5}.items():
            written.write(
                Findings(
                    step=step,
                    readings=(
                        reading(step, value),
                        reading(step, value * 2, group="code"),
                        reading(step, value / 2, group="prose"),
                        reading(step, value * 2, group="worst", note="group 'code'"),
                        reading(step, 0.1 + value, metric="relative_l2", hookpoint="a", stderr=0.5),
                        reading(step, 0.2 + value, metric="relative_l2", hookpoint="b", stderr=0.001),
                    ),
                    token_shifts=(shift(step, 0, NASTY), shift(step, 1, " fine"), shift(step, 0, "old", "reference")),
                )
            )
        at = [reading(40, 0.6 + n / 10, metric="relative_l2", hookpoint="ab"[n]) for n in (0, 1)]
        written.write(
            Findings(
                step=40,
                readings=(reading(40, 0.5), reading(40, 1.0, group="code"), reading(40, 0.25, group="prose"), *at),
                token_shifts=(shift(40, 0, NASTY), shift(40, 1, " fine"), shift(40, 0, "old", "reference")),
                alerts=(
                    Alert(step=40, rule="limit", severity="warning", subject="s", message="Too far.", first_step=30),
                ),
            )
        )
        written.write(Findings(step=40, verdicts=(Verdict(step=40, outcome="fail", reason="It is too far."),)))
    return path


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["ask", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, _ = ask(capsys, *arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_how_far_and_where_are_the_readings_of_the_step(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, record, "how-far")
    assert [(each["group"], each["value"]) for each in found["readings"]] == [("", 0.5), ("code", 1.0), ("prose", 0.25)]
    assert answer(capsys, record, "how-far", 30)["readings"][0]["value"] == 0.1
    assert [each["hookpoint"] for each in answer(capsys, record, "where")["readings"]] == ["b", "a"]
    assert answer(capsys, record, "worst-group")["group"] == "code"


def test_drift_began_where_it_became_measurable_for_good(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, record, "when-did-it-start")
    assert found["first_measurable_step"] == 30
    assert found["first_alert"]["first_step"] == 30


def test_what_moved_is_ordered_by_standard_errors(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, record, "what-moved-at", 30)
    assert (found["before"], found["step"]) == (20, 30)
    first = found["changes"][0]
    assert first["key"] == "diffsensor/relative_l2/at=b"
    assert first["change"] == pytest.approx(0.099)
    assert first["standard_errors"] == pytest.approx(0.099 / (2**0.5 * 0.001))
    assert found["changes"][-1]["key"] == "diffsensor/relative_l2/at=a"


def test_tokens_and_verdicts_and_alerts_are_told(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, record, "top-tokens", 40)
    assert [each["token"] for each in found["tokens"]] == [NASTY, " fine", "old"]
    assert answer(capsys, record, "verdict")["verdict"]["outcome"] == "fail"
    assert [each["message"] for each in answer(capsys, record, "alerts")["alerts"]] == ["Too far."]
    assert answer(capsys, record, "what-is-here")["steps"] == [0, 10, 20, 30, 40]


def test_foreign_text_cannot_steer_a_terminal(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ask(capsys, record, "top-tokens")
    assert "\x1b" not in out
    assert "<script>" in out
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("worst-grup",), "Did you mean 'worst-group'?"),
        (("how-far", "--metric", "kl_ref_liv"), "Did you mean 'kl_ref_live'?"),
    ],
)
def test_a_question_that_does_not_exist_is_refused(
    record: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, out, err = ask(capsys, record, *arguments)
    assert (code, out) == (2, "")
    assert told in err


@pytest.mark.parametrize("question", ["how-far", "top-tokens", "what-moved-at"])
def test_a_step_that_was_not_read_cannot_be_told(
    record: Path, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    code, out, _ = ask(capsys, record, question, 35)
    assert code == 2
    assert "35" in out


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_is_in_the_help(question: str) -> None:
    from diffsensor.ask_command import ask as command

    assert f"{question}" in (command.__doc__ or "")


def test_what_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ask(capsys, tmp_path / "nothing", "verdict")
    assert code == 2
    assert "Traceback" not in err
