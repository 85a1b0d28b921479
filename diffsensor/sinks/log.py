"""Alerts to Python's logging."""

import logging
from typing import final

from diffsensor.types import Findings

logger = logging.getLogger("diffsensor.alerts")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


@final
class LogAlerts:
    """Alerts to the logger `diffsensor.alerts`: info, warning and critical as INFO, WARNING and ERROR.

    Those that were on record before the run went on from an older checkpoint are not logged again.
    """

    def write(self, findings: Findings) -> None:
        for alert in findings.alerts:
            if not alert.is_repeat:
                logger.log(_LEVELS[alert.severity], "step %d, %s: %s", alert.step, alert.rule, alert.message)

    def close(self) -> None:
        """There is nothing to close."""
