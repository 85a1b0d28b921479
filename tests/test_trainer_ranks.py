"""The callback in runs of two processes, on the CPU: DDP, FSDP2 and GRPO read what one process reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest
import torch

from diffsensor import Monitor, read_record, read_verdict
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import TRAINERS, text_probes, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
]

WORKER = Path(__file__).parent / "trainers_on_two.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
# With --cpu it starts its processes by mpirun alone.
ON_CPUS = ["--multi_gpu"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"]
FSDP2 += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
#: As in trainers_on_two.py, in one process.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-1, "per_device_train_batch_size": 4, "max_steps": 6}
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
KL = "diffsensor/kl_ref_live"


def model_of(path: Path) -> Any:
    return tiny_model(path / "model", attention_dropout=0.0)


def monitor(path: Path, **options: Any) -> DriftMonitorCallback:
    return DriftMonitorCallback(text_probes(), 2, **({"sensors": "full", "cache_dir": path / "cache"} | options))


def ran(what: str, path: Path, launcher: list[str]) -> list[dict[str, Any]]:
    """What both processes found, in order of rank. They are given two minutes."""
    root = WORKER.parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "integrations", WORKER.parent)))}
    command = [sys.executable, *launcher, str(WORKER), what, str(path)]
    with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True) as launched:
        try:
            output, _ = launched.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            launched.terminate()  # and not kill: it is the launcher, which ends its processes first
            output, _ = launched.communicate()
            raise AssertionError(f"The processes hang. {output[-6000:]}") from None
    assert launched.returncode == 0, output[-6000:]
    return [json.loads((path / f"{what}-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def by_step(entries: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The readings in a trainer's log, without epoch and noise floors."""
    return {
        entry["step"]: {key: value for key, value in entry.items() if "diffsensor/" in key and "floor" not in key}
        for entry in entries
        if KL in entry
    }


def by_hand(path: Path, weights: dict[str, torch.Tensor], **options: Any) -> dict[str, float]:
    """What one process reads of these weights, against the model that training began with."""
    watching = Monitor(text_probes(), sensors="full", cache_dir=path / "cache", **options)
    model = model_of(path)
    watching.attach(model)
    model.load_state_dict(weights)
    return {reading.key: reading.value for reading in watching.read(model, 1)}


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def assert_same(theirs: dict[str, float], ours: dict[str, float], *, rel: float = 1e-6) -> None:
    """Every reading that is in the log, where single groups at single hookpoints are not."""
    assert len(theirs) > 20
    for key, value in theirs.items():
        if "rollout" not in key:
            assert value == pytest.approx(ours[key], rel=rel, abs=1e-9), key


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run in one process, and then all that is done in two."""
    path = tmp_path_factory.mktemp("ddp")
    trainer = TRAINERS["Trainer"](path / "one" / "run", [monitor(path)], model_of(path), **PLAIN, **SAVES)
    trainer.train()
    return path, ran("ddp", path, TORCHRUN)


Found = tuple[Path, list[dict[str, Any]]]


def test_under_ddp_a_run_with_readings_is_bit_identical_to_the_run_without(ddp: Found) -> None:
    for found in ddp[1]:
        assert found["differences"] == []
        assert found["differences with LoRA"] == []


def test_two_processes_read_what_one_does(ddp: Found) -> None:
    path, (first, second) = ddp
    assert first["ours"] == second["ours"]
    read = by_step(first["ours"])
    assert list(read) == [0, 2, 4, 6]
    for step in (2, 4, 6):
        assert_same(read[step], by_hand(path, stored(path / "on" / "run" / f"checkpoint-{step}")))
    assert 0 == read[0][KL] < read[2][KL] < read[6][KL]
    # The run itself is that of one process with batches twice as large, to rounding.
    record = read_record(path / "one" / "run" / "diffsensor")
    alone = {reading.key: reading.value for reading in record.readings if reading.step == 6}
    assert_same(read[6], alone, rel=1e-3)


def test_the_first_process_writes_record_verdicts_and_states(ddp: Found) -> None:
    path, found = ddp
    run = path / "on" / "run"
    record = read_record(run / "diffsensor")
    assert sorted({reading.step for reading in record.readings}) == [0, 2, 4, 6]
    assert record.manifest["processes"] == 2
    alone = read_record(path / "one" / "run" / "diffsensor").manifest
    assert record.manifest["recipe"] == alone["recipe"]  # one batch of 4 is two of 2
    assert len(record.verdicts) == 3
    for step in (2, 4, 6):
        assert read_verdict(run / f"checkpoint-{step}" / "diffsensor-verdict.json").outcome == "pass"
        assert (run / f"checkpoint-{step}" / "diffsensor-fixed.json").exists()
    passed = run / "last-passed" / "checkpoint-6"
    assert [each["last passed"] for each in found] == [str(passed)] * 2
    # With what the other process wrote into it.
    assert {file.name for file in passed.iterdir()} == {file.name for file in (run / "checkpoint-6").iterdir()}
    assert (passed / "rng_state_1.pth").exists()


def test_a_stop_ends_the_run_in_all_processes(ddp: Found) -> None:
    assert [found["stopped at"] for found in ddp[1]] == [2, 2]


def test_a_checkpoint_that_did_not_pass_is_the_best_in_no_process(ddp: Found) -> None:
    path, (first, second) = ddp
    best = path / "best" / "run" / "checkpoint-2"
    assert first["best passed"] == second["best passed"] == str(path / "best" / "run" / "last-passed" / "checkpoint-2")
    assert first["best"] == second["best"]
    sums = {name: weight.double().sum().item() for name, weight in stored(best).items()}
    assert {name: first["best"][name] for name in sums} == sums


def test_a_rollback_takes_all_processes_back(ddp: Found) -> None:
    path, (first, second) = ddp
    assert first["rolled back"] == second["rolled back"]
    sums = {name: weight.double().sum().item() for name, weight in stored(path / "on" / "run" / "checkpoint-2").items()}
    assert {name: first["rolled back"][name] for name in sums} == sums
    taken = read_record(path / "back" / "run" / "diffsensor").actions
    assert [(each.step, each.action, each.outcome) for each in taken] == [(4, "rollback", "done"), (4, "stop", "done")]
    assert first["rolled back to a checkpoint"] == second["rolled back to a checkpoint"]
    sums = {
        name: weight.double().sum().item() for name, weight in stored(path / "best" / "run" / "checkpoint-2").items()
    }
    assert {name: first["rolled back to a checkpoint"][name] for name in sums} == sums


def test_a_run_of_one_process_goes_on_in_two(ddp: Found) -> None:
    path, (first, second) = ddp
    assert first["went on"] == second["went on"]
    record = read_record(path / "one" / "run" / "diffsensor")
    assert sorted({reading.step for reading in record.readings}) == [0, 2, 4, 6]
    assert record.manifest["processes"] == 1
    went_on = by_step(first["went on"])
    assert list(went_on) == [0, 2, 4, 6]
    for step in (4, 6):
        assert_same(went_on[step], by_hand(path, stored(path / "one" / "run" / f"checkpoint-{step}")))


def test_a_run_of_two_processes_goes_on_in_one(ddp: Found, tmp_path: Path) -> None:
    path, (first, _) = ddp
    trainer = TRAINERS["Trainer"](path / "on" / "run", [monitor(path)], model_of(path), **PLAIN, **SAVES)
    trainer.train(resume_from_checkpoint=str(path / "on" / "run" / "checkpoint-4"))
    record = read_record(path / "on" / "run" / "diffsensor")
    assert sorted({reading.step for reading in record.readings}) == [0, 2, 4, 6]
    now = {reading.key: reading.value for reading in record.readings if reading.step == 6}
    assert_same(by_step(first["ours"])[6], now, rel=1e-3)
    assert_same(by_step(trainer.state.log_history)[6], by_hand(path, stored(path / "on" / "run" / "checkpoint-6")))


def test_under_fsdp2_two_processes_read_what_one_does_and_leave_no_trace(tmp_path: Path) -> None:
    model_of(tmp_path)
    found = ran("fsdp", tmp_path, [*ACCELERATE, *FSDP2])
    for way in ("accelerate", "transformers"):
        first, second = (each[way] for each in found)
        assert first["differences"] == second["differences"] == []
        assert first["rows"] == second["rows"] == [9, 9]  # of 18 tokens
        assert first["ours"] == second["ours"]
        read = by_step(first["ours"])
        assert list(read) == [0, 2, 4]
        assert_same(read[4], by_hand(tmp_path, torch.load(tmp_path / f"{way}-0.pt")))
    passed = tmp_path / "accelerate-1" / "run" / "last-passed" / "checkpoint-4"
    assert [each["accelerate"]["last passed"] for each in found] == [str(passed)] * 2
    assert read_verdict(passed / "diffsensor-verdict.json").outcome == "pass"
    assert_same(read[4], by_hand(tmp_path, stored(passed)))


def test_grpo_in_two_processes_is_read_as_in_one_and_tells_of_all_completions(tmp_path: Path) -> None:
    model_of(tmp_path)
    first, second = ran("grpo", tmp_path, [*ACCELERATE, *ON_CPUS])
    assert first["differences"] == second["differences"] == []
    assert first["ours"] == second["ours"]
    read = by_step(first["ours"])
    assert list(read) == [0, 2, 4]
    for step in (2, 4):
        weights = stored(tmp_path / "on" / "run" / f"checkpoint-{step}")
        assert_same(read[step], by_hand(tmp_path, weights, temperature=0.8))
    logged = {entry["step"]: entry for entry in first["history"] if "entropy" in entry}
    for ours, theirs in (
        ("rollout_kl_k3", "kl"),
        ("rollout_entropy", "entropy"),
        ("rollout_length", "completions/mean_length"),
        ("rollout_reward/letters", "rewards/letters/mean"),
    ):
        assert [read[step][f"diffsensor/{ours}"] for step in (2, 4)] == [logged[step][theirs] for step in (2, 4)]
    gap = read[4]["diffsensor/rollout_kl_minus_kl_live_ref"]
    probes = (read[2]["diffsensor/kl_live_ref"] + read[4]["diffsensor/kl_live_ref"]) / 2
    assert gap == pytest.approx(read[4]["diffsensor/rollout_kl_k3"] - probes)
