"""`diffsensor compare`: how alike runs are, as the report says it."""

import json
from pathlib import Path

import pytest

from diffsensor import cli
from diffsensor.report import describe
from tiny_records import make_record


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code: object = 0
    try:
        cli.main(["compare", *map(str, arguments)])
    except SystemExit as ended:
        code = ended.code or 0
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    return [make_record(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other", "third"))]


def test_json_is_the_comparison_of_the_report(records: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, *records, "--json")
    found = json.loads(out)
    assert code == 0
    assert found.pop("records") == [str(path) for path in records]
    assert found == describe(records)["comparison"]
    assert len(found["pairs"]) == 3


def test_the_table_has_a_line_for_each_pair(records: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    pairs = describe(records)["comparison"]["pairs"]
    lines = {line.split()[0]: line.split() for line in command(capsys, *records)[1].splitlines() if line.strip()}
    for pair, name in zip(pairs, ("A-B", "A-C", "B-C"), strict=True):
        assert lines[name][2] == f"{pair['directions']['means'][-1]:.2f}"
        assert lines[name][4] == f"{pair['token_overlap']:.2f}"


def test_one_record_cannot_be_compared(records: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, records[0])
    assert code == 2
    assert "Give two or more to compare" in err


def test_what_is_no_record_is_refused(records: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, records[0], tmp_path / "nothing")
    assert code == 2
    assert "Traceback" not in err
