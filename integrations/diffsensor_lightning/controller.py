"""What a Lightning run lets actions ask for."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from diffsensor import Ability, ConfigError, RefusedError
from diffsensor.control import Kept, PauseFile, Penalty, cannot_scale, scale_learning_rate

_log = logging.getLogger(__name__)
_warn = rank_zero_only(_log.warning)

#: Those of them that this version of Lightning has.
_AVERAGING = tuple(
    vars(lightning_callbacks)[name]
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if name in vars(lightning_callbacks)
)


class LightningController:
    """The controller of a Lightning run. `DriftMonitor` makes one when training starts.

    Checkpoints that an action asks for go into `diffsensor-checkpoints` beside those of the run. A rollback is done
    between two steps, to the copy in memory of the model that passed last; a run that goes on from a checkpoint begins
    with that one, if a gate passed it, else with none. A learning rate that the module sets by hand at each step
    (in `optimizer_step`, say) cannot be scaled for good: give it to a scheduler.

    Args:
        trainer: The trainer, once training has started.
        pl_module: What is trained.
        penalty: The KL penalty that `training_step` adds to its loss, whose `coefficient` is moved.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, penalty: Penalty | None = None) -> None:
        self._trainer, self._module, self._penalty = trainer, pl_module, penalty
        self._kept: Kept | None = None

    def cannot(self, ability: Ability) -> str:
        if ability == "scale_learning_rate":
            return cannot_scale(self._trainer.optimizers, self._schedulers())
        if ability == "set_kl_coefficient" and self._penalty is None:
            return (
                "Give DriftMonitor the penalty that training_step adds to its loss: DriftMonitor(..., "
                "penalty=KLPenalty(...))."
            )
        if ability == "rollback":
            return self._cannot_roll_back()
        return ""

    def stop(self, reason: str) -> str:
        trainer = self._trainer
        trainer.should_stop = True
        _warn("The run ends after step %d. %s", trainer.global_step, reason)
        # Lightning hears of should_stop only then.
        first = [f"min_epochs={trainer.min_epochs}"] if trainer.current_epoch < (trainer.min_epochs or 0) else []
        first += [f"min_steps={trainer.min_steps}"] if trainer.global_step < (trainer.min_steps or 0) else []
        return "the trainer was told to stop" + (f"; it goes on until {' and '.join(first)} is met" if first else "")

    def save_checkpoint(self, reason: str) -> str:
        path = run_directory(self._trainer) / "diffsensor-checkpoints" / f"step={self._trainer.global_step}.ckpt"
        try:
            self._trainer.save_checkpoint(path)
        except Exception:
            # It is contained, and the run goes on; at the end of a save the other processes wait for this one.
            self._trainer.strategy.barrier()
            raise
        return f"saved {path}"

    def scale_learning_rate(self, factor: float) -> str:
        return scale_learning_rate(self._trainer.optimizers, self._schedulers(), factor)

    def kl_coefficient(self) -> float:
        return float(self._required_penalty().coefficient)

    def set_kl_coefficient(self, value: float) -> str:
        penalty = self._required_penalty()
        before, penalty.coefficient = float(penalty.coefficient), value
        return f"KL coefficient {before:.4g} -> {value:.4g}"

    def keep(self, step: int) -> None:
        if reason := self.cannot("rollback"):
            raise RefusedError(reason)
        assert self._kept is not None
        self._kept.keep(step)

    def rollback(self, reason: str) -> str:
        if why := self.cannot("rollback"):
            raise RefusedError(why)
        assert self._kept is not None
        if self._kept.step is None:
            raise RefusedError("Nothing has passed yet since this process began, so there is no state to go back to.")
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.started > batches.processed:
            raise RefusedError(
                "The rollback was asked for in the midst of a training step, by a checkpoint that is saved there: its "
                "gradients are of the weights as they are. Save checkpoints between steps, in on_train_batch_end."
            )
        return f"went back to step {self._kept.restore()}; data and step go on"

    def pause(self, reason: str) -> str:
        place = run_directory(self._trainer)
        with contextlib.suppress(OSError):  # in whose place the file cannot be, which is told to all processes
            place.mkdir(parents=True, exist_ok=True)
        PauseFile(place / "PAUSED").wait(reason)
        return "waited until a person let the run go on"

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    def _required_penalty(self) -> Penalty:
        if self._penalty is None:
            raise RefusedError(self.cannot("set_kl_coefficient"))
        return self._penalty

    def _cannot_roll_back(self) -> str:
        trainer = self._trainer
        if saves_in_its_own_way(trainer.strategy):
            return (
                f"{type(trainer.strategy).__name__} holds weights and optimizer states in a way of its own, of which "
                "no copy is made in memory. Use strategy='auto', or stop and go on from a checkpoint by hand."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _AVERAGING):
                return (
                    f"{type(callback).__name__} averages the weights of all steps, and would keep those that are "
                    "rolled back. Leave one of the two out."
                )
        if self._kept is None:
            plugin = trainer.precision_plugin
            scaler: Any = plugin.scaler if isinstance(plugin, MixedPrecision) else None
            try:
                self._kept = Kept(self._module, trainer.optimizers, scaler)
            except ConfigError as error:
                return str(error)
        return ""


def saves_in_its_own_way(strategy: Strategy) -> bool:
    """Whether checkpoints are not written from the one dict that others see: of sharded strategies, and of TPUs."""
    return type(strategy).save_checkpoint is not Strategy.save_checkpoint


def run_directory(trainer: pl.Trainer) -> Path:
    """Where the run's own files are: the first logger's directory, or the trainer's without one.

    As the first process has it; to be asked by all of them.
    """
    places = [logger.log_dir for logger in trainer.loggers if logger.log_dir is not None]
    decided: Path = trainer.strategy.broadcast(Path(places[0] if places else trainer.default_root_dir))
    return decided
