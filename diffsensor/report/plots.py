"""Where everything goes in a plot: the page's template draws it, in SVG that stretches and text that does not.

A plot is 1000 wide and 1000 high and is stretched to the place it has; lines keep their width. Texts are put over it
at shares of its width and height, so that they stay readable on a telephone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffsensor.report.contents import spread
from diffsensor.report.texts import count, number, short, visible
from diffsensor.report.types import Curve, Heatmap, Run, Threshold
from diffsensor.types import ALL_PROBES, FIXED_BANK

#: So many groups get a colour and a name in a plot of all; the others are grey.
COLOURED = 6
#: Shades of a heatmap.
SHADES = 12
#: A limit is drawn where it is at most so many times as high as the curves; else it is named.
_IN_SIGHT = 3.0
#: Rows of the table behind a plot.
_TABLE_ROWS = 24
_LABEL_HEIGHT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A text at a share, in percent, of the width or height."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve with its band, as SVG paths; `label_at` is where its name goes, in percent from above, -1 for nowhere."""

    name: str
    style: str
    path: str
    band: str = ""
    label_at: float = -1.0
    last: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line: a limit or the noise floor."""

    at: float
    text: str
    kind: Literal["limit", "floor", "zero"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened, at a share of the width and, where it belongs to a curve, of the height."""

    x: float
    y: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A row of marks under a plot: all alerts, all actions, or all verdicts."""

    name: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The numbers behind a plot."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Curves over steps."""

    title: str
    unit: str
    description: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    marks: tuple[Mark, ...] = ()
    strips: tuple[Strip, ...] = ()
    notes: tuple[str, ...] = ()
    table: Table | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A heatmap: one path for each shade, with the cells of that shade."""

    title: str
    unit: str
    description: str
    height: int
    width: int
    depth: int
    shades: Mapping[int, str]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_name: str
    label_width: int
    high: str
    notes: tuple[str, ...]
    table: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A curve to be drawn, under a name and in a style of the page."""

    curve: Curve
    name: str
    style: str
    has_band: bool = True
    has_label: bool = True


@dataclass(frozen=True, slots=True)
class Frame:
    """What part of the plane a plot shows."""

    left: float
    right: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return 1000 * (step - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return 1000 * (self.high - min(max(value, self.low), self.high)) / (self.high - self.low)


def chart(
    drawn: Sequence[Drawn],
    *,
    title: str,
    height: int = 150,
    thresholds: Sequence[Threshold] = (),
    marks: Iterable[tuple[int, float, str, str]] = (),
    strips: Mapping[str, Sequence[tuple[int, str, str]]] | None = None,
    frame: "Frame | None" = None,
    notes: Sequence[str] = (),
    has_table: bool = True,
) -> Chart:
    """Curves in one plot.

    Arguments:
        marks: step, value, kind and text of what happened on a curve.
        strips: by name, step, kind and text of what happened in the run.
    """
    frame = frame or frame_of([each.curve for each in drawn], [each.threshold for each in thresholds])
    lines = [_line(each, frame) for each in drawn]
    notes = [*notes, *_notes(drawn, thresholds, frame, tells_floor=bool(strips))]
    return Chart(
        title=title,
        unit=drawn[0].curve.unit if drawn else "",
        description=_description(drawn, thresholds),
        height=height,
        x_ticks=tuple(Tick(at=frame.x(step) / 10, text=short(step)) for step in ticks(frame.left, frame.right, 5)),
        y_ticks=tuple(
            Tick(at=frame.y(value) / 10, text=short(value))
            for value in ticks(frame.low, frame.high, max(height // 45, 2))
        ),
        lines=tuple(_apart(lines, height)),
        levels=tuple(_levels(drawn, thresholds, frame)),
        marks=tuple(
            Mark(x=frame.x(step) / 10, y=frame.y(value) / 10, kind=kind, text=text)
            for step, value, kind, text in marks
            if math.isfinite(value)
        ),
        strips=tuple(
            Strip(
                name=name,
                marks=tuple(Mark(x=frame.x(step) / 10, y=50, kind=kind, text=text) for step, kind, text in happened),
            )
            for name, happened in (strips or {}).items()
            if happened
        ),
        notes=tuple(notes),
        table=_table(drawn) if has_table else None,
    )


def frame_of(curves: Sequence[Curve], thresholds: Sequence[float] = ()) -> Frame:
    """What these curves need; the bands may be cut, so that an uncertain point does not flatten all others."""
    steps = [step for curve in curves for step in curve.steps] or [0]
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    top, bottom = max([0.0, *values]), min([0.0, *values])
    size = max(top - bottom, 1e-300)
    top = max([top, *(min(high, top + 0.5 * size) for high in _ends(curves, upper=True))])
    bottom = min([bottom, *(max(low, bottom - 0.5 * size) for low in _ends(curves, upper=False))])
    size = top - bottom
    in_sight = [each for each in thresholds if bottom - _IN_SIGHT * size < each < bottom + _IN_SIGHT * size]
    top, bottom = max([top, *in_sight]), min([bottom, *in_sight])
    if top == bottom:
        top = bottom + 1.0
    room = 0.06 * (top - bottom)
    left, right = min(steps), max(steps)
    return Frame(
        left=left if right > left else left - 1,
        right=right if right > left else right + 1,
        low=bottom - room if bottom < 0 else 0.0,
        high=top + room if top > 0 else 0.0,
    )


def _ends(curves: Sequence[Curve], *, upper: bool) -> list[float]:
    return [value for curve in curves for value in (curve.highs if upper else curve.lows) if math.isfinite(value)]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between the two, about so many."""
    size = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= size * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [step * place for place in range(first, first + 3 * wanted + 3) if step * place <= high + 1e-9 * step]
    return [0.0 if abs(value) < 1e-9 * step else value for value in found]


def _line(drawn: Drawn, frame: Frame) -> Line:
    curve = drawn.curve
    places = [
        (frame.x(step), frame.y(value)) if math.isfinite(value) else None
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    last = next((place for place in reversed(places) if place is not None), None)
    return Line(
        name=drawn.name,
        style=drawn.style,
        path=_path(places),
        band=_band(curve, frame) if drawn.has_band else "",
        label_at=last[1] / 10 if last and drawn.has_label else -1.0,
        last=number(curve.values[-1]),
    )


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """A line through the places, broken where there is none. A lone one is a dot: a line of no length."""
    parts, is_open = [], False
    for place in places:
        if place is None:
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{place[0]:.0f} {place[1]:.0f}")
        if not is_open:
            parts.append("h0")
        is_open = True
    return "".join(parts)


def _band(curve: Curve, frame: Frame) -> str:
    parts, upper, lower = [], list[str](), list[str]()
    for step, low, high in [*zip(curve.steps, curve.lows, curve.highs, strict=True), (0, math.nan, math.nan)]:
        if math.isnan(low) or math.isnan(high):
            if len(upper) > 1:
                parts.append(f"M{'L'.join(upper)}L{'L'.join(reversed(lower))}Z")
            upper, lower = [], []
            continue
        upper.append(f"{frame.x(step):.0f} {frame.y(high):.0f}")
        lower.append(f"{frame.x(step):.0f} {frame.y(low):.0f}")
    return "".join(parts)


def _apart(lines: Sequence[Line], height: int) -> list[Line]:
    """The lines with their names moved so far up or down that none covers another."""
    least = 100 * _LABEL_HEIGHT / height
    named = sorted((line for line in lines if line.label_at >= 0), key=lambda line: line.label_at)
    at: list[float] = []
    for line in named:
        at.append(max(line.label_at, at[-1] + least if at else 0.0))
    ceiling = 100.0
    for place in reversed(range(len(at))):
        at[place] = min(at[place], ceiling)
        ceiling = at[place] - least
    moved = {id(line): place for line, place in zip(named, at, strict=True)}
    return [
        Line(
            name=line.name,
            style=line.style,
            path=line.path,
            band=line.band,
            label_at=moved.get(id(line), -1.0),
            last=line.last,
        )
        for line in lines
    ]


def _levels(drawn: Sequence[Drawn], thresholds: Sequence[Threshold], frame: Frame) -> list[Level]:
    found = []
    if frame.low < 0 < frame.high:
        found.append(Level(at=frame.y(0) / 10, text="", kind="zero"))
    found += [
        Level(
            at=frame.y(threshold) / 10,
            text=f"limit {short(threshold)}{_whose(drawn, thresholds, threshold)}",
            kind="limit",
        )
        for threshold in dict.fromkeys(each.threshold for each in thresholds)
        if frame.low <= threshold <= frame.high
    ]
    floor = _floor(drawn)
    if floor > 0.01 * (frame.high - frame.low) and floor <= frame.high:
        found.append(Level(at=frame.y(floor) / 10, text=f"noise floor {number(floor, 2)}", kind="floor"))
    return found


def _whose(drawn: Sequence[Drawn], thresholds: Sequence[Threshold], threshold: float) -> str:
    """Of which group a limit is, where others are drawn too."""
    keys = {each.key for each in thresholds if each.threshold == threshold}
    groups = [each.curve.group for each in drawn if each.curve.key in keys]
    if len(drawn) < 2 or ALL_PROBES in groups or not groups:
        return ""
    return f" of {visible(groups[0], 40)}{f' and {len(groups) - 1} more' if len(groups) > 1 else ''}"


def _floor(drawn: Sequence[Drawn]) -> float:
    return next((each.curve.noise_floor for each in drawn if math.isfinite(each.curve.noise_floor)), math.nan)


def _notes(drawn: Sequence[Drawn], thresholds: Sequence[Threshold], frame: Frame, *, tells_floor: bool) -> list[str]:
    notes = []
    if outside := [each for each in thresholds if not frame.low <= each.threshold <= frame.high]:
        told = ", ".join(dict.fromkeys(short(each.threshold) for each in outside))
        notes.append(f"Out of the picture: limit {told}.")
    floor = _floor(drawn)
    if tells_floor and floor <= 0.01 * (frame.high - frame.low):
        what = "too near 0 to be seen here" if floor else "in another batch split the same weights read the same"
        notes.append(f"Noise floor {number(floor, 2)}: {what}.")
    if broken := [each for each in drawn if each.curve.num_broken]:
        told = ", ".join(f"{visible(each.name, 40)} ({each.curve.num_broken})" for each in broken[:6])
        notes.append(f"Gaps where the value is not a number, with how many: {told}.")
    if thin := [each for each in drawn if each.curve.num_looks > len(each.curve.steps)]:
        most = max(each.curve.num_looks for each in thin)
        notes.append(
            f"Of {count(most, 'look')} at most {max(len(each.curve.steps) for each in thin)} are drawn of each curve: "
            "the first, the last, and the lowest and highest of each stretch between."
        )
    return notes


def _description(drawn: Sequence[Drawn], thresholds: Sequence[Threshold]) -> str:
    """What the plot shows, for who hears it: first, last and extremes of each curve that has a name."""
    told = []
    for each in drawn:
        curve = each.curve
        finite = [(value, step) for value, step in zip(curve.values, curve.steps, strict=True) if math.isfinite(value)]
        if each.has_label and finite:
            most, least = max(finite), min(finite)
            told.append(
                f"{visible(each.name, 60)}: {number(curve.values[0])} at step {curve.steps[0]}, "
                f"{number(curve.values[-1])} at step {curve.steps[-1]}, highest {number(most[0])} at step {most[1]}, "
                f"lowest {number(least[0])} at step {least[1]}"
            )
    limits = ", ".join(dict.fromkeys(short(each.threshold) for each in thresholds))
    return ". ".join([*told, *([f"Limit: {limits}"] if limits else [])]) + "."


def _table(drawn: Sequence[Drawn]) -> Table:
    shown = [each for each in drawn if each.has_label][: COLOURED + 1]
    steps = sorted({step for each in shown for step in each.curve.steps})
    steps = [steps[place] for place in spread(len(steps), _TABLE_ROWS)]
    at = [{step: place for place, step in enumerate(each.curve.steps)} for each in shown]
    rows = []
    for step in steps:
        cells = [str(step)]
        for each, places in zip(shown, at, strict=True):
            place = places.get(step)
            if place is None:
                cells.append("")
                continue
            error = each.curve.stderrs[place]
            told = f" ± {number(error, 2)}" if math.isfinite(error) else ""
            cells.append(f"{number(each.curve.values[place])}{told}")
        rows.append(tuple(cells))
    return Table(heads=("step", *(each.name for each in shown)), rows=tuple(rows))


def panels(run: Run) -> list[Chart]:
    """A plot for each metric on the outputs, with all groups; the first one is large and shows what happened."""
    found: list[Chart] = []
    colours = colours_of(run)
    for bank, metric in dict.fromkeys((curve.bank, curve.metric) for curve in run.curves):
        curves = [curve for curve in run.curves if (curve.bank, curve.metric) == (bank, metric)]
        keys = {curve.key for curve in curves}
        thresholds = [each for each in run.thresholds if each.key in keys]
        is_first = not found
        found.append(
            chart(
                styled(curves, colours),
                title=metric if bank == FIXED_BANK else f"{metric}, bank {bank}",
                height=300 if is_first else 150,
                thresholds=thresholds,
                marks=_alert_marks(run, keys),
                strips=_happened(run) if is_first else None,
            )
        )
    return found


def told(run: Run) -> list[Chart]:
    """A plot for each number that the loop or a rule told beside the readings."""
    colours = colours_of(run)
    found = []
    for bank, metric in dict.fromkeys((curve.bank, curve.metric) for curve in run.told):
        curves = [curve for curve in run.told if (curve.bank, curve.metric) == (bank, metric)]
        keys = {curve.key for curve in curves}
        thresholds = [each for each in run.thresholds if each.key in keys]
        title = metric if bank == FIXED_BANK else f"{metric}, bank {bank}"
        found.append(chart(styled(curves, colours), title=title, height=110, thresholds=thresholds))
    return found


def colours_of(run: Run) -> dict[str, str]:
    """The style of each group that gets one: those that ended farthest from 0 in the first metric."""
    groups = [curve for curve in _of_first_metric(run) if curve.group != ALL_PROBES]
    farthest = sorted(groups, key=lambda curve: -abs(_or_zero(curve.values[-1])))
    return {curve.group: f"s{place}" for place, curve in enumerate(farthest[:COLOURED], start=1)}


def _of_first_metric(run: Run) -> list[Curve]:
    return [curve for curve in run.curves if (curve.bank, curve.metric) == (run.curves[0].bank, run.curves[0].metric)]


def styled(curves: Sequence[Curve], colours: Mapping[str, str]) -> list[Drawn]:
    """All probes in ink over the groups that have a colour, over the others in grey."""
    grey = [
        Drawn(curve=curve, name=curve.group, style="rest", has_band=False, has_label=False)
        for curve in curves
        if curve.group != ALL_PROBES and curve.group not in colours
    ]
    return [
        *grey,
        *(
            Drawn(curve=curve, name=curve.group, style=colours[curve.group])
            for curve in curves
            if curve.group in colours
        ),
        *(Drawn(curve=curve, name="all probes", style="s0") for curve in curves if curve.group == ALL_PROBES),
    ]


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _alert_marks(run: Run, keys: set[str]) -> list[tuple[int, float, str, str]]:
    return [
        (alert.step, alert.value, "alert", f"step {alert.step}, {alert.severity}: {visible(alert.message, 300)}")
        for alert in run.alerts
        if alert.subject in keys and not alert.is_repeat
    ]


def _happened(run: Run) -> dict[str, list[tuple[int, str, str]]]:
    steps = range(run.first_step, run.last_step + 1)
    return {
        "alerts": [
            (each.step, f"alert {each.severity}", f"step {each.step}, {each.severity}: {visible(each.message, 300)}")
            for each in run.alerts
            if each.step in steps
        ],
        "actions": [
            (
                each.step,
                f"action {each.outcome.replace(' ', '-')}",
                f"step {each.step}, {visible(each.action, 80)}: {each.outcome}. {visible(each.detail, 200)}",
            )
            for each in run.actions
            if each.step in steps
        ],
        "verdicts": [
            (each.step, f"gate {each.outcome}", f"step {each.step}: {each.outcome}. {visible(each.reason, 200)}")
            for each in run.verdicts
            if each.step in steps
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiples:
    """A small plot for each group, all on the same axes, with all probes behind it."""

    metric: str
    unit: str
    high: str
    first_step: int
    last_step: int
    charts: tuple[Chart, ...]
    table: Table = field(default_factory=lambda: Table(heads=(), rows=()))


def multiples(run: Run) -> Multiples | None:
    """Of the first metric, the groups one by one; None for fewer than two groups."""
    if not run.curves:
        return None
    first, curves = run.curves[0], _of_first_metric(run)
    overall = [curve for curve in curves if curve.group == ALL_PROBES]
    groups = sorted(
        (curve for curve in curves if curve.group != ALL_PROBES), key=lambda curve: -abs(_or_zero(curve.values[-1]))
    )
    if len(groups) < 2:
        return None
    frame = frame_of(curves)
    charts = []
    for curve in groups:
        behind = [Drawn(curve=each, name="all", style="rest", has_band=False, has_label=False) for each in overall]
        charts.append(
            chart(
                [*behind, Drawn(curve=curve, name=curve.group, style="s1")],
                title=curve.group,
                height=64,
                thresholds=[each for each in run.thresholds if each.key == curve.key],
                marks=_alert_marks(run, {curve.key}),
                frame=frame,
                has_table=False,
            )
        )
    rows = []
    for curve in groups:
        error = curve.stderrs[-1]
        finite = [value for value in curve.values if math.isfinite(value)]
        rows.append(
            (
                curve.group,
                number(curve.values[-1]),
                number(error, 2),
                number(curve.lows[-1]),
                number(curve.highs[-1]),
                number(max(finite)) if finite else number(math.nan),
                str(curve.num_probes),
            )
        )
    heads = ("group", "last value", "standard error", "95 % from", "to", "highest", "probes")
    return Multiples(
        metric=first.metric,
        unit=first.unit,
        high=number(frame.high),
        first_step=run.first_step,
        last_step=run.last_step,
        charts=tuple(charts),
        table=Table(heads=heads, rows=tuple(rows)),
    )


def heatmap(given: Heatmap) -> Grid:
    """Cells in shades from 0 to the largest value. Deeper hookpoints are above, as in drawings of networks."""
    finite = [value for row in given.values for value in row if math.isfinite(value)]
    high = max([0.0, *finite])
    if given.over == "group":  # the names of groups are long, those of hookpoints share their beginning
        names, across = list(given.columns), list(given.rows)
        values = [[row[place] for row in given.values] for place in range(len(names))]
    else:
        names, across = list(given.rows)[::-1], list(given.columns)
        values = [list(row) for row in given.values][::-1]
    prefix = common_beginning(given.rows)
    depth, width = len(names), len(across)
    row_height = 22 if depth <= 12 else 16 if depth <= 24 else 11
    every = 1 if row_height >= 16 else 2
    hookpoints_across = given.over == "group"
    shown = spread(width, 6 if not hookpoints_across else 12)
    notes = [f"Hookpoints: {prefix}*." if prefix else ""]
    if given.num_columns > width and not hookpoints_across:
        notes.append(f"{width} of {count(given.num_columns, 'look')} are drawn, evenly spaced.")
    if any(not math.isfinite(value) for row in values for value in row):
        notes.append("Empty cells: not read, or not a number.")
    if any(value < 0 for value in finite):
        notes.append("Values below 0 are drawn as 0.")
    y_ticks = tuple(
        Tick(at=100 * (place + 0.5) / depth, text=_short(name, "" if hookpoints_across else prefix))
        for place, name in enumerate(names)
        if place % every == 0
    )
    return Grid(
        title=given.metric if given.bank == FIXED_BANK else f"{given.metric}, bank {given.bank}",
        unit=given.unit,
        description=_heatmap_description(given, finite),
        height=row_height * depth,
        width=width,
        depth=depth,
        shades=_shades(values, high),
        x_ticks=tuple(
            Tick(at=100 * (place + 0.5) / width, text=_short(across[place], prefix if hookpoints_across else ""))
            for place in shown
        ),
        y_ticks=y_ticks,
        x_name="hookpoint" if hookpoints_across else "step (one column for each look)",
        label_width=min(
            max((len(_short(visible(name), "" if hookpoints_across else prefix)) for name in names), default=1), 18
        ),
        high=number(high),
        notes=tuple(note for note in notes if note),
        table=_heatmap_table(names, across, values, "group" if hookpoints_across else "hookpoint"),
    )


def common_beginning(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; "" for a single one."""
    if len(names) < 2:
        return ""
    shared = names[0]
    while shared and not all(name.startswith(shared) for name in names):
        shared = shared[:-1]
    return shared[: shared.rfind(".") + 1]


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) or name


def _shades(values: Sequence[Sequence[float]], high: float) -> dict[int, str]:
    """By shade, the cells of that shade; neighbours in a row are one rectangle."""
    found: dict[int, list[str]] = {}
    for y, row in enumerate(values):
        shades = [-1 if not math.isfinite(value) else shade_of(value, high) for value in row]
        x = 0
        while x < len(shades):
            end = x
            while end < len(shades) and shades[end] == shades[x]:
                end += 1
            if shades[x] >= 0:
                found.setdefault(shades[x], []).append(f"M{x} {y}h{end - x}v1h-{end - x}z")
            x = end
    return {shade: "".join(found[shade]) for shade in sorted(found)}


def shade_of(value: float, high: float) -> int:
    """From 0 to 11, in equal parts of 0 to `high`."""
    return min(max(int(SHADES * value / high), 0), SHADES - 1) if high > 0 else 0


def _heatmap_description(given: Heatmap, finite: Sequence[float]) -> str:
    if not finite:
        return "No value is a number."
    most, row, column = max(
        (value, name, given.columns[place])
        for name, values in zip(given.rows, given.values, strict=True)
        for place, value in enumerate(values)
        if math.isfinite(value)
    )
    return (
        f"{len(given.rows)} hookpoints by {len(given.columns)} {'looks' if given.over == 'step' else 'groups'}, from "
        f"{number(min(finite))} to {number(most)}, which is at {visible(row, 80)}, {given.over} {visible(column, 80)}."
    )


def _heatmap_table(
    names: Sequence[str], across: Sequence[str], values: Sequence[Sequence[float]], corner: str
) -> Table:
    shown = spread(len(across), 12)
    return Table(
        heads=(corner, *(across[place] for place in shown)),
        rows=tuple((name, *(number(row[place]) for place in shown)) for name, row in zip(names, values, strict=True)),
    )
