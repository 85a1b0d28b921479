"""Which checkpoint a trainer takes for its best."""

from collections.abc import Callable
from typing import Any

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("BestOfPassed needs transformers: pip install 'diffsensor[transformers]'") from error

_DECISION = "_determine_best_metric"


class BestOfPassed:
    """What stands in the place of a trainer's decision on its best checkpoint, until `undo`: only one that passed is.

    It is put right where the trainer decides, before it saves: afterwards is too late, for the trainer protects its
    best checkpoint from `save_total_limit` and would have removed the earlier one, which passed.
    """

    def __init__(self, trainer: Trainer, has_passed: Callable[[], bool]) -> None:
        self._trainer, self._has_passed = trainer, has_passed
        self._own = trainer._determine_best_metric
        self._before = vars(trainer).get(_DECISION)
        self._is_undone = False
        vars(trainer)[_DECISION] = self

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        state = self._trainer.state
        before = state.best_metric, state.best_global_step
        is_best = self._own(*args, **kwargs)
        if is_best and not self._is_undone and not self._has_passed():
            state.best_metric, state.best_global_step = before
            return False
        return is_best

    def undo(self) -> None:
        """Let the trainer decide again."""
        self._is_undone = True
        held = vars(self._trainer)
        # Those of several callbacks stand around each other, and are not undone from the outside in.
        while isinstance(there := held.get(_DECISION), BestOfPassed) and there._is_undone:
            if there._before is None:
                del held[_DECISION]
            else:
                held[_DECISION] = there._before
