"""Pilots: healthy runs of one recipe, from which a rule learns what is usual and how often it would be wrong.

Some of them set the centre line, the others the threshold. Were they the same runs, the threshold would be too near,
for a line lies nearer to the runs it was drawn through than to any other.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsensor.errors import ConfigError, StorageError, listed, unknown
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, plain, read_json
from diffsensor.types import Reading, Scale

#: Two for a centre line with a scale, and three for a threshold.
FEWEST_PILOTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotRun:
    """One healthy run as it was recorded. `recipe` is what identifies the way of training."""

    name: str
    reference: str
    probes: str
    schedule: str
    recipe: Mapping[str, object] = field(default_factory=dict)
    readings: tuple[Reading, ...]

    @property
    def fingerprint(self) -> str:
        """Of its numbers: the same run is found again under another name."""
        content = [f"{reading.step} {reading.key} {reading.value!r}" for reading in self.readings]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What the pilots read under one log key: a row for each of them, a column for each step that all of them read."""

    metric: str
    group: str
    hookpoint: str
    scale: Scale
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilots:
    """Healthy runs of one recipe, read at the same steps. The first `num_centre` of them set the centre line.

    The others set the threshold. Which is which was decided by a hash of their numbers, so neither the order in which
    they were given nor what they look like has a say. `left_out` are steps that some pilots read and others did not.
    """

    reference: str
    probes: str
    schedule: str
    recipe: Mapping[str, object]
    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    num_centre: int
    left_out: tuple[int, ...]
    curves: Mapping[str, Curves]

    @property
    def num_calibration(self) -> int:
        """How many of them set the threshold."""
        return len(self.names) - self.num_centre

    @property
    def level(self) -> float:
        """The lowest run-level false-alarm probability that can be promised: 1/(num_calibration + 1)."""
        return 1 / (self.num_calibration + 1)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which all pilots read something."""
        return tuple(sorted({step for curves in self.curves.values() for step in curves.steps}))

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(sorted({curves.metric for curves in self.curves.values()}))

    def __str__(self) -> str:
        """What so many pilots allow, as a sentence."""
        sentence = (
            f"{len(self.names)} pilots: {self.num_centre} for the centre line, {self.num_calibration} for the "
            f"threshold: a healthy run alarms with probability at most 1/{self.num_calibration + 1} = "
            f"{100 * self.level:.2g} %"
        )
        if self.level <= 0.05:
            return f"{sentence}."
        return (
            f"{sentence}; a 5 % level needs {calibration_for(0.05)} for the threshold, which is {pilots_for(0.05)} "
            "pilots in all."
        )


def split(num_pilots: int) -> int:
    """How many of so many pilots set the centre line: half of a few, a third of many."""
    return min(num_pilots // 2, max(4, num_pilots // 3))


def calibration_for(level: float) -> int:
    """How many pilots must set the threshold for a run-level false-alarm probability of at most `level`."""
    return math.ceil(1 / level - 1e-9) - 1


def pilots_for(level: float) -> int:
    """How many pilots that are in all, with those for the centre line."""
    number = max(calibration_for(level), FEWEST_PILOTS)
    while number - split(number) < calibration_for(level):
        number += 1
    return number


def gather(runs: Sequence[PilotRun], metrics: Collection[str] = ()) -> Pilots:
    """The pilots of these runs, with some metrics or all that they read.

    Raises `ConfigError` where there are too few, where they are not of one recipe, or where two are the same run.
    """
    if len(runs) < FEWEST_PILOTS:
        raise ConfigError(
            f"Pilots given: {len(runs)}. At least {FEWEST_PILOTS} are needed (for a false-alarm level of 25 %), "
            f"and {pilots_for(0.05)} for one of 5 %: record more healthy runs of this recipe, each with its own seed."
        )
    _require_alike(runs)
    known = sorted({reading.metric for run in runs for reading in run.readings})
    for metric in metrics:
        if metric not in known:
            raise ConfigError("The pilots cannot be used. " + unknown("metric that they read", metric, known))
    prints = {run.name: run.fingerprint for run in runs}
    runs = sorted(runs, key=lambda run: prints[run.name])
    looks = Counter(step for run in runs for step in {reading.step for reading in run.readings})
    curves = _curves(runs, metrics or known)
    if not curves:
        steps = "; ".join(f"{run.name}: {_steps_told(run)}" for run in runs[:4])
        raise ConfigError(f"There is no step that all {len(runs)} pilots read. They read {steps}. Give whole runs.")
    return Pilots(
        reference=runs[0].reference,
        probes=runs[0].probes,
        schedule=runs[0].schedule,
        recipe=runs[0].recipe,
        names=tuple(run.name for run in runs),
        fingerprints=tuple(prints[run.name] for run in runs),
        num_centre=split(len(runs)),
        left_out=tuple(sorted(step for step, number in looks.items() if number < len(runs))),
        curves=curves,
    )


def _require_alike(runs: Sequence[PilotRun]) -> None:
    first = runs[0]
    of_print: dict[str, str] = {}
    for run in runs:
        for what in ("probes", "reference", "schedule", "recipe"):
            if differences := differing(what, getattr(run, what), getattr(first, what)):
                told = listed(f"{name} {one} there, {other} in {first.name}" for name, one, other in differences)
                raise ConfigError(
                    f"{run.name} is not a pilot of the same recipe as {first.name}: {told}. Pilots must be trained and "
                    "read alike in all but their seed and the order of their data: leave it out, or calibrate apart."
                )
        if not run.readings:
            raise ConfigError(f"{run.name} holds no readings. Leave it out, or let that run read something.")
        if (twin := of_print.get(run.fingerprint)) is not None:
            raise ConfigError(
                f"{run.name} and {twin} hold the same numbers: they are one run. Give each run once, and give each "
                "pilot its own seed."
            )
        of_print[run.fingerprint] = run.name


def differing(what: str, one: object, other: object) -> list[tuple[str, str, str]]:
    """In what two of the same kind differ: its name, and both as text. Of recipes the members that do."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            (f"{what} has {key} =", _told(one, key), _told(other, key))
            for key in dict.fromkeys([*one, *other])
            if _told(one, key) != _told(other, key)
        ]
    is_print = what in ("probes", "reference")
    short = (lambda text: text[:12]) if is_print else str
    return [(f"{what} is", short(str(one)), short(str(other)))] if one != other else []


def _told(recipe: Mapping[str, object], key: str) -> str:
    # As it comes back from a file, where a tuple is a list.
    return str(plain(recipe[key], key)) if key in recipe else "nothing"


def _steps_told(run: PilotRun) -> str:
    steps = sorted({reading.step for reading in run.readings})
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def _curves(runs: Sequence[PilotRun], metrics: Collection[str]) -> dict[str, Curves]:
    """By log key, at the steps where every pilot has a number; a key without such a step is left out."""
    first = {reading.key: reading for reading in runs[0].readings if reading.metric in metrics}
    tables = [
        {
            (reading.key, reading.step): reading.value
            for reading in run.readings
            if reading.metric in metrics and math.isfinite(reading.value)
        }
        for run in runs
    ]
    of_key: dict[str, list[int]] = {}
    for key, step in sorted(set(tables[0]).intersection(*tables[1:])):
        of_key.setdefault(key, []).append(step)
    return {
        key: Curves(
            metric=first[key].metric,
            group=first[key].group,
            hookpoint=first[key].hookpoint,
            scale=first[key].scale,
            steps=tuple(steps),
            values=tuple(tuple(table[key, step] for step in steps) for table in tables),
        )
        for key, steps in of_key.items()
    }


def write_pilots(path: str | os.PathLike[str], pilots: Pilots) -> None:
    """Write them to a file, as a whole or not at all."""
    content = {
        "reference": pilots.reference,
        "probes": pilots.probes,
        "schedule": pilots.schedule,
        "recipe": pilots.recipe,
        "names": pilots.names,
        "fingerprints": pilots.fingerprints,
        "num_centre": pilots.num_centre,
        "left_out": pilots.left_out,
        "curves": {
            key: {
                "metric": curves.metric,
                "group": curves.group,
                "hookpoint": curves.hookpoint,
                "scale": curves.scale,
                "steps": curves.steps,
                "values": curves.values,
            }
            for key, curves in pilots.curves.items()
        },
    }
    path = Path(path)
    try:
        store(path, json_bytes("pilots", content))
    except OSError as error:
        raise StorageError(
            f"The pilots cannot be written to {path}: {error.strerror or error}. Give another place with -o."
        ) from error


def read_pilots(path: str | os.PathLike[str]) -> Pilots:
    """The pilots in a file that `diffsensor calibrate` wrote. Raises `CorruptFileError` where it has changed."""
    path = Path(path)
    if not path.is_file():
        raise StorageError(
            f"There are no pilots at {path}. Make them of the records of healthy runs: diffsensor calibrate RECORD... "
            f"-o {path}"
        )
    content: dict[str, Any] = read_json(path, "pilots")
    curves = {
        key: Curves(**{**one, "steps": tuple(one["steps"]), "values": tuple(map(tuple, one["values"]))})
        for key, one in content["curves"].items()
    }
    lists = {name: tuple(content[name]) for name in ("names", "fingerprints", "left_out")}
    members: dict[str, Any] = {**content, **lists, "curves": curves}
    return Pilots(**members)
