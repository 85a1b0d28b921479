"""The one callback: reads at optimizer steps, shows that where the trainer shows its loss, watches and steers."""

import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor, nn

from diffsensor import (
    Budget,
    ConfigError,
    Gate,
    KLPenalty,
    Monitor,
    ProbeSet,
    Ranks,
    RanksError,
    Reading,
    Reference,
    RollingProbes,
    Rule,
    Schedule,
    Sensor,
    Sink,
    Verdict,
    every,
    read_record,
)
from diffsensor.actions import Response
from diffsensor_transformers.best import BestOfPassed
from diffsensor_transformers.controller import TrainerController
from diffsensor_transformers.offers import Offers, offered
from diffsensor_transformers.penalty import PenalisedLoss, penalised
from diffsensor_transformers.recipe import recipe_of
from diffsensor_transformers.rollouts import Rollouts, policy_temperature, sampler
from diffsensor_transformers.verdicts import CheckpointVerdicts

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
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.trainer_utils import SaveStrategy
except ImportError as error:
    raise ImportError("DriftMonitorCallback needs transformers: pip install 'diffsensor[transformers]'") from error

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What writes logs to the terminal, where a line of eighty numbers helps nobody.
_CONSOLE = (PrinterCallback, ProgressCallback)
#: Who writes where. An error ends a run without a word to its callbacks, so that a record may still be open when the
#: run goes on in the same process, as in a notebook.
_writers: "WeakValueDictionary[str, DriftMonitorCallback]" = WeakValueDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a run goes on, as the first process finds it: not every one may see the output directory.

    `stored` is our file in the checkpoint, `record` the record's directory. `by_record`: there is no such file, and the
    newest record ends at that checkpoint. `best` are the metric, the step and the directory of the best checkpoint so
    far, `passed` is the directory of the one that passed last.
    """

    stored: Path | None
    record: Path | None
    by_record: bool
    best: tuple[float | None, int | None, str | None]
    passed: Path | None


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

    Rules may look at `loss`, that of the last step as the trainer counts it, and at `learning_rate`, that of the next
    step (of the first parameter group); both are in the record beside the readings. What responses ask for is done
    between two steps.

    With a gate each checkpoint gets a verdict: all of them in `diffsensor-verdicts.json`, written before the
    checkpoint, and its own in `diffsensor-verdict.json` in its directory. `last-passed/` holds the checkpoint that
    passed last, whatever `save_total_limit` removes, and one that did not pass is never the trainer's best.

    Arguments:
        probes: the fixed inputs; or rolling ones, with bank="contextual", which are offered what the trainer trains
            on, or of trainers that sample one completion for each prompt.
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
        rules: rules and responses (rules with their actions). `Invariant()` alone where none are given.
        gate: what a checkpoint must meet. It reads the model wherever a checkpoint is to be saved.
        budget: keeps the drift near a limit by moving the coefficient of `penalty`, or the trainer's own `beta`.
        penalty: a KL penalty that is added to the loss while this run trains.
        sealed: these readings may alert a person, and nothing is ever driven by them: they go to the record and the
            sinks, and not to the trainer's log, where other callbacks could act on them.
        noise_floor: whether to measure, at the price of three readings before the first step, by how much the same
            weights read differently in another batch split.
        temperature: what the logits are divided by before they are compared; "policy" for the temperature at which the
            trainer samples.

    Raises `ConfigError` for arguments that mean nothing here; everything that needs the model is checked when
    training begins, before its first step.
    """

    def __init__(
        self,
        probes: ProbeSet | RollingProbes,
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
        rules: Sequence[Rule | Response] | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        penalty: KLPenalty | None = None,
        sealed: bool = False,
        noise_floor: bool = True,
        temperature: float | Literal["policy"] = 1.0,
    ) -> None:
        if every_n_steps is not None and schedule is not None:
            raise ConfigError(
                f"every_n_steps={every_n_steps!r} and schedule={schedule!r} were given. "
                "Both say when to look: give one of them."
            )
        if not re.fullmatch(r"[\w.-]+", bank) or re.fullmatch(r"verdicts?(-.*)?", bank):
            raise ConfigError(
                f"bank={bank!r} becomes part of log keys and file names. Use letters, digits, '_', '-' and '.', and "
                "not 'verdict', which names other files."
            )
        if penalty is not None and not isinstance(penalty, KLPenalty):
            raise ConfigError(f"penalty={penalty!r} was given, expected a KLPenalty: penalty=KLPenalty().")
        if isinstance(temperature, str) and temperature != "policy":
            raise ConfigError(
                f"temperature={temperature!r} was given. Did you mean 'policy'? Or give a number above 0."
            )
        self._probes, self._bank, self._is_gated = probes, bank, gate is not None
        self._reads_as_policy = temperature == "policy"
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
            "rules": rules,
            "gate": gate,
            "budget": budget,
            "sealed": sealed,
            "noise_floor": noise_floor,
            "temperature": 1.0 if temperature == "policy" else temperature,
            "progress": ("loss", "learning_rate"),
        }
        # Its arguments are checked now; it is made when training begins.
        self._drift = Monitor(**self._arguments).metrics
        self._penalty = penalty
        self._begin_coefficient = None if penalty is None else penalty.coefficient
        self._monitor: Monitor | None = None
        self._rollouts: Rollouts | None = None
        self._offers: Offers | None = None
        self._trainer: Trainer | None = None
        self._controller: TrainerController | None = None
        self._ranks, self._is_lost = Ranks(), False
        self._verdicts: CheckpointVerdicts | None = None  # in the first process, which writes
        self._last_passed: Path | None = None
        self._added: PenalisedLoss | None = None
        self._best: BestOfPassed | None = None
        self._verdict: Verdict | None = None
        self._read = -1
        self._loss: Tensor | None = None
        self._loss_before: Tensor | None = None

    @property
    def last_passed(self) -> Path | None:
        """The directory of the checkpoint that passed the gate last; None where there is none, or no gate."""
        return self._last_passed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        frame = trainer_frame()
        self._trainer = frame.f_locals["self"]
        self._require_apart()
        _require_whole()
        processing = kwargs.get("processing_class")
        tokenizer = getattr(processing, "tokenizer", processing)
        if tokenizer is not None and self._probes.is_text:
            self._probes.check_tokenizer(tokenizer)
        try:
            self._begin(args, state, frame, kwargs["model"])
        except BaseException:
            self.close()
            raise

    def _begin(self, args: TrainingArguments, state: TrainerState, frame: FrameType, model: nn.Module) -> None:
        assert self._trainer is not None
        self._read, self._verdict, self._loss = -1, None, None
        self._ranks, self._verdicts, self._is_lost = Ranks.now(), None, False
        place = self._ranks.told("where the run goes on", partial(self._found, args, state, frame))
        state.best_metric, state.best_global_step, state.best_model_checkpoint = place.best
        self._last_passed = place.passed
        if self._is_gated:
            self._best = BestOfPassed(self._trainer, self._may_be_best)
        if self._penalty is not None:
            assert self._begin_coefficient is not None
            self._penalty.coefficient = self._begin_coefficient
            self._added = penalised(self._trainer, self._penalty)
        self._controller = TrainerController(self._trainer, last_passed=lambda: self.last_passed)
        if self._reads_as_policy:
            self._arguments["temperature"] = policy_temperature(self._trainer)
        self._rollouts = self._rollouts_of(self._trainer)
        if place.record is not None:
            if (left_open := _writers.get(str(place.record.resolve()))) not in (None, self):
                left_open.close()
            _writers[str(place.record.resolve())] = self
        monitor = self._monitor = Monitor(
            **self._arguments,
            record=place.record,
            tellers=() if self._rollouts is None else (self._rollouts,),
            controller=self._controller,
            recipe=recipe_of(self._trainer),
            resume=place.by_record,
        )
        if isinstance(self._probes, RollingProbes):
            self._probes.forget()  # what an earlier run has left in them
            self._offers = offered(self._trainer, self._probes)
        if place.stored is not None:
            stored = self._ranks.told("the state in the checkpoint", partial(_loaded, monitor, place.stored))
            if not self._ranks.is_first:
                monitor.load_state_dict(stored)
        monitor.attach(model)
        self._read = monitor.last_step if place.stored is not None or place.by_record else -1

    def _found(self, args: TrainingArguments, state: TrainerState, frame: FrameType) -> _Place:
        """Where this run goes on; in the first process."""
        best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        if self._is_gated:
            suffix = "" if self._bank == "fixed" else f"-{self._bank}"
            self._verdicts = CheckpointVerdicts(_output_directory(args), suffix, state.global_step)
            if state.best_model_checkpoint is not None and not _is_passed(self._verdicts, state.best_model_checkpoint):
                best = (None, None, None)
        stored = self._stored_state(args, state, frame)
        record, by_record = self._record_directory(args, goes_on=stored is not None), False
        if stored is None and self._verdicts is not None and self._verdicts.knows(state.global_step):
            newest = self._record_directory(args, goes_on=True)
            if by_record := newest is not None and _last_step_in(newest) == state.global_step:
                record = newest
        if stored is None and state.global_step > 0 and self._arguments["reference"] is None and not by_record:
            logger.warning(
                "This run goes on at step %d from a checkpoint without a state of bank %r, so the model as it is now "
                "becomes the reference. To compare with another model, give reference=<its directory>.",
                state.global_step,
                self._bank,
            )
        passed = None if self._verdicts is None else self._verdicts.last_passed
        return _Place(stored=stored, record=record, by_record=by_record, best=best, passed=passed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # And not when training begins: the progress bar, which shows the logs, opens after us.
        if self._monitor is not None and self._read < 0:
            self._look(kwargs["model"], state, control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is not None and (summed := _summed_loss(self._trainer)) is not None:
            self._loss_before = summed.clone()
        if self._rollouts is not None:
            self._rollouts.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._monitor is None or self._trainer is None or self._controller is None:
            return
        summed = _summed_loss(self._trainer)
        # Now, for the trainer begins to sum anew at each log; a number is made of it only where it is read.
        self._loss = None if summed is None or self._loss_before is None else summed - self._loss_before
        if self._rollouts is not None:
            self._rollouts.end_step()
        if self._offers is not None:
            self._offers.end_step()
        control.should_save |= self._controller.is_save_due
        if self._monitor.is_due(state.global_step) or (control.should_training_stop and state.global_step > self._read):
            self._look(kwargs["model"], state, control)
        # With this strategy the evaluation decides whether to save, and asks us: see `_may_be_best`.
        is_decided_later = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if control.should_save and not is_decided_later:
            self._announce(kwargs["model"], state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._monitor is None:
            return
        # Where a callback after us has stopped the run.
        if control.should_training_stop and state.global_step > self._read:
            self._look(kwargs["model"], state, control)
        if control.should_save:
            self._announce(kwargs["model"], state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._monitor is None or self._controller is None:
            return
        self._controller.is_save_due = False
        if self._is_gated and (self._verdict is None or self._verdict.step != state.global_step):
            # A callback after us asked for this checkpoint.
            self._announce(kwargs["model"], state, control)
        # Each process writes a part of a checkpoint. Called once they are written, so that ours are the last files.
        self._told("the checkpoint is written", lambda: None)
        self._last_passed = self._told("our files in the checkpoint", partial(self._settle, args, state))

    def _settle(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Put our files into a checkpoint, in the first process. Gives the one that passed last."""
        assert self._monitor is not None
        directory = _output_directory(args) / f"checkpoint-{state.global_step}"
        if directory.is_dir():
            self._monitor.save(directory / self._state_name)
            if self._verdicts is not None and self._verdict is not None:
                self._verdicts.settle(self._verdict)
        return None if self._verdicts is None else self._verdicts.last_passed

    def _told(self, about: str, make: Callable[[], T]) -> T | None:
        """What the first process makes, for all of them, once it is made.

        Where they have lost each other, which does not end a run, it still writes what it has to.
        """
        assert self._monitor is not None
        if not (self._is_lost or self._monitor.is_out):
            try:
                return self._ranks.told(about, make)
            except RanksError as error:
                self._is_lost = True
                logger.error("%s The run goes on, and its processes do not wait for each other any more here.", error)
        return make() if self._ranks.is_first else None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._monitor is None or self._controller is None:
            return
        self._controller.is_over = True
        is_none_best = args.load_best_model_at_end and state.best_model_checkpoint is None
        if is_none_best and self._is_gated and self._ranks.is_first:
            logger.warning(
                "No checkpoint that was evaluated passed the gate, so none was loaded as the best one. The model is "
                "that of step %d.",
                state.global_step,
            )
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
        if self._added is not None:
            self._added.undo()
        if self._best is not None:
            self._best.undo()
        if self._offers is not None:
            self._offers.undo()
        self._monitor = self._trainer = self._controller = self._added = self._best = self._rollouts = None
        self._offers = None

    @property
    def _state_name(self) -> str:
        return f"diffsensor-{self._bank}.json"

    def _look(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        assert self._monitor is not None and self._trainer is not None
        readings = self._monitor.read(model, state.global_step, **self._progress())
        self._read = state.global_step
        shown = [
            each
            for each in readings
            if each.sensor != "progress" and not (each.group and each.hookpoint) and not self._monitor.is_sealed(each)
        ]
        values = {reading.key: reading.value for reading in shown}
        headlines = {
            # The trainer shows its own numbers there itself.
            reading.key: reading.value
            for reading in shown
            if not (reading.group or reading.hookpoint or reading.sensor == Rollouts.name)
        } or values.copy()
        values |= {reading.floor_key: reading.noise_floor for reading in shown if _has_floor(reading)}
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
                logs = {**headlines, "epoch": state.epoch}
                callback.on_log(self._trainer.args, state, control, logs=logs)  # type: ignore[no-untyped-call]

    def _progress(self) -> dict[str, float | Tensor]:
        """What rules may look at beside the readings."""
        assert self._trainer is not None and self._trainer.optimizer is not None
        rate = self._trainer.optimizer.param_groups[0]["lr"]
        told = {"loss": self._loss, "learning_rate": rate}
        return {name: value for name, value in told.items() if value is not None}

    def _rollouts_of(self, trainer: Trainer) -> Rollouts | None:
        if not sampler(trainer):
            return None
        return Rollouts(
            trainer,
            self._drift,
            # Rolling probes are on policy themselves: there is nothing to compare.
            is_same_reference=self._arguments["reference"] is None and isinstance(self._probes, ProbeSet),
            may_get_beta=self._arguments["budget"] is not None,
            probe_temperature=self._arguments["temperature"],
        )

    def _judge(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> Verdict:
        """The verdict on the model as it is after this step."""
        assert self._monitor is not None and self._controller is not None
        step = state.global_step
        if self._verdict is not None and self._verdict.step == step:
            return self._verdict
        if step > self._read:
            self._look(model, state, control)
        if self._controller.rolled_back is not None and self._controller.rolled_back[0] == step:
            reason = f"Rolled back at step {step} to the state of step {self._controller.rolled_back[1]}, which passed."
            self._verdict = Verdict(step=step, outcome="pass", reason=reason)
        else:
            self._verdict = self._monitor.verdict(model, step)
        return self._verdict

    def _announce(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        """Put the verdict on a checkpoint into the ledger; before it is saved, where we are asked before."""
        if not self._is_gated:
            return
        verdict = self._judge(model, state, control)
        # Before any process writes its part of the checkpoint.
        self._told("verdict on the checkpoint", partial(self._put_into_ledger, verdict))

    def _put_into_ledger(self, verdict: Verdict) -> None:
        if self._verdicts is not None:
            self._verdicts.announce(verdict)

    def _may_be_best(self) -> bool:
        """Whether the model, which has evaluated best, passes; asked by the trainer before it saves."""
        if self._trainer is None or not self._is_gated:
            return True
        trainer = self._trainer
        has_passed = self._judge(trainer.callback_handler.model, trainer.state, trainer.control).outcome == "pass"
        if has_passed and trainer.args.save_strategy == SaveStrategy.BEST:
            self._announce(trainer.callback_handler.model, trainer.state, trainer.control)
        return has_passed

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
        if self._arguments["budget"] is not None and any(other._arguments["budget"] is not None for other in others):
            raise ConfigError(
                "Two DriftMonitorCallbacks of this trainer have a budget, and would move one coefficient against each "
                "other. Give a budget to one of them; the others can watch with rules."
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


def _require_whole() -> None:
    """Raise for a way of cutting a model up that cannot be read."""
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "DriftMonitorCallback was given a run of DeepSpeed ZeRO-3, which keeps a part of each parameter in each "
            "process. That cannot be read. Use ZeRO-2, or FSDP2, or take the callback out."
        )


def _output_directory(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def trainer_frame() -> FrameType:
    """The trainer's frame that is calling us: a callback is told everything but whose it is, and must log by it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame
        frame = frame.f_back
    raise ConfigError("DriftMonitorCallback was called by something else than a transformers Trainer.")


def _summed_loss(trainer: Trainer) -> Tensor | None:
    """What the trainer has summed of its loss since it logged last: a tensor, which nobody has to wait for."""
    summed = getattr(trainer, "_tr_loss", None)
    return summed if isinstance(summed, Tensor) else None


def _loaded(monitor: Monitor, file: Path) -> dict[str, str]:
    monitor.load(file)
    return monitor.state_dict()


def _is_passed(verdicts: CheckpointVerdicts, best: str) -> bool:
    """Whether the best checkpoint of the run that goes on passed, without which it is not the best any more."""
    verdict = verdicts.of(Path(best))
    if verdict.outcome != "pass":
        logger.warning(
            "%s was the best checkpoint so far and has not passed the gate, so it is not the best any more. %s",
            *(best, verdict.reason),
        )
    return verdict.outcome == "pass"


def _has_floor(reading: Reading) -> bool:
    return not (reading.group or reading.hookpoint) and math.isfinite(reading.noise_floor)


def _last_step_in(record: Path) -> int:
    """The last step that was read, -1 where there is no record."""
    if not (record / "manifest.json").exists():
        return -1
    return max((reading.step for reading in read_record(record).readings), default=-1)
