"""`diffsensor scan`, `gate` and `watch`: saved checkpoints read against a reference."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from diffsensor.errors import ConfigError

if TYPE_CHECKING:
    from diffsensor.scan import Scanned

#: What a command ends with, by the worst verdict there was.
EXITS = {"pass": 0, "fail": 1, "unknown": 2}
_COLOURS = {"pass": "green", "fail": "red", "unknown": "yellow"}

Reference = Annotated[
    str, typer.Argument(metavar="REFERENCE", help="The model to compare with: a directory or a name.")
]
Probes = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A .jsonl file, a saved probe set, or 'default'. Or name them in the policy."),
]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="DIR", help="The tokenizer; that of the reference where none is given.")
]
Policy = Annotated[Path | None, typer.Option(metavar="FILE", help="A policy file (drift.yaml): probes, rules, gate.")]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="METRIC[@GROUP]=NUMBER",
        help="A checkpoint fails above it: kl_ref_live=0.3, kl_ref_live@worst=0.5. May be given again.",
    ),
]
Sensors = Annotated[str | None, typer.Option(metavar="CLASS", help="light (default) or full.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where models are put: cpu, cuda, cuda:1.")]
Dtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; as saved by default.")]
ModulePath = Annotated[
    str | None, typer.Option(metavar="NAME", help="What names in a mere state dict (.ckpt, .bin) begin with.")
]
Cache = Annotated[Path | None, typer.Option("--cache-dir", metavar="DIR", help="Where references are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def scan(
    reference: Reference,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="Directories or files; a directory of them stands for all of them."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RECORD", help="Where the record goes, or goes on.")],
    probes: Probes = None,
    tokenizer: Tokenizer = None,
    policy: Policy = None,
    limits: Limits = None,
    sensors: Sensors = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    module_path: ModulePath = None,
    cache_dir: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Read saved checkpoints against a reference, in the order of their steps, into a record.

    Directories of save_pretrained, adapters of PEFT (on the reference), and state dicts (.ckpt, .bin, .safetensors, of
    the reference's architecture). One is in memory at a time; what is in the record already is not read again. A pair
    with no training between, such as an edit, a merge or a quantisation, is a scan of one.

    Exit code 0: all pass, or there is no gate. 1: one fails. 2: one could not be told, or something was refused.

    Example: diffsensor scan ./base runs/1/checkpoint-* --probes probes.jsonl --limit kl_ref_live=0.3 --out scan
    """
    _quiet()
    arguments = arguments_of(reference, probes, tokenizer, policy, limits, cache_dir, sensors)
    from diffsensor.checkpoints import checkpoints_at
    from diffsensor.scan import Scan

    found = checkpoints_at(checkpoints)
    console = Console(stderr=True)
    scanned: list[Scanned] = []
    with _progress(console) as progress:
        task = progress.add_task("the reference", total=len(found))
        reader = Scan(reference, arguments, record=out, device=device, dtype=dtype, module_path=module_path)
        try:
            for checkpoint in found:
                progress.update(task, description=checkpoint.path.name)
                scanned.append(reader.read(checkpoint))
                progress.advance(task)
        finally:
            reader.close()
    _tell(scanned, as_json=as_json, record=out)
    sys.exit(_exit_of(scanned))


def gate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory or a file.")],
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The model to compare with: a directory or a name.")],
    probes: Probes = None,
    tokenizer: Tokenizer = None,
    policy: Policy = None,
    limits: Limits = None,
    sensors: Sensors = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    module_path: ModulePath = None,
    cache_dir: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a checkpoint may be released: with the reading that decided, its error, and the limit.

    Exit code 0: it passes. 1: it fails. 2: that could not be told, or something was refused.

    Example: diffsensor gate ./tuned --reference ./base --probes probes.jsonl --limit kl_ref_live=0.3
    """
    _quiet()
    arguments = arguments_of(reference, probes, tokenizer, policy, limits, cache_dir, sensors)
    if "gate" not in arguments:
        raise ConfigError(
            "There is nothing that the checkpoint must meet. Give a limit, such as --limit kl_ref_live=0.3, or a "
            "policy with a gate."
        )
    from diffsensor.checkpoints import checkpoints_at
    from diffsensor.scan import Scan

    (found,) = _one(checkpoints_at([checkpoint]), checkpoint)
    reader = Scan(reference, arguments, device=device, dtype=dtype, module_path=module_path)
    try:
        scanned = [reader.read(found)]
    finally:
        reader.close()
    _tell(scanned, as_json=as_json, record=None)
    sys.exit(_exit_of(scanned))


def arguments_of(
    reference: str,
    probes: str | None,
    tokenizer: str | None,
    policy: Path | None,
    limits: Sequence[str] | None,
    cache_dir: Path | None,
    sensors: str | None,
) -> dict[str, Any]:
    """What a monitor is given: by a policy, and by options, which take the place of what the policy says."""
    from diffsensor.gate import Gate
    from diffsensor.loading import load_tokenizer
    from diffsensor.probes import ProbeSet

    if _is_path(reference) and not Path(reference).is_dir():
        raise ConfigError(
            f"There is no directory {reference!r}. Give that of the reference model, or its name on a hub."
        )
    tokenize: Any = None
    if policy is None or tokenizer is not None or probes is not None:
        tokenize = load_tokenizer(tokenizer or reference)
    arguments: dict[str, Any] = {}
    if policy is not None:
        from diffsensor.policy import read_policy

        arguments = dict(read_policy(policy, tokenize or load_tokenizer(reference)).arguments)
        arguments.pop("budget", None)  # there is no run that could be steered
        given = arguments.get("rules", [])
        arguments["rules"] = [getattr(rule, "rule", rule) for rule in given]
        if any(rule is not bare for rule, bare in zip(given, arguments["rules"], strict=True)):
            typer.echo("There is no run to act on: rules alert, and what the policy would do is left out.", err=True)
    if probes is not None:
        arguments["probes"] = ProbeSet.read(probes, tokenize)
    if "probes" not in arguments:
        raise ConfigError("No probes were given. Give --probes FILE, --probes default, or a policy that names them.")
    if sensors is not None:
        arguments["sensors"] = sensors
    if limits:  # beside what a policy asks for, never in its place
        asked = arguments["gate"].criteria if arguments.get("gate") is not None else ()
        arguments["gate"] = Gate(*asked, *map(_limit, limits))
    if cache_dir is not None:
        arguments["cache_dir"] = cache_dir
    return arguments


def _is_path(name: str) -> bool:
    """A name on a hub has one slash at most, and does not begin with one or with a dot."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _limit(text: str) -> Any:
    from diffsensor.rules import Limit

    subject, _, number = text.partition("=")
    metric, _, group = subject.partition("@")
    try:
        return Limit(metric, above=float(number), group=group)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--limit {text!r} was given, expected METRIC=NUMBER or METRIC@GROUP=NUMBER, such as kl_ref_live=0.3."
        ) from error


def _one(found: Sequence[Any], given: Path) -> Sequence[Any]:
    if len(found) != 1:
        raise ConfigError(f"{str(given)!r} holds {len(found)} checkpoints. Name one of them: {found[-1].path}.")
    return found


def _quiet() -> None:
    """Whatever libraries have to show while they load: a bar for each file is not for someone who gave a command."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _exit_of(scanned: "Sequence[Scanned]") -> int:
    return _exit_code([each.verdict.outcome for each in scanned if each.verdict is not None])


def _exit_code(outcomes: Sequence[str]) -> int:
    return 1 if "fail" in outcomes else 2 if "unknown" in outcomes else 0


def _tell(scanned: "Sequence[Scanned]", *, as_json: bool, record: Path | None) -> None:
    from diffsensor.scan import as_plain

    if as_json:
        content = {
            "record": None if record is None else str(record),
            "checkpoints": [as_plain(each) for each in scanned],
        }
        print(json.dumps(_without_nan(content), indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("step", "checkpoint", "KL(ref||live)", "worst group", "verdict"):
        table.add_column(name, justify="right" if name == "step" else "left", overflow="fold")
    for each in scanned:
        table.add_row(
            str(each.checkpoint.step),
            Text(each.checkpoint.path.name),
            _reading(each, ""),
            _reading(each, "worst"),
            _verdict(each),
        )
    console = Console()
    console.print(table)
    for each in scanned:
        if each.verdict is not None and (each.verdict.outcome != "pass" or len(scanned) == 1):
            console.print(Text(f"step {each.checkpoint.step}: {each.verdict.reason}"))
    if record is not None:
        console.print(Text(f"The record is in {record}: diffsensor report {record} -o report.html"))


def _reading(scanned: "Scanned", group: str) -> Text:
    found = next((each for each in scanned.readings if each.metric == "kl_ref_live" and each.group == group), None)
    if found is None:
        return Text("-")
    named = f"  {found.note.removeprefix('group ')}" if group else ""
    return Text(
        f"{found.value:.4g} ± {found.stderr:.2g}{named}" if found.is_measurable else f"0 within rounding{named}"
    )


def _verdict(scanned: "Scanned") -> Text:
    if scanned.verdict is None:
        return Text("-")
    return Text(scanned.verdict.outcome, style=_COLOURS[scanned.verdict.outcome])


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the run saves its checkpoints.")],
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The model to compare with: a directory or a name.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RECORD", help="Where the record goes, or goes on.")],
    probes: Probes = None,
    tokenizer: Tokenizer = None,
    policy: Policy = None,
    limits: Limits = None,
    sensors: Sensors = None,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="From one look at DIR to the next.")] = 5.0,
    idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End when nothing new has come for so long; 0: at once.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    module_path: ModulePath = None,
    cache_dir: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each checkpoint.")] = False,
) -> None:
    """Read each new checkpoint of a run as it appears, at no cost to the run, and write its verdict beside it.

    A checkpoint is read once it is complete. What was read is in the record: killed and begun again, the watch goes on
    where it was. Runs until Ctrl-C, or until nothing new has come for --idle seconds.

    Exit code as of scan: 0 all passed, 1 one failed, 2 one could not be told.

    Example: diffsensor watch runs/1 --reference ./base --probes probes.jsonl --limit kl_ref_live=0.3 --out runs/1/drift
    """
    _quiet()
    arguments = arguments_of(reference, probes, tokenizer, policy, limits, cache_dir, sensors)
    if not directory.is_dir():
        raise ConfigError(f"{str(directory)!r} is no directory. Give the one in which the run saves its checkpoints.")
    from diffsensor.scan import Scan, as_plain
    from diffsensor.watch import Watch

    reader = Scan(reference, arguments, record=out, device=device, dtype=dtype, module_path=module_path)
    console = Console()
    watching = Watch(directory, reader, every=every)
    try:
        for each in watching.until_idle(idle):
            if as_json:
                print(json.dumps(_without_nan(as_plain(each)), ensure_ascii=False), flush=True)
            else:
                reason = each.verdict.reason if each.verdict is not None else ""
                parts = (
                    f"step {each.checkpoint.step}  KL ",
                    _reading(each, ""),
                    "  worst ",
                    _reading(each, "worst"),
                    "  ",
                )
                console.print(Text.assemble(*parts, _verdict(each), f"  {reason}"))
    finally:
        reader.close()
    outcomes = list(watching.outcomes.values())
    if not as_json:
        counted = ", ".join(f"{outcomes.count(each)} {each}" for each in EXITS if each in outcomes)
        console.print(Text(f"Verdicts in {directory}: {counted or 'none'}."))
    sys.exit(_exit_code(outcomes))
