"""The callback in transformers' own Trainer: where readings appear, what they leave alone, how a run goes on."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    LlamaModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from diffsensor import ConfigError, DiffSensorError, Monitor, RecordContents, Reference, log_spaced, read_record
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import (
    WORDS,
    Kept,
    differences,
    lora,
    plain,
    text_probes,
    tiny_classifier,
    tiny_model,
    tokenizer,
    trace_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # transformers' own
]

KL = "diffsensor/kl_ref_live"


def callback(path: Path, every_n_steps: int | None = 2, **options: Any) -> DriftMonitorCallback:
    return DriftMonitorCallback(text_probes(), every_n_steps, cache_dir=path / "cache", **options)


def ours(history: list[dict[str, Any]], key: str = KL) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in history if key in entry}


def steps_of(record: RecordContents) -> list[int]:
    return sorted({reading.step for reading in record.readings})


def found_in(record: RecordContents, last: int) -> list[str]:
    """All that was read up to a step, in a form that can be compared: NaN is equal to NaN."""
    return sorted(repr(found) for found in (*record.readings, *record.token_shifts) if found.step <= last)


# Where readings appear


@pytest.mark.parametrize("logging_steps", [1, 2, 3])
def test_readings_are_in_the_log_and_no_loss_is_lost(logging_steps: int, tmp_path: Path) -> None:
    kept = Kept()
    trainer = plain(
        tmp_path, [callback(tmp_path), kept], tiny_model(tmp_path / "m"), max_steps=6, logging_steps=logging_steps
    )
    trainer.train()
    for logs in (trainer.state.log_history, kept.logs):
        assert list(ours(logs)) == [0, 2, 4, 6]
        assert ours(logs)[0] == 0.0 < min(list(ours(logs).values())[1:])
        assert [entry["step"] for entry in logs if "loss" in entry] == list(range(logging_steps, 7, logging_steps))


def test_groups_and_hookpoints_are_in_the_log_and_both_at_once_in_the_record_alone(tmp_path: Path) -> None:
    trainer = plain(tmp_path / "run", [callback(tmp_path, sensors="full")], tiny_model(tmp_path / "m"))
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry if key.startswith("diffsensor/")}
    assert {KL, f"{KL}/group=short", f"{KL}/group=worst", "diffsensor/relative_l2/at=model.layers.1"} <= keys
    assert not [key for key in keys if "/group=" in key and "/at=" in key]
    record = read_record(tmp_path / "run" / "diffsensor")
    assert [reading for reading in record.readings if reading.group and reading.hookpoint]


@pytest.mark.parametrize("bar", [True, False])
def test_the_console_shows_a_line_that_can_be_read(
    bar: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(tmp_path, [callback(tmp_path)], tiny_model(tmp_path / "m"), disable_tqdm=not bar).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if KL in line]
    assert len(lines) == 3  # at the steps 0, 2 and 4
    assert all("group=" not in line and "at=" not in line and "epoch" in line for line in lines)


def test_with_activations_alone_the_console_shows_those(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(tmp_path, [callback(tmp_path, sensors=["activations"])], tiny_model(tmp_path / "m")).train()
    assert "diffsensor/relative_l2/at=model.layers.0" in capsys.readouterr().out


def test_evaluations_and_checkpoints_at_the_step_of_a_reading_take_place(tmp_path: Path) -> None:
    kept = Kept()
    trainer = plain(
        tmp_path, [callback(tmp_path), kept], tiny_model(tmp_path / "m"), max_steps=6,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    assert kept.evaluated == kept.saved == [2, 4, 6]
    assert (tmp_path / "checkpoint-4" / "diffsensor-fixed.json").exists()


class StopsAt(TrainerCallback):
    """Stops the run when a log says so, as a user's own rule may."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        control.should_training_stop |= logs.get(KL, 0.0) > self.limit


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_callback_that_reads_the_log_can_stop_the_run(ours_first: bool, tmp_path: Path) -> None:
    callbacks: list[TrainerCallback] = [callback(tmp_path), StopsAt(1e-9)]
    trainer = plain(tmp_path, callbacks if ours_first else callbacks[::-1], tiny_model(tmp_path / "m"), max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 2


class Stops(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_training_stop = state.global_step == 3
        return control


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_run_that_is_stopped_is_read_at_its_last_step(ours_first: bool, tmp_path: Path) -> None:
    callbacks = [callback(tmp_path), Stops()]
    trainer = plain(tmp_path, callbacks if ours_first else callbacks[::-1], tiny_model(tmp_path / "m"), max_steps=6)
    trainer.train()
    assert list(ours(trainer.state.log_history)) == [0, 2, 3]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_best_model_loaded_at_the_end_is_not_taken_for_the_last_one(strategy: str, tmp_path: Path) -> None:
    trainer = plain(
        tmp_path / "run", [callback(tmp_path, 5), EarlyStoppingCallback(1)], tiny_model(tmp_path / "m"), max_steps=-1,
        num_train_epochs=4, learning_rate=1e-3, eval_strategy=strategy, eval_steps=1, save_strategy=strategy,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    last, best = trainer.state.global_step, int(str(trainer.state.best_model_checkpoint).rsplit("-", 1)[1])
    assert best < last < 32
    read = steps_of(read_record(tmp_path / "run" / "diffsensor"))
    # Within an epoch the model of the last step is still there to be read; after its end the best one has come in.
    assert (last in read) == (strategy == "steps")


def test_without_a_record_none_is_written(tmp_path: Path) -> None:
    trainer = plain(tmp_path, [callback(tmp_path, record=None)], tiny_model(tmp_path / "m"))
    trainer.train()
    assert not list(tmp_path.rglob("readings.jsonl"))
    assert list(ours(trainer.state.log_history)) == [0, 2, 4]


def test_a_second_run_in_one_directory_begins_a_record_of_its_own(tmp_path: Path) -> None:
    for _ in range(3):
        plain(tmp_path / "run", [callback(tmp_path)], tiny_model(tmp_path / "m")).train()
    names = sorted(path.name for path in (tmp_path / "run").glob("diffsensor*"))
    assert names == ["diffsensor", "diffsensor.2", "diffsensor.3"]
    assert [steps_of(read_record(tmp_path / "run" / name)) for name in names] == [[0, 2, 4]] * 3


def test_the_reference_may_be_another_model(tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", initializer_range=0.3)
    for reference in (other, tmp_path / "other"):
        trainer = plain(tmp_path / "run", [callback(tmp_path, reference=reference)], tiny_model(tmp_path / "m"))
        trainer.train()
        assert ours(trainer.state.log_history)[0] > 0.1
        assert ours(trainer.state.log_history, "diffsensor/top1_flip")[0] > 0.0


def test_a_reading_in_the_run_is_that_of_the_monitor_by_hand(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m")
    trainer = plain(tmp_path, [callback(tmp_path)], model)
    trainer.train()
    model.eval()  # as a user would, who has the model at the end of the run
    found = Monitor(text_probes(), Reference.build(tiny_model(tmp_path / "m"), text_probes(), tmp_path)).read(model, 4)
    logged = [entry for entry in trainer.state.log_history if KL in entry][-1]
    assert {reading.key: reading.value for reading in found if not (reading.group and reading.hookpoint)} == {
        key: value
        for key, value in logged.items()
        if key.startswith("diffsensor/") and not key.endswith("/noise_floor")  # measured at the beginning of each
    }


# No trace


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "LoRA": {"peft_config": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "evaluation and checkpoints": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"},
    "rare logs": {"logging_steps": 2, "max_steps": 7},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "counted tokens": {"include_num_input_tokens_seen": "all"},
}


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("run", RUNS)
def test_a_run_with_readings_is_bit_identical_to_the_run_without(run: str, tmp_path: Path) -> None:
    options = RUNS[run]
    traces = [
        trace_of(
            "Trainer", tmp_path, callbacks, **(options | ({"peft_config": lora()} if "peft_config" in options else {}))
        )
        for callbacks in ([], [callback(tmp_path, 2, sensors="full")])
    ]
    assert differences(*traces) == []
    assert traces[0]["step"] >= 4
    assert len(traces[1]["ours"]) == 1 + (traces[0]["step"] + 1) // 2


class Vandal(TrainerCallback):
    def __init__(self, harm: Callable[[Any], Any]) -> None:
        self.harm = harm

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step == 2:
            self.harm(model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda _: torch.rand(()), id="a random number"),
        pytest.param(lambda model: model.eval(), id="eval mode"),
        pytest.param(lambda model: model.lm_head.requires_grad_(False), id="a frozen head"),
    ],
)
def test_this_comparison_notices(harm: Callable[[Any], Any], tmp_path: Path) -> None:
    one, other = (trace_of("Trainer", tmp_path, callbacks) for callbacks in ([], [Vandal(harm)]))
    assert differences(one, other) != []


# Going on after a stop


class Crash(TrainerCallback):
    """After the checkpoint of its step and of all before it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError


def crash(trainer: Any, **options: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        trainer.train(**options)
    for monitor in trainer.callback_handler.callbacks:
        if isinstance(monitor, DriftMonitorCallback):
            monitor.close()  # as the end of the process would


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


def banks(path: Path) -> list[TrainerCallback]:
    return [callback(path, 2, sensors="full"), callback(path, None, schedule=log_spaced(5), bank="second")]


@pytest.mark.parametrize(("step", "peft"), [(1, False), (2, False), (3, False), (4, False), (5, False), (3, True)])
def test_a_resumed_run_writes_the_records_of_the_uninterrupted_one(step: int, peft: bool, tmp_path: Path) -> None:
    def trainer_of(run: str, *extra: TrainerCallback) -> Any:
        torch.manual_seed(3)
        options = SAVING | ({"peft_config": lora()} if peft else {})
        return plain(tmp_path / run, [*banks(tmp_path), *extra], tiny_model(tmp_path / "m"), **options)

    trainer_of("whole").train()
    crash(trainer_of("parts", Crash(min(step + 2, 5))))  # past the checkpoint: what came after it is read again
    trainer_of("parts").train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{step}"))
    for name, steps in (("diffsensor", [0, 2, 4, 5]), ("diffsensor-second", [0, 1, 2, 3, 4, 5])):
        whole, parts = (read_record(tmp_path / run / name) for run in ("whole", "parts"))
        assert steps_of(whole) == steps
        # The checkpoint of the last step does not end a run: transformers takes one more step from there.
        assert steps_of(parts) == (steps if step < 5 else [*steps, 6])
        assert found_in(parts, last=5) == found_in(whole, last=5)
    assert sorted(path.name for path in (tmp_path / "parts").glob("diffsensor*")) == ["diffsensor", "diffsensor-second"]


def stopped_at_3(path: Path) -> Path:
    crash(plain(path / "run", [callback(path), Crash(3)], tiny_model(path / "m"), **SAVING))
    return path / "run" / "checkpoint-3"


def test_resume_from_checkpoint_true_takes_the_last_one(tmp_path: Path) -> None:
    stopped_at_3(tmp_path)
    trainer = plain(tmp_path / "run", [callback(tmp_path)], tiny_model(tmp_path / "m"), **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert list(ours(trainer.state.log_history)) == [0, 2, 4, 5]
    assert steps_of(read_record(tmp_path / "run" / "diffsensor")) == [0, 2, 4, 5]


def test_a_run_resumed_into_another_directory_keeps_its_reference(tmp_path: Path) -> None:
    checkpoint = stopped_at_3(tmp_path)
    trainer = plain(tmp_path / "other", [callback(tmp_path)], tiny_model(tmp_path / "m"), **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    old, new = (read_record(tmp_path / run / "diffsensor") for run in ("run", "other"))
    assert steps_of(new) == [4, 5]
    assert old.manifest["reference"] == new.manifest["reference"]


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_run_that_an_error_ended_goes_on_in_the_same_process(same_trainer: bool, tmp_path: Path) -> None:
    # As in a notebook, where nobody closed the record.
    stop, record = Crash(3), tmp_path / "record"
    first = plain(tmp_path / "run", [callback(tmp_path, record=record), stop], tiny_model(tmp_path / "m"), **SAVING)
    with pytest.raises(ZeroDivisionError):
        first.train()
    stop.step = -1
    second = plain(tmp_path / "run", [callback(tmp_path, record=record)], tiny_model(tmp_path / "m"), **SAVING)
    (first if same_trainer else second).train(resume_from_checkpoint=True)
    assert steps_of(read_record(record)) == [0, 2, 4, 5]


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_state_is_refused_with_a_sentence(harm: str, tmp_path: Path) -> None:
    file = stopped_at_3(tmp_path) / "diffsensor-fixed.json"
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    trainer = plain(tmp_path / "run", [callback(tmp_path)], tiny_model(tmp_path / "m"), **SAVING)
    with pytest.raises(DiffSensorError, match=r"diffsensor-fixed\.json"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_our_state_brings_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (stopped_at_3(tmp_path) / "diffsensor-fixed.json").unlink()
    trainer = plain(tmp_path / "run", [callback(tmp_path)], tiny_model(tmp_path / "m"), **SAVING)
    with caplog.at_level(logging.WARNING, "diffsensor_transformers"):
        trainer.train(resume_from_checkpoint=True)
    assert "goes on at step 3 from a checkpoint without a state of bank 'fixed'" in caplog.text
    assert "reference=" in caplog.text
    # Not the record of the first run: that one has another reference.
    assert steps_of(read_record(tmp_path / "run" / "diffsensor.2")) == [3, 4, 5]
    assert read_record(tmp_path / "run" / "diffsensor.2").readings[0].value == 0.0


def test_a_resume_whose_reference_is_gone_is_refused(tmp_path: Path) -> None:
    stopped_at_3(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    trainer = plain(tmp_path / "run", [callback(tmp_path)], tiny_model(tmp_path / "m"), **SAVING)
    with pytest.raises(ValueError, match="It is not built anew, because the model has been trained since"):
        trainer.train(resume_from_checkpoint=True)


def test_the_state_in_a_checkpoint_is_plain(tmp_path: Path) -> None:
    state = json.loads((stopped_at_3(tmp_path) / "diffsensor-fixed.json").read_text())
    assert state["diffsensor-fixed"]["last_step"] == 2


# Refused when training begins, with a sentence


def refused(path: Path, callbacks: list[TrainerCallback], sentence: str, model: Any = None, **options: Any) -> None:
    trainer = plain(path / "run", callbacks, tiny_model(path / "m") if model is None else model, **options)
    with pytest.raises(DiffSensorError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0


def test_probes_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    probes = text_probes(tokenizer=tokenizer(WORDS[::-1]))
    refused(tmp_path, [DriftMonitorCallback(probes, cache_dir=tmp_path)], "tokenizer")


def test_a_model_spread_over_devices_is_refused(tmp_path: Path) -> None:
    class Offloads(TrainerCallback):
        """What device_map does with the layers that find no room."""

        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
        ) -> None:
            model.model.layers[1].to("meta")

    refused(tmp_path, [Offloads(), callback(tmp_path)], r"spread over the devices cpu, meta.*device_map=\{'': 0\}")


def test_two_callbacks_of_one_bank_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, [callback(tmp_path), callback(tmp_path, 3)], "have the bank 'fixed'.*bank='fixed2'")


def test_two_callbacks_of_one_record_are_refused(tmp_path: Path) -> None:
    callbacks = [callback(tmp_path, record=tmp_path / "r"), callback(tmp_path, record=str(tmp_path / "r"), bank="b")]
    refused(tmp_path, callbacks, "have the record '.*'auto' takes one for each bank")


def test_a_model_without_an_output_head_is_refused(tmp_path: Path) -> None:
    model = LlamaModel(tiny_model(tmp_path / "m").config)
    refused(tmp_path, [callback(tmp_path)], "BaseModelOutputWithPast.*no output head", model)


def test_a_classifier_of_texts_is_refused_with_text_probes(tmp_path: Path) -> None:
    refused(tmp_path, [callback(tmp_path)], r"logits of shape \[1, 1\], expected \[1, 5, classes\]", tiny_classifier())


def test_zero_3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsensor_transformers.callback.is_deepspeed_zero3_enabled", lambda: True)
    refused(tmp_path, [callback(tmp_path)], "a run of DeepSpeed ZeRO-3.*Use ZeRO-2, or FSDP2")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"every_n_steps": 0}, "at least 1"),
        ({"every_n_steps": 5, "schedule": log_spaced()}, "give one of them"),
        ({"sensors": "lihgt"}, "'light'"),
        ({"bank": "my probes"}, "bank='my probes'"),
        ({"bank": ""}, "bank=''"),
        ({"temperature": "polcy"}, "temperature='polcy'.*Did you mean 'policy'"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DriftMonitorCallback(text_probes(), **wrong)


def test_a_wrong_hookpoint_is_refused_before_the_first_update(tmp_path: Path) -> None:
    refused(tmp_path, [callback(tmp_path, hookpoints=["no.such.block"])], r"No hookpoint is named 'no\.such\.block'")


def test_a_sensor_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"
        metrics: dict[str, Any] = {}  # noqa: RUF012

        def open(self, *_: Any) -> Any:
            raise RuntimeError("this sensor is broken")

    trainer = plain(tmp_path, [callback(tmp_path, sensors=[Broken()])], tiny_model(tmp_path / "m"))
    trainer.train()
    assert trainer.state.global_step == 4
    assert "this sensor is broken" in caplog.text
