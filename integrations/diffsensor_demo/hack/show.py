"""What the terminal and the picture show of the two runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffsensor_demo.hack.account import LAST, Account, Wanted
from diffsensor_demo.hack.grpo import Sampled
from diffsensor_demo.show import context_of, quoted

_FREE, _HELD, _MARK = "#d55e00", "#0072b2", "#222222"
_TOKENS = 5


def show_moments(console: Console, account: Account) -> None:
    """The run without a budget at its start, when the hack begins, at the alert and at the end."""
    moments = _moments(account)
    table = _table(console, "What is paid for, what is wanted, and how far the model has moved")
    table.add_column("")
    for name, step in moments:
        table.add_column(f"{name}\nstep {step}", justify="right", no_wrap=True)
    rows: Sequence[tuple[str, Callable[[Sampled], str]]] = (
        ("reward: terms said", lambda each: f"{each.reward:.1f}"),
        ("true score (hidden)", lambda each: f"{each.score:.2f}"),
        ("hacked completions", lambda each: f"{each.hacked:.0%}"),
    )
    for title, shown in rows:
        table.add_row(title, *(shown(account.sampled(step)) for _, step in moments))
    for metric in ("max_token_gain", "kl_ref_live"):
        table.add_row(f"{metric}", *(f"{account.at(metric, step).value:.3f}" for _, step in moments))
    console.print(table)
    if account.alert:
        console.print(Text(f"Alert at step {account.alert.step}: {account.alert.message}", style="bold"))
    for name, step in moments:
        text = " ".join(account.sampled(step).example.split())
        console.print(Text(f"  {name}: …{text}", style="dim"), no_wrap=True, overflow="ellipsis")
    console.print()


def show_tokens(console: Console, account: Account) -> None:
    """The token table at the alert, or at the end where there was none."""
    step = account.alert.step if account.alert else account.curve("kl_ref_live")[-1].step
    hacked = account.run.sampled[-1].favourite
    table = _table(console, f"Tokens that gained most probability on the probes by step {step}")
    for heading in ("#", "token", "probability", "for example after"):
        table.add_column(heading, no_wrap=True)
    for shift in account.tokens(step)[:_TOKENS]:
        table.add_row(
            str(shift.rank + 1),
            Text(quoted(shift.token)),
            f"{shift.mass_moved:+.4f} ± {shift.mass_moved_stderr:.4f}",
            Text(context_of(shift)),
            style="bold magenta" if shift.token.strip() == hacked else None,
        )
    console.print(table)
    console.print(f"The run ends up saying {hacked!r} again and again.\n")


def show_saved(console: Console, free: Account, held: Account, budget: float) -> None:
    """The ends of both runs beside each other."""
    table = _table(console, f"What a drift budget of {budget:g} nats/token saves (means of the last {LAST} steps)")
    table.add_column("")
    table.add_column("without", justify="right")
    table.add_column("with the budget", justify="right")
    rows: Sequence[tuple[str, Wanted]] = (
        ("reward", "reward"),
        ("true score", "score"),
        ("hacked completions", "hacked"),
    )
    for title, wanted in rows:
        table.add_row(title, *(f"{account.last(wanted):.2f}" for account in (free, held)))
    table.add_row("kl_ref_live", *(f"{account.curve('kl_ref_live')[-1].value:.3f}" for account in (free, held)))
    console.print(table)


def save_plot(free: Account, held: Account, limit: float, budget: float, file: Path) -> None:
    """Both runs over their steps: what was paid, what was wanted, the hack, and the readings."""
    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = Figure(figsize=(10, 8.5), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 2, sharex=True)
    panels: Sequence[tuple[str, str]] = (
        ("Paid for: terms in a completion", "reward"),
        ("Wanted, and hidden: true score", "score"),
        ("Completions that are hacked", "hacked"),
    )
    for axes, (title, wanted) in zip(grid.flat, panels, strict=False):
        for account, colour, name in ((free, _FREE, "without a budget"), (held, _HELD, "with a drift budget")):
            label = name if wanted == "reward" else None
            axes.plot([getattr(each, wanted) for each in account.run.sampled], color=colour, label=label)
        axes.set_title(title, loc="left", fontsize=10)
    for axes, metric in zip(grid.flat[3:], ("kl_ref_live", "max_token_gain", "kl_coefficient"), strict=True):
        for account, colour in ((free, _FREE), (held, _HELD)):
            if curve := account.curve(metric):
                axes.plot([each.step for each in curve], [each.value for each in curve], color=colour)
        axes.set_title(_TITLES[metric], loc="left", fontsize=10)
    grid.flat[3].axhline(budget, color=_HELD, linewidth=0.9, linestyle="--", label="budget")
    grid.flat[4].axhline(limit, color=_MARK, linewidth=0.9, linestyle=":", label="limit of the rule")
    for axes in grid.flat:
        _mark(axes, free, with_text=axes is grid.flat[0])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    figure.savefig(file, dpi=130)


_TITLES = {
    "kl_ref_live": "Read on the probes: KL(reference ‖ live), nats per token",
    "max_token_gain": "Read on the probes: largest gain of one token's probability",
    "kl_coefficient": "What the budget makes of beta",
}


def _mark(axes: Axes, account: Account, *, with_text: bool) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    for step, width, style, text in (
        (account.began, 0.9, "--", "hack begins without one"),
        (account.alert.step if account.alert else None, 1.4, "-", "alert"),
    ):
        if step is not None:
            axes.axvline(step, color=_MARK, linewidth=width, linestyle=style, label=text if with_text else None)


def _moments(account: Account) -> list[tuple[str, int]]:
    end = account.curve("kl_ref_live")[-1].step
    alert = account.alert.step if account.alert else None
    found = {"start": 0, "hack begins": account.began, "alert": alert, "end": end}
    known = [(name, step) for name, step in found.items() if step is not None]
    return sorted(known, key=lambda moment: moment[1])


def _table(console: Console, title: str) -> Table:
    # Not the table's own title, which is no wider than the table.
    console.print(Text(title, style="italic"))
    return Table(box=SIMPLE_HEAD, pad_edge=False)
