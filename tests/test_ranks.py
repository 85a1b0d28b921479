"""Several processes of one run: they read what one alone would, fail together or not at all, and come to one verdict.

The processes are those of tests/ranks_worker.py, which torchrun starts: two, and then four. What one process reads is
read in here.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diffsensor import read_record
from diffsensor.probes import shares_of
from diffsensor.types import Batch, Plan
from ranks_worker import FAILS_AT, KINDS, NUM_STEPS, SCENARIOS, STAGES, Place, go_through, goes_on, watching
from tiny import llama

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers
]

#: What one launch may take: the processes start in some 10 s, and one that hangs is to fail, not to wait.
SECONDS = 240
FOLDER = Path(__file__).parent
WITH_FOUR = (
    "readings ddp", "readings ddp lora", "readings fsdp", "readings fsdp bf16", "few probes ddp", "few probes fsdp",
    "on and off fsdp", "nan in one", "sensor fails in update", "stopped ddp", "stopped fsdp", "goes on",
)  # fmt: skip

Facts = dict[str, Any]
Run = Mapping[str, list[Facts]]


def launched(size: int, path: Path, *names: str) -> dict[str, list[Facts]]:
    """What each of so many processes says of each scenario."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
        str(FOLDER / "ranks_worker.py"), str(path), *names,
    ]  # fmt: skip
    folders = os.pathsep.join([str(FOLDER.parent), str(FOLDER)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its processes with it
            told, _ = process.communicate(timeout=60)
            told += f"\nnot done after {SECONDS} s"
    run: dict[str, list[Facts]] = {}
    for name in names:
        files = [path / f"{name}-{size}-{rank}.json" for rank in range(size)]
        missing = {"error": f"Nothing is known of it. Told by the processes: {told[-3000:]}"}
        run[name] = [json.loads(file.read_text(encoding="utf-8")) if file.exists() else missing for file in files]
    return run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(path: Path) -> Run:
    return launched(2, path, *SCENARIOS)


@pytest.fixture(scope="module")
def four(path: Path, two: Run) -> Run:
    """After the two: of what they left, four go on."""
    return launched(4, path, *WITH_FOUR)


@pytest.fixture(params=[2, 4])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue("two" if request.param == 2 else "four")
    return found


@pytest.fixture(scope="module")
def alone(path: Path) -> Any:
    """What one process finds, each scenario once."""

    @cache
    def found(name: str) -> Facts:
        facts: Facts = json.loads(json.dumps(SCENARIOS[name](Place(0, 1, path))))
        return facts

    return found


def facts(run: Run, name: str) -> list[Facts]:
    if errors := [f"process {rank}: {each['error']}" for rank, each in enumerate(run[name]) if "error" in each]:
        pytest.fail("\n".join(errors))
    return run[name]


def same(run: Run, name: str, *keys: str) -> Facts:
    """The facts of the first process, once it is clear that all others have the same."""
    first, *others = facts(run, name)
    for key in keys:
        for rank, other in enumerate(others, 1):
            assert repr(other[key]) == repr(first[key]), f"process {rank} has another {key}"
    return first


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Number for number, to 1e-6 relative."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-300, nan_ok=True), key


# Readings


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_read_what_one_does(two: Run, alone: Any, kind: str) -> None:
    assert_reads_the_same(two, alone, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if f"readings {kind}" in WITH_FOUR])
def test_four_processes_read_what_one_does(four: Run, alone: Any, kind: str) -> None:
    assert_reads_the_same(four, alone, kind)


def assert_reads_the_same(run: Run, alone: Any, kind: str) -> None:
    name = f"readings {kind}"
    expected = alone(name)
    first = same(run, name, "same", "moved", "light", "fingerprint", "floors", "failures")
    assert len(expected["moved"]) > 60
    assert any("cka" in key for key in expected["moved"])
    assert all(value == 0 for value, _ in first["same"].values())
    assert any(value > 1e-3 for value, _ in expected["moved"].values())
    for what in ("moved", "light"):
        assert_equal(first[what], expected[what])
    assert first["light"].keys() < first["moved"].keys()
    assert len(expected["token table"]) > 10
    for found, one in zip(first["token table"], expected["token table"], strict=True):
        assert found == pytest.approx(one, rel=1e-6, nan_ok=True) if isinstance(found, float) else True
        assert_equal(
            {key: value for key, value in found.items() if isinstance(value, float)},
            {key: value for key, value in one.items() if isinstance(value, float)},
        )
        assert [each for each in found.values() if not isinstance(each, float)] == [
            each for each in one.values() if not isinstance(each, float)
        ]
    for what in ("vectors", "by probe"):
        assert expected[what]
        assert_equal(first[what], expected[what])
    assert first["floors"] == pytest.approx(expected["floors"], rel=1e-6, nan_ok=True)
    if "bf16" not in kind:  # where the weights themselves are kept in float32, which are others
        assert first["fingerprint"] == expected["fingerprint"]
    assert all(not each["failures"] and not each["told"] for each in run[name])


@pytest.mark.parametrize("kind", ["ddp", "ddp lora", "fsdp"])
def test_the_probes_tokens_are_shared(run: Run, alone: Any, kind: str) -> None:
    if f"readings {kind}" not in run:
        pytest.skip("not run by four")
    whole = sum(alone(f"readings {kind}")["tokens"])
    shares = [sum(each["tokens"]) for each in facts(run, f"readings {kind}")]
    assert max(shares) <= 1.1 * whole / len(shares)
    if kind != "fsdp":  # where all make as many forward passes, the shorter ones of some for nobody
        assert sum(shares) == whole


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fewer_probes_than_processes_are_read_all_the_same(run: Run, alone: Any, kind: str) -> None:
    name = f"few probes {kind}"
    expected, first = alone(name), same(run, name, "same", "moved", "failures")
    assert expected["moved"]["diffsensor/kl_ref_live"][0] > 1e-3
    assert_equal(first["same"], expected["same"])
    assert_equal(first["moved"], expected["moved"])
    assert first["failures"] == {}
    runs = [len(each["tokens"]) for each in run[name]]
    assert runs == ([1] * len(runs) if kind == "fsdp" else [1, *[0] * (len(runs) - 1)])


def test_batches_are_shared_so_that_none_is_left_out_and_tokens_are_even() -> None:
    sizes = [(4, 30), (8, 32), (1, 7), (3, 9), (8, 32), (2, 2), (5, 20)]
    batches = tuple(
        Batch(inputs={"input_ids": torch.zeros(size, dtype=torch.long)}, leading=size, index=torch.arange(1), start=at)
        for at, size in enumerate(sizes)
    )
    none = torch.zeros(0, dtype=torch.long)
    plan = Plan(batches=batches, probe=none, offset=none, target=none, packed=True)
    for size in (1, 2, 3, 4, 9):
        shares = shares_of(plan, size)
        assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
        tokens = [sum(math.prod(sizes[place]) for place in share) for share in shares]
        assert len(shares[0]) > 0
        # What longest-first promises: no share is beyond the even one by more than a third, or a single batch.
        assert max(tokens) <= max(4 / 3 * sum(tokens) / size, max(math.prod(each) for each in sizes))


# What training notices


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp head", "fsdp tied", "fsdp whole"])
def test_training_goes_bit_for_bit_as_without_the_monitor(two: Run, kind: str) -> None:
    for each in facts(two, f"on and off {kind}"):
        on, off = each["on"], each["off"]
        for what in ("losses", "gradients", "weights", "random"):
            assert on[what] == off[what], what
        assert len(set(off["losses"])) == len(off["losses"]) == 6
        assert on["sharded"] == [kind != "ddp"] * 6
        assert on["readings"]["diffsensor/kl_ref_live"][0] > 1e-3
        assert on["failures"] == {}


def test_training_goes_as_without_the_monitor_with_four(four: Run) -> None:
    for each in facts(four, "on and off fsdp"):
        assert {**each["on"], "sharded": [], "readings": {}} == each["off"]


# Faults


@pytest.mark.parametrize("where", FAILS_AT)
def test_a_sensor_that_fails_in_one_process_is_left_out_in_all_with_one_message(two: Run, where: str) -> None:
    assert_left_out(two, where)


def test_of_four_processes_too(four: Run) -> None:
    assert_left_out(four, "update")


def assert_left_out(run: Run, where: str) -> None:
    name = f"sensor fails in {where}"
    first = same(run, name, "looks", "alerts", "failures", "state")
    during, after = first["looks"]
    assert set(after) - set(during) == {"diffsensor/positions_seen"}
    assert len(during) > 20
    assert after["diffsensor/positions_seen"][0] > 100
    assert first["failures"] == {"failing": 1}
    assert first["alerts"] == [["sensor"], []]
    told = [[text for text in each["told"] if "left out of this reading" in text] for each in run[name]]
    assert [len(texts) for texts in told] == [
        int(rank == (where != "shape") * FAILS_AT[where]) for rank in range(len(told))
    ]


def test_a_sink_that_fails_is_known_to_all_processes(two: Run) -> None:
    first, second = facts(two, "sink fails")
    assert first["failures"] == second["failures"] == {"Full": 2}
    assert first["states"] == second["states"]
    assert first["verdict"] == second["verdict"] == "pass"
    assert [len(first["told"]), len(second["told"])] == [1, 0]


def test_nan_in_one_process_reads_as_nan_and_fails_the_gate_in_all(run: Run) -> None:
    first = same(run, "nan in one", "values", "alerts", "verdicts", "failures", "state")
    outputs = [value for key, value in first["values"].items() if "/at=" not in key and "group" not in key]
    assert len(outputs) > 5
    assert all(math.isnan(value) for value in outputs)
    # The norm before the head is behind all hookpoints.
    assert all(math.isfinite(value) for key, value in first["values"].items() if "/at=" in key)
    assert [subject for subject, _ in first["alerts"]] == ["nonfinite", "replicas"]
    assert [verdict["outcome"] for verdict in first["verdicts"]] == ["pass", "fail"]
    assert first["failures"] == {}


def test_replicas_that_differ_are_a_fault(two: Run) -> None:
    first = same(two, "replicas differ", "values", "alerts", "verdicts", "state")
    assert all(math.isfinite(value) for key, value in first["values"].items())
    ((subject, message),) = first["alerts"]
    assert subject == "replicas"
    assert message.startswith("process 1 of 2 holds other weights than process 0, which all should share, since step 1")
    assert first["verdicts"][1]["outcome"] == "fail"


def test_a_slow_process_is_waited_for(two: Run, alone: Any) -> None:
    first = same(two, "slow", "found", "failures")
    assert first["waited"] >= first["seconds_late"] > 0
    assert_equal(first["found"], alone("slow")["found"])
    assert first["failures"] == {}


def test_a_model_that_raises_in_one_process_costs_that_look(two: Run) -> None:
    first, second = facts(two, "forward fails")
    same(two, "forward fails", "during", "after", "alerts", "failures")
    assert first["during"] == {}
    assert len(first["after"]) > 30
    assert first["failures"] == {"forward pass": 1}
    assert "forward pass failed (ZeroDivisionError: in the model in process 1 of 2)" in first["alerts"][0]
    assert "left out of this reading" not in first["told"][0]
    assert second["told"][0].startswith("forward pass failed and is left out of this reading; the run goes on.")


def test_what_cannot_be_is_refused_in_all_processes(two: Run) -> None:
    first, second = facts(two, "attach fails")
    assert first["record"][0] == "StorageError"
    assert second["record"][0] == "RanksError"
    assert "Process 0 of 2 failed (StorageError: The record at" in second["record"][1]
    for what, shown in (
        ("probes", "probes"),
        ("sensors", "sensors"),
        ("record in one", "record"),
        ("weights", "reference"),
    ):
        assert first[what] == second[what]
        assert first[what][0] == "ConfigError"
        assert f"The processes of this run disagree about the monitor's {shown}: " in first[what][1]
    assert "'outputs, activations' in process 0, 'outputs_full, activations' in process 1" in first["sensors"][1]
    assert (first["reference"][0], second["reference"][0]) == ("StorageError", "RanksError")
    assert (first["answers"][0], second["answers"][0]) == ("RanksError", "NonFiniteError")
    assert first["answers"][1] == f"Process 1 of 2 failed (NonFiniteError: {second['answers'][1]})."
    assert first["nothing"] == second["nothing"] == []
    assert not first["never"]


def test_processes_at_other_steps_are_told_so_and_none_waits(two: Run) -> None:
    both = facts(two, "steps differ")
    for rank, each in enumerate(both):
        kind, sentence = each["at first"]
        assert kind == "RanksError"
        assert f"Process {rank} of 2 is at 'what is due from step {rank}' and another one at" in sentence
        for how, there in (("observe", "what is due from step"), ("read", "the look at step")):
            (told,) = each[how]["told"]
            assert told.startswith(
                f"Process {rank} of 2 is at '{there} {2 + rank}' and another one at '{there} {3 - rank}'"
            )
            assert "All processes must call the monitor, with the same arguments and at the same steps." in told
            assert "Nothing is read any more in this run, which goes on; a gate passes nothing." in told
            assert (each[how]["found"], each[how]["later"], each[how]["verdict"]) == (0, 0, "unknown")


def test_the_first_process_decides_when_to_look(two: Run) -> None:
    assert [each["read"] for each in facts(two, "schedules differ")] == [[0, 2, 4, 6]] * 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_come_to_one_end(run: Run, alone: Any, kind: str, path: Path) -> None:
    name = f"stopped {kind}"
    expected = alone(name)
    first = same(run, name, "step", "reason", "saved", "alerts", "verdict", "state", "loss", "failures")
    for what in ("step", "reason", "saved", "failures"):
        assert first[what] == expected[what]
    assert 2 < first["step"] < NUM_STEPS - 1
    assert [alert["rule"] for alert in first["alerts"]] == ["early", "far"]
    assert first["verdict"]["outcome"] == "fail"
    assert first["loss"] == pytest.approx(1.0 + (len(run[name]) - 1) / 2)
    assert len(first["told"]) > 0
    assert all(each["told"] == [] for each in run[name][1:])
    record, whole = (read_record(path / f"record {kind}, {size}") for size in (len(run[name]), 1))
    for what in ("alerts", "actions", "verdicts"):
        assert repr(getattr(record, what)) == repr(getattr(whole, what))
    assert len(record.actions) == 2
    readings = [reading for reading in record.readings if reading.metric != "loss"]
    assert repr(readings) == repr([reading for reading in whole.readings if reading.metric != "loss"])
    assert record.manifest["processes"] == len(run[name])


def test_an_action_that_one_process_refuses_has_failed(two: Run, path: Path) -> None:
    first = same(two, "stopped ddp refused", "step", "reason", "alerts", "verdict", "state")
    saved, stopped = read_record(path / "record ddp refused, 2").actions
    assert (saved.outcome, saved.action) == ("failed", "save_checkpoint")
    assert saved.detail == "the loop saved a checkpoint; process 1: refused, This process has no disk."
    assert (stopped.outcome, stopped.step) == ("done", first["step"])


def test_all_processes_wait_for_the_first_ones_file(two: Run) -> None:
    first, second = facts(two, "paused")
    for each in (first, second):
        assert (each["removed"], each["left"]) == (True, False)
        assert not each["removed, here"]
        assert not each["left, here"]
    assert first["refused"][0] == "RefusedError"
    assert second["refused"][0] == "RanksError"
    assert "The run cannot wait" in second["refused"][1]


# State


def lines(path: Path) -> dict[str, Any]:
    stored = read_record(path)
    return {
        "steps": sorted({each.step for each in stored.readings if each.step < NUM_STEPS}),
        "readings": [repr(each) for each in stored.readings if each.step < NUM_STEPS],
        "token table": [repr(each) for each in stored.token_shifts if each.step < NUM_STEPS],
        # Of a step that was read again they say so.
        "alerts": [repr(replace(each, is_repeat=False)) for each in stored.alerts if each.step < NUM_STEPS],
        "vectors": [
            [(key, vector.tolist()) for key, vector in sorted(stored.tensors(step).items())]
            for step in stored.tensor_steps
            if step < NUM_STEPS
        ],
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_run_goes_on_with_another_number_of_processes(two: Run, four: Run, path: Path) -> None:
    same(two, "goes on", "state by record", "state by file", "state by dcp")
    same(four, "goes on", "state by record", "state by file", "state by dcp")
    one = Place(0, 1, path)
    last = goes_on(one)
    whole = watching(one, "record of one")
    go_through(whole, llama(), range(NUM_STEPS))
    whole.close()
    expected = lines(path / "record of one")
    assert [steps.start for steps in STAGES.values()] == [0, 2, 4]
    assert len(expected["alerts"]) >= 3
    assert expected["steps"] == list(range(NUM_STEPS))
    for by in ("record", "file", "dcp"):
        found = lines(path / f"record by {by}")
        for what, value in expected.items():
            assert found[what] == value, (by, what)
    assert last["state by file"] == last["state by dcp"]
