"""DriftMonitor inside Lightning: when it reads, who sees the readings, how a run goes on after a stop."""

import csv
import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from diffsensor import Findings, log_spaced, read_record
from diffsensor_lightning import DriftMonitor
from tiny_lightning import TinyModule, ValidatedModule, data, tiny_probes, trainer

KL = "diffsensor/kl_ref_live"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
]


class Kept:
    """A sink that keeps all findings."""

    def __init__(self) -> None:
        self.findings: list[Findings] = []

    def write(self, findings: Findings) -> None:
        self.findings.append(findings)

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [findings.step for findings in self.findings]

    def values(self, key: str = KL) -> list[float]:
        return [reading.value for found in self.findings for reading in found.readings if reading.key == key]


def drift_monitor(tmp_path: Path, every_n_train_steps: int | None = 2, **options: Any) -> DriftMonitor:
    return DriftMonitor(tiny_probes(), every_n_train_steps, **({"cache_dir": tmp_path / "cache"} | options))


# When it reads


def test_it_reads_before_the_first_update_then_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    kept = Kept()
    trainer([drift_monitor(tmp_path, 4, sinks=[kept])], tmp_path).fit(TinyModule(), data())
    assert kept.steps == [0, 4, 6]
    assert kept.values()[0] == 0.0
    assert 0 < kept.values()[1] < kept.values()[2]


def test_gradient_accumulation_counts_optimizer_steps_and_reads_none_twice(tmp_path: Path) -> None:
    kept = Kept()
    monitor = drift_monitor(tmp_path, 2, sinks=[kept])
    trainer([monitor], tmp_path, accumulate_grad_batches=3, max_epochs=3).fit(TinyModule(), data())
    assert kept.steps == [0, 2, 4, 6]


class TwoOptimizers(TinyModule):
    """Manual optimization in which global_step moves by two for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.model.model.parameters(), 0.1),
            torch.optim.SGD(self.model.lm_head.parameters(), 0.1),
        ]


def test_steps_that_two_optimizers_step_over_are_read_at_the_next_one(tmp_path: Path) -> None:
    kept = Kept()
    trainer([drift_monitor(tmp_path, 5, sinks=[kept])], tmp_path).fit(TwoOptimizers(), data())
    assert kept.steps == [0, 6, 10, 12]


def test_a_schedule_takes_the_place_of_a_number_of_steps(tmp_path: Path) -> None:
    kept = Kept()
    monitor = drift_monitor(tmp_path, None, schedule=log_spaced(per_decade=3), sinks=[kept])
    trainer([monitor], tmp_path, max_epochs=2).fit(TinyModule(), data())
    assert kept.steps == [0, 1, 2, 5, 10, 12]


def test_sanity_check_validation_and_test_do_not_read(tmp_path: Path) -> None:
    kept = Kept()
    runner = trainer(
        [drift_monitor(tmp_path, 3, sinks=[kept])], tmp_path, num_sanity_val_steps=2, val_check_interval=1, max_epochs=1
    )
    module = ValidatedModule()
    runner.validate(module, data(8), verbose=False)
    assert kept.steps == []
    runner.fit(module, data(), data(8))
    runner.validate(module, data(8), verbose=False)
    assert kept.steps == [0, 3, 6]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_reference_is_taken_in_the_precision_of_training(precision: str, tmp_path: Path) -> None:
    kept = Kept()
    trainer([drift_monitor(tmp_path, 3, sinks=[kept])], tmp_path, precision=precision).fit(TinyModule(), data())
    assert kept.steps == [0, 3, 6]
    assert kept.values()[0] == 0.0
    assert 0 < kept.values()[1] < kept.values()[2]
    assert torch.get_default_dtype() == torch.float32


# Who sees the readings


def logged_by_csv(logger: CSVLogger) -> dict[int, float]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[KL]) for row in csv.DictReader(file) if row.get(KL)}


def test_every_logger_gets_every_reading_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept, table, board = Kept(), CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    monitor = drift_monitor(tmp_path, 2, sinks=[kept])
    trainer([monitor], tmp_path, logger=[table, board], log_every_n_steps=50).fit(TinyModule(), data())
    expected = dict(zip(kept.steps, kept.values(), strict=True))
    assert list(expected) == [0, 2, 4, 6]
    assert logged_by_csv(table) == expected
    events = EventAccumulator(board.log_dir).Reload()
    assert {event.step: event.value for event in events.Scalars(KL)} == pytest.approx(expected)
    read = [r for found in kept.findings for r in found.readings if r.sensor != "progress"]  # the run logs its own
    assert {reading.key for reading in read} <= set(events.Tags()["scalars"])


class Dashes(Logger):
    """A logger that groups by '-'."""

    group_separator = "-"
    name = version = "dashes"

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.keys |= metrics.keys()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_logger_s_own_group_separator_is_used(tmp_path: Path) -> None:
    logger = Dashes()
    trainer([drift_monitor(tmp_path)], tmp_path, logger=logger).fit(TinyModule(), data())
    assert "diffsensor-kl_ref_live" in logger.keys
    assert not any("/" in key for key in logger.keys if key.startswith("diffsensor"))


class Onlooker(pl.Callback):
    """Compares, wherever a callback may look, what is there with the latest reading."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.looks: set[str] = set()
        self.stale: list[str] = []

    def _look(self, trainer: pl.Trainer, where: str) -> None:
        self.looks.add(where)
        for reading in self.kept.findings[-1].readings:
            if reading.sensor == "progress":
                continue  # the run's own, and not DriftMonitor's to show
            value = trainer.callback_metrics.get(reading.key)
            if value is None or float(value) != pytest.approx(reading.value, rel=1e-6):
                self.stale.append(f"{where} at {trainer.global_step}: {reading.key} is {value}, not {reading.value}")

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "train start")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "batch start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "batch end")

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "validation start")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "validation end")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "epoch end")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer, "train end")


def test_callback_metrics_always_hold_the_latest_readings(tmp_path: Path) -> None:
    kept = Kept()
    onlooker = Onlooker(kept)
    callbacks = [drift_monitor(tmp_path, 4, sinks=[kept], sensors="full"), onlooker]
    runner = trainer(callbacks, tmp_path, max_epochs=3, val_check_interval=3)
    runner.fit(ValidatedModule(), data(20), data(8))
    assert kept.steps == [0, 4, 8, 12, 15]
    assert len(onlooker.looks) == 7
    assert onlooker.stale == []
    assert float(runner.callback_metrics[KL]) == pytest.approx(kept.values()[-1])


def limit_between_readings(tmp_path: Path) -> float:
    """A KL that a run of this kind passes between its third and its fourth reading."""
    kept = Kept()
    trainer([drift_monitor(tmp_path, 2, sinks=[kept])], tmp_path, max_epochs=4).fit(TinyModule(), data())
    return (kept.values()[2] + kept.values()[3]) / 2


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_early_stopping_on_a_reading_stops_the_run(at_epoch_end: bool, tmp_path: Path) -> None:
    stop = EarlyStopping(
        KL,
        mode="min",
        patience=100,
        divergence_threshold=limit_between_readings(tmp_path),
        check_on_train_epoch_end=at_epoch_end,
    )
    kept = Kept()
    # Three batches an epoch and a reading every two steps: epochs end where nothing is read, too.
    runner = trainer([stop, drift_monitor(tmp_path, 2, sinks=[kept])], tmp_path, max_epochs=4)
    runner.fit(ValidatedModule(), data(12), data(8))
    assert stop.stopping_reason is EarlyStoppingReason.DIVERGENCE_THRESHOLD
    assert runner.global_step in (6, 9)
    assert kept.steps[-1] == runner.global_step


def test_a_checkpoint_of_every_step_carries_the_reading_of_its_step(tmp_path: Path) -> None:
    kept = Kept()
    saved = ModelCheckpoint(tmp_path / "ckpt", "{step}", monitor=KL, mode="max", save_top_k=-1, every_n_train_steps=1)
    runner = trainer([saved, drift_monitor(tmp_path, 2, sinks=[kept])], tmp_path, enable_checkpointing=True)
    runner.fit(TinyModule(), data())
    scores = {int(Path(path).stem.removeprefix("step=")): float(score) for path, score in saved.best_k_models.items()}
    latest = {step: kept.values()[step // 2] for step in range(1, 7)}
    assert scores == pytest.approx(latest)
    assert saved.best_model_score == pytest.approx(kept.values()[-1])


def test_a_checkpoint_after_validation_carries_the_latest_reading(tmp_path: Path) -> None:
    kept = Kept()
    saved = ModelCheckpoint(tmp_path / "ckpt", "{step}", monitor=KL, mode="min", save_top_k=-1)
    runner = trainer(
        [saved, drift_monitor(tmp_path, 2, sinks=[kept])], tmp_path, enable_checkpointing=True, max_epochs=2
    )
    runner.fit(ValidatedModule(), data(20), data(8))
    scores = {int(Path(path).stem.removeprefix("step=")): float(score) for path, score in saved.best_k_models.items()}
    assert scores == pytest.approx({5: kept.values()[2], 10: kept.values()[5]})


def test_the_progress_bar_shows_the_latest_kl_and_no_other_reading(tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            shown.append(dict(self.get_metrics(trainer, pl_module)))

    kept, bar = Kept(), Bar()
    bar.disable()
    trainer([drift_monitor(tmp_path, 2, sinks=[kept]), bar], tmp_path, enable_progress_bar=True).fit(
        TinyModule(), data()
    )
    assert [set(metrics) for metrics in shown] == [{KL}] * 6
    assert [metrics[KL] for metrics in shown] == pytest.approx([kept.values()[step // 2] for step in range(1, 7)])


def test_several_monitors_work_side_by_side_under_their_names(tmp_path: Path) -> None:
    kept, other = Kept(), Kept()
    callbacks = [
        drift_monitor(tmp_path, 2, sinks=[kept]),
        drift_monitor(tmp_path, 3, sinks=[other], bank="second", sensors="full"),
    ]
    logger = CSVLogger(tmp_path / "csv")
    runner = trainer(callbacks, tmp_path, logger=logger)
    runner.fit(TinyModule(), data())
    assert kept.steps == [0, 2, 4, 6]
    assert other.steps == [0, 3, 6]
    assert logged_by_csv(logger) == dict(zip(kept.steps, kept.values(), strict=True))
    assert float(runner.callback_metrics[f"{KL}/bank=second"]) == pytest.approx(other.values(f"{KL}/bank=second")[-1])
    places = [Path(logger.log_dir) / name for name in ("diffsensor", "diffsensor-second")]
    assert [steps_of(read_record(place)) for place in places] == [[0, 2, 4, 6], [0, 3, 6]]


def test_two_monitors_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DriftMonitor`"):
        trainer([drift_monitor(tmp_path), drift_monitor(tmp_path)], tmp_path)


# Going on after a stop


class Crash(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def steps_of(record: Any) -> list[int]:
    return sorted({reading.step for reading in record.readings})


def same(record: Any) -> list[Any]:
    """All readings of a record, in an order and a form that can be compared: NaN is equal to NaN."""
    return sorted(repr(reading) for reading in record.readings)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_resumed_run_writes_the_record_of_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    def fit(record: Path, *extra: pl.Callback, ckpt: Path | None = None) -> None:
        saved = ModelCheckpoint(record.parent, "{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = [drift_monitor(tmp_path, 2, record=record, sensors="full"), *extra, saved]
        # One epoch for each batch: every checkpoint is one at an epoch's end, from which Lightning resumes exactly.
        runner = trainer(callbacks, tmp_path, enable_checkpointing=True, max_epochs=7)
        runner.fit(TinyModule(), data(4), ckpt_path=ckpt, weights_only=True)

    whole, parts = tmp_path / "whole" / "record", tmp_path / "parts" / "record"
    fit(whole)
    assert steps_of(read_record(whole)) == [0, 2, 4, 6, 7]
    with pytest.raises(ZeroDivisionError):  # past the checkpoint: what came after it is read again
        fit(parts, Crash(min(step + 2, 7)))
    fit(parts, ckpt=parts.parent / f"step={step}.ckpt")
    assert same(read_record(parts)) == same(read_record(whole))


def test_the_state_in_a_checkpoint_is_plain_and_loads_with_weights_only(tmp_path: Path) -> None:
    monitor = drift_monitor(tmp_path, 2)
    runner = trainer([monitor], tmp_path)
    runner.fit(TinyModule(), data())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["DriftMonitor"]
    assert json.loads(json.dumps(state)) == state == monitor.state_dict()
    assert state["read"] == 6
    assert KL in state["latest"]


def checkpoint_at_3(tmp_path: Path) -> Path:
    saved = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=3)
    runner = trainer([drift_monitor(tmp_path, 2), Crash(4), saved], tmp_path, enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        runner.fit(TinyModule(), data())
    return tmp_path / "ckpt" / "step=3.ckpt"


def test_a_resumed_run_shows_the_latest_reading_before_the_next_one(tmp_path: Path) -> None:
    ckpt = checkpoint_at_3(tmp_path)
    stored = torch.load(ckpt, weights_only=True)["callbacks"]["DriftMonitor"]["latest"][KL]
    seen: list[tuple[int, float]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append((trainer.global_step, float(trainer.callback_metrics[KL])))

    kept = Kept()
    trainer([drift_monitor(tmp_path, 4, sinks=[kept]), Look()], tmp_path).fit(TinyModule(), data(), ckpt_path=ckpt)
    assert seen == [(3, pytest.approx(stored))]
    assert kept.steps == [4, 6]


def test_a_resume_whose_reference_is_gone_is_refused(tmp_path: Path) -> None:
    ckpt = checkpoint_at_3(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="reference"):
        trainer([drift_monitor(tmp_path, 2)], tmp_path).fit(TinyModule(), data(), ckpt_path=ckpt)


def test_a_monitor_added_to_a_run_under_way_says_what_its_reference_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = trainer([], tmp_path)
    runner.fit(TinyModule(), data())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    kept = Kept()
    with caplog.at_level(logging.WARNING, "diffsensor_lightning"):
        trainer([drift_monitor(tmp_path, 2, sinks=[kept])], tmp_path, max_epochs=2).fit(
            TinyModule(), data(), ckpt_path=tmp_path / "end.ckpt"
        )
    assert "starts at step 6" in caplog.text
    assert "reference=" in caplog.text
    assert kept.steps == [6, 8, 10, 12]
    assert kept.values()[0] == 0.0


def test_fit_called_again_goes_on(tmp_path: Path) -> None:
    kept, module = Kept(), TinyModule()
    runner = trainer([drift_monitor(tmp_path, 4, sinks=[kept])], tmp_path)
    runner.fit(module, data())
    runner.fit_loop.max_epochs = 2
    runner.fit(module, data())
    assert kept.steps == [0, 4, 6, 8, 12]
    assert min(kept.values()[1:]) > 0.0


def test_a_run_resumed_before_its_first_step_goes_on_too(tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, ckpt: Path | None = None) -> pl.Trainer:
        monitor = drift_monitor(tmp_path, 1, record=tmp_path / "record")
        runner = trainer([monitor, *callbacks], tmp_path, accumulate_grad_batches=3)
        runner.fit(TinyModule(), data(), ckpt_path=ckpt)
        return runner

    class SaveAndCrash(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "zero.ckpt")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(SaveAndCrash())
    assert fit(ckpt=tmp_path / "zero.ckpt").global_step == 2
    assert steps_of(read_record(tmp_path / "record")) == [0, 1, 2]


def test_one_monitor_in_a_second_run_starts_anew(tmp_path: Path) -> None:
    kept = Kept()
    monitor = drift_monitor(tmp_path, 4, sinks=[kept])
    for lr in (1e-2, 2e-2):
        trainer([monitor], tmp_path).fit(TinyModule(lr=lr), data())
    assert kept.steps == [0, 4, 6] * 2
    assert kept.values()[3] == 0.0
    other = trainer([], tmp_path)
    other.fit(TinyModule(), data())
    other.save_checkpoint(tmp_path / "other.ckpt")
    runner = trainer([monitor], tmp_path, max_epochs=2)
    runner.fit(TinyModule(), data(), ckpt_path=tmp_path / "other.ckpt")
    assert kept.steps[6:] == [6, 8, 12]
    assert kept.values()[6] == 0.0


# Contained and refused


class Broken:
    """A sensor that fails at every reading."""

    name = "broken"
    metrics: dict[str, Any] = {}  # noqa: RUF012

    def open(self, *_: Any) -> Any:
        raise RuntimeError("this sensor is broken")


def test_a_sensor_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = trainer([drift_monitor(tmp_path, 2, sensors=[Broken()])], tmp_path)
    runner.fit(TinyModule(), data())
    assert runner.global_step == 6
    assert "this sensor is broken" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"every_n_train_steps": 0}, "at least 1"),
        ({"sensors": "lihgt"}, "'light'"),
        ({"bank": "my probes"}, "'my_probes'"),
        ({"schedule": log_spaced(), "every_n_train_steps": 5}, "give one of them"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(wrong: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        drift_monitor(tmp_path, **wrong)


def test_a_wrong_path_of_probes_names_the_closest(tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").touch()
    with pytest.raises(MisconfigurationException, match=r"Did you mean 'probes\.jsonl'\?"):
        DriftMonitor(tmp_path / "probe.jsonl", tokenizer="some")
    with pytest.raises(MisconfigurationException, match="and no tokenizer"):
        DriftMonitor(tmp_path / "probes.jsonl")


def test_a_strategy_that_shards_by_fsdp1_is_refused_with_the_one_that_can_be_read(tmp_path: Path) -> None:
    runner = trainer([], tmp_path)
    runner._accelerator_connector.strategy = FSDPStrategy()  # which Lightning lets nobody choose without a GPU
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy, which shards.*strategy=ModelParallelStrategy"):
        drift_monitor(tmp_path).setup(runner, TinyModule(), "fit")


def test_the_reference_may_be_the_directory_of_a_model(tmp_path: Path) -> None:
    module, kept, again = TinyModule(), Kept(), Kept()
    module.model.save_pretrained(tmp_path / "model")
    trainer([drift_monitor(tmp_path, 3, sinks=[kept])], tmp_path).fit(module, data())
    # The module has been trained by now; compared with itself it would read 0.
    monitor = drift_monitor(tmp_path, 3, reference=tmp_path / "model", sinks=[again])
    trainer([monitor], tmp_path).fit(module, data())
    assert again.values()[0] == pytest.approx(kept.values()[-1])


def test_an_error_at_attach_ends_the_run_before_the_first_update(tmp_path: Path) -> None:
    runner = trainer([drift_monitor(tmp_path, hookpoints=["no.such.block"])], tmp_path)
    with pytest.raises(ValueError, match=r"No hookpoint is named 'no\.such\.block'"):
        runner.fit(TinyModule(), data())
    assert runner.global_step == 0


# The record and the command line


def test_the_record_is_beside_the_logger_s_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "csv")
    trainer([drift_monitor(tmp_path)], tmp_path, logger=logger).fit(TinyModule(), data())
    assert steps_of(read_record(Path(logger.log_dir) / "diffsensor")) == [0, 2, 4, 6]


@pytest.mark.parametrize(("logger", "record"), [(False, "auto"), (True, None)])
def test_no_record_is_written_without_a_place_for_it(logger: bool, record: str | None, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv")] if logger else False
    trainer([drift_monitor(tmp_path, record=record)], tmp_path, logger=loggers).fit(TinyModule(), data())
    assert not list(tmp_path.rglob("readings.jsonl"))


def tiny_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0} | {
        word: number for number, word in enumerate(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], start=3)
    }
    own = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>").save_pretrained(path)
    return path


class TinyData(pl.LightningDataModule):
    def train_dataloader(self) -> Iterable[Any]:
        return data()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own
def test_lightning_cli_builds_it_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    probes = tmp_path / "probes.jsonl"
    probes.write_text(
        '{"text": "the cat sat on a mat", "group": "cats"}\n{"prompt": "a cat", "completion": " slept"}\n'
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        seed_everything: 5
        trainer:
          accelerator: cpu
          max_epochs: 1
          enable_progress_bar: false
          enable_model_summary: false
          enable_checkpointing: false
          default_root_dir: {tmp_path}
          logger: false
          callbacks:
            - class_path: diffsensor_lightning.DriftMonitor
              init_args:
                probes: {probes}
                tokenizer: {tiny_tokenizer(tmp_path / "tokenizer")}
                sensors: full
                schedule: {{class_path: diffsensor.every, init_args: {{n: 3}}}}
                record: {tmp_path / "record"}
                cache_dir: {tmp_path / "cache"}
        """
    )
    LightningCLI(TinyModuleOfCLI, TinyData, args=["fit", "--config", str(config)], save_config_callback=None)
    record = read_record(tmp_path / "record")
    assert steps_of(record) == [0, 3, 6]
    assert {reading.group for reading in record.readings} >= {"", "cats"}


class TinyModuleOfCLI(TinyModule):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)


def test_probes_may_be_the_path_of_a_saved_set(tmp_path: Path) -> None:
    tiny_probes().save(tmp_path / "probes")
    kept = Kept()
    monitor = DriftMonitor(str(tmp_path / "probes"), 3, cache_dir=tmp_path / "cache", sinks=[kept])
    trainer([monitor], tmp_path).fit(TinyModule(), data())
    assert kept.steps == [0, 3, 6]
    assert math.isfinite(kept.values()[-1])


class Failing(CSVLogger):
    """A logger that takes what the trainer logs, and fails at readings."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith("diffsensor/") for key in metrics):
            raise OSError("no more room")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_told_of_once_and_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drift = DriftMonitor(tiny_probes(), 2, cache_dir=tmp_path / "cache", record=None)
    made = trainer([drift], tmp_path, max_steps=4, logger=[Failing(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    made.fit(TinyModule(), data())
    assert made.global_step == 4
    assert caplog.text.count("Failing failed and shows no readings") == 1
    (rows,) = (tmp_path / "b").rglob("metrics.csv")
    assert KL in rows.read_text()


def test_mlflow_gets_keys_that_it_takes(tmp_path: Path) -> None:
    class MLFlowLogger(CSVLogger):
        """By name the one of MLflow, whose package is not needed for this."""

    drift = DriftMonitor(tiny_probes(), 2, cache_dir=tmp_path / "cache", record=None)
    made = trainer([drift], tmp_path, max_steps=2, logger=MLFlowLogger(tmp_path))
    made.fit(TinyModule(), data())
    (rows,) = tmp_path.rglob("metrics.csv")
    keys = rows.read_text().splitlines()[0].split(",")
    assert KL in keys
    assert any("/group_" in key for key in keys)
    assert not any("=" in key for key in keys)
