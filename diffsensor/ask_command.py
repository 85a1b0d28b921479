"""`diffsensor ask`: questions that a record answers, for people in a hurry and for agents that audit models."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffsensor.errors import ConfigError, unknown

if TYPE_CHECKING:
    from diffsensor.record import RecordContents
    from diffsensor.types import Reading

#: The command could not tell: the record does not have what was asked for.
CANNOT_TELL = 2


def ask(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="The directory of a run's record.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="One of those below.")],
    step: Annotated[
        int | None, typer.Argument(metavar="[STEP]", help="Of which step; the last one by default.")
    ] = None,
    metric: Annotated[str, typer.Option(metavar="NAME", help="The metric that is asked about.")] = "kl_ref_live",
    top: Annotated[int, typer.Option(metavar="N", min=1, help="How many lines at most.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Answer a question from a record.

    how-far: the metric over all probes and in each group. worst-group: the group that moved furthest. top-tokens: the
    tokens preferred more, and less, than by the reference. when-did-it-start: the first step with measurable drift, and
    the first alert. what-moved-at STEP: what changed most since the reading before. where: the hookpoints that moved
    furthest. verdict: what the gate said. alerts: what rules told. what-is-here: what the record holds.

    Exit code 0: answered. 2: the record does not have it, or there is no such question.

    Example: diffsensor ask runs/1/drift worst-group --json
    """
    from diffsensor.record import read_record

    if question not in QUESTIONS:
        raise ConfigError(unknown("question", question, QUESTIONS))
    contents = read_record(record)
    answer = QUESTIONS[question](contents, step, metric, top)
    if as_json:
        print(json.dumps({"question": question, "record": str(record), **_plain(answer)}, indent=2, ensure_ascii=False))
    else:
        print(_safe(str(answer["answer"])))
        for line in answer.get("lines", []):
            print("  " + _safe(line))
    sys.exit(0 if answer["found"] else CANNOT_TELL)


def _how_far(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    found = _at(contents, step, metric)
    whole = next((each for each in found if each.group == ""), None)
    if whole is None:
        return _nothing(contents, metric, step)
    groups = sorted((each for each in found if each.group not in ("", "worst")), key=lambda each: -abs(each.value))
    return {
        "found": True,
        "answer": f"At step {whole.step}, {_told(whole)} over all probes.",
        "lines": [f"{each.group}: {_told(each)}" for each in groups[:top]],
        "readings": [asdict(each) for each in (whole, *groups[:top])],
    }


def _worst_group(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    found = [each for each in _at(contents, step, metric) if each.group not in ("", "worst")]
    if not found:
        return _nothing(contents, metric, step)
    worst = max(found, key=lambda each: math.inf if math.isnan(each.value) else abs(each.value))
    return {
        "found": True,
        "answer": f"The group {worst.group!r}: {_told(worst)} at step {worst.step}.",
        "group": worst.group,
        "reading": asdict(worst),
    }


def _top_tokens(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    steps = sorted({shift.step for shift in contents.token_shifts})
    if not steps or (step is not None and step not in steps):
        return {"found": False, "answer": f"The record has no token table{'' if step is None else f' of step {step}'}."}
    at = steps[-1] if step is None else step
    shifts = [each for each in contents.token_shifts if each.step == at and not each.group]
    moved = sorted((each for each in shifts if each.ranked_by == "mass_moved"), key=lambda each: each.rank)
    by = {who: [each for each in moved if each.prefers == who][:top] for who in ("live", "reference")}
    signs = {"live": "+", "reference": "-"}
    lines = [
        f"{signs[who]} {each.token!r} (id {each.token_id}): {each.mass_moved:+.3g} of the probability"
        for who, some in by.items()
        for each in some
    ]
    return {
        "found": True,
        "answer": f"At step {at}, tokens preferred more (+) and less (-) than by the reference, by mass moved:",
        "lines": lines,
        "step": at,
        "tokens": [asdict(each) for some in by.values() for each in some],
    }


def _when(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    series = sorted((each for each in _of(contents, metric) if each.group == ""), key=lambda each: each.step)
    if not series:
        return _nothing(contents, metric, None)
    # From which on it stays measurable: a lone blip is no start.
    start = None
    for reading in reversed(series):
        if not reading.is_measurable or reading.value == 0:
            break
        start = reading.step
    alert = min(contents.alerts, key=lambda each: each.first_step, default=None)
    first = " (the first that was read)" if start == series[0].step else ""
    told = (
        f"{metric} has been measurable since step {start}{first}."
        if start is not None
        else f"{metric} shows no lasting drift."
    )
    if alert is not None:
        told += f" The first alert is of step {alert.step}: {alert.message}"
    return {
        "found": True,
        "answer": told,
        "first_measurable_step": start,
        "first_alert": None if alert is None else asdict(alert),
    }


def _what_moved(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    steps = sorted({each.step for each in contents.readings if each.sensor != "progress"})
    if len(steps) < 2 or (step is not None and step not in steps[1:]):
        where = "" if step is None else f" at step {step}"
        told = f"Nothing can be compared{where}: expected a step that was read and has one before it."
        return {"found": False, "answer": f"{told} Steps read: {_span(steps)}."}
    at = steps[-1] if step is None else step
    before = steps[steps.index(at) - 1]
    then, now = ({each.key: each for each in contents.readings if each.step == which} for which in (before, at))
    changes = []
    for key, reading in now.items():
        if key in then and reading.sensor != "progress" and reading.group != "worst":
            error = math.hypot(*(0.0 if math.isnan(each.stderr) else each.stderr for each in (reading, then[key])))
            change = reading.value - then[key].value
            if error > 0 and math.isfinite(change):
                changes.append((abs(change) / error, change, reading))
    changes.sort(key=lambda each: -each[0])
    return {
        "found": True,
        "answer": f"From step {before} to {at}, by the size of the change in standard errors:",
        "lines": [
            f"{reading.key.removeprefix('diffsensor/')}: {change:+.3g} {reading.unit} ({size:.1f} standard errors)"
            for size, change, reading in changes[:top]
        ],
        "step": at,
        "before": before,
        "changes": [
            {"key": reading.key, "change": change, "standard_errors": size} for size, change, reading in changes[:top]
        ],
    }


def _where(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    metric = "relative_l2" if metric == "kl_ref_live" else metric
    found = [each for each in _at(contents, step, metric, hookpoints=True) if each.group == ""]
    if not found:
        return _nothing(contents, metric, step)
    found.sort(key=lambda each: -abs(each.value))
    return {
        "found": True,
        "answer": f"At step {found[0].step}, by {metric}:",
        "lines": [f"{each.hookpoint}: {_told(each)}" for each in found[:top]],
        "readings": [asdict(each) for each in found[:top]],
    }


def _verdict(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    verdicts = [each for each in contents.verdicts if step in (None, each.step)]
    if not verdicts:
        return {"found": False, "answer": "The record has no verdict: the run had no gate, or saved nothing yet."}
    last = verdicts[-1]
    return {"found": True, "answer": f"Step {last.step}: {last.outcome}. {last.reason}", "verdict": asdict(last)}


def _alerts(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    alerts = [each for each in contents.alerts if step in (None, each.step)]
    return {
        "found": True,
        "answer": f"{len(alerts)} alerts." if alerts else "No alerts.",
        "lines": [f"step {each.step}, {each.severity}: {each.message}" for each in alerts[-top:]],
        "alerts": [asdict(each) for each in alerts[-top:]],
    }


def _what_is_here(contents: "RecordContents", step: int | None, metric: str, top: int) -> dict[str, Any]:
    steps = sorted({each.step for each in contents.readings})
    metrics = sorted({each.metric for each in contents.readings if each.sensor != "progress"})
    groups = sorted({each.group for each in contents.readings} - {"", "worst"})
    hookpoints = sorted({each.hookpoint for each in contents.readings} - {""})
    return {
        "found": True,
        "answer": f"{len(steps)} readings, of the steps {_span(steps)}.",
        "lines": [
            f"metrics: {', '.join(metrics)}",
            f"groups: {', '.join(groups) or 'none'}",
            f"hookpoints: {', '.join(hookpoints) or 'none'}",
            f"alerts: {len(contents.alerts)}, actions: {len(contents.actions)}, verdicts: {len(contents.verdicts)}",
            f"questions: {', '.join(QUESTIONS)}",
        ],
        "steps": steps,
        "metrics": metrics,
        "groups": groups,
        "hookpoints": hookpoints,
        "questions": list(QUESTIONS),
    }


QUESTIONS: Mapping[str, Callable[["RecordContents", int | None, str, int], dict[str, Any]]] = {
    "how-far": _how_far,
    "worst-group": _worst_group,
    "top-tokens": _top_tokens,
    "when-did-it-start": _when,
    "what-moved-at": _what_moved,
    "where": _where,
    "verdict": _verdict,
    "alerts": _alerts,
    "what-is-here": _what_is_here,
}


def _of(contents: "RecordContents", metric: str, *, hookpoints: bool = False) -> "list[Reading]":
    known = {each.metric for each in contents.readings}
    if metric not in known:
        raise ConfigError(unknown("metric of this record", metric, sorted(known)))
    return [each for each in contents.readings if each.metric == metric and bool(each.hookpoint) == hookpoints]


def _at(contents: "RecordContents", step: int | None, metric: str, *, hookpoints: bool = False) -> "list[Reading]":
    found = _of(contents, metric, hookpoints=hookpoints)
    last = max((each.step for each in found), default=-1) if step is None else step
    return [each for each in found if each.step == last]


def _nothing(contents: "RecordContents", metric: str, step: int | None) -> dict[str, Any]:
    steps = sorted({each.step for each in contents.readings})
    of_step = "" if step is None else f" at step {step}"
    return {
        "found": False,
        "answer": f"The record has no such reading of {metric}{of_step}. Steps read: {_span(steps)}.",
    }


def _told(reading: "Reading") -> str:
    if not reading.is_measurable:
        return f"{reading.metric} is no measurable drift"
    error = "" if math.isnan(reading.stderr) else f" ± {reading.stderr:.2g}"
    return f"{reading.metric} is {reading.value:.4g}{error} {reading.unit}"


def _span(steps: list[int]) -> str:
    if not steps:
        return "none"
    return f"{steps[0]} to {steps[-1]} ({len(steps)})" if len(steps) > 1 else str(steps[0])


def _safe(text: str) -> str:
    """Foreign text on one line, without what would steer a terminal."""
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)[:2000]


def _plain(value: Any) -> Any:
    """The same with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
