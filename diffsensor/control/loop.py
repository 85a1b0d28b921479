"""What a training loop of one's own lets an action ask for."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from diffsensor.control.kept import Kept
from diffsensor.control.learning_rate import cannot_scale, scale_learning_rate
from diffsensor.control.pause import PauseFile
from diffsensor.control.wrapped import bare_optimizer
from diffsensor.errors import ConfigError, RefusedError
from diffsensor.types import Ability

logger = logging.getLogger(__name__)


@runtime_checkable
class Penalty(Protocol):
    """A KL penalty, as far as a controller needs to know it: what its loss is multiplied by."""

    coefficient: float


@final
class LoopController:
    """The controller of a plain loop. It can do what it is given the means for; the loop checks `should_stop`.

        controller = LoopController(model, optimizer, scheduler=scheduler, save=lambda reason: torch.save(...))
        monitor = Monitor(probes, rules=[...], controller=controller)
        for step, batch in enumerate(batches):
            monitor.observe(model, step)
            if controller.should_stop:
                print(controller.stop_reason)
                break

    A rollback happens right after the next update of every optimizer, because a forward pass may be under way when it
    is asked for; that update is thrown away. A learning rate that the loop itself sets at each step cannot be scaled
    for good: give it to a scheduler.

    Arguments:
        model: what is trained; needed to roll back.
        optimizer: one, or all of them; needed to roll back and to scale learning rates.
        scheduler: one, or all of them; without them a scaled learning rate would be undone.
        scaler: the gradient scaler, where there is one.
        save: saves a checkpoint; is called with the reason, a sentence.
        penalty: the KL penalty, whose `coefficient` is moved.
        wait: how to wait for a person; a path is that of the file, `PAUSED` in the current directory by default.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        scheduler: object = None,
        scaler: GradScaler | None = None,
        save: Callable[[str], object] | None = None,
        penalty: Penalty | None = None,
        wait: PauseFile | Path | str | None = None,
    ) -> None:
        #: Whether an action asked the run to end; the loop checks it, and says why: `stop_reason`.
        if model is not None and not isinstance(model, nn.Module):
            raise ConfigError(
                f"LoopController was given a {type(model).__name__} as its model. Give the model first: "
                "LoopController(model, optimizer)."
            )
        self.should_stop = False
        self.stop_reason = ""
        self._model, self._scaler, self._save, self._penalty = model, scaler, save, penalty
        given = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._optimizers = [bare_optimizer(each) for each in given]
        is_several = isinstance(scheduler, (list, tuple))
        self._schedulers = [] if scheduler is None else list(scheduler) if is_several else [scheduler]  # type: ignore[call-overload]
        self._wait = wait if isinstance(wait, PauseFile) else PauseFile() if wait is None else PauseFile(wait)
        self._kept: Kept | None = None
        self._rolling_back: dict[Optimizer, RemovableHandle] = {}
        if save is not None and not callable(save):
            raise ConfigError(f"LoopController was given save={save!r}, expected a function of one reason.")
        if penalty is not None and not isinstance(penalty, Penalty):
            raise ConfigError(f"LoopController was given penalty={penalty!r}, which has no coefficient to move.")

    def cannot(self, ability: Ability) -> str:
        if ability == "save_checkpoint" and self._save is None:
            return "This loop gave no way to save: LoopController(save=...), a function that saves a checkpoint."
        if ability == "scale_learning_rate":
            if not self._optimizers:
                return "This loop gave no optimizer: LoopController(optimizer=...)."
            return cannot_scale(self._optimizers, self._schedulers)
        if ability == "set_kl_coefficient" and self._penalty is None:
            return "This loop gave no KL penalty: LoopController(penalty=...), an object with a coefficient."
        if ability == "rollback":
            if self._model is None or not self._optimizers:
                missing = "model" if self._model is None else "optimizer"
                return f"This loop gave no {missing} to roll back: LoopController(model, optimizer)."
            try:
                self._kept = self._kept or Kept(self._model, self._optimizers, self._scaler)
            except ConfigError as error:
                return str(error)
        return ""

    def stop(self, reason: str) -> str:
        self.should_stop = True
        self.stop_reason = self.stop_reason or reason
        return "the loop was told to stop"

    def save_checkpoint(self, reason: str) -> str:
        self._require("save_checkpoint")
        assert self._save is not None
        self._save(reason)
        return "the loop saved a checkpoint"

    def scale_learning_rate(self, factor: float) -> str:
        self._require("scale_learning_rate")
        return scale_learning_rate(self._optimizers, self._schedulers, factor)

    def kl_coefficient(self) -> float:
        self._require("set_kl_coefficient")
        assert self._penalty is not None
        return float(self._penalty.coefficient)

    def set_kl_coefficient(self, value: float) -> str:
        before = self.kl_coefficient()
        assert self._penalty is not None
        self._penalty.coefficient = value
        return f"KL coefficient {before:.4g} -> {value:.4g}"

    def keep(self, step: int) -> None:
        self._require("rollback")
        assert self._kept is not None
        if not self._rolling_back:  # else what passed is about to be replaced
            self._kept.keep(step)

    def rollback(self, reason: str) -> str:
        self._require("rollback")
        assert self._kept is not None
        if self._kept.step is None:
            raise RefusedError("Nothing has passed yet, so there is no state to roll back to.")
        if not self._rolling_back:
            self._rolling_back = {
                each: each.register_step_post_hook(lambda stepped, *_: self._after(stepped))
                for each in self._optimizers
            }
        return f"goes back to step {self._kept.step} after this update; data and step go on"

    def pause(self, reason: str) -> str:
        if self._wait.wait(reason):
            return "waited until a person let the run go on"
        self.stop(f"nobody let the run go on within {self._wait.timeout:g} s. {reason}")
        return f"waited {self._wait.timeout:g} s, nobody let the run go on, and the loop was told to stop"

    def _after(self, stepped: Optimizer) -> None:
        """An optimizer has made its update; once all have, nothing that began before the rollback is under way."""
        if handle := self._rolling_back.pop(stepped, None):
            handle.remove()
        if not self._rolling_back:
            assert self._kept is not None
            try:
                self._kept.restore()
            except RefusedError as error:  # in the midst of the loop's own update, which must not end for it
                logger.error("The rollback was not carried out. %s", error)

    def _require(self, ability: Ability) -> None:
        if reason := self.cannot(ability):
            raise RefusedError(reason)
