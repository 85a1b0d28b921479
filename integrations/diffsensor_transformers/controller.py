"""What a run of transformers' Trainer lets an action ask for."""

import copy
from collections.abc import Callable
from pathlib import Path

from torch.optim import Optimizer

from diffsensor import Ability, ConfigError, RefusedError
from diffsensor.control import Kept, PauseFile, cannot_scale, scale_learning_rate
from diffsensor_transformers.coefficient import kl_coefficient, set_kl_coefficient, why_no_coefficient

try:
    from transformers import Trainer
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy
except ImportError as error:
    raise ImportError("TrainerController needs transformers: pip install 'diffsensor[transformers]'") from error


class TrainerController:
    """The controller of a trainer; to be asked between two updates, as in the trainer's own callbacks.

    A rollback goes to the copy in memory that was kept last. A run that goes on from a checkpoint has none at first,
    and goes to the checkpoint that passed last, where a gate keeps one.

    Arguments:
        trainer: the trainer.
        wait: how to wait for a person; by default a file PAUSED in the trainer's output directory.
        last_passed: where the checkpoint is that passed last; gives None where there is none.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        wait: PauseFile | None = None,
        last_passed: Callable[[], Path | None] = lambda: None,
    ) -> None:
        #: Whether a checkpoint was asked for that is not saved yet: the trainer forgets it where none can be saved now.
        self.is_save_due = False
        #: The run is over: it saves nothing any more.
        self.is_over = False
        #: At which step a rollback took place last, and to which one.
        self.rolled_back: tuple[int, int] | None = None
        self._trainer, self._last_passed = trainer, last_passed
        self._wait = PauseFile(Path(trainer.args.output_dir or ".") / "PAUSED") if wait is None else wait
        self._kept: Kept | None = None

    def cannot(self, ability: Ability) -> str:
        if ability in ("scale_learning_rate", "rollback") and self._trainer.is_deepspeed_enabled:
            return (
                "DeepSpeed holds optimizer and weights in ways of its own. Train without it, or leave this action out."
            )
        if ability == "scale_learning_rate":
            return cannot_scale([self._optimizer], [self._trainer.lr_scheduler])
        if ability == "set_kl_coefficient":
            return why_no_coefficient(self._trainer)
        if ability == "rollback" and self._kept is None:
            model, scaler = self._trainer.model, getattr(self._trainer.accelerator, "scaler", None)
            assert model is not None
            try:
                self._kept = Kept(model, [self._optimizer], scaler)
            except ConfigError as error:
                return str(error)
        return ""

    def stop(self, reason: str) -> str:
        args, control = self._trainer.args, self._trainer.control
        control.should_training_stop = True
        # As the trainer does at its last step; what goes by epochs follows by itself.
        if args.eval_strategy == IntervalStrategy.STEPS and not self.is_over:
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.STEPS and not self.is_over:
            self.save_checkpoint(reason)
        return "the trainer was told to stop after this step"

    def save_checkpoint(self, reason: str) -> str:
        if self.is_over:
            raise RefusedError("The run is over, and its trainer saves no checkpoint any more: trainer.save_model().")
        # A callback can raise this flag and no more; the trainer saves once all callbacks were asked.
        self._trainer.control.should_save = self.is_save_due = True
        return "the trainer was told to save a checkpoint after this step"

    def scale_learning_rate(self, factor: float) -> str:
        self._require("scale_learning_rate")
        return scale_learning_rate([self._optimizer], [self._trainer.lr_scheduler], factor)

    def kl_coefficient(self) -> float:
        return kl_coefficient(self._trainer)

    def set_kl_coefficient(self, value: float) -> str:
        return set_kl_coefficient(self._trainer, value)

    def keep(self, step: int) -> None:
        self._require("rollback")
        assert self._kept is not None
        self._kept.keep(step)

    def rollback(self, reason: str) -> str:
        self._require("rollback")
        assert self._kept is not None
        now = self._trainer.state.global_step
        passed = self._last_passed()
        if self._kept.step is not None:
            step, whence = self._kept.restore(), ""
        elif passed is not None and _step_of(passed) <= now:
            step, whence = self._load(passed), f", from {passed}"
        else:
            raise RefusedError("Nothing has passed yet, so there is no state to roll back to.")
        self.rolled_back = (now, step)
        return f"went back to the state of step {step}{whence}; data and step go on"

    def pause(self, reason: str) -> str:
        if self._wait.wait(reason):
            return "waited until a person let the run go on"
        self.stop(f"nobody let the run go on within {self._wait.timeout:g} s. {reason}")
        return f"waited {self._wait.timeout:g} s, nobody let the run go on, and the trainer was told to stop"

    def _load(self, directory: Path) -> int:
        """Put weights, optimizer, scaler and random states back to those of a checkpoint; learning rates stay."""
        args = self._trainer.args
        random = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
        if missing := [name for name in ("optimizer.pt", "scheduler.pt", random) if not (directory / name).exists()]:
            raise RefusedError(
                f"{directory} passed last and has no {missing[0]}, so it cannot be gone back to. Save whole "
                "checkpoints, save_only_model=False, with as many processes as there are now."
            )
        trainer, place, groups = self._trainer, str(directory), self._optimizer.param_groups
        assert trainer.lr_scheduler is not None
        schedule = copy.deepcopy(trainer.lr_scheduler.state_dict())
        kept = [{name: group[name] for name in group if name != "params"} for group in groups]
        trainer._load_from_checkpoint(place)
        trainer._load_optimizer_and_scheduler(place)
        trainer._load_scaler(place)
        trainer._load_rng_state(place)
        trainer.lr_scheduler.load_state_dict(schedule)
        for group, own in zip(self._optimizer.param_groups, kept, strict=True):
            group.update(own)
        return _step_of(directory)

    @property
    def _optimizer(self) -> Optimizer:
        assert self._trainer.optimizer is not None
        return self._trainer.optimizer

    def _require(self, ability: Ability) -> None:
        if reason := self.cannot(ability):
            raise RefusedError(reason)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
