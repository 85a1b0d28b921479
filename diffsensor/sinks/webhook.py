"""Alerts to a chat or any other place that takes JSON by HTTP, without a step ever waiting for it."""

import atexit
import json
import logging
import math
import time
from collections import deque
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Condition, Thread, current_thread
from typing import final, get_args
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from diffsensor.errors import ConfigError, unknown
from diffsensor.types import ActionTaken, Alert, Findings, Severity

logger = logging.getLogger(__name__)

_SEVERITIES: tuple[Severity, ...] = get_args(Severity)
#: The actions after which a run is no longer what its owner thinks.
_TOLD = ("stop", "rollback", "pause")
#: No wait between two attempts is longer, whatever a server asks for.
LONGEST_WAIT = 120.0


@final
class Webhook:
    """Posts each alert, stop, rollback and pause as Slack-compatible JSON, in the background.

    The `text` says it all; its parts are fields of an attachment.

    `write` returns at once; a thread of its own sends the alerts in order. What fails is tried again with growing
    waits: no connection, a timeout, 408, 429 and 5xx, after as long as the server asks for (Retry-After, at most two
    minutes). Other answers are final, redirects among them. When the queue is full the oldest alert goes. The first
    failure is logged, all are counted: `num_sent`, `num_failed`, `num_dropped`. Logs name the host alone, for the rest
    of the address is often a secret. Repeats (alerts on record before the run went on) are not sent again.

    Arguments:
        url: where to, http or https.
        min_severity: less severe alerts are not sent.
        timeout: seconds for one attempt.
        attempts: how often one alert is tried.
        first_wait: seconds before the second attempt; doubles from one to the next.
        queue_size: how many alerts may wait.
        close_within: seconds that `close`, or else the end of the program, waits for what is not sent yet.
    """

    def __init__(
        self,
        url: str,
        *,
        min_severity: Severity = "warning",
        timeout: float = 5.0,
        attempts: int = 5,
        first_wait: float = 1.0,
        queue_size: int = 100,
        close_within: float = 10.0,
    ) -> None:
        self.host = _host_of(url)
        if min_severity not in _SEVERITIES:
            raise ConfigError(unknown("severity", str(min_severity), _SEVERITIES))
        for name, count in (("attempts", attempts), ("queue_size", queue_size)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(f"Webhook was given {name}={count!r}, expected a whole number of at least 1.")
        for name, seconds in (("timeout", timeout), ("first_wait", first_wait), ("close_within", close_within)):
            if not (seconds > 0 and math.isfinite(seconds)):
                raise ConfigError(f"Webhook was given {name}={seconds!r}, expected seconds above 0.")
        self.num_sent = self.num_failed = self.num_dropped = 0
        self._url, self._min_severity = url, min_severity
        self._timeout, self._attempts, self._first_wait = timeout, attempts, first_wait
        self._queue_size, self._close_within = queue_size, close_within
        self._opener = build_opener(_NoRedirects())
        self._waiting: deque[Alert] = deque()
        self._changed = Condition()
        self._deadline = math.inf
        self._thread: Thread | None = None
        self._has_complained = False

    def write(self, findings: Findings) -> None:
        least = _SEVERITIES.index(self._min_severity)
        told = [*findings.alerts, *(_as_alert(taken) for taken in findings.actions if taken.action in _TOLD)]
        alerts = [a for a in told if not a.is_repeat and _SEVERITIES.index(a.severity) >= least]
        if not alerts:
            return
        with self._changed:
            for alert in alerts:
                if len(self._waiting) == self._queue_size:
                    self._waiting.popleft()
                    self.num_dropped += 1
                self._waiting.append(alert)
            if self._thread is None:
                self._deadline = math.inf
                self._thread = Thread(target=self._work, name="diffsensor webhook", daemon=True)
                self._thread.start()
                # A run that ends without closing its monitor has alerts to send as well.
                atexit.register(self.close)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for what is not sent yet, for a bounded time, and log what was not sent. Writing again reopens it."""
        thread = self._thread
        if thread is None:
            return
        atexit.unregister(self.close)
        with self._changed:
            self._deadline = time.monotonic() + self._close_within
            self._changed.notify_all()
        thread.join(self._close_within)
        with self._changed:
            # A thread that hangs in its last attempt finds that it has been replaced, and ends.
            self._thread = None
            late = len(self._waiting) + thread.is_alive()
            self._waiting.clear()
            self.num_failed += late
        if self.num_failed or self.num_dropped:
            logger.warning(
                "%d alerts were not sent to %s: %d failed or were too late, %d were dropped from a full queue. "
                "They are in the record.",
                self.num_failed + self.num_dropped,
                self.host,
                self.num_failed,
                self.num_dropped,
            )

    def _work(self) -> None:
        me = current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._deadline < math.inf or self._thread is not me)
                if self._thread is not me or not self._waiting or time.monotonic() >= self._deadline:
                    return
                alert = self._waiting.popleft()
            sent = self._send(alert)
            with self._changed:
                if self._thread is not me:
                    return
                self.num_sent += sent
                self.num_failed += not sent

    def _send(self, alert: Alert) -> bool:
        """Try until it is sent, refused for good, tried often enough, or too late."""
        request = Request(self._url, data=_payload(alert), headers={"Content-Type": "application/json"})
        for attempt in range(self._attempts):
            wait = min(self._first_wait * 2.0**attempt, LONGEST_WAIT)
            try:
                with self._opener.open(request, timeout=self._timeout):
                    return True
            except HTTPError as error:
                self._complain(f"answered {error.code}")
                error.close()
                if error.code not in (408, 429) and error.code < 500:
                    return False
                wait = min(max(wait, _asked_to_wait(error.headers.get("Retry-After"))), LONGEST_WAIT)
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread goes on with the next alert
                # Not the error's own text, which may hold the address.
                cause = error.reason if isinstance(error, URLError) else error
                self._complain(f"cannot be reached ({type(cause).__name__})")
            if attempt + 1 < self._attempts and not self._has_waited(wait):
                return False
        return False

    def _has_waited(self, seconds: float) -> bool:
        """Wait, unless that would take until after the deadline, which may be set meanwhile."""
        end = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._deadline < end or self._thread is not current_thread(), seconds)
            return self._deadline >= end and self._thread is current_thread()

    def _complain(self, what: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            logger.warning(
                "The webhook at %s %s. Alerts are tried again in the background where that may help; the run goes on, "
                "and further failures are counted, not logged.",
                self.host,
                what,
            )


class _NoRedirects(HTTPRedirectHandler):
    """Alerts go to the address that was given and to no other."""

    def redirect_request(self, req: Request, fp: object, code: int, msg: str, headers: object, newurl: str) -> None:
        return None


def _host_of(url: str) -> str:
    """The host of a web address. No message shows more of it than that."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError("The webhook's address cannot be read. Expected https://host/path.") from None
    if parts.scheme not in ("http", "https"):
        given = f"begins with {parts.scheme + ':'!r}" if parts.scheme else "has no scheme"
        raise ConfigError(f"The webhook's address {given}, expected http:// or https://.")
    if not parts.hostname or any(char.isspace() or not char.isprintable() for char in url) or not url.isascii():
        raise ConfigError("The webhook's address has no host, or characters that no address has (spaces, umlauts).")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"The webhook's address for {parts.hostname} holds a user name or password, which is not supported. Use an "
            "address whose path is the secret."
        )
    return parts.hostname + (f":{port}" if port is not None else "")


def _as_alert(taken: ActionTaken) -> Alert:
    return Alert(
        step=taken.step,
        rule=taken.rule,
        severity="critical",
        subject=taken.action,
        message=f"{taken.action} ({taken.outcome}), as {taken.rule!r} asks for: {taken.detail}",
        first_step=taken.step,
    )


def _payload(alert: Alert) -> bytes:
    """Slack's form: `text`, and an attachment with the parts. Other services read the text alone."""
    parts = {
        "rule": alert.rule,
        "severity": alert.severity,
        "step": alert.step,
        "first step": alert.first_step,
        "subject": alert.subject,
        "value": alert.value,
        "standard error": alert.stderr,
        "threshold": alert.threshold,
        "unit": alert.unit,
        "suppressed": alert.suppressed,
    }
    fields = [
        {"title": title, "value": _escaped(f"{part:.6g}" if isinstance(part, float) else str(part)), "short": True}
        for title, part in parts.items()
        if part != "" and not (isinstance(part, float) and math.isnan(part))
    ]
    text = _escaped(f"[{alert.severity}] step {alert.step}, {alert.rule}: {alert.message}")
    return json.dumps({"text": text, "attachments": [{"fallback": text, "fields": fields}]}).encode()


def _escaped(text: str) -> str:
    """Slack reads <!channel> as a call to everybody; a group's name may be anything."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _asked_to_wait(header: str | None) -> float:
    """The seconds of a Retry-After header: a number, or a date; 0 where it is neither."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
