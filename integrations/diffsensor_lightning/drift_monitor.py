"""The one callback: reads at optimizer steps, shows the readings to loggers, callbacks and the progress bar."""

import logging
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from diffsensor import (
    Budget,
    DiffSensorError,
    Gate,
    Monitor,
    ProbeSet,
    Reading,
    Reference,
    Rule,
    Schedule,
    Sensor,
    Sink,
    Verdict,
)
from diffsensor.actions import Response
from diffsensor.control import Penalty

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
    from lightning.pytorch.utilities.seed import isolate_rng
except ImportError as error:
    raise ImportError("DriftMonitor needs Lightning: pip install 'diffsensor[lightning]'") from error

from diffsensor_lightning.arguments import penalty_of, probes_of, record_directory, require_readable, schedule_of
from diffsensor_lightning.controller import LightningController
from diffsensor_lightning.gated_checkpoints import GatedCheckpoints
from diffsensor_lightning.recipe import recipe_of

_warn = rank_zero_only(logging.getLogger(__name__).warning)

#: The reading that the progress bar shows, where it is read.
HEADLINE = "kl_ref_live"
#: What is told to the record of the run's own progress, at each reading.
PROGRESS = ("loss", "learning_rate")


class DriftMonitor(pl.Callback):
    """Reads how far the model has moved from its reference, while it trains, and leaves no trace in the run.

    The first reading is taken before the first update, then one every `every_n_train_steps` optimizer steps
    (gradient accumulation counts as Lightning's `global_step` does), and one at the end of fit if the last step
    was not read. Every logger gets every reading, at the step that was read whatever `log_every_n_steps` says.
    `trainer.callback_metrics` always holds the latest ones, so `EarlyStopping(monitor="diffsensor/kl_ref_live")`
    and `ModelCheckpoint(monitor="diffsensor/kl_ref_live")` work, also where they look between two readings.

    Rules make alerts of the readings, responses ask the run for something, a gate gives a verdict on every checkpoint,
    and a budget moves the coefficient of a KL penalty. Rules may also look at "loss" and "learning_rate".

    A run resumed from a checkpoint compares with the reference that the first run stored, never with a new one; its
    rules, responses and budget go on where that checkpoint was saved, also in another number of processes.

    In a run of several processes each has a DriftMonitor with the same arguments. They share the probes; the first one
    decides and writes, and all of them see the same readings and do the same at the same step.

    Args:
        probes: The probe set; or the path of a saved one; or the path of a .jsonl file with probes.
        every_n_train_steps: Optimizer steps from one reading to the next. 50 where no schedule is given.
        tokenizer: For a .jsonl file, or to decode a saved set: a tokenizer, or what
            `transformers.AutoTokenizer.from_pretrained` takes.
        sensors: "light", "full", or a list of sensors.
        reference: What to compare with: a reference, a model, or a model's directory or name. The model as it is
            before the first update where none is given.
        record: The directory of the run's record. "auto" is `diffsensor` inside the first logger's `log_dir`, and
            no record where no logger has one. None writes no record.
        hookpoints: "auto" (at most 8 evenly spaced blocks), or names or globs of sub-modules.
        cache_dir: Where references are kept. The user's cache directory where none is given.
        model_path: The causal LM's path inside the module, such as "model", where it is not unique.
        log_text: Whether text of probes may be written to the record.
        schedule: Says at which steps to look, instead of `every_n_train_steps`; such as `diffsensor.log_spaced()`.
        sinks: Where else to write what is found.
        bank: Tells several DriftMonitors of one trainer apart: in readings and log keys (`.../bank=<bank>`), in
            checkpoints, and in the name of the automatic record (`diffsensor-<bank>`).
        rules: Rules, and responses (rules with their actions). `Invariant()` alone where none are given.
        gate: What a checkpoint must meet. Every checkpoint then holds its verdict, under "diffsensor_verdict", and has
            it beside it (`<checkpoint>.verdict.json`), or inside where it is a directory; one that did not pass is
            never among a ModelCheckpoint's best.
        budget: Keeps the drift near a limit, by moving the coefficient of `penalty`.
        penalty: The KL penalty that `training_step` adds to its loss, such as a `KLPenalty`.
        sealed: These readings may alert a person, and drive no action: loggers get them, `callback_metrics` do not.
        noise_floor: Whether to measure, at the price of three readings before the first step, by how much the same
            weights read differently in another batch split. Loggers show it as `<key>/noise_floor`.
        temperature: What logits are divided by before they are compared, as a policy's are when it samples.

    Raises:
        MisconfigurationException: An argument means nothing here, or the strategy is FSDPStrategy, which cannot be
            read; the message names what would do.
    """

    def __init__(
        self,
        probes: ProbeSet | str | Path,
        every_n_train_steps: int | None = None,
        *,
        tokenizer: str | Callable[..., Any] | None = None,
        sensors: str | Sequence[str | Sensor] = "light",
        reference: Reference | torch.nn.Module | str | Path | None = None,
        record: str | Path | None = "auto",
        hookpoints: str | Sequence[str] = "auto",
        cache_dir: str | Path | None = None,
        model_path: str | None = None,
        log_text: bool = True,
        schedule: Schedule | None = None,
        sinks: Sequence[Sink] = (),
        bank: str = "fixed",
        rules: Sequence[Rule | Response] | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
        penalty: Penalty | None = None,
        sealed: bool = False,
        noise_floor: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        allowed = re.sub(r"[^\w.-]+", "_", bank) or "fixed"
        if bank != allowed:
            raise MisconfigurationException(
                f"DriftMonitor was given bank={bank!r}. It becomes part of log keys and of a directory: "
                f"use letters, digits, '_', '-' and '.', such as {allowed!r}."
            )
        self._suffix = "" if bank == "fixed" else f"-{bank}"
        self._record = record
        self._gate = gate
        self._penalty = penalty_of(penalty, budget)
        try:
            self._arguments: dict[str, Any] = {
                "probes": probes_of(probes, tokenizer),
                "reference": reference,
                "sensors": sensors if isinstance(sensors, str) else list(sensors),
                "schedule": schedule_of(every_n_train_steps, schedule),
                "sinks": tuple(sinks),
                "hookpoints": hookpoints if isinstance(hookpoints, str) else list(hookpoints),
                "cache_dir": cache_dir,
                "log_text": log_text,
                "model_path": model_path,
                "bank": bank,
                "rules": None if rules is None else list(rules),
                "gate": gate,
                "budget": budget,
                "sealed": sealed,
                "progress": PROGRESS,
                "noise_floor": noise_floor,
                "temperature": temperature,
            }
            # Its arguments are checked when it is made; made again at each fit, when the record's place is known.
            Monitor(**self._arguments)
        except DiffSensorError as error:
            raise MisconfigurationException(f"DriftMonitor: {error}") from error
        responses = [part for part in rules or () if isinstance(part, Response)]
        self._rolls_back = any("rollback" in response.needs for response in responses)
        self._monitor: Monitor | None = None
        self._gated: GatedCheckpoints | None = None
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._is_shown = False
        self._failed_loggers: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._latest: dict[str, float] = {}
        self._seen = -1  # the last optimizer step at which it was asked whether to read
        self._read = -1  # the last one that was read
        self._loss: tuple[int, torch.Tensor | float | None] = (-1, None)  # of which step; nobody waits for a tensor
        self._optimizers: list[Any] = []  # as they were before the first step
        self._passed: list[str] = []
        self._verdict: Verdict | None = None
        self._stored: dict[str, Any] = {}  # the monitor's state while there is no monitor

    @property
    def state_key(self) -> str:
        # Of the bank alone: if other arguments were part of it, a run resumed with changed arguments would
        # not find its state and would take the trained model for the reference, instead of being refused.
        return type(self).__qualname__ + self._suffix

    @property
    def last_passed(self) -> str:
        """Where the newest checkpoint is that passed the gate and was not removed since; "" where there is none."""
        passed = self._passed if self._gated is None else self._gated.passed
        return passed[-1] if passed else ""

    def state_dict(self) -> dict[str, Any]:
        monitor = self._monitor.state_dict() if self._monitor is not None else self._stored
        if not monitor:
            return {}
        return {
            "monitor": monitor,
            "read": self._read,
            "latest": self._latest | self._actionable(),
            "optimizers": self._optimizers,
            "passed": list(self._passed if self._gated is None else self._gated.passed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._stored = state_dict["monitor"]
        self._seen = self._read = state_dict["read"]
        self._latest = dict(state_dict["latest"])
        self._optimizers = list(state_dict["optimizers"])
        self._passed = list(state_dict["passed"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_readable(trainer.strategy)
        # `fit` of the same trainer goes on where it was. Another trainer is another run, and what goes on there is
        # in its checkpoint, which is loaded after this.
        if self._trainer is None or self._trainer() is not trainer:
            self._forget()
            self._gated = None
        self._trainer = weakref.ref(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: only now the module is on its device, in its precision, and restored from its checkpoint.
        step = trainer.global_step
        goes_on = bool(self._stored)
        if step > 0 and not goes_on and self._arguments["reference"] is None:
            _warn(
                "DriftMonitor starts at step %d and the checkpoint holds no state of it, so the model as it is "
                "now becomes the reference. To compare with another model, give its directory: reference=...",
                step,
            )
        self._is_shown = False
        recipe = recipe_of(trainer, pl_module)
        recipe["optimizers"] = self._optimizers = self._optimizers or recipe["optimizers"]
        monitor = self._monitor = Monitor(
            **self._arguments,
            record=record_directory(self._record, trainer, f"diffsensor{self._suffix}"),
            controller=LightningController(trainer, pl_module, self._penalty),
            recipe=recipe,
        )
        if goes_on:
            monitor.load_state_dict(self._stored)
        if self._gate is not None:
            self._gated = GatedCheckpoints.of(trainer)
            self._gated.begin(self._suffix, self, self._judged, self._passed)
        # The precision plugin's context is the one in which training_step runs; hooks run outside of it.
        # Where a model is loaded for its answers, that may draw random numbers.
        with isolate_rng(), trainer.precision_plugin.forward_context():
            monitor.attach(pl_module)
        if goes_on:
            self._keep_if_passed(trainer.global_step)
            trainer.callback_metrics.update(_as_tensors(self._latest, pl_module))
            self._look_if_due(trainer, pl_module)
        else:
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._loss[0]:
            self._loss = (trainer.global_step, _loss(outputs, trainer, pl_module))
        # Fires at each micro-batch, while global_step counts optimizer steps.
        if self._look_if_due(trainer, pl_module) or not self._is_shown:
            self._show_in_progress_bar(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._monitor is not None and trainer.global_step > self._read:
            self._look(trainer, pl_module)
        if self._gate is not None:
            self._verdict = self._judged()  # for checkpoints that are saved after fit

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._verdict = None  # the weights may be between two steps
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _look_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Reads if a step that went by since the last call is due, and says whether it did."""
        monitor, step = self._monitor, trainer.global_step
        if monitor is None:
            return False
        # With several optimizers global_step moves by more than one, and could step over every due step.
        due = any(monitor.is_due(passed) for passed in range(self._seen + 1, step + 1))
        self._seen = step
        if due:
            self._look(trainer, pl_module)
        return due

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._monitor is not None
        self._seen = self._read = step = trainer.global_step  # before what is read may lead to a checkpoint
        with trainer.precision_plugin.forward_context():
            readings = self._monitor.read(pl_module, step, **self._progress(trainer))
        values = {reading.key: reading.value for reading in readings if reading.sensor != "progress"}
        if not values:
            return
        values |= {reading.floor_key: reading.noise_floor for reading in readings if _has_floor(reading)}
        for logger in trainer.loggers:
            self._log_to(logger, values, step)
        actionable = self._actionable()
        self._latest.update(actionable)
        # Not `pl_module.log`: Lightning goes through all that was logged at each batch (1 ms a batch for 300 keys),
        # and refuses it in on_train_start and on_train_end.
        trainer.callback_metrics.update(_as_tensors(actionable, pl_module))

    def _log_to(self, logger: Logger, values: Mapping[str, float], step: int) -> None:
        """Hand the readings to a logger. One that fails is told of once, and the run goes on."""
        name = type(logger).__name__
        named = {key.replace("/", logger.group_separator): value for key, value in values.items()}
        if name == "MLFlowLogger":  # it knows no "=", and Lightning would warn of each key at each look
            named = {re.sub(r"[^\w/. -]", "_", key, flags=re.ASCII): value for key, value in named.items()}
        try:
            logger.log_metrics(named, step=step)
            logger.save()
        except Exception as error:
            if name not in self._failed_loggers:
                self._failed_loggers.add(name)
                logging.getLogger(__name__).error(
                    "%s failed and shows no readings; the run goes on. %s", name, error, exc_info=error
                )

    def _progress(self, trainer: pl.Trainer) -> dict[str, float | torch.Tensor]:
        rates = [group.get("lr") for optimizer in trainer.optimizers for group in optimizer.param_groups]
        loss = self._loss[1] if self._loss[0] == trainer.global_step else None
        told = {"loss": loss, "learning_rate": rates[0] if rates else None}
        return {name: value for name, value in told.items() if value is not None}

    def _actionable(self) -> dict[str, float]:
        """What was read last and other callbacks may act on."""
        monitor = self._monitor
        if monitor is None:
            return {}
        return {
            reading.key: reading.value
            for reading in monitor.readings
            if reading.sensor != "progress" and not monitor.is_sealed(reading)
        }

    def _judged(self) -> Verdict:
        """The verdict on the model as it is now, which is read first where this step was not."""
        trainer = self._trainer() if self._trainer is not None else None
        assert trainer is not None
        step, module = trainer.global_step, trainer.lightning_module
        if trainer.interrupted:  # in this process, maybe not in the others, so that nothing can be read
            reason = "The run was broken off, and its weights may be between two steps."
            return Verdict(step=step, outcome="unknown", reason=reason)
        if self._monitor is None:
            if self._verdict is not None and self._verdict.step == step:
                return self._verdict
            reason = f"The model was not read at step {step}, and is not read once training has ended."
            return Verdict(step=step, outcome="unknown", reason=reason)
        if self._monitor.last_step != step:
            self._look(trainer, module)
        with trainer.precision_plugin.forward_context():
            return self._monitor.verdict(module, step)

    def _keep_if_passed(self, step: int) -> None:
        """A run that goes on from a checkpoint that passed can roll back to it."""
        assert self._monitor is not None and self._monitor.controller is not None
        verdict = self._monitor.last_verdict
        if self._rolls_back and verdict is not None and (verdict.outcome, verdict.step) == ("pass", step):
            self._monitor.controller.keep(step)

    def _show_in_progress_bar(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One number only: `log` is the way into the progress bar, and each one costs time at each batch."""
        headlines = [key for key in self._latest if key.startswith(f"diffsensor/{HEADLINE}")] or list(self._latest)
        if headlines and not trainer.barebones:
            key = min(headlines, key=len)
            pl_module.log(key, self._latest[key], prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self._is_shown = True

    def _close(self) -> None:
        if self._monitor is not None:
            # Checkpoints may be saved after fit.
            self._latest.update(self._actionable())
            self._stored = self._monitor.state_dict()
            self._monitor.close()
            self._monitor = None
        if self._gated is not None:
            self._gated.end()


def _as_tensors(values: Mapping[str, float], pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """As Lightning's own: float32, on the device; not views of one tensor, or a checkpoint would hold all of it."""
    return {key: torch.tensor(value, dtype=torch.float32, device=pl_module.device) for key, value in values.items()}


def _has_floor(reading: Reading) -> bool:
    """Whether loggers draw its noise floor: of all probes, on the outputs."""
    return not reading.group and not reading.hookpoint and not math.isnan(reading.noise_floor)


def _loss(outputs: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.Tensor | float | None:
    """What `training_step` gave as its loss, as long as nobody waits for a GPU; None where it gave none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            return None
        # Lightning has divided it by the number of batches that make one step.
        num_batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        return loss.detach() if num_batches == 1 else loss.detach() * num_batches
    return float(loss) if isinstance(loss, Real) else None
