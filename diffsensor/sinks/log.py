"""Alerts to Python's logging."""

import logging
import math
from typing import final

from diffsensor.errors import listed
from diffsensor.types import Alert, Findings

logger = logging.getLogger("diffsensor.alerts")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


@final
class LogAlerts:
    """Alerts to the logger `diffsensor.alerts`: info, warning and critical as INFO, WARNING and ERROR.

    Of several of one rule at one look the one that is furthest from 0 is told in full, the others by their subjects.
    Those that were on record before the run went on from an older checkpoint are not logged again.
    """

    def write(self, findings: Findings) -> None:
        alike: dict[tuple[str, str], list[Alert]] = {}
        for alert in findings.alerts:
            if not alert.is_repeat:
                alike.setdefault((alert.rule, alert.severity), []).append(alert)
        for alerts in alike.values():
            worst = max(alerts, key=lambda alert: -1.0 if math.isnan(alert.value) else abs(alert.value))
            others = [alert.subject for alert in alerts if alert is not worst]
            so_too = f" So do {len(others)} more: {listed(others, 4)}." if others else ""
            logger.log(_LEVELS[worst.severity], "step %d, %s: %s%s", worst.step, worst.rule, worst.message, so_too)

    def close(self) -> None:
        """There is nothing to close."""
