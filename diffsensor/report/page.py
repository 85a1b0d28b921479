"""The page: one file that needs no other, and nothing from a network."""

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count as count_up
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffsensor.errors import StorageError
from diffsensor.report.compare import Comparison, compare, letter
from diffsensor.report.contents import Loaded, curve_of, load, run_of
from diffsensor.report.plots import (
    SHADES,
    Chart,
    Drawn,
    Frame,
    chart,
    heatmap,
    multiples,
    panels,
    told,
)
from diffsensor.report.texts import count, number, short, size, visible
from diffsensor.report.types import Curve, Detail, Run
from diffsensor.storage.atomic import store

#: Of what `describe` returns; grows when a name in it changes its meaning or goes away.
FORMAT = 1
#: What fits into a mail and a review.
LARGEST = 2_000_000
#: From much to little; the first with which the page is small enough is taken.
_DETAILS = (
    Detail(),
    Detail(points=80, columns=80, context=160),
    Detail(points=40, columns=60, context=80),
    Detail(points=20, columns=30, context=40),
    Detail(points=8, columns=12, context=20),
)
_TEMPLATES = Path(__file__).parent / "templates"


def describe(records: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """What a report says, in plain types for JSON: NaN is None, infinities are "inf" and "-inf".

    Curves are as they are drawn, of long ones some points; all are in the record (`read_record`). Text is as it is in
    the record, so it is for programs: whoever shows it must make it harmless.

    Arguments:
        records: the directories of runs. Raises `StorageError` where there is no record, `CorruptFileError` where one
            was changed, `ConfigError` where one holds nothing yet.
    """
    loaded = load([Path(path) for path in records])
    return _as_data(*_described(loaded, _DETAILS[0]))


def write_report(
    records: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
) -> None:
    """Write a page on these records: one file, under 2 MB where that can be, that loads nothing from anywhere.

        write_report("runs/1/drift", "report.html")

    Several records are overlaid, and it is said how alike they are.

    Arguments:
        records: the directory of a run, or several. A run may be going on; what it has written is shown. Raises as
            `describe` does.
        path: where the page goes; what is there is replaced.
    """
    given = [records] if isinstance(records, str | os.PathLike) else list(records)
    page = render(load([Path(each) for each in given]))
    try:
        store(Path(path), page.encode())
    except OSError as error:
        raise StorageError(
            f"The report cannot be written to {path}: {error.strerror or error}. Give a file in a directory that is "
            "there and can be written to."
        ) from error


def render(loaded: Sequence[Loaded]) -> str:
    """The page as text, with as much detail as fits."""
    page = ""
    for detail in _DETAILS:
        page = _rendered(*_described(loaded, detail))
        if len(page.encode()) < LARGEST:
            break
    return page


def _described(loaded: Sequence[Loaded], detail: Detail) -> tuple[list[Run], Comparison | None]:
    runs = [run_of(each, detail) for each in loaded]
    return runs, compare(loaded, runs) if len(runs) > 1 else None


def _as_data(runs: Sequence[Run], comparison: Comparison | None) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "diffsensor": version("diffsensor"),
        "records": [asdict(run) for run in runs],
        "comparison": None if comparison is None else asdict(comparison),
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _rendered(runs: Sequence[Run], comparison: Comparison | None) -> str:
    numbers = count_up(1)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters |= {"number": number, "short": short, "size": size, "count": count, "flat": _flat}
    script = environment.get_template("page.js").render()
    page = environment.get_template("page.html")
    return page.render(
        runs=runs,
        comparison=comparison,
        letters=[letter(place) for place in range(len(runs))],
        overlays=overlays(runs) if len(runs) > 1 else [],
        directions=_directions(comparison) if comparison else None,
        profile=_profile(runs) if comparison else None,
        panels=panels,
        multiples=multiples,
        heatmap=heatmap,
        told=told,
        shades=range(SHADES),
        next_number=lambda: next(numbers),
        isfinite=math.isfinite,
        version=version("diffsensor"),
        script=script,
        # So that no other script runs, whatever a record holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _harmless(value: object) -> object:
    """What each expression in a template goes through, before it is escaped."""
    return visible(value) if type(value) is str else value  # and not markup, which is a kind of text


def _flat(value: object) -> str:
    """A setting in one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_flat(part) for part in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_flat(part)}" for key, part in value.items()) or "none"
    return "none" if value is None else str(value)


def overlays(runs: Sequence[Run]) -> list[Chart]:
    """Each metric over all probes that at least two records have, one curve for each record."""
    found: list[Chart] = []
    keys = dict.fromkeys((curve.bank, curve.metric) for run in runs for curve in run.curves if not curve.group)
    for bank, metric in keys:
        curves = [(place, curve_of(run, metric, bank=bank)) for place, run in enumerate(runs)]
        drawn = [
            Drawn(curve=curve, name=letter(place), style=f"r{place % 8 + 1}")
            for place, curve in curves
            if curve is not None
        ]
        if len(drawn) < 2:
            continue
        keys_here = {each.curve.key for each in drawn}
        thresholds = {each.threshold: each for run in runs for each in run.thresholds if each.key in keys_here}
        found.append(
            chart(
                drawn,
                title=metric if bank == "fixed" else f"{metric}, bank {bank}",
                height=150 if found else 280,
                thresholds=list(thresholds.values()),
            )
        )
    return found


def _directions(comparison: Comparison) -> Chart | None:
    """How the mean cosine of each pair's directions went over the steps."""
    drawn = list[Drawn]()
    for pair in comparison.pairs:
        if pair.directions is not None and len(pair.directions.steps) > 1:
            name = f"{letter(pair.one)}\N{EN DASH}{letter(pair.other)}"
            drawn.append(Drawn(curve=_as_curve(pair.directions), name=name, style=f"r{len(drawn) % 8 + 1}"))
    if not drawn:
        return None
    steps = [step for each in drawn for step in each.curve.steps]
    lowest = min(value for each in drawn for value in each.curve.values)
    frame = Frame(left=min(steps), right=max(steps), low=min(0.0, -1.0 if lowest < -0.5 else 2 * lowest), high=1.0)
    return chart(drawn, title="cosine of drift directions, mean over hookpoints", height=200, frame=frame)


def _as_curve(directions: Any) -> Curve:
    unknown = tuple(math.nan for _ in directions.steps)
    return Curve(
        key="cosine",
        metric="cosine",
        bank="",
        group="",
        hookpoint="",
        unit="1: the same way, 0: at right angles",
        noise_floor=math.nan,
        num_probes=0,
        num_looks=len(directions.steps),
        num_broken=0,
        steps=directions.steps,
        values=directions.means,
        stderrs=unknown,
        lows=unknown,
        highs=unknown,
    )


def _profile(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The last readings of the groups, of the first metric that the first record has, for a table."""
    first = next((run.curves[0] for run in runs if run.curves), None)
    if first is None:
        return None
    groups = dict.fromkeys(name for run in runs for name in run.groups)
    columns = [{name: curve_of(run, first.metric, bank=first.bank, group=name) for name in groups} for run in runs]
    most = [
        max((abs(each.values[-1]) for each in column.values() if each and math.isfinite(each.values[-1])), default=0.0)
        for column in columns
    ]
    rows = [(name, [column[name] for column in columns]) for name in groups]
    return {"metric": first.metric, "unit": first.unit, "rows": rows, "most": most} if rows else None
