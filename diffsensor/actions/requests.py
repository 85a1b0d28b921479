"""What can be asked of a run when a rule is breached. The run's controller decides how, and whether it can."""

import logging
import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal, get_args

from diffsensor.errors import ConfigError, RefusedError, unknown
from diffsensor.protocols import Controller
from diffsensor.types import Ability, Alert

logger = logging.getLogger(__name__)

LogLevel = Literal["debug", "info", "warning", "error", "critical"]

#: Beyond this a KL penalty leaves nothing of the task.
LARGEST_KL_COEFFICIENT = 1e2


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run after this step, as if it were over: with its last checkpoint and its closing hooks."""

    name: ClassVar[str] = "stop"
    needs: ClassVar[Ability] = "stop"
    at_most: ClassVar[None] = None

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.stop(_reason(alert))


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Save a checkpoint of the model as it is now."""

    name: ClassVar[str] = "save_checkpoint"
    needs: ClassVar[Ability] = "save_checkpoint"
    at_most: ClassVar[None] = None

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.save_checkpoint(_reason(alert))


@dataclass(frozen=True, slots=True)
class ScaleLearningRate:
    """Multiply every learning rate by `factor`, for the rest of the run.

    Drift is a state and the learning rate its speed: a smaller one slows the drift down and takes none of it back.
    """

    needs: ClassVar[Ability] = "scale_learning_rate"
    at_most: ClassVar[None] = None

    factor: float

    def __post_init__(self) -> None:
        _require_factor("ScaleLearningRate", self.factor)

    @property
    def name(self) -> str:
        return f"scale_learning_rate({self.factor:g})"

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.scale_learning_rate(self.factor)


@dataclass(frozen=True, slots=True)
class SetKLCoefficient:
    """Set the coefficient of the KL penalty to `value`, in [0, 100]."""

    needs: ClassVar[Ability] = "set_kl_coefficient"
    at_most: ClassVar[None] = None

    value: float

    def __post_init__(self) -> None:
        if not _is_number(self.value) or not 0 <= self.value <= LARGEST_KL_COEFFICIENT:
            raise ConfigError(
                f"SetKLCoefficient was given value={self.value!r}, expected a number from 0 (no penalty) to "
                f"{LARGEST_KL_COEFFICIENT:g}."
            )

    @property
    def name(self) -> str:
        return f"set_kl_coefficient({self.value:g})"

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.set_kl_coefficient(self.value)


@dataclass(frozen=True, slots=True)
class ScaleKLCoefficient:
    """Multiply the coefficient of the KL penalty by `factor`, up to 100 at most."""

    needs: ClassVar[Ability] = "set_kl_coefficient"
    at_most: ClassVar[None] = None

    factor: float

    def __post_init__(self) -> None:
        _require_factor("ScaleKLCoefficient", self.factor)

    @property
    def name(self) -> str:
        return f"scale_kl_coefficient({self.factor:g})"

    def __call__(self, alert: Alert, controller: Controller) -> str:
        now = controller.kl_coefficient()
        if now == 0:
            raise RefusedError(
                "The KL coefficient is 0, and so is every multiple of it. Begin with a positive one, or use "
                "SetKLCoefficient."
            )
        if self.factor > 1 and now >= LARGEST_KL_COEFFICIENT:
            raise RefusedError(f"The KL coefficient is {now:g} already, and {LARGEST_KL_COEFFICIENT:g} is the largest.")
        return controller.set_kl_coefficient(min(now * self.factor, LARGEST_KL_COEFFICIENT))


@dataclass(frozen=True, slots=True)
class Rollback:
    """Put weights, optimizer and random states back to those that passed last. Data and step go on.

    At most `at_most` times in a run: where the data themselves are the cause, the run comes back to the same place
    (3 to 6 times in 240 steps in `benchmarks/bench_budget.py`).
    """

    name: ClassVar[str] = "rollback"
    needs: ClassVar[Ability] = "rollback"

    at_most: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.at_most, int) or isinstance(self.at_most, bool) or self.at_most < 1:
            raise ConfigError(
                f"Rollback was given at_most={self.at_most!r}. It counts, so give a whole number of at least 1."
            )

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.rollback(_reason(alert))


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait until a person lets the run go on."""

    name: ClassVar[str] = "pause"
    needs: ClassVar[Ability] = "pause"
    at_most: ClassVar[None] = None

    def __call__(self, alert: Alert, controller: Controller) -> str:
        return controller.pause(_reason(alert))


@dataclass(frozen=True, slots=True)
class Log:
    """Write the alert to Python's logging, at `level`. The first rung of a ladder that warns before it acts."""

    needs: ClassVar[None] = None
    at_most: ClassVar[None] = None

    level: LogLevel = "warning"

    def __post_init__(self) -> None:
        if self.level not in get_args(LogLevel):
            raise ConfigError(unknown("log level", str(self.level), get_args(LogLevel)))

    @property
    def name(self) -> str:
        return f"log({self.level})"

    def __call__(self, alert: Alert, controller: Controller) -> str:
        logger.log(logging.getLevelNamesMapping()[self.level.upper()], "%s", _reason(alert))
        return f"logged as {self.level}"


def _reason(alert: Alert) -> str:
    return f"{alert.rule}, step {alert.step}: {alert.message}"


def _is_number(given: object) -> bool:
    return isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given)


def _require_factor(action: str, factor: float) -> None:
    if not _is_number(factor) or factor <= 0:
        raise ConfigError(
            f"{action} was given factor={factor!r}, expected a finite number above 0: 0.5 halves, 2 doubles."
        )
    if factor == 1:
        raise ConfigError(f"{action} was given factor=1, which changes nothing. Give 0.5 to halve, 2 to double.")
