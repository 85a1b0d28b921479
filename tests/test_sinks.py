"""Alerts to logging, a webhook and a function: what goes out, what is kept back, and that no step waits for it."""

import http.server
import itertools
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from diffsensor.errors import ConfigError
from diffsensor.protocols import Sink
from diffsensor.sinks import Calls, LogAlerts, Webhook
from diffsensor.sinks.webhook import _asked_to_wait
from diffsensor.types import ActionTaken, Alert, Findings, Severity

SECRET = "T000/B000/XyZsecret"


def alert(step: int = 0, severity: Severity = "warning", message: str = "KL is 0.4.", **more: Any) -> Alert:
    return Alert(
        step=step, rule="limit", severity=severity, subject="diffsensor/kl", message=message, first_step=step, **more
    )


def findings(*alerts: Alert) -> Findings:
    return Findings(step=0, alerts=alerts)


class Server:
    """A web server that answers in turn as it is told, then 200; it keeps what was posted, with the time."""

    def __init__(self, port: int = 0) -> None:
        self.answers: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.posted: list[tuple[float, dict[str, Any]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posted.append(
                    (time.monotonic(), body | {"path": self.path, "type": self.headers["Content-Type"]})
                )
                (outer.answers.pop(0) if outer.answers else answer(200))(self)

            def do_GET(self) -> None:
                outer.posted.append((time.monotonic(), {"text": "followed a redirect"}))
                answer(200)(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/services/{SECRET}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def texts(self) -> list[str]:
        return [body["text"].rpartition(": ")[2] for _, body in self.posted]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def answer(code: int, wait: float = 0.0, **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def send(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(wait)
        try:
            handler.send_response(code)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        except OSError:
            pass  # nobody waits for the answer any more

    return send


@pytest.fixture(autouse=True)
def without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_alerts_are_logged_at_the_level_of_their_severity_and_repeats_are_not(caplog: pytest.LogCaptureFixture) -> None:
    sink = LogAlerts()
    with caplog.at_level(logging.DEBUG, "diffsensor.alerts"):
        sink.write(findings(alert(1, "info"), alert(2, "warning"), alert(3, "critical"), alert(4, is_repeat=True)))
    sink.close()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "step 1, limit: KL is 0.4."),
        ("WARNING", "step 2, limit: KL is 0.4."),
        ("ERROR", "step 3, limit: KL is 0.4."),
    ]


def test_a_function_is_called_with_each_alert_even_after_one_failed() -> None:
    seen: list[int] = []

    def function(given: Alert) -> None:
        seen.append(given.step)
        if given.step == 1:
            raise ZeroDivisionError("of the user")

    sink = Calls(function)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        sink.write(findings(alert(1), alert(2), alert(3, is_repeat=True)))
    assert seen == [1, 2, 3]
    sink.close()


def test_all_are_sinks() -> None:
    assert all(isinstance(sink, Sink) for sink in (LogAlerts(), Calls(print), Webhook("https://example.org/x")))


def test_alerts_are_posted_in_order_in_slacks_form(server: Server) -> None:
    webhook = Webhook(server.url)
    webhook.write(findings(alert(1, message="KL of <!channel> & co"), alert(2)))
    webhook.write(Findings(step=1))
    webhook.write(findings(alert(3, value=0.4123456789, threshold=0.3, unit="nats/token")))
    webhook.close()
    assert webhook.num_sent == 3
    bodies = [body for _, body in server.posted]
    assert bodies[0]["text"] == "[warning] step 1, limit: KL of &lt;!channel&gt; &amp; co"
    assert [body["path"] for body in bodies] == [f"/services/{SECRET}"] * 3
    assert bodies[0]["type"] == "application/json"
    fields = {field["title"]: field["value"] for field in bodies[2]["attachments"][0]["fields"]}
    assert fields == {
        "rule": "limit",
        "severity": "warning",
        "step": "3",
        "first step": "3",
        "subject": "diffsensor/kl",
        "value": "0.412346",
        "threshold": "0.3",
        "unit": "nats/token",
        "suppressed": "0",
    }


def test_repeats_and_the_less_severe_are_not_posted(server: Server) -> None:
    webhook = Webhook(server.url, min_severity="critical")
    webhook.write(findings(alert(1, "info"), alert(2), alert(3, "critical", is_repeat=True), alert(4, "critical")))
    webhook.close()
    assert [body["text"][:17] for _, body in server.posted] == ["[critical] step 4"]
    assert Webhook(server.url)._thread is None  # off until there is something to send


def test_a_webhook_that_is_down_at_first_gets_all_alerts_in_order(caplog: pytest.LogCaptureFixture) -> None:
    down = Server()
    down.close()
    webhook = Webhook(down.url, first_wait=0.05, attempts=9)
    for step in range(3):
        webhook.write(findings(alert(step, message=f"number {step}")))
    until(lambda: "cannot be reached" in caplog.text)
    again = Server(down.port)
    webhook.close()
    again.close()
    assert again.texts == ["number 0", "number 1", "number 2"]
    assert (webhook.num_sent, webhook.num_failed) == (3, 0)
    assert len(caplog.records) == 1
    assert "ConnectionRefusedError" in caplog.text


def test_a_slow_webhook_holds_up_no_step_and_close_waits_for_a_bounded_time(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [answer(200, wait=3.0)] * 4
    webhook = Webhook(server.url, timeout=5.0, close_within=0.3)
    begun = time.monotonic()
    for step in range(100):
        webhook.write(findings(alert(step)))
    assert time.monotonic() - begun < 0.5
    begun = time.monotonic()
    webhook.close()
    assert 0.25 < time.monotonic() - begun < 2
    assert webhook.num_sent == 0
    assert webhook.num_failed == 100
    assert "100 alerts were not sent to 127.0.0.1" in caplog.text
    assert "They are in the record." in caplog.text


def test_an_attempt_that_takes_too_long_is_made_again(server: Server) -> None:
    server.answers = [answer(200, wait=0.5)]
    webhook = Webhook(server.url, timeout=0.1, first_wait=0.01)
    webhook.write(findings(alert(message="slow")))
    webhook.close()
    assert server.texts == ["slow", "slow"]
    assert webhook.num_sent == 1


@pytest.mark.parametrize("code", [429, 503])
def test_a_webhook_that_asks_for_time_gets_it(server: Server, code: int) -> None:
    server.answers = [answer(code, Retry_After="0.3")]
    webhook = Webhook(server.url, first_wait=0.01)
    webhook.write(findings(alert(message="a"), alert(message="b")))
    webhook.close()
    assert server.texts == ["a", "a", "b"]
    assert webhook.num_sent == 2
    assert server.posted[1][0] - server.posted[0][0] >= 0.3


def test_the_time_asked_for_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 < _asked_to_wait(soon) <= 30
    assert _asked_to_wait("7") == 7
    assert _asked_to_wait("-7") == 0
    assert _asked_to_wait(None) == _asked_to_wait("later") == 0


def test_waits_grow_and_after_so_many_attempts_the_next_alert_has_its_turn(server: Server) -> None:
    server.answers = [answer(500)] * 4
    webhook = Webhook(server.url, first_wait=0.05, attempts=4)
    webhook.write(findings(alert(message="a"), alert(message="b")))
    webhook.close()
    assert server.texts == ["a"] * 4 + ["b"]
    times = [moment for moment, _ in server.posted]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[0] >= 0.05
    assert waits[1] >= 0.1
    assert waits[2] >= 0.2
    assert (webhook.num_sent, webhook.num_failed) == (1, 1)


@pytest.mark.parametrize("code", [301, 302, 307, 308, 400, 403, 404, 410])
def test_an_answer_that_is_final_is_not_asked_for_again(server: Server, code: int) -> None:
    server.answers = [answer(code, Location=server.url + "/elsewhere")]
    webhook = Webhook(server.url, first_wait=0.01)
    webhook.write(findings(alert(message="a"), alert(message="b")))
    webhook.close()
    assert server.texts == ["a", "b"]
    assert (webhook.num_sent, webhook.num_failed) == (1, 1)


def test_when_the_queue_is_full_the_oldest_alert_goes_and_is_counted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    server.answers = [lambda handler: (release.wait(5), answer(200)(handler))[1]]
    webhook = Webhook(server.url, queue_size=2)
    webhook.write(findings(alert(message="in flight")))
    until(lambda: len(server.posted) == 1)
    webhook.write(findings(*(alert(message=str(number)) for number in range(5))))
    release.set()
    webhook.close()
    assert server.texts == ["in flight", "3", "4"]
    assert (webhook.num_sent, webhook.num_dropped) == (3, 3)
    assert "3 alerts were not sent to 127.0.0.1" in caplog.text
    assert "3 were dropped from a full queue" in caplog.text


def test_a_closing_webhook_does_not_wait_for_what_would_be_too_late(server: Server) -> None:
    server.answers = [answer(429, Retry_After="60")]
    webhook = Webhook(server.url, close_within=5.0)
    webhook.write(findings(alert(message="a"), alert(message="b")))
    until(lambda: len(server.posted) == 1)
    begun = time.monotonic()
    webhook.close()
    assert time.monotonic() - begun < 2
    assert server.texts == ["a", "b"]
    assert (webhook.num_sent, webhook.num_failed) == (1, 1)


def test_writing_again_after_a_close_sends_again(server: Server) -> None:
    webhook = Webhook(server.url)
    webhook.close()
    for message in ("a", "b"):
        webhook.write(findings(alert(message=message)))
        webhook.close()
        webhook.close()
    assert server.texts == ["a", "b"]


def test_one_that_hung_at_its_close_does_not_mix_with_what_is_sent_later(server: Server) -> None:
    server.answers = [answer(500, wait=0.4)]
    webhook = Webhook(server.url, first_wait=0.01, close_within=0.1)
    webhook.write(findings(alert(message="hung")))
    until(lambda: len(server.posted) == 1)
    webhook.close()
    webhook.write(findings(alert(message="later")))
    until(lambda: webhook.num_sent == 1)
    time.sleep(0.5)
    assert server.texts == ["hung", "later"]
    assert webhook.num_failed == 1
    webhook.close()


def test_a_run_that_ends_without_closing_sends_what_it_has(server: Server) -> None:
    server.answers = [answer(503)]  # so that it is not sent before the end by chance
    script = (
        "from diffsensor.sinks import Webhook\n"
        "from diffsensor.types import Alert, Findings\n"
        "alert = Alert(step=0, rule='r', severity='critical', subject='', message='the last', first_step=0)\n"
        f"Webhook({server.url!r}).write(Findings(step=0, alerts=(alert,)))\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 3
    assert server.texts == ["the last", "the last"]


def test_no_log_and_no_message_shows_the_address(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answers = [answer(404)]
    for url in (server.url, f"http://127.0.0.1:1/{SECRET}", f"http://nowhere..invalid/{SECRET}"):
        webhook = Webhook(url, attempts=2, first_wait=0.01)
        webhook.write(findings(alert(1), alert(2)))
        webhook.close()
        assert SECRET not in repr(webhook)
    assert len(caplog.records) == 6
    assert SECRET not in caplog.text
    assert "The webhook at 127.0.0.1" in caplog.text


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        (f"ftp://host/{SECRET}", "begins with 'ftp:', expected http:// or https://"),
        (f"file:///{SECRET}", "begins with 'file:'"),
        (f"hooks.slack.com/services/{SECRET}", "has no scheme, expected http"),
        (f"https:///{SECRET}", "has no host"),
        (f"https://host/{SECRET} x", "characters that no address has"),
        (f"https://host/{SECRET}\n", "characters that no address has"),
        (f"https://host/ü{SECRET}", "characters that no address has"),
        (f"https://host:port/{SECRET}", "cannot be read"),
        (f"https://me:{SECRET.replace('/', '')}@host/", "for host holds a user name or password"),
        ("", "has no scheme"),
    ],
)
def test_an_address_that_is_none_is_refused_without_showing_it(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as refused:
        Webhook(url)
    assert "XyZ" not in str(refused.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: Webhook("https://host/", min_severity="warn"), "No severity is named 'warn'. Did you mean 'warning'"),
        (lambda: Webhook("https://host/", attempts=0), "attempts=0, expected a whole number of at least 1"),
        (lambda: Webhook("https://host/", queue_size=2.5), "queue_size=2.5"),
        (lambda: Webhook("https://host/", timeout=0), "timeout=0, expected seconds above 0"),
        (lambda: Webhook("https://host/", close_within=float("inf")), "close_within=inf"),
        (lambda: Calls("print"), "given 'print', expected a function of one alert"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(build: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build()


def test_several_alerts_of_one_rule_are_one_line_with_the_worst_in_full(caplog: pytest.LogCaptureFixture) -> None:
    alerts = [
        replace(alert(message=f"group {number} is {number}."), subject=f"group={number}", value=float(number))
        for number in (1, 3, 2)
    ]
    LogAlerts().write(findings(*alerts, replace(alert(message="another rule."), rule="other")))
    assert [record.getMessage() for record in caplog.records] == [
        "step 0, limit: group 3 is 3. So do 2 more: group=1, group=2.",
        "step 0, other: another rule.",
    ]


def test_a_webhook_tells_of_a_stop_and_not_of_a_scaled_rate(server: Server) -> None:
    hook = Webhook(server.url)
    taken = ActionTaken(step=7, rule="limit", action="stop", outcome="done", detail="the loop was told to stop")
    hook.write(Findings(step=7, actions=(replace(taken, action="scale_learning_rate(0.5)"), taken)))
    hook.close()
    (text,) = [body["text"] for _, body in server.posted]
    assert "stop (done), as 'limit' asks for: the loop was told to stop" in text
