"""The report: what the page says is what the record holds, whatever that is."""

import itertools
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsensor import cli
from diffsensor.errors import ConfigError, CorruptFileError, StorageError
from diffsensor.record import Record, read_manifest, read_record
from diffsensor.report import describe, write_report
from diffsensor.report.compare import correlation, rank_biased_overlap
from diffsensor.report.contents import Loaded, load, spread, thinned
from diffsensor.report.page import LARGEST, render
from diffsensor.report.plots import SHADES, shade_of, ticks
from diffsensor.report.texts import number, short, visible
from diffsensor.types import (
    Alert,
    BankProbe,
    Findings,
    Reading,
    Verdict,
    log_key,
)
from tiny_records import make_record

VOID = {"meta", "link", "br", "hr", "img", "input", "path"}


class Parsed(HTMLParser):
    """What a page holds; complains of tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> in <{self.open[-1] if self.open else ''}>")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data


def page_of(tmp_path: Path, *records: Path) -> str:
    target = tmp_path / "page.html"
    write_report(list(records), target)
    return target.read_text()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return make_record(tmp_path / "run" / "record")


# What is shown


def test_the_numbers_of_the_table_are_those_of_the_record(record: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, record)
    contents = read_record(record)
    last = {reading.metric: reading for reading in contents.readings if not reading.group and not reading.hookpoint}
    shown = dict(re.findall(r'class="nowrap t">(\w+)</th><td class="nowrap" data-v="([^"]+)"><b>', page))
    assert len(shown) == 5
    assert {metric: float(value) for metric, value in shown.items()} == {name: last[name].value for name in shown}
    assert f"<b>{number(last['kl_ref_live'].value)}</b>" in page


def test_the_curves_as_data_are_the_readings_to_the_last_digit(record: Path) -> None:
    contents = read_record(record)
    (said,) = describe([record])["records"]
    assert len(said["curves"]) == 5 * 4
    for curve in said["curves"]:
        readings = [reading for reading in contents.readings if reading.key == curve["key"]]
        assert curve["steps"] == [reading.step for reading in readings]
        assert curve["values"] == [reading.value for reading in readings]
        assert curve["num_looks"] == len(readings) == 12


def test_a_path_goes_through_the_values_of_its_curve(tmp_path: Path) -> None:
    values = {(10 * look, ""): float(look % 2) for look in range(3)} | {(10 * look, "only"): 0.5 for look in range(3)}
    record = make_record(tmp_path / "r", looks=3, groups=("only",), values=values, with_events=False)
    page = page_of(tmp_path, record)
    plot = page.split("</figure>")[0]
    (path,) = re.findall(r'<path class="line s0" d="([^"]+)"/>', plot)
    points = [(int(x), int(y)) for x, y in re.findall(r"[ML](\d+) (\d+)", path)]
    at = {text: 10 * float(place) for place, text in re.findall(r'style="top:([\d.]+)%">([01])</span>', plot)}
    assert at["1"] < at["0"]  # larger is higher
    assert points == [(x, pytest.approx(at[value], abs=1)) for x, value in ((0, "0"), (500, "1"), (1000, "0"))]


def test_the_heatmap_has_the_shades_of_its_values(record: Path, tmp_path: Path) -> None:
    contents = read_record(record)
    page = page_of(tmp_path, record)
    (said,) = describe([record])["records"]
    heatmap = next(each for each in said["heatmaps"] if each["metric"] == "relative_l2" and each["over"] == "step")
    steps = [int(step) for step in heatmap["columns"]]
    expected = [
        [reading.value for reading in contents.readings if reading.key == log_key("relative_l2", hookpoint=name)]
        for name in heatmap["rows"]
    ]
    assert heatmap["values"] == expected
    assert steps == list(range(0, 120, 10))
    high = max(itertools.chain(*expected))
    drawn = [[-1] * 12 for _ in expected]
    svg = page.split("relative_l2: hookpoints by step")[1].split("</svg>")[0]
    for shade, path in re.findall(r'<path class="q(\d+)" d="([^"]+)"/>', svg):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
            for column in range(int(x), int(x) + int(width)):
                drawn[int(y)][column] = int(shade)
    assert drawn == [[shade_of(value, high) for value in row] for row in reversed(expected)]


@pytest.mark.parametrize(
    ("value", "high", "shade"), [(0.0, 1.0, 0), (1.0, 1.0, SHADES - 1), (0.5, 1.0, 6), (-1.0, 1.0, 0), (0.0, 0.0, 0)]
)
def test_shades_are_equal_parts_of_0_to_the_largest(value: float, high: float, shade: int) -> None:
    assert shade_of(value, high) == shade


def test_limits_alerts_actions_and_verdicts_are_drawn_and_listed(record: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, record)
    contents = read_record(record)
    (alert,), (action,) = contents.alerts, contents.actions
    (said,) = describe([record])["records"]
    held = {(each["key"], each["threshold"]) for each in said["thresholds"]}
    assert held == {(alert.subject, 0.3), ("diffsensor/kl_ref_live", 0.3)}
    assert 'class="level limit"' in page
    assert f'class="mark alert {alert.severity}"' in page
    assert 'class="mark action done"' in page
    for verdict in contents.verdicts:
        assert f'class="mark gate {verdict.outcome}"' in page
        assert verdict.reason in page
    text = Parsed(page).text
    assert alert.message in text
    assert action.detail in text


@pytest.mark.parametrize(
    ("unit", "value", "keys"),
    [
        ("deviations", 7.0, ["diffsensor/kl_ref_live_deviation"]),
        ("nats/token", 0.2, ["diffsensor/kl_ref_live"]),
        ("nats/token", 0.7, []),  # a number of the rule's own
        ("nats/token", math.nan, []),
    ],
)
def test_a_limit_is_that_of_the_curve_whose_value_was_held_against_it(
    unit: str, value: float, keys: list[str], tmp_path: Path
) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False)
    evidence = Reading(step=30, sensor="envelope", metric="kl_ref_live_deviation", value=7.0, unit="deviations")
    judged = Reading(step=30, sensor="outputs", metric="kl_ref_live", value=0.2, unit="nats/token", num_probes=9)
    alert = Alert(
        step=30,
        rule="a rule",
        severity="warning",
        subject="diffsensor/kl_ref_live",
        message="It left the band.",
        value=value,
        threshold=3.5,
        unit=unit,
        first_step=30,
    )
    _append(record, Findings(step=30, readings=(judged, evidence), alerts=(alert,)))
    (said,) = describe([record])["records"]
    assert [each["key"] for each in said["thresholds"]] == keys


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("pass", "The last checkpoint passed (step 20). It is fine."),
        ("fail", "The last checkpoint failed (step 20). It is fine."),
        ("unknown", "It could not be told whether the last checkpoint may pass, which is not a pass (step 20)."),
    ],
)
def test_the_page_begins_with_the_last_verdict(outcome: Any, words: str, tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False)
    _append(record, Findings(step=10, verdicts=(Verdict(step=10, outcome="fail", reason="Old."),)))
    _append(record, Findings(step=20, verdicts=(Verdict(step=20, outcome=outcome, reason="It is fine."),)))
    (said,) = describe([record])["records"]
    assert said["standing"]["outcome"] == outcome
    assert said["standing"]["sentence"].startswith(words)
    text = Parsed(page_of(tmp_path, record)).text
    assert text.index(words) < text.index("At the last look")


def test_weights_that_were_read_after_the_last_verdict_are_said_to_have_none(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False)
    _append(record, Findings(step=10, verdicts=(Verdict(step=10, outcome="pass", reason="Fine."),)))
    (said,) = describe([record])["records"]
    assert "Nothing that was read after step 10 has a verdict; the last look is of 20." in said["standing"]["because"]


def test_a_run_without_a_gate_is_not_judged(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False, rules=[])
    (said,) = describe([record])["records"]
    assert said["standing"]["outcome"] == "not judged"
    assert said["standing"]["sentence"] == "No gate was set, so no checkpoint was judged; no alert was raised."
    assert "No alert: no rule was watching." in said["standing"]["because"]


def test_since_when_a_token_is_in_the_table_is_the_first_look_of_an_unbroken_row(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=1, with_events=False)
    template = read_record(make_record(tmp_path / "other", looks=2, with_events=False)).token_shifts[0]
    held = {10: (1, 2), 20: (1, 3), 30: (1, 2), 40: (1, 2)}
    for step, tokens in held.items():
        shifts = tuple(replace(template, step=step, token_id=token, rank=rank) for rank, token in enumerate(tokens))
        reading = Reading(step=step, sensor="outputs", metric="kl_ref_live", value=0.1, unit="nats/token")
        _append(record, Findings(step=step, readings=(reading,), token_shifts=shifts))
    (said,) = describe([record])["records"]
    (table,) = said["tokens"]
    assert {row["token_id"]: row["since"] for row in table["rows"]} == {1: 10, 2: 30}


def test_it_says_what_it_does_not_see_and_does_not_know(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, sealed=True)
    text = Parsed(page_of(tmp_path, record)).text
    for name, info in read_record(record).manifest["metrics"].items():  # type: ignore[attr-defined]
        assert f"{name}blind to {info['blind_to']}" in text
    assert "no action was ever driven by them" in text
    assert "a record keeps none of them" in text
    assert "a1" * 32 in text  # the reference's fingerprint, whole


def test_small_groups_are_named_with_their_size(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=1, with_events=False)
    reading = Reading(
        step=10, sensor="outputs", metric="kl_ref_live", value=0.1, unit="nats/token", group="tiny", num_probes=3
    )
    _append(record, Findings(step=10, readings=(reading,)))
    (said,) = describe([record])["records"]
    (few,) = (each["says"] for each in said["cautions"] if each["about"] == "groups with few probes")
    assert few.startswith("tiny (3). With n probes")


def test_what_a_rolling_bank_held_is_shown_and_its_texts_are_said_to_change(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False)
    held = tuple(
        BankProbe(step=30, bank="fixed", probe=str(drift), age=4, num_counted=8, metric="kl_ref_live", drift=drift)
        for drift in (0.1, math.nan, 0.7)
    )
    reading = Reading(step=30, sensor="outputs", metric="kl_ref_live", value=0.1, unit="nats/token")
    _append(record, Findings(step=30, readings=(reading,), bank_probes=held))
    (said,) = describe([record])["records"]
    assert [probe["probe"] for probe in said["bank_probes"]] == ["0.7", "0.1", "nan"]
    assert any(each["about"] == "a rolling bank" for each in said["cautions"])
    assert "What the rolling bank held" in page_of(tmp_path, record)
    both = describe([record, make_record(tmp_path / "s", looks=3)])["comparison"]
    assert both["pairs"][0]["directions"] is None
    assert "rolling bank" in both["pairs"][0]["not_compared"][0]


# What is broken


def test_what_is_no_number_is_a_gap_and_null_and_is_told(tmp_path: Path) -> None:
    values = {(20, ""): math.nan, (30, "code"): math.inf, (110, ""): math.nan}
    record = make_record(tmp_path / "r", values=values, with_events=False)
    said = describe([record])
    json.dumps(said, allow_nan=False)
    curves = {curve["key"]: curve for curve in said["records"][0]["curves"]}
    assert curves["diffsensor/kl_ref_live"]["values"][2] is None
    assert curves["diffsensor/kl_ref_live/group=code"]["values"][3] == "inf"
    page = page_of(tmp_path, record)
    (path,) = re.findall(r'<path class="line s0" d="([^"]+)"/>', page)[:1]
    assert path.count("M") == 2
    assert "Gaps where the value is not a number, with how many: code (1), all probes (2)." in page
    assert "kl_ref_live is not a number: the model&#39;s answers are broken" in page
    assert not re.search(r"\bnan\b|\binf\b", Parsed(page).text)


@pytest.mark.parametrize("looks", [1, 2])
def test_a_run_of_one_or_two_looks_has_a_page(looks: int, tmp_path: Path) -> None:
    page = page_of(tmp_path, make_record(tmp_path / "r", looks=looks))
    assert Parsed(page).wrong == []


def test_a_run_that_did_not_move_has_a_page(tmp_path: Path) -> None:
    still = {(10 * look, group): 0.0 for look in range(3) for group in ("", "knowledge", "code", "refusal")}
    page = page_of(tmp_path, make_record(tmp_path / "r", looks=3, values=still, with_events=False))
    assert Parsed(page).wrong == []
    assert "which is no measurable drift" in page


def test_a_record_that_holds_an_alert_alone_has_a_page(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=0)
    _append(
        record,
        Findings(
            step=0,
            alerts=(Alert(step=0, rule="x", severity="critical", subject="s", message="All failed.", first_step=0),),
        ),
    )
    text = Parsed(page_of(tmp_path, record)).text
    assert "All failed." in text
    assert "Nothing was read of the outputs." in text


def test_a_torn_record_is_read_as_far_as_it_goes_and_the_page_says_so(record: Path, tmp_path: Path) -> None:
    whole = describe([record])["records"][0]["num_looks"]
    lines = record / "readings.jsonl"
    with lines.open("ab") as file:
        file.write(b'{"step": 120, "sens')
    said = describe([record])["records"][0]
    assert said["num_looks"] == whole
    assert "is torn and left out" in said["warnings"][0]
    assert "The record is not whole." in page_of(tmp_path, record)


def test_what_is_no_record_is_refused_with_a_sentence(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, record.parent, "-o", tmp_path / "p.html")
    assert (code, out) == (2, "")
    assert err == f"There is no record at {record.parent}: it has no manifest.json. Did you mean {record}?\n"
    assert not (tmp_path / "p.html").exists()
    with pytest.raises(StorageError, match="Give the directory of a run"):
        describe([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="at least one run"):
        describe([])


def test_an_empty_record_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record(tmp_path / "r", looks=0)
    code, _, err = run(capsys, record, "--json")
    assert code == 2
    assert "holds nothing yet: no look at the model was completed" in err


def test_a_record_that_was_changed_is_refused(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = record / "readings.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b"kl_ref_live", b"kl_ref_love", 1))
    code, _, err = run(capsys, record)
    assert code == 2
    assert "line 1 was changed" in err
    with pytest.raises(CorruptFileError):
        describe([record])


def test_a_place_that_cannot_be_written_is_refused(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, record, "-o", tmp_path)
    assert (code, err) == (2, f"-o was given {tmp_path}, which is a directory. Give a file: {tmp_path}/report.html.\n")
    code, _, err = run(capsys, record, "-o", tmp_path / "no" / "where.html")
    assert code == 2
    assert err.startswith("The report cannot be written to")


def test_groups_whose_names_differ_in_case_alone_have_tables_of_their_own(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_record(tmp_path / "r", looks=3, groups=("b", "Code", "code")))
    assert re.findall(r'<summary>Group <span class="t">(\w+)</span>', page) == ["b", "Code", "code"]


def test_the_evidence_of_a_rule_is_one_plot_for_all_groups(tmp_path: Path) -> None:
    record = make_record(tmp_path / "r", looks=3, with_events=False)
    before = page_of(tmp_path, record).count("<svg")
    p_values = tuple(
        Reading(step=30, sensor="group_shift", metric="kl_group_shift_p", value=0.1, unit="p", group=group)
        for group in ("knowledge", "code", "refusal")
    )
    _append(record, Findings(step=30, readings=p_values))
    assert page_of(tmp_path, record).count("<svg") == before + 1


# Foreign text

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m",
    "\u202egnihton",
    "a\nb\r\tc\x00",
    "\u2066\u200b\ufeff\u2028",
    "\ud800",
    "{{ 7 * 7 }}{% raw %}",
    "' onclick='alert(1)",
    '" style="x',
    "x" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_harmless_text(text: str, tmp_path: Path) -> None:
    groups = (f"g {text}"[:300], "code")
    record = make_record(
        tmp_path / "r",
        looks=3,
        groups=groups,
        hookpoints=(f"h {_storable(text)}", "other"),
        tokens=(text, " ok"),
        rules=[text],
        recipe={"data": text, text: 1},
    )
    template = read_record(record)
    shift = template.token_shifts[0]
    alert = Alert(
        step=30, rule=text, severity="warning", subject=text, message=text, first_step=0, value=1.0, threshold=0.5
    )
    reading = replace(template.readings[0], step=30, note=text, metric="kl_ref_live")
    odd = replace(
        shift, step=30, token=text, context=text, probe=text, group="", prefers="live", ranked_by="mass_moved"
    )
    _append(record, Findings(step=30, readings=(reading,), token_shifts=(odd,), alerts=(alert,)))
    other = make_record(tmp_path / "s", looks=3, groups=groups, tokens=(text, " ok"))
    for records in ([record], [record, other]):
        page = page_of(tmp_path, *records)
        parsed = Parsed(page)
        assert parsed.wrong == []
        assert not set(page) & set("\x1b\x00\u202e\u2066\u200b\ufeff\u2028\ud800")
        (script,) = parsed.scripts
        assert "alert(1)" not in script
        assert not [tag for tag, attributes in parsed.tags if {"onerror", "onclick"} & attributes.keys()]
        assert not [tag for tag, _ in parsed.tags if tag in {"img", "iframe", "object", "embed"}]
        assert "49" not in parsed.text.split("{{ 7 * 7 }}")[0][-20:]
        assert page.count("x" * 700) == 0
    json.dumps(describe([record]), allow_nan=False)


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\x1b[1mb\u202ec\nd\ud800") == "a\\x1b[1mb\\u202ec⏎d\\ud800"
    assert visible("caf\u00e9 \u4f60\u597d") == "caf\u00e9 \u4f60\u597d"
    long = visible("a" * 5000 + "b" * 5000, 100)
    assert long == f"{'a' * 50} … (9900 characters left out) … {'b' * 50}"


@given(st.text(alphabet=st.characters()))
def test_visible_text_can_be_seen_and_written(text: str) -> None:
    shown = visible(text)
    assert all(each.isprintable() or each.isspace() for each in shown)  # there are many kinds of spaces
    shown.encode()


def test_without_text_no_probes_text_is_in_page_or_data(tmp_path: Path) -> None:
    source = read_record(make_record(tmp_path / "with", looks=3))
    record = tmp_path / "without"
    with Record(record, manifest=source.manifest) as written:
        for step in (0, 10, 20):
            found = Findings(
                step=step,
                readings=tuple(each for each in source.readings if each.step == step),
                token_shifts=tuple(each for each in source.token_shifts if each.step == step),
            )
            written.write(found.without_text())
    page, data = page_of(tmp_path, record), json.dumps(describe([record]))
    assert "quick brown fox" in page_of(tmp_path, tmp_path / "with")
    for text in ("quick brown fox", "sorry", " nice"):
        assert text not in Parsed(page).text
        assert text not in data
    assert "Texts were kept out of this record" in page
    assert f">{source.token_shifts[0].token_id}<" in page


# The page as a file


def test_the_page_is_whole_and_asks_for_nothing(record: Path, tmp_path: Path) -> None:
    for records in ([record], [record, make_record(tmp_path / "other")]):
        page = page_of(tmp_path, *records)
        parsed = Parsed(page)
        assert parsed.wrong == []
        links = [
            value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("href", "src")
        ]
        assert all((link or "").startswith(("#", "data:")) for link in links)
        assert "http" not in page.replace("http-equiv", "")
        assert "@import" not in page
        assert "url(" not in page
        anchors = {attributes.get("id") for _, attributes in parsed.tags}
        assert {link[1:] for link in links if link.startswith("#")} <= anchors | {""}
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_each_plot_has_a_title_and_a_description_for_who_does_not_see_it(record: Path, tmp_path: Path) -> None:
    parsed = Parsed(page_of(tmp_path, record))
    plots = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    known = {attributes.get("id") for tag, attributes in parsed.tags if tag in ("title", "desc")}
    assert len(plots) > 8
    for plot in plots:
        assert plot["role"] == "img"
        assert set((plot["aria-labelledby"] or "").split()) <= known
    assert "all probes: 0 at step 0" in parsed.text


def test_the_same_record_gives_the_same_page(record: Path, tmp_path: Path) -> None:
    assert page_of(tmp_path, record) == page_of(tmp_path, record)


def test_a_large_run_makes_a_page_of_less_than_2_mb_within_seconds(tmp_path: Path) -> None:
    small = read_record(make_record(tmp_path / "r", looks=2, groups=[f"group {each}" for each in range(40)]))
    hookpoints = [f"model.layers.{each}" for each in range(32)]
    outputs = [each for each in small.readings if each.step == 10 and not each.hookpoint]
    inside = [each for each in small.readings if each.step == 10 and each.hookpoint == "model.layers.0"]
    readings = [replace(each, step=step, value=each.value * (1 + step % 7)) for step in range(1000) for each in outputs]
    readings += [
        replace(each, step=step, hookpoint=name, value=each.value * (1 + step % 7))
        for step in range(1000)
        for name in hookpoints
        for each in inside
        if not each.group or step == 999
    ]
    readings.sort(key=lambda each: each.step)
    manifest = {**small.manifest, "hookpoints": hookpoints}
    contents = replace(small, readings=tuple(readings), manifest=manifest)
    began = time.process_time()
    page = render([Loaded(name="large", contents=contents, warnings=())])
    assert time.process_time() - began < 15  # it takes 2
    assert len(page.encode()) < LARGEST == 2_000_000
    assert Parsed(page).wrong == []
    assert "of 1\N{NARROW NO-BREAK SPACE}000 looks at most" in page.replace("Of", "of").lower()
    assert "120 of 1\N{NARROW NO-BREAK SPACE}000 looks are drawn, evenly spaced." in page


def test_a_page_that_would_be_too_large_is_drawn_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load([make_record(tmp_path / "r", looks=200, tokens=("a",))])
    whole = render(loaded)
    monkeypatch.setattr("diffsensor.report.page.LARGEST", 0.7 * len(whole.encode()))
    less = render(loaded)
    assert len(less.encode()) < 0.7 * len(whole.encode())
    assert "looks at most" in less
    assert Parsed(less).wrong == []


# What is drawn of many


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(4, 60))
def test_of_a_long_curve_its_ends_and_extremes_are_kept(values: list[float], limit: int) -> None:
    kept = thinned(values, limit)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert len(kept) <= max(limit * 1.5, limit + 2)
    finite = [value for value in values if not math.isnan(value)]
    shown = [values[index] for index in kept if not math.isnan(values[index])]
    if finite:
        assert max(shown) == max(finite)
        assert min(shown) == min(finite)
    assert any(math.isnan(values[index]) for index in kept) == (len(finite) < len(values))


@given(st.integers(1, 500), st.integers(1, 50))
def test_spread_takes_so_many_with_both_ends(length: int, limit: int) -> None:
    taken = spread(length, limit)
    assert taken == sorted(set(taken))
    assert len(taken) == min(length, limit)
    assert taken[-1] == length - 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, width: float, wanted: int) -> None:
    found = ticks(low, low + width, wanted)
    assert 1 <= len(found) <= 3 * wanted + 3
    assert all(low - 1e-6 * width <= tick <= low + width + 1e-6 * width for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.38012, "0.380"),
        (-0.0904, "\N{MINUS SIGN}0.0904"),
        (0.0009996, "0.00100"),
        (12345.6, "12\N{NARROW NO-BREAK SPACE}346"),
        (1.2345e-7, "1.23e\N{MINUS SIGN}7"),
        (99999999.0, "1.00e8"),
        (math.nan, "\N{EN DASH}"),
        (math.inf, "\N{INFINITY}"),
        (0.9999, "1.00"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(1e-9, 1e12) | st.floats(-1e12, -1e-9))
def test_a_short_number_is_the_number_to_three_digits(value: float) -> None:
    text = number(value).replace("\N{MINUS SIGN}", "-").replace("\N{NARROW NO-BREAK SPACE}", "")
    assert float(text) == pytest.approx(value, rel=5.01e-3)


def test_ticks_have_no_zeros_at_their_ends() -> None:
    assert [short(value) for value in (0.5, 100.0, 0.30, 1e-7, -20.0)] == [
        "0.5",
        "100",
        "0.3",
        "1e\N{MINUS SIGN}7",
        "\N{MINUS SIGN}20",
    ]


# Several records


def test_runs_in_one_direction_are_told_from_runs_in_another(tmp_path: Path) -> None:
    alike, too, elsewhere = (
        make_record(tmp_path / name, seed=seed, direction=direction)
        for name, seed, direction in (("a", 1, 7), ("b", 2, 7), ("c", 3, 8))
    )
    said = describe([alike, too, elsewhere])["comparison"]
    contents = [read_record(path) for path in (alike, too, elsewhere)]
    for pair in said["pairs"]:
        assert pair["directions"]["step"] == 110
        for name, cosine in pair["directions"]["cosines"].items():
            key = log_key("mean_difference", hookpoint=name)
            one, other = (contents[place].tensors(110)[key] for place in (pair["one"], pair["other"]))
            assert cosine == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-6)
    means = {(pair["one"], pair["other"]): pair["directions"]["means"][-1] for pair in said["pairs"]}
    assert means[0, 1] > 0.8
    assert abs(means[0, 2]) < 0.5
    assert "went different ways" in said["sentences"][-1]
    assert said["pairs"][0]["directions"]["steps"][0] == 10  # at step 0 nothing has moved, so it has no direction


def test_group_profiles_are_correlated_over_groups_at_the_last_common_step(tmp_path: Path) -> None:
    groups = ("a", "b", "c", "d")
    one = make_record(tmp_path / "one", looks=4, groups=groups, values=dict(_at(30, groups, (1.0, 2.0, 3.0, 4.0))))
    other = make_record(tmp_path / "two", looks=6, groups=groups, values=dict(_at(30, groups, (2.0, 1.0, 4.0, 3.0))))
    (pair,) = describe([one, other])["comparison"]["pairs"]
    assert (pair["step"], pair["metric"], pair["num_groups"]) == (30, "kl_ref_live", 4)
    assert pair["group_correlation"] == pytest.approx(0.6)


def _at(step: int, groups: tuple[str, ...], values: tuple[float, ...]) -> list[tuple[tuple[int, str], float]]:
    return [((step, group), value) for group, value in zip(groups, values, strict=True)]


@pytest.mark.parametrize(
    ("one", "other", "r"),
    [([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0), ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], -1.0)],
)
def test_correlation_is_pearsons(one: list[float], other: list[float], r: float) -> None:
    assert correlation(one, other) == pytest.approx(r)


def test_correlation_of_too_little_is_not_known() -> None:
    assert math.isnan(correlation([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_rank_biased_overlap_is_that_of_the_paper() -> None:
    assert rank_biased_overlap([1, 2, 3], [1, 2, 3]) == pytest.approx(1.0)
    assert rank_biased_overlap([1, 2, 3], [4, 5, 6]) == 0.0
    # By hand, p = 0.9, lists a b c and b a d: X = 0, 2, 2.
    by_hand = 2 / 3 * 0.9**3 + 0.1 / 0.9 * (0 / 1 * 0.9 + 2 / 2 * 0.9**2 + 2 / 3 * 0.9**3)
    assert rank_biased_overlap([1, 2, 3], [2, 1, 4]) == pytest.approx(by_hand)
    assert rank_biased_overlap([1, 2, 3, 4], [1, 2, 9, 8]) > rank_biased_overlap([1, 2, 3, 4], [9, 8, 1, 2])
    assert math.isnan(rank_biased_overlap([], []))


def test_token_tables_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    one = make_record(tmp_path / "one", looks=3, tokens=("a", "b"))
    other = make_record(tmp_path / "two", looks=3, tokens=("a", "c", "d", "e", "f", "g"))
    said = describe([one, other])["comparison"]
    assert said["pairs"][0]["num_tokens"] == 2
    assert said["pairs"][0]["token_overlap"] in (0.0, 0.5)
    assert {each["token"] for each in said["tokens"]} == set("abcdefg")
    assert said["tokens"][0]["token"] == "a"  # the only one that both have


def test_records_of_other_probes_are_overlaid_and_not_said_to_be_alike(tmp_path: Path) -> None:
    one, other = make_record(tmp_path / "one"), make_record(tmp_path / "two", probes="c3" * 32)
    third = make_record(tmp_path / "three", reference="d4" * 32)
    said = describe([one, other, third])["comparison"]
    first, second = said["pairs"][:2]
    assert first["directions"] is None
    assert first["group_correlation"] is None
    assert first["token_overlap"] is None
    assert "Their probes differ" in first["not_compared"][0]
    assert second["directions"] is None
    assert second["group_correlation"] is not None
    assert "Their references differ" in second["not_compared"][0]
    page = page_of(tmp_path, one, other)
    assert "Their probes differ" in page
    assert 'class="line r1"' in page
    assert 'class="line r2"' in page


def test_only_what_differs_in_the_configuration_is_listed(tmp_path: Path) -> None:
    one = make_record(tmp_path / "one", recipe={"learning_rate": 1e-3, "data": "x", "optimizers": [{"lr": 1}]})
    other = make_record(tmp_path / "two", recipe={"learning_rate": 1e-4, "data": "x", "optimizers": [{"lr": 2}]})
    said = describe([one, other])["comparison"]
    assert said["differences"] == {"recipe.learning_rate": [1e-3, 1e-4], "recipe.optimizers.0.lr": [1, 2]}


def test_a_record_without_directions_says_so(tmp_path: Path) -> None:
    one = make_record(tmp_path / "one", looks=2)
    other = make_record(tmp_path / "two", looks=2)
    source = read_record(other)
    bare = tmp_path / "bare"
    with Record(bare, manifest=source.manifest) as written:
        written.write(Findings(step=0, readings=source.readings[:5]))
    (pair,) = describe([one, bare])["comparison"]["pairs"]
    assert pair["not_compared"] == ["They keep no mean differences of activations at a common step."]


def test_records_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [make_record(tmp_path / name / "drift", looks=1) for name in ("seed-1", "seed-2")]
    assert [each["name"] for each in describe(paths)["records"]] == ["seed-1/drift", "seed-2/drift"]
    deep = [make_record(tmp_path / name / "x" / "drift", looks=1) for name in ("p", "q")]
    assert [each["name"] for each in describe(deep)["records"]] == ["p/x/drift", "q/x/drift"]
    assert len({each["name"] for each in describe([paths[0], paths[0]])["records"]}) == 2


# The command


def test_the_command_writes_a_page(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.html"
    assert run(capsys, record, "-o", target) == (0, f"{target}\n", "")
    assert target.read_text().startswith("<!doctype html>")


def test_without_a_name_the_page_is_report_html(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, record) == (0, "report.html\n", "")
    assert (tmp_path / "report.html").exists()


def test_json_goes_to_stdout_alone_and_the_page_only_where_it_is_named(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, record, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == describe([record])
    assert out.isascii()  # what a terminal would act on is written out
    assert not (tmp_path / "report.html").exists()
    code, out, err = run(capsys, record, "--json", "-o", "page.html")
    assert (code, err) == (0, "page.html\n")
    json.loads(out)
    assert (tmp_path / "page.html").exists()


def test_the_data_has_these_names(record: Path) -> None:
    said = describe([record])
    assert list(said) == ["format", "diffsensor", "records", "comparison"]
    assert said["format"] == 1
    assert list(said["records"][0]) == [
        *("name", "path", "standing", "warnings", "first_step", "last_step", "num_looks", "metrics", "groups"),
        *("figures", "curves", "told", "heatmaps", "thresholds", "tokens", "has_token_text", "bank_probes"),
        *("num_bank_probes", "num_alerts", "num_actions", "num_verdicts", "alerts", "actions", "verdicts", "cost"),
        *("cautions", "provenance"),
    ]
    assert list(describe([record, record])["comparison"]) == ["sentences", "differences", "pairs", "tokens", "formulas"]


PNG = b"\x89PNG"


def test_pictures_are_drawn_into_a_file_or_a_directory(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "p.html"
    assert run(capsys, record, "-o", page, "--png", tmp_path / "all.png")[0] == 0
    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    code, out, _ = run(capsys, record, "-o", page, "--png", tmp_path / "pictures")
    assert code == 0
    names = ["drift.png", "layers.png", "tokens.png"]
    assert out.splitlines() == [str(page), *(str(tmp_path / "pictures" / name) for name in names)]
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(PNG) for name in names)


@pytest.mark.parametrize("text", ["$x^{$", "\u4f60\u597d", "\x1b[31m", "\ud800", "_under", "x" * 10_000])
def test_pictures_take_any_text(text: str, tmp_path: Path) -> None:
    from diffsensor.report.picture import write_pictures

    records = [
        make_record(
            tmp_path / name,
            looks=3,
            groups=(f"g{text}", "b"),
            hookpoints=(f"h{_storable(text)}", "i"),
            tokens=(text, "a"),
        )
        for name in ("one", "two")
    ]
    write_pictures(records[:1], tmp_path / "one.png")
    write_pictures(records, tmp_path / "both.png")


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "Example: diffsensor report runs/1/drift -o report.html" in " ".join(out.split())


def test_without_jinja2_the_command_says_how_to_get_it(record: Path) -> None:
    code = "import sys; sys.modules['jinja2'] = None; from diffsensor.cli import main; main(['report', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "`diffsensor report` needs jinja2, which is not installed: pip install 'diffsensor[report]'\n"
    )


def _append(record: Path, findings: Findings) -> None:
    with Record(record, manifest=read_manifest(record), resume=True) as written:
        written.write(findings)


def _storable(text: str) -> str:
    """Names of modules are names of tensors, which safetensors stores as UTF-8."""
    return text.encode(errors="replace").decode()
