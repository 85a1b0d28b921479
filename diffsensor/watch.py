"""A side-car: reads each new checkpoint of a run in a process of its own, and writes the verdict beside it."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from diffsensor.checkpoints import Checkpoint, checkpoint_at
from diffsensor.errors import CaptureError, ConfigError, CorruptFileError, DiffSensorError
from diffsensor.gate import VERDICT_BESIDE, VERDICT_IN, read_verdict, write_verdict
from diffsensor.scan import Scan, Scanned
from diffsensor.types import Verdict

logger = logging.getLogger(__name__)

#: How often a checkpoint that cannot be read is tried before its verdict is "unknown".
_ATTEMPTS = 3


@final
class Watch:
    """Waits for checkpoints in a directory and reads each of them once, in the order of their steps.

    A checkpoint is read when it is complete, to the last byte of its weights. Its readings go to the record of the
    scan, then its verdict is written beside it, as a whole or not at all; a watch that is killed at any moment and
    begun again goes on there: what is in the record is not read again, and a verdict that was not yet written is
    written then. A checkpoint that cannot be read at all gets the verdict "unknown", which is no pass.

    Arguments:
        directory: where the run saves its checkpoints.
        scan: reads them; with a record.
        every: seconds from one look at the directory to the next.
    """

    def __init__(self, directory: str | Path, scan: Scan, *, every: float = 5.0) -> None:
        self._directory, self._scan, self._every = Path(directory), scan, every
        if not every > 0:
            raise ConfigError(f"every={every!r} was given, expected seconds above 0.")
        self._failed: dict[Path, int] = {}
        self._left_out: set[Path] = set()

    def round(self) -> Iterator[Scanned]:
        """Read what is complete and has no verdict yet, now."""
        for checkpoint in self._new():
            try:
                scanned = self._scan.read(checkpoint)
            except CorruptFileError as error:
                logger.info("%s is waited for. %s", checkpoint.path, error)
                continue
            except FileNotFoundError:  # a run that keeps the last few has removed it
                logger.info("%s is gone.", checkpoint.path)
                continue
            except (CaptureError, ConfigError) as error:
                self._give_up(checkpoint, error)
                continue
            if scanned.verdict is not None:
                write_verdict(verdict_file(checkpoint.path), scanned.verdict)
            self._left_out.add(checkpoint.path)
            yield scanned

    def until(self, is_over: Callable[[], bool]) -> Iterator[Scanned]:
        """Go on from round to round until it is over."""
        while True:
            was_over = is_over()  # before the round: what was there when the run ended is read
            yield from self.round()
            if was_over:
                return
            time.sleep(self._every)

    def _new(self) -> list[Checkpoint]:
        """What has no verdict yet and tells its step, in the order of steps."""
        found: list[Checkpoint] = []
        for path in sorted(self._directory.iterdir()) if self._directory.is_dir() else ():
            if path in self._left_out or path.name.startswith("."):
                continue
            try:
                checkpoint = checkpoint_at(path)
            except DiffSensorError:
                continue  # something else, or not far enough yet
            if checkpoint.step < 0:
                logger.info("%s is left out: neither its name nor its files tell its step.", path)
                self._left_out.add(path)
            elif read_verdict(path).step != checkpoint.step:
                found.append(checkpoint)
        return sorted(found, key=lambda each: each.step)

    def _give_up(self, checkpoint: Checkpoint, error: DiffSensorError) -> None:
        self._failed[checkpoint.path] = self._failed.get(checkpoint.path, 0) + 1
        if self._failed[checkpoint.path] < _ATTEMPTS:
            logger.info("%s is tried again. %s", checkpoint.path, error)
            return
        logger.error("%s cannot be read. %s", checkpoint.path, error)
        reason = f"The checkpoint could not be read. {error}"
        write_verdict(verdict_file(checkpoint.path), Verdict(step=checkpoint.step, outcome="unknown", reason=reason))
        self._left_out.add(checkpoint.path)


def verdict_file(checkpoint: Path) -> Path:
    """Where the verdict on a checkpoint is: in its directory, or beside it where it is a file."""
    return checkpoint / VERDICT_IN if checkpoint.is_dir() else checkpoint.with_name(checkpoint.name + VERDICT_BESIDE)
