"""The demonstration from beginning to end: the model, a run that is hacked, the same run on a budget, the account."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from diffsensor import ConfigError, DriftBudget
from diffsensor.rules import Limit
from diffsensor_demo.command import new_directory
from diffsensor_demo.hack.account import Account
from diffsensor_demo.hack.goal import TERMS, reward
from diffsensor_demo.hack.grpo import Base, Sampled, Settings, base_of, train
from diffsensor_demo.hack.show import save_plot, show_moments, show_saved, show_tokens
from diffsensor_demo.model import built_in_model
from diffsensor_demo.pretrain import Recipe
from diffsensor_demo.quiet import quiet
from diffsensor_demo.show import progress_bar

#: The largest gain of one token at one position that was read in ten runs with a reward that cannot be hacked (see
#: benchmarks/bench_hack.py): one more such run passes it with a probability of at most 1/11.
LIMIT = 0.63
#: Nats per token: half of how far the model has moved when the hack begins.
BUDGET = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be shown."""

    out: Path
    settings: Settings = field(default_factory=Settings)
    recipe: Recipe = field(default_factory=Recipe)
    num_probes: int = 12


def hack(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where records and plot go. By default diffsensor-demo/hack-<number>."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one is another run.")] = 0,
) -> None:
    """Watch a GRPO run hack its reward, see it in the drift readings, and hold it with a drift budget.

    A small model learns from the Python manual. That takes a minute or two, once;
    then it is kept in the cache directory. TRL's GRPOTrainer trains it to mention
    technical terms, with a reward that counts each mention: it finds out that one
    term, said again and again, pays best. Then the same run with a drift budget.

    All runs on the CPU, in two minutes after the first time.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"The demo was given --seed {seed}. Expected a whole number from 0 to {2**32 - 1}.")
    out = new_directory(out, "hack")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"The directory {str(out)!r} cannot be written to: {problem.strerror}. Expected a place with a few MB "
            "free. Give one with --out."
        ) from problem
    show_hack(Request(out=out, settings=Settings(seed=seed)))


def show_hack(request: Request, console: Console | None = None) -> tuple[Account, Account]:
    """Do it, show it in the terminal, and leave both records and the plot in `request.out`."""
    console = console or Console()
    with quiet():
        base = base_of(built_in_model(request.recipe, console), request.num_probes)
    settings = request.settings
    console.print(
        f"GRPO for {settings.steps} steps. The reward counts how often a completion says {', '.join(TERMS[:3])}, … "
        f"What is wanted are different terms.\nThe drift is read on fixed probes every {settings.every} steps, and "
        f"a rule alerts where some token has gained {LIMIT:.0%} of probability somewhere."
    )
    free = _watched(base, request, console, "without")
    held = _watched(base, request, console, "with", DriftBudget(BUDGET))
    plot = request.out / "hack.png"
    save_plot(free, held, LIMIT, BUDGET, plot)
    console.print()
    show_moments(console, free)
    show_tokens(console, free)
    show_saved(console, free, held, BUDGET)
    console.print(Text(f"Records and plot: {request.out}"))
    return free, held


def _watched(base: Base, request: Request, console: Console, name: str, budget: DriftBudget | None = None) -> Account:
    """One run, with a bar in the terminal."""
    with progress_bar(console) as bar:
        task = bar.add_task(f"GRPO {name} a drift budget", total=request.settings.steps, state="")

        def show(sampled: Sampled) -> None:
            state = f"reward {sampled.reward:4.1f}  hacked {sampled.hacked:4.0%}"
            bar.update(task, completed=sampled.step + 1, state=state)

        rules = [Limit("max_token_gain", above=LIMIT)]
        run = train(
            *(base, request.settings, reward, request.out / name),
            budget=budget, rules=rules, progress=show,
        )  # fmt: skip
    return Account(run=run)
