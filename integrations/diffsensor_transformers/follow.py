"""Obeying the verdicts that a watch writes beside the checkpoints of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsensor import Action, Followed, FollowedVerdicts
from diffsensor_transformers.callback import trainer_frame
from diffsensor_transformers.controller import TrainerController

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("FollowVerdicts needs transformers: pip install 'diffsensor[transformers]'") from error


class FollowVerdicts(TrainerCallback):
    """Obeys what `diffsensor watch` says of this run's checkpoints; the run itself reads nothing and pays nothing.

        trainer = Trainer(..., callbacks=[FollowVerdicts()])       # beside: diffsensor watch OUTPUT_DIR --reference ...

    A failed checkpoint stops the run, or asks for whatever else is given. The verdict comes as much later as the watch
    needs to read a checkpoint.

    Arguments:
        directory: where the verdicts appear; the trainer's `output_dir` by default.
        actions: what a failed checkpoint asks of the run; `Stop()` where none are given.
        every_n_steps: optimizer steps from one look at the directory to the next.
        unknown_is_fail: whether a verdict that could not be told asks for the actions too.

    Raises `ConfigError` for arguments that mean nothing, and when training begins for what this run cannot do.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        actions: Sequence[Action] | None = None,
        *,
        every_n_steps: int = 10,
        unknown_is_fail: bool = False,
    ) -> None:
        self._directory = directory
        self._options: dict[str, Any] = {"every": every_n_steps, "unknown_is_fail": unknown_is_fail}
        self._actions = actions
        self._verdicts = FollowedVerdicts(directory or ".", actions, **self._options)  # its arguments are checked now
        self._controller: TrainerController | None = None
        #: The verdicts that appeared while this run trained.
        self.followed: list[Followed] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        directory = Path(self._directory or args.output_dir or ".")
        self._verdicts = FollowedVerdicts(directory, self._actions, **self._options)
        self._controller = TrainerController(trainer_frame().f_locals["self"])
        self._verdicts.begin(self._controller)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._controller is not None:
            self.followed += self._verdicts.look(state.global_step, self._controller)
