"""The one callback: reads at optimizer steps and shows the readings where the trainer shows its loss."""

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from diffsensor import ConfigError, Monitor, ProbeSet, Reference, Schedule, Sensor, Sink, every

try:
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError("DriftMonitorCallback needs transformers: pip install 'diffsensor[transformers]'") from error

logger = logging.getLogger(__name__)

#: What writes logs to the terminal, where a line of eighty numbers helps nobody.
_CONSOLE = (PrinterCallback, ProgressCallback)
#: Who writes where. An error ends a run without a word to its callbacks, so that a record may still be open when the
#: run goes on in the same process, as in a notebook.
_writers: "WeakValueDictionary[Path, DriftMonitorCallback]" = WeakValueDictionary()


class DriftMonitorCallback(TrainerCallback):
    """Reads how far the model has moved from its reference, while it trains, and leaves no trace in the run.

    For `transformers.Trainer` and all that are built on it, such as TRL's SFT, DPO and GRPO trainers. The first
    reading is taken before the first update, then one every `every_n_steps` optimizer steps, and one at the end
    if the last step was not read. Readings go to the trainer's own log: to `log_history` and whatever `report_to`
    names, except those of single groups at single hookpoints, which are many and go to the record alone; to the
    console, those of the outputs over all probes.

    With PEFT the reference is the model with its adapter off, asked once; no second model is ever held.
    Each checkpoint directory gets a small file of ours, and a run resumed from it compares with the reference
    that the first run stored, never with a new one.

    Arguments:
        probes: the fixed inputs.
        every_n_steps: optimizer steps from one reading to the next. 50 where no schedule is given.
        sensors: "light", "full", or a list of names and sensors.
        reference: what to compare with: a reference, a model, or a model's directory or name. The model as it is
            before the first update (adapters off) where none is given.
        record: the directory of the run's record. "auto" is `diffsensor` in the trainer's `output_dir`, with a
            number behind it where an earlier run has left one. None keeps none.
        hookpoints: "auto" for at most 8 evenly spaced blocks, or names and globs of sub-modules.
        schedule: says at which steps to look, in place of `every_n_steps`.
        sinks: further places where findings go.
        cache_dir: where references are kept; the user's cache directory by default.
        model_path: where in the trained module the language model is, needed only where there are several.
        log_text: False keeps the text of probes and tokens out of the record.
        bank: what these probes are called in log keys. Several callbacks of one trainer need different ones.

    Raises `ConfigError` for arguments that mean nothing here; everything that needs the model is checked when
    training begins, before its first step.
    """

    def __init__(
        self,
        probes: ProbeSet,
        every_n_steps: int | None = None,
        *,
        sensors: str | Sequence[str | Sensor] = "light",
        reference: Reference | nn.Module | str | Path | None = None,
        record: str | Path | None = "auto",
        hookpoints: str | Sequence[str] = "auto",
        schedule: Schedule | None = None,
        sinks: Sequence[Sink] = (),
        cache_dir: str | Path | None = None,
        model_path: str | None = None,
        log_text: bool = True,
        bank: str = "fixed",
    ) -> None:
        if every_n_steps is not None and schedule is not None:
            raise ConfigError(
                f"every_n_steps={every_n_steps!r} and schedule={schedule!r} were given. "
                "Both say when to look: give one of them."
            )
        if not re.fullmatch(r"[\w.-]+", bank):
            raise ConfigError(
                f"bank={bank!r} becomes part of log keys and file names. Use letters, digits, '_', '-' and '.'."
            )
        self._probes, self._bank = probes, bank
        self._record = record if record is None or record == "auto" else Path(record)
        self._arguments: dict[str, Any] = {
            "probes": probes,
            "reference": reference,
            "sensors": sensors,
            "hookpoints": hookpoints,
            "schedule": schedule or every(50 if every_n_steps is None else every_n_steps),
            "sinks": sinks,
            "cache_dir": cache_dir,
            "model_path": model_path,
            "log_text": log_text,
            "bank": bank,
        }
        Monitor(**self._arguments)  # its arguments are checked now; it is made when training begins
        self._monitor: Monitor | None = None
        self._trainer: Trainer | None = None
        self._read = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        frame = _trainer_frame()
        self._trainer = frame.f_locals["self"]
        self._require_apart()
        if args.world_size > 1:
            raise ConfigError(
                f"DriftMonitorCallback was given a run of {args.world_size} processes. It reads in runs of one process "
                "only, so far: start one process, or take the callback out."
            )
        processing = kwargs.get("processing_class")
        tokenizer = getattr(processing, "tokenizer", processing)
        if tokenizer is not None and self._probes.is_text:
            self._probes.check_tokenizer(tokenizer)
        stored = self._stored_state(args, state, frame)
        record = self._record_directory(args, goes_on=stored is not None)
        if record is not None:
            if (left_open := _writers.get(record.resolve())) not in (None, self):
                left_open.close()
            _writers[record.resolve()] = self
        self._monitor = Monitor(**self._arguments, record=record)
        if stored is not None:
            self._monitor.load(stored)
        elif state.global_step > 0 and self._arguments["reference"] is None:
            logger.warning(
                "This run goes on at step %d from a checkpoint without a state of bank %r, so the model as it is now "
                "becomes the reference. To compare with another model, give reference=<its directory>.",
                state.global_step,
                self._bank,
            )
        self._monitor.attach(kwargs["model"])
        self._read = -1 if stored is None else self._monitor.last_step

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # And not when training begins: the progress bar, which shows the logs, opens after us.
        if self._monitor is not None and self._read < 0:
            self._look(kwargs["model"], state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._monitor is None:
            return
        if self._monitor.is_due(state.global_step) or (control.should_training_stop and state.global_step > self._read):
            self._look(kwargs["model"], state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Where a callback after us has stopped the run.
        if self._monitor is not None and control.should_training_stop and state.global_step > self._read:
            self._look(kwargs["model"], state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Called once the directory is written, so that ours is the last file to appear in it.
        if self._monitor is not None and state.is_world_process_zero:
            directory = _output_directory(args) / f"checkpoint-{state.global_step}"
            if directory.is_dir():
                self._monitor.save(directory / self._state_name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._monitor is None:
            return
        # Where the best checkpoint has been loaded by now, the model is no longer that of the last step.
        is_last = not (args.load_best_model_at_end and state.best_model_checkpoint is not None)
        if is_last and state.global_step > self._read:
            self._look(kwargs["model"], state, control)
        self.close()

    def close(self) -> None:
        """Close the record: for a run that an error ended, which tells its callbacks nothing.

        Called for you when a run ends well, and when the next one that wants the same record begins.
        """
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = self._trainer = None

    @property
    def _state_name(self) -> str:
        return f"diffsensor-{self._bank}.json"

    def _look(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        assert self._monitor is not None and self._trainer is not None
        readings = self._monitor.read(model, state.global_step)
        self._read = state.global_step
        values = {reading.key: reading.value for reading in readings if not (reading.group and reading.hookpoint)}
        headlines = {
            reading.key: reading.value for reading in readings if not (reading.group or reading.hookpoint)
        } or values
        if not values:
            return
        handler, should_log = self._trainer.callback_handler, control.should_log
        everybody = handler.callbacks
        handler.callbacks = [callback for callback in everybody if not isinstance(callback, _CONSOLE)]
        try:
            # Not the trainer's own `log`: TRL's flush what they have gathered since they logged last.
            Trainer.log(self._trainer, values)
        finally:
            handler.callbacks = everybody
            # Logging clears it, and the trainer would forget to log the loss of this step.
            control.should_log = should_log
        for callback in everybody:
            if isinstance(callback, _CONSOLE):
                shown = {**headlines, "epoch": state.epoch}
                callback.on_log(self._trainer.args, state, control, logs=shown)  # type: ignore[no-untyped-call]

    def _require_apart(self) -> None:
        assert self._trainer is not None
        others = [
            callback
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, DriftMonitorCallback) and callback is not self
        ]
        if any(other._bank == self._bank for other in others):
            raise ConfigError(
                f"Two DriftMonitorCallbacks of this trainer have the bank {self._bank!r}, and would overwrite each "
                f"other's readings. Give each its own: DriftMonitorCallback(..., bank='{self._bank}2')."
            )
        if self._record not in (None, "auto") and any(other._record == self._record for other in others):
            raise ConfigError(
                f"Two DriftMonitorCallbacks of this trainer have the record {str(self._record)!r}, and would overwrite "
                "each other's readings. Give each its own, or leave both out: 'auto' takes one for each bank."
            )

    def _stored_state(self, args: TrainingArguments, state: TrainerState, frame: FrameType) -> Path | None:
        """Our file in the checkpoint that this run goes on from, if it goes on from one that has it."""
        if state.global_step == 0:
            return None
        resumed = frame.f_locals.get("resume_from_checkpoint") or args.resume_from_checkpoint
        directory = (
            Path(resumed) if isinstance(resumed, str) else _output_directory(args) / f"checkpoint-{state.global_step}"
        )
        path = directory / self._state_name
        return path if path.exists() else None

    def _record_directory(self, args: TrainingArguments, *, goes_on: bool) -> Path | None:
        if self._record != "auto":
            return None if self._record is None else Path(self._record)
        name = "diffsensor" if self._bank == "fixed" else f"diffsensor-{self._bank}"
        first = _output_directory(args) / name
        earlier = sorted(
            (path for path in first.parent.glob(f"{name}*") if re.fullmatch(rf"{re.escape(name)}(\.\d+)?", path.name)),
            key=lambda path: int(path.suffix[1:] or 1) if path.name != name else 1,
        )
        if not earlier:
            return first
        return earlier[-1] if goes_on else first.with_name(f"{name}.{len(earlier) + 1}")


def _output_directory(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _trainer_frame() -> FrameType:
    """The trainer's frame that is calling us: a callback is told everything but whose it is, and must log by it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame
        frame = frame.f_back
    raise ConfigError("DriftMonitorCallback was called by something else than a transformers Trainer.")
