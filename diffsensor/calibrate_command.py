"""`diffsensor calibrate`: make pilots of the records of healthy runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffsensor.rules.pilots import PilotRun, Pilots


def calibrate(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="The directories of healthy runs of one recipe.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the pilots go: pilots.json.")],
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME", help="Keep only this one; may be given again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Learn from healthy runs what is usual: pilots for the rule Envelope.

    Give the records of runs that were trained alike (same recipe, probes, reference and schedule, each with its own
    seed) and that you know to be healthy. Exit code 2: they cannot be used together; the sentence says why.

    Example: diffsensor calibrate runs/1/drift runs/2/drift ... -o pilots.json
    """
    # Loaded now, not for --help: they take seconds.
    from diffsensor.rules.pilots import gather, write_pilots

    pilots = gather([_pilot_run(path) for path in records], metrics or ())
    write_pilots(output, pilots)
    if as_json:
        print(json.dumps(_summary(pilots, output), indent=2, ensure_ascii=False))
    else:
        _show(pilots, output)


def _pilot_run(path: Path) -> "PilotRun":
    from diffsensor.record import read_record
    from diffsensor.rules.pilots import PilotRun

    record = read_record(path)
    manifest = record.manifest
    recipe = manifest.get("recipe", {})
    assert isinstance(recipe, dict)
    return PilotRun(
        name=str(path),
        reference=str(manifest["reference"]),
        probes=str(manifest["probes"]),
        schedule=str(manifest.get("schedule", "")),
        recipe=recipe,
        readings=record.readings,
    )


def _summary(pilots: "Pilots", output: Path) -> dict[str, object]:
    from diffsensor.rules.pilots import pilots_for

    return {
        "file": str(output),
        "pilots": list(pilots.names),
        "num_centre": pilots.num_centre,
        "num_calibration": pilots.num_calibration,
        "level": pilots.level,
        "pilots_for_5_percent": pilots_for(0.05),
        "steps": list(pilots.steps),
        "left_out": list(pilots.left_out),
        "metrics": list(pilots.metrics),
        "recipe": dict(pilots.recipe),
    }


def _show(pilots: "Pilots", output: Path) -> None:
    steps = pilots.steps
    print(pilots)
    print(
        f"{output} has {_count(len(pilots.metrics), 'metric')} at {_count(len(steps), 'step')}, {_span(steps)}: "
        f"{', '.join(pilots.metrics)}."
    )
    if pilots.left_out:
        print(
            f"Left out: {_count(len(pilots.left_out), 'step')} ({_span(pilots.left_out)}) that not all pilots read; no "
            "run is judged there."
        )
    if not pilots.recipe:
        print(
            "These records name no recipe, so nothing holds a run of another one against them. Tell the monitor what "
            "identifies the way of training: recipe={'learning_rate': 1e-4, 'data': ...}."
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(steps: tuple[int, ...]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
