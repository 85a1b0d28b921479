"""`diffsensor calibrate` makes pilots of real records, says what they allow, and refuses what cannot be pilots."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsensor import cli
from diffsensor.record import Record
from diffsensor.rules.envelope import Envelope
from diffsensor.rules.pilots import read_pilots
from diffsensor.types import Findings, Reading

RECIPE = {"learning_rate": 0.001, "data": "docstrings"}
Made = Callable[..., list[str]]


@pytest.fixture
def records(tmp_path: Path) -> Made:
    """Writes records of so many runs, which differ in their numbers, and returns their paths."""

    def write(number: int = 9, *, first: int = 0, steps: int = 4, **differently: Any) -> list[str]:
        members = {"reference": "r" * 64, "probes": "p" * 64, "schedule": "every(10)", "recipe": RECIPE}
        manifest = {key: value for key, value in {**members, **differently}.items() if value is not None}
        paths = [tmp_path / f"run-{first + each}" for each in range(number)]
        for each, path in enumerate(paths):
            with Record(path, manifest=manifest) as record:
                for step in range(0, 10 * steps, 10):
                    record.write(Findings(step=step, readings=_readings(step, first + each)))
        return [str(path) for path in paths]

    return write


def _readings(step: int, run: int) -> tuple[Reading, ...]:
    return tuple(
        Reading(step=step, sensor="outputs", metric=metric, value=step * (1 + run / 10), unit="nats/token", scale="log")
        for metric in ("kl_ref_live", "mass_moved")
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["calibrate", *arguments])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err


def test_it_says_what_so_many_pilots_allow(records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pilots.json"
    code, out, _ = run(capsys, *records(9), "-o", str(file))
    assert code == 0
    assert out.splitlines() == [
        (
            "9 pilots: 4 for the centre line, 5 for the threshold: a healthy run alarms with probability at most 1/6 = "
            "17 %; a 5 % level needs 19 for the threshold, which is 28 pilots in all."
        ),
        f"{file} has 2 metrics at 4 steps, 0 to 30: kl_ref_live, mass_moved.",
    ]
    assert Envelope(file).level == pytest.approx(1 / 6)
    assert read_pilots(file).recipe == RECIPE


def test_enough_pilots_are_told_no_more_is_needed(
    records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, *records(28), "-o", str(tmp_path / "pilots.json"))
    assert out.startswith(
        "28 pilots: 9 for the centre line, 19 for the threshold: a healthy run alarms with probability at most 1/20 = "
        "5 %.\n"
    )


def test_as_json_it_says_the_same(records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pilots.json"
    code, out, _ = run(capsys, *records(9), "-o", str(file), "--json", "--metric", "kl_ref_live")
    said = json.loads(out)
    assert code == 0
    assert said["metrics"] == ["kl_ref_live"]
    assert (said["num_centre"], said["num_calibration"], said["pilots_for_5_percent"]) == (4, 5, 28)
    assert said["level"] == pytest.approx(1 / 6)
    assert said["steps"] == [0, 10, 20, 30]
    assert sorted(said["pilots"]) == [str(tmp_path / f"run-{each}") for each in range(9)]


def test_steps_that_not_all_read_are_told(records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = records(8) + records(1, first=8, steps=2)
    _, out, _ = run(capsys, *paths, "-o", str(tmp_path / "pilots.json"))
    assert "at 2 steps, 0 to 10: " in out
    assert "Left out: 2 steps (20 to 30) that not all pilots read; no run is judged there." in out


def test_records_without_a_recipe_are_taken_and_told(
    records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, *records(5, recipe=None), "-o", str(tmp_path / "pilots.json"))
    assert code == 0
    assert "These records name no recipe" in out


@pytest.mark.parametrize(
    ("differently", "complaint"),
    [
        ({"recipe": {**RECIPE, "learning_rate": 0.01}}, "recipe has learning_rate = 0.01 there, 0.001 in"),
        ({"recipe": None}, "recipe has learning_rate = nothing there, 0.001 in"),
        ({"probes": "q" * 64}, "probes is qqqqqqqqqqqq there, pppppppppppp in"),
        ({"reference": "q" * 64}, "reference is qqqqqqqqqqqq there, rrrrrrrrrrrr in"),
        ({"schedule": "every(5)"}, "schedule is every(5) there, every(10) in"),
    ],
)
def test_a_record_of_another_kind_is_refused_and_nothing_written(
    differently: dict[str, Any],
    complaint: str,
    records: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = records(6) + records(1, first=6, **differently)
    code, _, err = run(capsys, *paths, "-o", str(tmp_path / "pilots.json"))
    assert code == 2
    assert complaint in err
    assert paths[6] in err
    assert not (tmp_path / "pilots.json").exists()


def test_too_few_records_are_refused_with_the_number_needed(
    records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *records(4), "-o", str(tmp_path / "pilots.json"))
    assert code == 2
    assert "Pilots given: 4. At least 5 are needed" in err


def test_a_record_given_twice_is_refused(records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = records(6)
    code, _, err = run(capsys, *paths, paths[2], "-o", str(tmp_path / "pilots.json"))
    assert code == 2
    assert f"{paths[2]} and {paths[2]} hold the same numbers: they are one run." in err


def test_what_cannot_be_read_or_written_is_a_sentence(
    records: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = records(5)
    code, _, err = run(capsys, *paths, str(tmp_path / "nothing"), "-o", str(tmp_path / "pilots.json"))
    assert code == 2
    assert "There is no record at" in err
    code, _, err = run(capsys, *paths, "-o", str(tmp_path / "missing" / "pilots.json"))
    assert code == 2
    assert "The pilots cannot be written to" in err
    code, _, err = run(capsys, *paths, "-o", str(tmp_path / "pilots.json"), "--metric", "kl_ref_liv")
    assert code == 2
    assert "Did you mean 'kl_ref_live'?" in err
