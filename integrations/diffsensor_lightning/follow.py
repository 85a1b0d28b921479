"""Obeying the verdicts that a watch writes beside the checkpoints of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsensor import Action, DiffSensorError, Followed, FollowedVerdicts

try:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError as error:
    raise ImportError("FollowVerdicts needs Lightning: pip install 'diffsensor[lightning]'") from error

from diffsensor_lightning.controller import LightningController


class FollowVerdicts(pl.Callback):
    """Obeys what `diffsensor watch` says of this run's checkpoints; the run itself reads nothing and pays nothing.

    A failed checkpoint stops the run, or asks for whatever else is given. The verdict comes as much later as the watch
    needs to read a checkpoint.

    Args:
        directory: Where the checkpoints are, and their verdicts appear: that of the ModelCheckpoint.
        actions: What a failed checkpoint asks of the run; `Stop()` where none are given.
        every_n_train_steps: Optimizer steps from one look at the directory to the next.
        unknown_is_fail: Whether a verdict that could not be told asks for the actions too.

    Raises:
        MisconfigurationException: An argument means nothing here, or the run cannot do what is asked of it.
    """

    def __init__(
        self,
        directory: str | Path,
        actions: Sequence[Action] | None = None,
        *,
        every_n_train_steps: int = 10,
        unknown_is_fail: bool = False,
    ) -> None:
        super().__init__()
        try:
            self._verdicts = FollowedVerdicts(
                directory, actions, every=every_n_train_steps, unknown_is_fail=unknown_is_fail
            )
        except DiffSensorError as error:
            raise MisconfigurationException(f"FollowVerdicts: {error}") from error
        self._controller: LightningController | None = None
        self._looked = -1
        #: The verdicts that appeared while this run trained.
        self.followed: list[Followed] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._controller = LightningController(trainer, pl_module)
        try:
            self._verdicts.begin(self._controller)
        except DiffSensorError as error:
            raise MisconfigurationException(f"FollowVerdicts: {error}") from error

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Fires at each micro-batch, while global_step counts optimizer steps.
        if self._controller is not None and trainer.global_step != self._looked:
            self._looked = trainer.global_step
            self.followed += self._verdicts.look(trainer.global_step, self._controller)
