"""The callback in TRL's trainers: with and without it the same losses, weights, completions and logs."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

import diffsensor_transformers
from diffsensor import DiffSensorError, Monitor, Reference, read_record
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import (
    TRAINERS,
    Kept,
    differences,
    lora,
    reward,
    sentences,
    text_probes,
    tiny_classifier,
    tiny_model,
    trace_of,
)

pytestmark = [
    # Calls of TRL and of transformers itself.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
]

KL = "diffsensor/kl_ref_live"

#: Each trainer, and the settings that change what it does beside the loss.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {}),
    "SFT with evaluation": ("SFT", {"eval_strategy": "steps", "eval_steps": 2}),
    "SFT packed": ("SFT", {"packing": True}),
    "SFT with gradient checkpointing": ("SFT", {"gradient_checkpointing": True}),
    "SFT in bfloat16": ("SFT", {"bf16": True}),
    "DPO": ("DPO", {}),
    "DPO with gradient accumulation": ("DPO", {"gradient_accumulation_steps": 2}),
    "GRPO": ("GRPO", {}),
    "GRPO with a KL term": ("GRPO", {"beta": 0.1}),
    "GRPO with gradient checkpointing": ("GRPO", {"gradient_checkpointing": True}),
    "GRPO in two iterations": ("GRPO", {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 6}),
    "KTO": ("KTO", {}),
    "RLOO": ("RLOO", {}),
}


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("peft", [pytest.param(False, id="full"), pytest.param(True, id="LoRA")])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_readings_is_bit_identical_to_the_run_without(run: str, peft: bool, tmp_path: Path) -> None:
    name, options = RUNS[run]
    without, with_readings = (
        trace_of(name, tmp_path, callbacks, peft_config=lora() if peft else None, **options)
        for callbacks in ([], [DriftMonitorCallback(text_probes(), 2, sensors="full", cache_dir=tmp_path)])
    )
    assert differences(without, with_readings) == []
    assert without["step"] >= 4
    assert len(without["history"]) >= without["step"]
    assert bool(without["completions"]) == (name in ("GRPO", "RLOO"))
    # The readings are there, and of a model that moves.
    values = [entry[KL] for entry in with_readings["ours"]]
    assert len(values) == 1 + without["step"] // 2
    assert values[0] == 0.0 < min(values[1:])


@pytest.mark.parametrize("name", list(TRAINERS))
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_readings_take_nothing_out_of_the_trainer_s_own_logs(name: str, logging_steps: int, tmp_path: Path) -> None:
    kept = Kept()
    monitor = DriftMonitorCallback(text_probes(), 2, cache_dir=tmp_path)
    trainer = TRAINERS[name](
        tmp_path / "run", [monitor, kept], tiny_model(tmp_path / "model"), logging_steps=logging_steps
    )
    trainer.train()
    for logs in (trainer.state.log_history, kept.logs):
        assert [entry["step"] for entry in logs if KL in entry] == [0, 2, 4]
        of_the_trainer = [entry for entry in logs if "loss" in entry]
        assert [entry["step"] for entry in of_the_trainer] == list(range(logging_steps, 5, logging_steps))
        # TRL's own means come with the loss, at every one of its logs.
        assert len({frozenset(entry) for entry in of_the_trainer}) == 1
        assert not [key for entry in logs if KL in entry for key in entry if key in ("reward", "entropy", "num_tokens")]


def test_grpo_without_a_kl_term_is_read_though_it_holds_no_reference(tmp_path: Path) -> None:
    monitor = DriftMonitorCallback(text_probes(), 2, cache_dir=tmp_path)
    trainer = TRAINERS["GRPO"](tmp_path / "run", [monitor], tiny_model(tmp_path / "model"))
    assert trainer.beta == 0.0
    assert trainer.ref_model is None
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if key == "kl"]
    last = [entry[KL] for entry in trainer.state.log_history if KL in entry][-1]
    reference = Reference.build(tiny_model(tmp_path / "model"), text_probes(), tmp_path)
    found = Monitor(text_probes(), reference).read(trainer.model, 4)
    assert last == next(reading.value for reading in found if reading.key == KL)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_a_resumed_run_goes_on_with_its_record(name: str, tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        monitor = DriftMonitorCallback(text_probes(), 2, cache_dir=tmp_path)
        trainer = TRAINERS[name](
            tmp_path / "run", [monitor], tiny_model(tmp_path / "model"), save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=resume)
    record = read_record(tmp_path / "run" / "diffsensor")
    assert sorted({reading.step for reading in record.readings}) == [0, 2, 4]
    assert not (tmp_path / "run" / "diffsensor.2").exists()


def test_a_reward_model_is_refused_when_training_begins(tmp_path: Path) -> None:
    trainer = reward(tmp_path, [DriftMonitorCallback(text_probes(), cache_dir=tmp_path)], tiny_classifier())
    with pytest.raises(DiffSensorError, match=r"logits of shape \[\d+, 1\].*no next-token distribution"):
        trainer.train()
    assert trainer.state.global_step == 0


README = Path(diffsensor_transformers.__file__).parent / "README.md"


def scripts() -> dict[str, str]:
    """The examples of the README that are whole scripts, by where they write."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    whole = [block for block in blocks if "sys.argv" in block]
    return {re.findall(r'"out/(\w+)"', block)[0]: block for block in whole}


@pytest.mark.filterwarnings("ignore:.*'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("name", ["trainer", "sft", "grpo"])
def test_the_readme_s_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("DIFFSENSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "model", max_position_embeddings=256)
    if name == "trainer":
        (tmp_path / "data").write_text(json.dumps(sentences(20)), encoding="utf-8")
    else:
        lines = [json.dumps({"question": text, "answer": text[::-1]}) for text in sentences(20)]
        (tmp_path / "data").write_text("\n".join(lines), encoding="utf-8")
    script, steps = re.subn(r"max_steps=\d+, logging_steps=\d+", "max_steps=2, logging_steps=1", scripts()[name])
    assert steps == 1
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "model"), str(tmp_path / "data")])
    exec(compile(script, f"{name}.py", "exec"), {"__name__": "__main__"})
    record = read_record(tmp_path / "out" / name / "diffsensor")
    assert {reading.step for reading in record.readings} == {0, 2}
    assert len({reading.group for reading in record.readings}) == 10  # all, eight, and the worst
