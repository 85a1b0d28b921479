"""`diffsensor probes`: the command line for files of probes."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffsensor.probes.check import ProbeCheck

FINE, PROBLEMS = 0, 1

app = typer.Typer(
    no_args_is_help=True,
    help="Look at files of probes.",
    epilog="Example: diffsensor probes check my-probes.jsonl --tokenizer ./my-model",
)


@app.callback()
def probes() -> None:
    """Look at files of probes."""


@app.command(epilog="Example: diffsensor probes check my-probes.jsonl --tokenizer ./my-model --max-length 64 --json")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="One JSON record a line, as for ProbeSet.from_jsonl.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="The model's tokenizer: a Hugging Face directory, or a name on the hub.")
    ],
    max_length: Annotated[int, typer.Option(metavar="N", min=2, help="Longer probes are cut to so many tokens.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is in a file of probes, what is wrong with it, and how exact a reading with it will be.

    Exit code 0: nothing is wrong. 1: problems were found. 2: the file or the tokenizer cannot be read.
    """
    # Loaded now, not for --help: they take seconds.
    from diffsensor.loading import load_tokenizer
    from diffsensor.probes.check import check_file

    found = check_file(file, load_tokenizer(tokenizer), max_length)
    if as_json:
        print(json.dumps(_plain(dataclasses.asdict(found)), indent=2, ensure_ascii=False))
    else:
        _show(found, file)
    sys.exit(PROBLEMS if found.problems else FINE)


def _plain(value: Any) -> Any:
    """The same with null in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(found: "ProbeCheck", file: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from diffsensor.probes.check import in_words

    console = Console()
    table = Table(title=Text(str(file)))
    for name in ("group", "probes", "counted positions", "standard error of the mean KL"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group in found.groups:
        # A name comes from the file, and square brackets in it are no markup.
        table.add_row(Text(group.group or "(none)"), *_cells(group.num_probes, group.num_positions, group.expected))
    table.add_section()
    table.add_row("all", *_cells(found.num_probes, found.num_positions, found.expected))
    console.print(table)
    tokens = found.tokens
    sizes = (
        f"Tokens of a probe: {tokens['min']:g} to {tokens['max']:g}, median {tokens['median']:g}; "
        f"{tokens['sum']:g} in all. {len(found.truncated)} cut to {found.max_length}."
    )
    lines = [
        sizes,
        in_words(found),
        *(f"Problem: {problem}" for problem in found.problems),
        *(f"Advice: {advice}" for advice in found.advice),
    ]
    if not found.problems:
        lines.append("No problems found.")
    for line in lines:
        style = "bold red" if line.startswith("Problem") else ""
        console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


def _cells(num_probes: int, num_positions: int, expected: Any) -> tuple[str, str, str]:
    from diffsensor.probes.check import percent

    return str(num_probes), str(num_positions), percent(expected)
