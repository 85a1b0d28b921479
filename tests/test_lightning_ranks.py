"""DriftMonitor in Lightning runs of two processes: DDP, and FSDP2 by ModelParallelStrategy; gloo, on the CPU.

Everything that two processes do here is done in one launch (see lightning_in_ranks.py), and held against runs of one.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsensor import Verdict, read_record, read_verdict
from lightning_in_ranks import Crash, read_against_another, run_of_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
]

#: After so many seconds the processes have waited for each other.
SECONDS = 120
FOLDER = Path(__file__).parent

#: Of each run, what each process saw.
Runs = Mapping[str, list[dict[str, Any]]]


def launched(out: Path) -> Runs:
    script = str(FOLDER / "lightning_in_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(out)]
    folders = os.pathsep.join(map(str, (FOLDER.parent, FOLDER.parent / "integrations", FOLDER)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its processes with it
            told = f"{process.communicate()[0]}\nnot done after {SECONDS} s"
    assert process.returncode == 0, told[-5000:]
    names = {path.stem.rpartition("-")[0] for path in out.glob("*.pt")}
    return {name: [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)] for name in names}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def runs(out: Path) -> Runs:
    run_of_parts(out / "one-to-two", Crash(5))  # which two processes go on with
    return launched(out)


@pytest.fixture(scope="module")
def whole(out: Path) -> Path:
    """The record of a run of one process that nothing interrupted."""
    assert run_of_parts(out / "whole")["step"] == 7
    return out / "whole" / "record"


def read(record: Path) -> dict[str, float]:
    """All readings with their standard errors, by their step and their key."""
    readings = read_record(record).readings
    values = {f"{reading.step} {reading.key}": reading.value for reading in readings}
    return values | {f"{reading.step} {reading.key} stderr": reading.stderr for reading in readings}


def as_good_as(values: dict[str, float]) -> Any:
    # What is below is the rounding of float32 and of nothing else, as at the first step of a run.
    return pytest.approx(values, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_read_and_train_as_one_does(kind: str, out: Path, runs: Runs) -> None:
    """The same batches shared by two, so that loss and weights are the same as well, from a drift at the first step."""
    alone = read_against_another(out / "alone" / kind)
    assert read(out / kind / "record") == as_good_as(read(out / "alone" / kind / "record"))
    assert {reading.step for reading in read_record(out / kind / "record").readings} == {0, 2, 4, 6}
    assert alone["kl"][0] > 0.01
    for seen in runs[kind]:  # other callbacks in both processes
        assert seen["step"] == alone["step"] == 6
        assert seen["kl"] == pytest.approx(alone["kl"], rel=1e-6)
        assert seen["last"] == pytest.approx(alone["last"], rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_in_two_processes_the_run_is_bit_for_bit_the_one_without_a_monitor(kind: str, runs: Runs) -> None:
    for seen in runs[f"{kind}-trace"]:
        assert seen["differences"] == []
        assert seen["step"] == len(seen["losses"]) == 6
    first, second = (seen["losses"] for seen in runs[f"{kind}-trace"])
    assert first != second  # they were given other texts


def test_an_action_stops_all_processes_and_one_that_fails_in_one_of_them_is_told(out: Path, runs: Runs) -> None:
    assert [seen["step"] for seen in runs["stopped"]] == [3, 3]
    place = out / "stopped" / "logs" / "version_0"
    record = read_record(place / "diffsensor")
    assert [(each.step, each.action, each.outcome) for each in record.actions] == [
        (3, "save_checkpoint", "failed"),
        (3, "stop", "done"),
    ]
    # Where the run's own files are is what the first process says.
    assert record.actions[0].detail.endswith(f"process 1: done, saved {place}/diffsensor-checkpoints/step=3.ckpt")


def test_the_first_process_says_where_the_record_is_and_alone_writes_it(out: Path, runs: Runs) -> None:
    """Also where the others have no logger that would say it."""
    assert runs["stopped"]
    records = list(out.joinpath("stopped").rglob("readings.jsonl"))
    assert records == [out / "stopped" / "logs" / "version_0" / "diffsensor" / "readings.jsonl"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_gate_keeps_the_same_account_in_all_processes_and_writes_each_verdict_once(
    kind: str, out: Path, runs: Runs
) -> None:
    for seen in runs[f"{kind}-gated"]:
        assert seen["best"] == ["best/step=2.ckpt", "best/step=5.ckpt"]
        assert (seen["best of all"], seen["passed"]) == ("all/step=5.ckpt", "all/step=5.ckpt")
    first, second = runs[f"{kind}-gated"]
    assert second["written"] == []
    assert len(first["written"]) == 2 + 6 + 6 + 1  # the two best, each step, each step as the last one, the end
    outcomes = {path.name: read_verdict(path).outcome for path in (out / f"{kind}-gated").rglob("*.ckpt")}
    assert outcomes == {
        "step=2.ckpt": "pass",
        "step=5.ckpt": "pass",
        "step=6.ckpt": "fail",
        "last.ckpt": "fail",
        "end.ckpt": "fail",
    }
    verdicts = [(each.step, each.outcome) for each in read_record(out / f"{kind}-gated" / "record").verdicts]
    assert verdicts == [(1, "fail"), (2, "pass"), (3, "fail"), (4, "fail"), (5, "pass"), (6, "fail")]


@pytest.mark.parametrize(("kind", "metadata"), [("ddp", ""), ("fsdp2", "meta.pt")])
def test_a_checkpoint_holds_the_verdict_and_the_state_also_where_each_process_saves_its_part(
    kind: str, metadata: str, out: Path, runs: Runs
) -> None:
    assert runs[f"{kind}-gated"]
    path = out / f"{kind}-gated" / "all" / "step=5.ckpt"
    assert path.is_dir() == bool(metadata)
    checkpoint = torch.load(path / metadata, weights_only=True)
    assert Verdict(**checkpoint["diffsensor_verdict"]) == read_verdict(path)
    state = checkpoint["callbacks"]["DriftMonitor"]
    assert state["read"] == 5
    assert [Path(passed).name for passed in state["passed"]] == [f"step={step}.ckpt" for step in (2, 2, 5, 5)]


def test_a_run_of_one_process_goes_on_in_two_as_if_nothing_had_been(out: Path, runs: Runs, whole: Path) -> None:
    for seen in runs["one-to-two"]:
        assert (seen["crashed"], seen["step"]) == (False, 7)
        assert seen["passed"].endswith("step=7.ckpt")
    assert read(out / "one-to-two" / "record") == as_good_as(read(whole))


@pytest.mark.parametrize("run", ["two-to-one", "fsdp2-to-one"])
def test_a_run_of_two_processes_goes_on_in_one_as_if_nothing_had_been(
    run: str, out: Path, runs: Runs, whole: Path
) -> None:
    assert [seen["crashed"] for seen in runs[run]] == [True, True]
    assert run_of_parts(out / run, ckpt=out / run / "ckpt" / "step=3.ckpt")["step"] == 7
    assert read(out / run / "record") == as_good_as(read(whole))


def test_a_run_goes_on_from_a_distributed_checkpoint_as_if_nothing_had_been(out: Path, runs: Runs, whole: Path) -> None:
    assert [seen["crashed"] for seen in runs["fsdp2-parts"]] == [True, True]
    assert [seen["step"] for seen in runs["fsdp2-resumed"]] == [7, 7]
    assert (out / "fsdp2-parts" / "ckpt" / "step=3.ckpt" / "__1_0.distcp").exists()
    assert read(out / "fsdp2-parts" / "record") == as_good_as(read(whole))


def test_a_process_that_crashes_waits_for_nobody_and_nobody_for_it(runs: Runs) -> None:
    first, crashed = runs["one-crashes"]
    assert crashed["raised"] == "ZeroDivisionError"
    assert first["raised"] == "RuntimeError"  # of the training's own next exchange
    assert max(first["seconds"], crashed["seconds"]) < 30
