"""The saved pictures: curves, a heatmap of layers over steps, bars of tokens."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from diffsensor_demo.show import quoted
from diffsensor_demo.story import RANKINGS, Ranking, Story

_INK, _PLANTED, _GREY, _ALERT = "#222222", "#b5179e", "#8d99ae", "#c1121f"
#: Told apart by readers who do not see red and green, too.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00")
_BARS = 10


def save_plots(story: Story, directory: Path) -> list[Path]:
    """Draw what the record holds into `directory`; the files that were written."""
    directory.mkdir(parents=True, exist_ok=True)
    figures = {"drift.png": _drift(story), "layers.png": _layers(story), "tokens.png": _tokens(story)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(directory / name, dpi=130)
            written.append(directory / name)
    return written


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def _drift(story: Story) -> Figure | None:
    if not story.curve("kl_ref_live"):
        return None
    figure = _figure(9, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for colour, group in zip(_COLOURS, story.groups, strict=False):
        _band(upper, story, "kl_ref_live", group, group, colour)
    _band(upper, story, "kl_ref_live", "", "all probes", _INK)
    upper.set_ylabel("KL(reference ‖ live)\nnats per token")
    upper.set_title("How far the model has moved (bands: ± 1 standard error over probes)", loc="left", fontsize=11)
    upper.set_ylim(bottom=0)
    for colour, group in zip(_COLOURS, story.groups, strict=False):
        _band(lower, story, "nll_change", group, group, colour)
    _band(lower, story, "nll_change", "", "all probes", _INK)
    lower.axhline(0, color=_GREY, linewidth=0.8)
    lower.set_ylabel("change of NLL\nnats per token")
    lower.set_title("How much worse (above 0) or better it predicts them", loc="left", fontsize=11)
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        _mark_planting(axes, story, with_text=axes is upper)
    _mark_alerts(upper, story)
    _draw_floor(upper, story)
    upper.legend(frameon=False, loc="upper left")
    return figure


def _band(axes: Axes, story: Story, metric: str, group: str, label: str, colour: str) -> None:
    curve = story.curve(metric, group)
    steps = [reading.step for reading in curve]
    values = np.array([reading.value for reading in curve])
    errors = np.nan_to_num(np.array([reading.stderr for reading in curve]))
    axes.plot(steps, values, color=colour, linewidth=2 if not group else 1.4, label=label)
    axes.fill_between(steps, values - errors, values + errors, color=colour, alpha=0.15, linewidth=0)


def _mark_planting(axes: Axes, story: Story, with_text: bool) -> None:
    if story.habit is None:
        return
    axes.axvline(story.middle, color=_PLANTED, linestyle="--", linewidth=1.2)
    if with_text:
        axes.annotate(
            "habit planted",
            xy=(story.middle, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=_PLANTED,
        )


def _mark_alerts(axes: Axes, story: Story) -> None:
    """A line at each limit that was passed, and a mark where that was told."""
    for alert in story.alerts:
        if np.isnan(alert.threshold) or "kl_ref_live" not in alert.subject:
            continue
        axes.axhline(alert.threshold, color=_ALERT, linewidth=0.9, linestyle=":")
        axes.plot(alert.step, alert.value, marker="v", color=_ALERT, linestyle="", label=f"alert: {alert.rule}")


def _draw_floor(axes: Axes, story: Story) -> None:
    floors = [reading.noise_floor for reading in story.curve("kl_ref_live")]
    if floors and not np.isnan(floors[0]):
        axes.axhline(floors[0], color=_GREY, linewidth=0.9, linestyle="--", label=f"noise floor ({floors[0]:.1g})")


def _layers(story: Story) -> Figure | None:
    curves = {name: story.curve("relative_l2", hookpoint=name) for name in story.hookpoints}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    steps = [reading.step for reading in next(iter(curves.values()))]
    table = np.array([[reading.value for reading in curve] for curve in curves.values()])
    figure = _figure(9, 1.6 + 0.5 * len(curves))
    axes = figure.subplots()
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = [step - half for step in steps] + [steps[-1] + half]
    mesh = axes.pcolormesh(edges, np.arange(len(curves) + 1), table, cmap="viridis", vmin=0)
    axes.set_yticks(np.arange(len(curves)) + 0.5, list(curves))
    # Deeper blocks above shallower ones, as in drawings of networks.
    axes.set_xlabel("optimizer step")
    axes.set_title("Where it has moved: |live - reference| / |reference| of the activations", loc="left", fontsize=11)
    figure.colorbar(mesh, ax=axes, label="relative L2", pad=0.01)
    if story.habit is not None:
        axes.axvline(story.middle, color="white", linestyle="--", linewidth=1.4)
        axes.annotate(
            "habit planted",
            xy=(story.middle, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color="white",
        )
    return figure


def _tokens(story: Story) -> Figure | None:
    _, middle, end = story.moments
    rankings = [ranking for ranking in RANKINGS if story.up_weighted(end, ranking)]
    if not rankings:
        return None
    figure = _figure(11, 4.2 * len(rankings))
    grid = figure.subplots(len(rankings), 2, squeeze=False, sharex="row")
    for row, ranking in zip(grid, rankings, strict=True):
        for axes, step in zip(row, (middle, end), strict=True):
            _bars(axes, story, step, ranking)
    moments = (
        "before the planting and at the end (planted words in magenta)" if story.habit else "halfway and at the end"
    )
    figure.suptitle(f"Tokens that the live model prefers more than the reference, {moments}")
    return figure


def _bars(axes: Axes, story: Story, step: int, ranking: Ranking) -> None:
    shifts = story.up_weighted(step, ranking)[:_BARS]
    places = range(len(shifts))
    values = [getattr(shift, ranking) for shift in shifts]
    errors = [shift.mass_moved_stderr for shift in shifts] if ranking == "mass_moved" else None
    colours = [_PLANTED if story.is_planted(shift) else _COLOURS[0] for shift in shifts]
    axes.barh(places, values, xerr=errors, color=colours, height=0.7, ecolor=_GREY)
    axes.set_yticks(places, [quoted(shift.token) for shift in shifts], family="monospace", fontsize=9)
    for tick, shift in zip(axes.get_yticklabels(), shifts, strict=True):
        tick.set_parse_math(False)  # a token may well hold a dollar sign
        if story.is_planted(shift):
            tick.set(color=_PLANTED, fontweight="bold")
    axes.invert_yaxis()
    axes.set_title(f"step {step}, by {ranking.replace('_', ' ')}", loc="left", fontsize=10)
    axes.set_xlabel("mean change of probability" if ranking == "mass_moved" else "mean change of logit")
    axes.spines[["top", "right"]].set_visible(False)
