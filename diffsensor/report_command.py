"""`diffsensor report`: a page, data or pictures on the records of runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from diffsensor.errors import ConfigError
from diffsensor.report import describe, write_report


def report(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="The directories of runs: what a monitor wrote.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes. [default: report.html]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON; a page is written only where -o names one.")
    ] = False,
    png: Annotated[
        Path | None,
        typer.Option(metavar="PLACE", help="Draw pictures, too: one, where it ends in .png, else several in there."),
    ] = None,
) -> None:
    """Make one page of a run: verdict, drift, layers, tokens, alerts, cost, what was not seen, provenance.

    The page is one file that needs no network. Several records are laid over each other, and it says how alike they
    are: seeds of one recipe, or recipes. A run may be going on. Exit code 2: what was given is no record, was changed,
    or holds nothing yet; the sentence says which.

    Example: diffsensor report runs/1/drift -o report.html

    Example: diffsensor report runs/*/drift --json | jq '.comparison.pairs'
    """
    if output is not None and output.is_dir():
        raise ConfigError(f"-o was given {output}, which is a directory. Give a file: {output / 'report.html'}.")
    if as_json:
        print(json.dumps(describe(records), indent=2, allow_nan=False))
    page = output if output is not None or as_json else Path("report.html")
    if page is not None:
        write_report(records, page)
    written = [page] if page is not None else []
    if png is not None:
        written += _pictures(records, png)
    for file in written:
        typer.echo(file, err=as_json)


def _pictures(records: list[Path], place: Path) -> list[Path]:
    try:
        # Loaded now, not for --help: it takes seconds.
        from diffsensor.report.picture import write_pictures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError("--png needs matplotlib, which is not installed: pip install 'diffsensor[report]'") from error
    return write_pictures(records, place)
