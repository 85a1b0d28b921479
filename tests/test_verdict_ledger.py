"""The ledger of verdicts: complete after each change, and never silently wrong."""

from pathlib import Path

import pytest

from diffsensor.errors import CorruptFileError
from diffsensor.gate import VerdictLedger
from diffsensor.types import Verdict


def verdict(step: int, outcome: str = "pass") -> Verdict:
    return Verdict(step=step, outcome=outcome, reason="By hand.", value=0.25)


def test_what_was_added_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    ledger = VerdictLedger(tmp_path / "verdicts.json")
    assert (dict(ledger.verdicts), ledger.last_passed) == ({}, "")
    assert not ledger.path.exists()
    ledger.add("checkpoint-2", verdict(2, "fail"))
    ledger.add("checkpoint-1", verdict(1))
    ledger.set_last_passed("last-passed/checkpoint-1")
    ledger.add("checkpoint-2", verdict(2, "unknown"))
    again = VerdictLedger(tmp_path / "verdicts.json")
    assert repr(again.verdicts) == repr(ledger.verdicts)  # their errors are NaN
    assert {name: each.outcome for name, each in again.verdicts.items()} == {
        "checkpoint-2": "unknown",
        "checkpoint-1": "pass",
    }
    assert again.last_passed == "last-passed/checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["verdicts.json"]


def test_the_place_of_what_passed_last_is_kept_at_once(tmp_path: Path) -> None:
    ledger = VerdictLedger(tmp_path / "verdicts.json")
    before = ledger.verdicts
    ledger.add("checkpoint-1", verdict(1))
    ledger.set_last_passed("last-passed/checkpoint-1")
    assert VerdictLedger(ledger.path).last_passed == "last-passed/checkpoint-1"
    assert before == {}


@pytest.mark.parametrize("harm", [lambda raw: raw.replace(b"fail", b"pass"), lambda raw: raw[: len(raw) // 2]])
def test_a_changed_ledger_is_refused(harm: object, tmp_path: Path) -> None:
    ledger = VerdictLedger(tmp_path / "verdicts.json")
    ledger.add("checkpoint-2", verdict(2, "fail"))
    assert callable(harm)
    ledger.path.write_bytes(harm(ledger.path.read_bytes()))
    with pytest.raises(CorruptFileError, match=r"verdicts\.json was changed"):
        VerdictLedger(ledger.path)
