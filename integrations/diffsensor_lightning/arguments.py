"""What DriftMonitor is given, checked and made into what the monitor takes."""

from numbers import Real
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy, Strategy
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


def require_readable(strategy: Strategy) -> None:
    """Refuse FSDP1, which shows the module that it wraps as if its parameters were whole."""
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            f"DriftMonitor was given a run of {type(strategy).__name__}, which shards by FullyShardedDataParallel "
            "(FSDP1), and cannot read it. Use FSDP2: strategy=ModelParallelStrategy(...), with fully_shard(...) in the "
            "module's configure_model."
        )


def record_directory(record: str | Path | None, trainer: pl.Trainer, name: str) -> Path | None:
    """Where the first process of the run has the record, asked by all of them."""
    place = None if record is None else _directory_of_logger(trainer, name) if record == "auto" else Path(record)
    # In other processes a logger may have none, or one of its own.
    decided: Path | None = trainer.strategy.broadcast(place)
    return decided


def _directory_of_logger(trainer: pl.Trainer, name: str) -> Path | None:
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
    return ProbeSet.read(probes, tokenizer)
