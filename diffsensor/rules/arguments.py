"""What every rule is given, checked with the closest valid choice: severity, cool-down, numbers."""

import math
from numbers import Real
from typing import get_args

from diffsensor.errors import ConfigError, unknown
from diffsensor.types import Severity

#: From the mildest to the gravest.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


def require_severity(rule: str, severity: str) -> None:
    if severity not in SEVERITIES:
        raise ConfigError(f"The rule {rule!r} cannot be built. " + unknown("severity", str(severity), SEVERITIES))


def require_looks(rule: str, argument: str, number: int, *, at_least: int) -> None:
    """Raise unless `number` is a whole number of looks."""
    if isinstance(number, bool) or not isinstance(number, int) or number < at_least:
        raise ConfigError(
            f"The rule {rule!r} was given {argument}={number!r}, which is counted in looks. Give a whole number of at "
            f"least {at_least}."
        )


def require_finite(rule: str, argument: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ConfigError(f"The rule {rule!r} was given {argument}={number!r}. Give a finite number.")


def require_texts(rule: str, **arguments: str) -> None:
    for argument, text in arguments.items():
        if not isinstance(text, str):
            raise ConfigError(f"The rule {rule!r} was given {argument}={text!r}. Give a text.")
