"""The plots as pictures, for where a page cannot go."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from diffsensor.errors import StorageError
from diffsensor.report.compare import letter
from diffsensor.report.contents import load, run_of
from diffsensor.report.plots import Drawn, colours_of, common_beginning, styled
from diffsensor.report.texts import number
from diffsensor.report.types import Detail, Heatmap, Run, TokenTable
from diffsensor.types import ALL_PROBES

_COLOURS = {
    "s0": "#1b1f24",
    "s1": "#0067b8",
    "s2": "#c25700",
    "s3": "#00785a",
    "s4": "#a5329a",
    "s5": "#7a6a00",
    "s6": "#4b4fc4",
    "s7": "#a8324a",
    "s8": "#35707a",
    "rest": "#b9bfc7",
}
_LIMIT = "#b3261e"
_LINES = {"s2": "--", "s3": ":", "s5": "-."}
_BARS = 10


def write_pictures(paths: Sequence[Path], target: Path) -> list[Path]:
    """Draw what the records hold; the files that were written.

    Arguments:
        target: a file that ends in .png for one picture with all of it, else a directory for one of each kind:
            drift.png, layers.png and tokens.png, the latter two of the first record.
    """
    runs = [run_of(each, Detail()) for each in load(paths)]
    of = f" of {_ascii(runs[0].name)}" if len(runs) > 1 else ""
    heatmap = next((each for each in runs[0].heatmaps if each.over == "step"), None)
    tokens = next((each for each in runs[0].tokens if not each.group and each.prefers == "live"), None)
    try:
        if target.suffix.lower() == ".png":
            return [_together(runs, heatmap, tokens, of, target)]
        target.mkdir(parents=True, exist_ok=True)
        written = [_saved(_drift_alone(runs), target / "drift.png")]
        if heatmap is not None:
            figure = _figure(9, 1.6 + 0.25 * len(heatmap.rows))
            _layers(figure, figure.subplots(), heatmap, of)
            written.append(_saved(figure, target / "layers.png"))
        if tokens is not None:
            figure = _figure(9, 4.2)
            _tokens(figure.subplots(), tokens, of)
            written.append(_saved(figure, target / "tokens.png"))
        return written
    except OSError as error:
        raise StorageError(
            f"The pictures cannot be written to {target}: {error.strerror or error}. Give a place that is there "
            "and can be written to."
        ) from error


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=144)
    return file


def _drift_alone(runs: Sequence[Run]) -> Figure:
    figure = _figure(9, 4.6)
    _drift(figure.subplots(), runs)
    return figure


def _together(runs: Sequence[Run], heatmap: Heatmap | None, tokens: TokenTable | None, of: str, target: Path) -> Path:
    parts = [(4.2, "drift")]
    parts += [(1.4 + 0.22 * len(heatmap.rows), "layers")] if heatmap is not None else []
    parts += [(3.4, "tokens")] if tokens is not None else []
    figure = _figure(9, sum(height for height, _ in parts))
    grid = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[height for height, _ in parts])[:, 0]
    for axes, (_, part) in zip(grid, parts, strict=True):
        if part == "drift":
            _drift(axes, runs)
        elif part == "layers" and heatmap is not None:
            _layers(figure, axes, heatmap, of)
        elif tokens is not None:
            _tokens(axes, tokens, of)
    return _saved(figure, target)


def _drift(axes: Axes, runs: Sequence[Run]) -> None:
    """The first metric: of one record with its groups, of several over all probes."""
    first = next((run.curves[0] for run in runs if run.curves), None)
    _plain(axes)
    axes.set_xlabel("step")
    if first is None:
        axes.set_title("Nothing was read of the outputs", loc="left", fontsize=11)
        return
    drawn = list[Drawn]()
    for place, run in enumerate(runs):
        curves = [curve for curve in run.curves if (curve.bank, curve.metric) == (first.bank, first.metric)]
        if len(runs) == 1:
            drawn += styled(curves, colours_of(run))
        else:
            name = f"{letter(place)} {run.name}"
            style = f"s{place % 8 + 1}"
            drawn += [Drawn(curve=each, name=name, style=style) for each in curves if each.group == ALL_PROBES]
    for each in drawn:
        curve, colour = each.curve, _COLOURS[each.style]
        values = np.array([value if math.isfinite(value) else math.nan for value in curve.values])
        width = 2.2 if each.style == "s0" else 0.7 if each.style == "rest" else 1.4
        label = f"{_ascii(each.name)} {number(curve.values[-1])}" if each.has_label else None
        axes.plot(
            curve.steps, values, color=colour, linewidth=width, linestyle=_LINES.get(each.style, "-"), label=label
        )
        if each.has_band:
            low, high = (np.array(side, dtype=float) for side in (curve.lows, curve.highs))
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.12, linewidth=0)
    for run in runs:
        keys = {each.curve.key for each in drawn}
        for threshold in {each.threshold for each in run.thresholds if each.key in keys}:
            axes.axhline(threshold, color=_LIMIT, linewidth=1, linestyle="--")
        told = [alert for alert in run.alerts if alert.subject in keys and not alert.is_repeat]
        axes.plot([alert.step for alert in told], [alert.value for alert in told], "v", color=_LIMIT)
    axes.set_title(f"{_ascii(first.metric)}, {_ascii(first.unit)} (bands: 95 % over probes)", loc="left", fontsize=11)
    legend = axes.legend(frameon=False, fontsize=8, loc="upper left")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _layers(figure: Figure, axes: Axes, heatmap: Heatmap, of: str) -> None:
    values = np.array([[value if math.isfinite(value) else math.nan for value in row] for row in heatmap.values])
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="Blues", vmin=0)
    prefix = common_beginning(heatmap.rows)
    every = max(len(heatmap.rows) // 16, 1)
    names = [_ascii(name.removeprefix(prefix)) for name in heatmap.rows]
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every])
    shown = range(0, len(heatmap.columns), max(len(heatmap.columns) // 8, 1))
    axes.set_xticks([place + 0.5 for place in shown], [heatmap.columns[place] for place in shown])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_xlabel("step (one column for each look)")
    axes.set_title(f"{_ascii(heatmap.metric)}{of}, {_ascii(heatmap.unit)}", loc="left", fontsize=11)
    figure.colorbar(mesh, ax=axes, pad=0.01)


def _tokens(axes: Axes, table: TokenTable, of: str) -> None:
    rows = table.rows[:_BARS]
    _plain(axes)
    errors = [row.mass_moved_stderr if math.isfinite(row.mass_moved_stderr) else 0.0 for row in rows]
    values = [row.mass_moved for row in rows]
    axes.barh(range(len(rows)), values, xerr=errors, color=_COLOURS["s1"], height=0.7, ecolor=_COLOURS["rest"])
    names = [f"'{_ascii(row.token)}'" if row.token else f"token {row.token_id}" for row in rows]
    axes.set_yticks(range(len(rows)), names, family="monospace", fontsize=9)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a token may well hold a dollar sign
    axes.invert_yaxis()
    axes.set_title(f"What gained most probability{of}, at step {table.step}", loc="left", fontsize=11)
    axes.set_xlabel("mean of p(live) - p(reference) over positions, ± standard error")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _ascii(text: str, limit: int = 60) -> str:
    """Letters that every font has: a picture must not warn, or show boxes, because a token is of another script."""
    written = text.encode("ascii", "backslashreplace").decode()
    shown = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in written)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."
