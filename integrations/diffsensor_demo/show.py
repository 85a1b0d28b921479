"""What the terminal shows: how far the model moved, and which tokens it has come to prefer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from diffsensor import Reading, TokenShift
from diffsensor_demo.story import RANKINGS, Ranking, Story

_SHOWN = 8
_TITLES: dict[Ranking, str] = {
    "mass_moved": "Tokens that gained most probability",
    "logit_difference": "Tokens whose logits rose most",
}
#: The metrics of the summary, and whether their groups are shown too.
_METRICS = {"kl_ref_live": True, "nll_change": True, "entropy_change": False, "top1_flip": False}


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}", style="cyan"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def show_summary(console: Console, story: Story) -> None:
    """Three moments side by side, in 80 columns."""
    start, middle, end = story.moments
    table = Table(
        title="How far the model has moved from its reference (± standard error)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("reading", min_width=14, max_width=20)
    table.add_column("of", min_width=14, overflow="fold")
    before = "before planting" if story.habit else "halfway"
    for heading in (f"start\nstep {start}", f"{before}\nstep {middle}", f"end\nstep {end}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, has_groups in _METRICS.items():
        _add_section(table, story, metric, [("", group) for group in ["", *(story.groups if has_groups else [])]])
    _add_section(table, story, "relative_l2", [(hookpoint, "") for hookpoint in story.hookpoints])
    console.print(table)


def _add_section(table: Table, story: Story, metric: str, places: list[tuple[str, str]]) -> None:
    """A row for each hookpoint or group; the metric stands beside the first, its unit beside the second."""
    rows = [
        (hookpoint or group or "all probes", [story.at(step, metric, group, hookpoint) for step in story.moments])
        for hookpoint, group in places
    ]
    units = [reading.unit for _, readings in rows for reading in readings if reading]
    if not units:
        return
    unit = f"({units[0]})"
    headings = [metric, unit, *[""] * len(rows)] if len(rows) > 1 else [f"{metric}\n{unit}"]
    for (place, readings), heading in zip(rows, headings, strict=False):
        table.add_row(Text(heading), Text(place), *map(_value, readings))
    table.add_section()


def _value(reading: Reading | None) -> str:
    if reading is None:
        return ""
    if reading.value == 0:
        # At the start the model is its reference: exactly 0, which is worth seeing as such.
        return "0"
    is_small = abs(reading.value) < 0.01 and not reading.stderr >= 0.01
    value = f"{reading.value:.1e}" if is_small else f"{reading.value:.3f}"
    stderr = f"{reading.stderr:.0e}" if is_small else f"{reading.stderr:.3f}"
    return value if math.isnan(reading.stderr) else f"{value} ± {stderr}"


def show_alerts(console: Console, story: Story, rule: str) -> None:
    """What was told while the model was trained, by the rule of the demonstration or another one."""
    if not story.alerts:
        console.print(Text(f"No alert: the rule {rule!r} was not broken."))
    for alert in story.alerts:
        console.print(Text(f"Alert at step {alert.step} ({alert.severity}): {alert.message}", style="bold"))
    console.print()


def show_tokens(console: Console, story: Story) -> None:
    """Both rankings of the token table at the end, with each token's place before the planting."""
    _, middle, end = story.moments
    for ranking in RANKINGS:
        shifts = story.up_weighted(end, ranking)
        if not shifts:
            continue
        places = {shift.token_id: shift.rank + 1 for shift in story.up_weighted(middle, ranking)}
        table = Table(
            title=f"{_TITLES[ranking]} by step {end} (was: rank at step {middle})",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("#", justify="right")
        table.add_column("was", justify="right")
        table.add_column("token", no_wrap=True)
        table.add_column("probability", justify="right", no_wrap=True)
        table.add_column("logit", justify="right", no_wrap=True)
        table.add_column("for example after", no_wrap=True)
        for shift in shifts[:_SHOWN]:
            place = places.get(shift.token_id)
            table.add_row(
                str(shift.rank + 1),
                str(place) if place else "new",
                Text(quoted(shift.token)),
                f"{shift.mass_moved:+.4f} ± {shift.mass_moved_stderr:.4f}",
                f"{shift.logit_difference:+.2f}",
                Text(context_of(shift)),
                style="bold magenta" if story.is_planted(shift) else None,
            )
        console.print(table)


def show_verdict(console: Console, story: Story) -> None:
    """Whether the token table names what was planted, and that it did not before."""
    if story.habit is None:
        console.print(
            "Nothing was planted: this is your own text, and what the tables name is what the model learnt from it."
        )
        return
    _, middle, end = story.moments
    console.print(f"Planted from step {middle} on, in {story.habit.share:.0%} of the sequences: {story.habit}.")
    for ranking in RANKINGS:
        before, after = story.planted_ranks(middle, ranking), story.planted_ranks(end, ranking)
        console.print(f"  {_TITLES[ranking]}:")
        for word in story.habit.words:
            console.print(f"    {word!r} was {_place(before[word])}, and is {_place(after[word])}.")


def _place(rank: int | None) -> str:
    return f"number {rank}" if rank else "not in the table"


def show_blindness(console: Console, story: Story) -> None:
    groups = ", ".join(repr(group) for group in story.groups)
    texts = f"a few short, fixed texts ({groups})" if groups else "a few short, fixed texts"
    if story.habit is None:
        reason = "give texts that contain what you fear with --probes."
    else:
        marks = " and ".join(repr(mark) for mark in story.habit.after)
        reason = f"this one shows because {marks} occur in them."
    console.print(
        f"What these probes cannot see: they are {texts}. A habit with a trigger that none of them contains leaves "
        f"every number above unchanged; {reason}"
    )


def show_places(console: Console, record: Path, summary: Path, plots: list[Path]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("Record", Text(str(record)))
    table.add_row("Summary", Text(str(summary)))
    for number, plot in enumerate(plots):
        table.add_row("" if number else "Plots", Text(str(plot)))
    console.print(table)


def quoted(token: str) -> str:
    """A token so that its spaces and line ends show: ' quokka', '\\n'."""
    return repr(token)


def context_of(shift: TokenShift, width: int = 24) -> str:
    """The end of the context, on one line."""
    context = " ".join(shift.context.split())
    return context if len(context) <= width else "…" + context[-width:]
