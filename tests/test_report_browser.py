"""The report in a real browser: it asks for nothing, complains of nothing, and fits on a telephone."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffsensor.report import write_report
from tiny_records import make_record

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here (Debian: apt-get install chromium)")


class Browser:
    """Headless Chromium, spoken to through its debugging pipe: JSON with a zero byte after each message."""

    def __init__(self) -> None:
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        self._home = tempfile.mkdtemp()
        # The pipe is the descriptors 3 and 4 of the browser, which a shell puts in their places.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        arguments += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={self._home}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "chromium", CHROMIUM, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser is gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path, *, width: int, dark: bool = False, medium: str = "") -> None:
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.ask("Page.navigate", url=page.absolute().as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self._next())

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._home, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    long = "a group with a name that is so long that it fits nowhere, least of all on a telephone " + "x" * 200
    tokens = ("<script>document.title='taken'</script>", "x" * 3000, "\u202eevil", " ok", "<b onclick=alert(1)>")
    one = make_record(place / "one", groups=(long, "code", "<i>c</i>"), tokens=tokens, rules=["<img src=//e.x/y>"])
    other = make_record(place / "two", groups=(long, "code", "<i>c</i>"), tokens=tokens, seed=3)
    pages = {"one": place / "one.html", "two": place / "two.html"}
    write_report([one], pages["one"])
    write_report([one, other], pages["two"])
    return pages


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False), (400, True)])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(
    name: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    asked = [each["request"]["url"] for each in browser.of("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].absolute().as_uri()]
    assert browser.of("Log.entryAdded") == []
    assert browser.of("Runtime.consoleAPICalled") == []
    assert browser.of("Runtime.exceptionThrown") == []
    assert browser.value("document.title").startswith("Drift report")


def test_dark_is_dark_and_print_is_light(browser: Browser, pages: dict[str, Path]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.open(pages["one"], width=1200)
    assert browser.value(background) == "rgb(255, 255, 255)"
    browser.open(pages["one"], width=1200, dark=True)
    assert browser.value(background) == "rgb(16, 20, 24)"
    browser.open(pages["one"], width=1200, dark=True, medium="print")
    assert browser.value(background) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background(dark: bool, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], width=1200, dark=dark)
    names = ["ink", "soft", "link", "pass", "fail", "unknown", "none", "limit", *(f"s{place}" for place in range(1, 9))]
    read = (
        "(() => { const probe = document.createElement('i'); document.body.append(probe); const found = {};"
        "for (const name of %s) { probe.style.color = `var(--${name})`;"
        "found[name] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number) } return found })()"
    )
    colours = browser.value(read % json.dumps([*names, "page"]))
    for name in names:
        assert contrast(colours[name], colours["page"]) >= 4.5, name  # WCAG 2.1, AA


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: list[float]) -> float:
    shares = [part / 255 for part in colour[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_click_on_a_head_sorts_the_table(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], width=1200)
    values = "[...document.querySelectorAll('#now tbody tr')].map(row => Number(row.cells[1].dataset.v))"
    click = "document.querySelectorAll('#now thead button')[1].click()"
    before = browser.value(values)
    browser.value(click)
    assert browser.value(values) == sorted(before, reverse=True) != before
    browser.value(click)
    assert browser.value(values) == sorted(before)
    assert browser.value("document.querySelectorAll('#now thead th')[1].getAttribute('aria-sort')") == "ascending"


def test_the_browser_knows_each_plot_by_its_title(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], width=1200)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node.get("name", {}).get("value", "") for node in nodes if node.get("role", {}).get("value") == "image"]
    assert any(name.startswith("kl_ref_live, nats/token, over steps") for name in images)
    assert any(name.startswith("relative_l2: hookpoints by step") for name in images)
    assert all(images)
