"""Alerts to a function of one's own."""

from collections.abc import Callable
from typing import final

from diffsensor.errors import ConfigError
from diffsensor.types import Alert, Findings


@final
class Calls:
    """Calls `function` with each alert, repeats included (`alert.is_repeat`), within the step: let it be quick.

    One that fails does not keep the others from being called with; the first failure is raised at the end, and the
    monitor logs and counts it.
    """

    def __init__(self, function: Callable[[Alert], object]) -> None:
        if not callable(function):
            raise ConfigError(f"Calls was given {function!r}, expected a function of one alert.")
        self.function = function

    def write(self, findings: Findings) -> None:
        failures = list[Exception]()
        for alert in findings.alerts:
            try:
                self.function(alert)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below
                failures.append(error)
        if failures:
            raise failures[0]

    def close(self) -> None:
        """There is nothing to close."""
