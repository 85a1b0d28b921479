"""One look at the live model: its batches are run, shared between the processes, and each sensor says what it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from diffsensor.capture import Capture, leave_no_trace
from diffsensor.probes import shares_of
from diffsensor.protocols import Fold, OutputHead, Sensor
from diffsensor.ranks import Ranks
from diffsensor.reference import Reference
from diffsensor.types import Findings, Plan


class Failure(NamedTuple):
    """Something that failed and is left out: `told` is what was raised, in words.

    `error` is the exception itself in the first process that it befell, which is to log it, and None in all others.
    """

    name: str
    told: str
    error: Exception | None


def look_at(
    capture: Capture,
    reference: Reference,
    sensors: Sequence[Sensor],
    plan: Plan,
    *,
    step: int,
    bank: str,
    ranks: Ranks,
) -> tuple[Findings, list[Failure]]:
    """What the sensors find, and what failed meanwhile: anywhere, so that no sensor tells of a part of the probes.

    Each process runs some of the batches and the heads' passes over them; what comes of it is added up in the first
    one, which alone finishes. The findings of the others are empty. Under `leave_no_trace`, to the end.
    """
    failed: dict[str, Exception] = {}

    def contained(name: str, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - contained is the promise; it is counted and logged
            failed.setdefault(name, error)
            return False
        return True

    found: list[Findings] = []
    with leave_no_trace(capture.root):
        folds: dict[str, Fold] | None = None
        try:
            for piece in capture.pieces(plan, shares_of(plan, ranks.size), ranks.rank):
                if folds is None:  # and not once more where all have failed: they would see a part only
                    folds = _opened(sensors, reference, capture.head(), contained)
                for name in list(folds):
                    if not contained(name, partial(folds[name].update, piece)):
                        del folds[name]
            if folds is None:  # fewer batches than processes, and none for this one
                folds = _opened(sensors, reference, capture.head(), contained)
        except Exception as error:  # noqa: BLE001 - whatever the model raises, the run goes on
            failed["forward pass"] = error
            folds = {}
        sums: dict[str, Mapping[str, Tensor]] = {}
        for name, fold in folds.items():
            contained(name, partial(_sum_into, sums, name, fold))
        failures, whole = _of_all(failed, sums, ranks, step)
        for name in sorted(whole, key=list(folds).index):
            added = ranks.summed(sums[name])
            if ranks.is_first:
                contained(name, partial(_finish_into, found, folds[name], step, added))
    known = {failure.name for failure in failures}
    if ranks.is_first:  # the others learn of it with the readings
        failures += [Failure(name, told_of(error), error) for name, error in failed.items() if name not in known]
    findings = Findings(
        step=step,
        readings=tuple(replace(reading, bank=bank) for each in found for reading in each.readings),
        token_shifts=tuple(replace(shift, bank=bank) for each in found for shift in each.token_shifts),
        tensors={name: tensor for each in found for name, tensor in each.tensors.items()},
        by_probe={name: values for each in found for name, values in each.by_probe.items()},
    )
    return findings, failures


def told_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _opened(
    sensors: Sequence[Sensor], reference: Reference, head: OutputHead, contained: Callable[[str, Any], bool]
) -> dict[str, Fold]:
    folds: dict[str, Fold] = {}
    for sensor in sensors:
        contained(sensor.name, partial(_open_into, folds, sensor, reference, head))
    return folds


def _of_all(
    failed: Mapping[str, Exception], sums: Mapping[str, Mapping[str, Tensor]], ranks: Ranks, step: int
) -> tuple[list[Failure], set[str]]:
    """What failed in any process, and the sensors that did in none: the one exchange by which every look ends."""
    mine = (
        {name: told_of(error) for name, error in failed.items()},
        {name: {key: (tuple(each.shape), str(each.dtype)) for key, each in of.items()} for name, of in sums.items()},
    )
    reports = ranks.each(f"the look at step {step}", mine)
    failures: dict[str, Failure] = {}
    for rank, (their_failed, _) in enumerate(reports):
        for name, told in their_failed.items():
            place = f" in process {rank} of {ranks.size}" if ranks.size > 1 else ""
            error = failed[name] if rank == ranks.rank else None
            failures.setdefault(name, Failure(name, told + place, error))
    everywhere = set.intersection(*(set(layouts) for _, layouts in reports))
    for name in sorted(everywhere):
        if any(layouts[name] != reports[0][1][name] for _, layouts in reports):
            told = "its sums have other names, shapes or dtypes in other processes"
            failures[name] = Failure(name, told, TypeError(told) if ranks.is_first else None)
    return list(failures.values()), everywhere - failures.keys()


def _open_into(folds: dict[str, Fold], sensor: Sensor, reference: Reference, head: OutputHead) -> None:
    folds[sensor.name] = sensor.open(reference, head)


def _sum_into(sums: dict[str, Mapping[str, Tensor]], name: str, fold: Fold) -> None:
    sums[name] = fold.sums()


def _finish_into(found: list[Findings], fold: Fold, step: int, sums: Mapping[str, Tensor]) -> None:
    found.append(fold.finish(step, sums))
