"""`diffsensor cache`: the references that are kept, whether they are whole, and how to be rid of them."""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffsensor.errors import ConfigError

FINE, PROBLEMS = 0, 1

app = typer.Typer(
    no_args_is_help=True,
    help="Look after the references that are kept.",
    epilog="Example: diffsensor cache ls",
)

Place = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="DIR", help="Where they are; the user's cache where none is given."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One reference on disk. `age_days` is since a run last opened it."""

    path: str
    fingerprint: str
    model: str
    probes: str
    num_bytes: int
    age_days: float
    problem: str = ""


@app.callback()
def cache() -> None:
    """Look after the references that are kept."""


@app.command(name="ls", epilog="Example: diffsensor cache ls --json")
def ls(cache_dir: Place = None, as_json: AsJson = False) -> None:
    """List the references that are kept, the newest first. Nothing of them is verified."""
    _show(_kept(cache_dir, verify=False), _place(cache_dir), as_json=as_json)


@app.command(epilog="Example: diffsensor cache verify")
def verify(cache_dir: Place = None, as_json: AsJson = False) -> None:
    """Read every byte of every reference and compare it with its checksum.

    Exit code 0: all are whole. 1: some are not; a run that needs one computes it anew.
    """
    kept = _kept(cache_dir, verify=True)
    _show(kept, _place(cache_dir), as_json=as_json)
    sys.exit(PROBLEMS if any(each.problem for each in kept) else FINE)


@app.command(epilog="Example: diffsensor cache prune --older-than 30")
def prune(
    cache_dir: Place = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0.0, help="Those that nobody has used for so long.")
    ] = None,
    broken: Annotated[bool, typer.Option("--broken", help="Those that are not whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove references that are old, or not whole.

    A run that goes on needs the very reference that it began with: remove none of a run that is not over.
    """
    if older_than is None and not broken:
        raise ConfigError("Nothing was said of which to remove. Give --older-than DAYS, --broken, or both.")
    gone = [
        each
        for each in _kept(cache_dir, verify=broken)
        if (broken and each.problem) or (older_than is not None and each.age_days > older_than)
    ]
    if not dry_run:
        for each in gone:
            shutil.rmtree(each.path)
    if not as_json:
        told = "would be removed" if dry_run else "removed"
        number = f"{len(gone)} reference{'' if len(gone) == 1 else 's'}"
        print(f"{number} {told}, {_size(sum(each.num_bytes for each in gone))}.")
    _show(gone, _place(cache_dir), as_json=as_json)


def _place(cache_dir: Path | None) -> Path:
    from diffsensor.reference import cache_directory

    return cache_dir or cache_directory() / "references"


def _kept(cache_dir: Path | None, *, verify: bool) -> list[Kept]:
    from diffsensor.reference import directories, meta_of, verified

    found = []
    for path in directories(_place(cache_dir)):
        meta, problem = meta_of(path)
        if verify and not problem:
            problem = verified(path)
        files = [each for each in path.iterdir() if each.is_file()]
        used = max((each.stat().st_mtime for each in files), default=path.stat().st_mtime)
        found.append(
            Kept(
                path=str(path),
                fingerprint=str(meta.get("fingerprint", path.name)),
                model=str(meta.get("model", "?")),
                probes=str(meta.get("probes", "?")),
                num_bytes=sum(each.stat().st_size for each in files),
                age_days=max(0.0, (time.time() - used) / 86400),
                problem=problem,
            )
        )
    return sorted(found, key=lambda each: each.age_days)


def _show(kept: list[Kept], place: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"directory": str(place), "references": [asdict(each) for each in kept]}, indent=2))
        return
    if not kept:
        print(f"No references are in {place}.")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("reference", "model", "probes", "size", "days", "problem"):
        table.add_column(name, justify="right" if name in ("size", "days") else "left", overflow="fold")
    for each in kept:
        table.add_row(
            *(each.fingerprint[:12], Text(each.model), each.probes[:12], _size(each.num_bytes), f"{each.age_days:.1f}"),
            Text(each.problem, style="red"),
        )
    console = Console()
    console.print(table)
    console.print(Text(f"{len(kept)} in {place}, {_size(sum(each.num_bytes for each in kept))}."))


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes //= 1000
    return f"{num_bytes} GB"
