"""The benchmarks run, and say what they are there to say. Nothing in here depends on how fast the machine is."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffsensor.oversight import Oversight
from diffsensor.types import Findings
from tiny_rules import Scripted

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def folder_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it is when a script is run: some of them import others of their folder. One thread, as before."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_readings_are_as_exact_as_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("bench_accuracy")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["case"] for row in rows} == {case.name for case in bench.CASES}
    assert "missed" not in capsys.readouterr().out
    without_drift = [row for row in rows if row["kl"] == 0]
    assert len(without_drift) >= 5
    assert all(not any(row["full_errors"].values()) and row["light_error"] == 0 for row in without_drift)
    # What the benchmark is there to show: bfloat16 logits must not be subtracted from one another.
    low = [row for row in rows if row["case"].startswith("bf16") and 0 < row["kl"] < 1e-4]
    assert low
    assert all(row["naive_error"] > 0.2 for row in low)


def test_the_accuracy_benchmark_ends_with_1_where_a_target_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench_accuracy")
    monkeypatch.setattr(bench, "CASES", bench.CASES[:1])
    monkeypatch.setattr(bench, "FULL_SHARE", 0.0)
    assert bench.main(["--quick"]) == 1
    assert "missed: kl_ref_live" in capsys.readouterr().out


def test_the_reading_benchmark_runs_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("bench_reading")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))}
    assert rows.keys() >= set(bench.CONFIGS["A"].targets) | {bench.BARE, bench.NAIVE, bench.TOOLKIT, bench.CACHED}
    assert all(row["ratio"] > 0 for row in rows.values())
    # 8 x 128 x 500 logits in float32 are 2 MB, and the naive way holds several such tables at once.
    assert rows[bench.NAIVE]["memory_mb"] > 4 * rows[bench.LIGHT]["memory_mb"] > 0
    shown = capsys.readouterr().out
    assert "Where the time of `light` goes" in shown
    assert "metrics/tiles.py" in shown


def test_the_trainers_benchmark_runs(tmp_path: Path) -> None:
    bench = script("bench_trainers")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["trainer"] for row in rows} >= {"SFT", "GRPO"}
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reading_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench_reading").main(["--cuda"]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_a_limit_keeps_its_promises_at_the_limit(tmp_path: Path) -> None:
    bench = script("bench_limits")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["table"] for row in rows} == {"Hovering", "Breach", "FalseAlarms"}
    hovering = [row for row in rows if row["table"] == "Hovering"]
    assert all(row["alerts"] <= 2.5 < 50 < row["plain"] for row in hovering)
    assert not any(row["missed_target"] for row in rows)


def test_the_benchmark_of_limits_counts_alerts_as_oversight_sends_them() -> None:
    bench = script("bench_limits")
    breach, quiet = ["breach"], ["quiet"]
    said = quiet + breach * 3 + quiet + breach * 30 + quiet * 40 + breach + quiet + breach
    counted = []
    for cooldown in (0, 3, 20):
        rule = Scripted(*said, cooldown=cooldown)
        watching = Oversight([rule], contain=lambda name, error: None)
        counted.append(sum(len(watching.judge(Findings(step=step)).alerts) for step in range(len(said))))
        assert bench.alerts(said, cooldown) == counted[-1]
    assert len(set(counted)) > 1


def test_the_benchmark_of_limits_ends_with_1_where_a_target_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench_limits")
    monkeypatch.setattr(bench, "ALERTS", 0.5)
    assert bench.main(["--quick"]) == 1
    assert "missed" in capsys.readouterr().out


def test_the_benign_benchmark_judges_real_fine_tunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("bench_benign")
    arguments = ["--quick", "--cache", str(tmp_path / "cache"), "--json"]
    assert bench.main([*arguments, str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {row["fault"] for row in found["rows"]} == {bench.HEALTHY, *bench.FAULTS}
    assert {row["rule"].split()[0] for row in found["rows"]} == {"Limit", "Envelope", "ChangePoint"}
    assert all(row["low"] <= row["share"] <= row["high"] for row in found["rows"])
    # What is on disk is not trained again: an envelope of the same runs says the same.
    files = sorted((tmp_path / "cache").glob("fine-tunes-*/*.json.gz"))
    assert len(files) == 26
    stamps = [file.stat().st_mtime_ns for file in files]
    assert bench.main([*arguments, str(tmp_path / "again.json")]) == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps
    # Compared as text: NaN stands for no delay, and is not equal to itself.
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == (tmp_path / "found.json").read_text(
        encoding="utf-8"
    )
    assert "Envelope with other pilots" in capsys.readouterr().out


def test_the_budget_benchmark_runs_every_control(tmp_path: Path) -> None:
    bench = script("bench_budget")
    assert bench.main(["--quick", "--cache", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["control"] for row in rows if row["scenario"] == bench.CHANGE} == set(bench.CONTROLS)
    assert all(row["trajectory"][0] == 0.0 < row["end"] for row in rows)


def test_the_budget_benchmark_names_each_missed_target() -> None:
    bench = script("bench_budget")
    given = {"seed": 0, "scenario": bench.SAME, "others": 0.2, "coefficient": 1.0, "note": "", "seconds": 1.0}
    none = bench.Row(control=bench.NONE, end=0.7, largest=0.7, task_loss=3.0, trajectory=(), **given)
    good = bench.Row(control=bench.PI, end=0.22, largest=0.29, task_loss=3.05, trajectory=(), **given)
    bad = bench.Row(control=bench.PI, end=0.16, largest=0.31, task_loss=3.07, trajectory=(), **given)
    assert bench.missed([none, good]) == []
    assert len(bench.missed([none, bad])) == 3


def test_rules_are_judged_on_runs_where_nothing_is_wrong(tmp_path: Path) -> None:
    streams = script("streams")
    bench = script("bench_false_alarms")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["rule"].split(",")[0] for row in rows} == {"ChangePoint", "Limit", "Envelope", "GroupShift"}
    assert all(row["interval"][0] <= row["false_alarms"] <= row["interval"][1] for row in rows)
    low, high = streams.binomial_interval(5, 100)
    assert (round(low, 4), round(high, 4)) == (0.0164, 0.1128)


def test_the_ranks_benchmark_shares_the_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("bench_ranks")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [(row["model"], row["sensors"]) for row in rows] == [
        (model, sensors) for model in ("DDP", "FSDP2") for sensors in ("light", "full")
    ]
    assert all(row["tokens"] == 0.5 and row["cpu"] > 0 and row["processes"] == 2 for row in rows)
    assert "missed" not in capsys.readouterr().out


def test_the_contextual_benchmark_reads_both_banks(tmp_path: Path) -> None:
    bench = script("bench_contextual")
    arguments = ["--quick", "--cache", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert bench.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {(row["way"], row["bank"]) for row in rows} == {(way, bank) for way in bench.WAYS for bank in bench.BANKS}


def test_the_scan_benchmark_asks_the_reference_once(tmp_path: Path) -> None:
    bench = script("bench_scan")
    assert bench.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [(row["head"], row["times_asked"], row["num_checkpoints"]) for row in rows] == [
        ("frozen", 1, 3),
        ("trained", 1, 3),
    ]
    assert all(row["ratio"] > 0.5 for row in rows)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning")
def test_the_hack_benchmark_runs_every_kind_of_run_and_resumes(tmp_path: Path) -> None:
    bench = script("bench_hack")
    arguments = ["--quick", "--cache", str(tmp_path), "--json"]
    assert bench.main([*arguments, str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {row["arm"] for row in found["rows"]} == {"honest tests", "none", "budget 0.2", "beta 0.2"}
    assert [rule.split()[0] for rule in found["rules"]] == ["Limit"] * 4 + ["Envelope"] * 3 + ["ChangePoint"] * 2
    assert all(row["beta"] > 0 for row in found["rows"] if row["arm"].startswith("budget"))
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("hack-*/*/completions.json")}
    assert len(stamps) == 13
    assert bench.main([*arguments, str(tmp_path / "again.json")]) == 0
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert (tmp_path / "again.json").read_text() == (tmp_path / "found.json").read_text()


def test_the_hack_benchmark_counts_readings_and_names_each_missed_target() -> None:
    bench = script("bench_hack")
    assert [bench.delay(25, alert, 2) for alert in (24, 26, 28, 20, None)] == [0, 1, 2, -2, None]
    assert (bench.delay(24, 24, 2), bench.delay(24, 38, 2), bench.delay(None, 8, 2)) == (0, 7, None)
    numbers = ("reward", "score", "hacked", "kl", "largest", "beta", "place_at_beginning", "place_at_alert", "seconds")
    given = {**dict.fromkeys(numbers, 0), "alerts": {}, "term": ""}
    rows = [
        bench.Row(arm=arm, seed=seed, began=began, delays={"first": late, "second": 50}, **given)
        for arm, seed, began, late in (
            (bench.NONE, 0, 9, 10), (bench.NONE, 1, 9, 11), (bench.NONE, 2, 9, None), (bench.NONE, 3, None, None),
            ("budget 0.1", 4, 9, None),
        )
    ]  # fmt: skip
    assert [line[:6] for line in bench.missed(rows)] == ["seed 1", "seed 2"]
