"""What DriftMonitor is given, checked and made into what the monitor takes."""

import difflib
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from diffsensor import ProbeSet, Schedule, every
from diffsensor.control import Penalty


def penalty_of(penalty: Any, budget: object) -> Penalty | None:
    if penalty is None:
        if budget is not None:
            raise MisconfigurationException(
                "DriftMonitor was given a budget and no penalty, whose coefficient it moves. Give it the one that "
                "training_step adds to its loss: penalty=KLPenalty(...)."
            )
        return None
    if not isinstance(penalty, Penalty) or not isinstance(penalty.coefficient, Real):
        raise MisconfigurationException(
            f"DriftMonitor was given penalty={penalty!r}, which has no number `coefficient` that could be moved. Give "
            "the object that training_step calls, such as a KLPenalty."
        )
    return penalty


def require_one_process(trainer: pl.Trainer) -> None:
    """The only place that assumes a single process; the rest reads the unwrapped module."""
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"DriftMonitor was given a run of {trainer.world_size} processes "
            f"({type(trainer.strategy).__name__}). It reads in runs of one process only, so far: use devices=1, or "
            "take DriftMonitor out of the callbacks."
        )


def record_directory(record: str | Path | None, trainer: pl.Trainer, name: str) -> Path | None:
    if record is None:
        return None
    if record != "auto":
        return Path(record)
    # Not trainer.log_dir: without loggers that is the working directory, and for some a place shared by all runs.
    for logger in trainer.loggers:
        if logger.log_dir is not None:
            return Path(logger.log_dir) / name
    return None


def schedule_of(every_n_train_steps: int | None, schedule: Schedule | None) -> Schedule:
    if schedule is None:
        return every(50 if every_n_train_steps is None else every_n_train_steps)
    if every_n_train_steps is not None:
        raise MisconfigurationException(
            f"DriftMonitor was given every_n_train_steps={every_n_train_steps!r} and schedule={schedule!r}. "
            "Both say when to look: give one of them."
        )
    if not callable(schedule):
        raise MisconfigurationException(
            f"DriftMonitor was given schedule={schedule!r}, which is no function of the step. "
            "Give one that is, such as diffsensor.every(50)."
        )
    return schedule


def probes_of(probes: ProbeSet | str | Path, tokenizer: Any) -> ProbeSet:
    if isinstance(probes, ProbeSet):
        if tokenizer is not None:
            raise MisconfigurationException(
                "DriftMonitor was given a probe set and a tokenizer. A probe set is tokenised already: leave out one."
            )
        return probes
    path = Path(probes)
    if not path.exists():
        near = sorted(found.name for found in path.parent.glob("*")) if path.parent.is_dir() else []
        raise MisconfigurationException(
            f"DriftMonitor was given probes={str(probes)!r}, where nothing is. {_closest(path.name, near)}"
            "Give a .jsonl file, the directory of a saved probe set, or a ProbeSet."
        )
    if path.is_dir():
        return ProbeSet.load(path, tokenizer)
    if tokenizer is None:
        raise MisconfigurationException(
            f"DriftMonitor was given probes={str(probes)!r} and no tokenizer. "
            "Give tokenizer=<the directory or the name of the model's tokenizer>."
        )
    return ProbeSet.from_jsonl(path, tokenizer)


def _closest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""
