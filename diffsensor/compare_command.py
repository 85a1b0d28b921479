"""`diffsensor compare`: how alike several runs have drifted."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffsensor.errors import ConfigError


def compare(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD RECORD...", help="The directories of two runs or more.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say how alike runs have drifted: in which direction, in which groups, by which tokens.

    direction: the mean cosine, over hookpoints, of the mean differences of activations. groups: Pearson's r of the
    groups' drift. tokens: the share of tokens that both lists of the most gained have, and their rank-biased overlap.
    The formulas are in --json and in the page of `diffsensor report`. Exit code 2: something is no record.

    Example: diffsensor compare runs/seed-1/drift runs/seed-2/drift
    """
    if len(records) < 2:
        raise ConfigError(
            f"One record was given, {records[0]}. Give two or more to compare; `diffsensor ask` is for one."
        )
    # Loaded now, not for --help: it takes seconds.
    from diffsensor.report import describe

    found = describe(records)
    comparison: dict[str, Any] = found["comparison"]
    if as_json:
        content = {"records": [str(path) for path in records], **comparison}
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    console = Console()
    names = [chr(ord("A") + place) if place < 26 else str(place) for place in range(len(records))]
    for name, path in zip(names, records, strict=True):
        console.print(Text(f"{name}  {path}"))
    for sentence in comparison["sentences"]:
        console.print(Text(sentence))
    table = Table(box=None, pad_edge=False)
    for title in ("runs", "step", "direction", "groups", "tokens", "rank-biased", "not compared"):
        table.add_column(title, overflow="fold")
    for pair in comparison["pairs"]:
        directions = pair["directions"]
        means = directions["means"] if directions is not None else []
        table.add_row(
            f"{names[pair['one']]}-{names[pair['other']]}",
            str(pair["step"]) if pair["step"] is not None else "-",
            _number(means[-1] if means else None),
            _number(pair["group_correlation"]),
            _number(pair["token_overlap"]),
            _number(pair["token_rank_biased_overlap"]),
            Text("; ".join(pair["not_compared"])),
        )
    console.print(table)
    for what, values in comparison["differences"].items():
        console.print(Text(f"different: {what}: {', '.join(map(str, values))}"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
