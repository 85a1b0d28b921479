"""A side-car: reads each new checkpoint of a run in a process of its own, and writes the verdict beside it."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import final

from diffsensor.checkpoints import Checkpoint, checkpoint_at, identity_of
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
    written then. A checkpoint that cannot be read at all gets the verdict "unknown", which is no pass. A verdict that
    is there already, of a gate of the run's own or of other limits, is replaced.

    Arguments:
        directory: where the run saves its checkpoints.
        scan: reads them; with a record.
        every: seconds from one look at the directory to the next.
    """

    def __init__(self, directory: str | Path, scan: Scan, *, every: float = 5.0) -> None:
        self._directory, self._scan, self._every = Path(directory), scan, every
        if not every > 0:
            raise ConfigError(f"every={every!r} was given, expected seconds above 0.")
        #: What became of each checkpoint: its verdict, also of one that was read before; unknown while it is not read.
        self.outcomes: dict[Path, str] = {}
        self._done: dict[Path, dict[str, list[int]]] = {}
        self._failed: dict[Path, int] = {}
        self._left_out: set[Path] = set()

    def round(self) -> Iterator[Scanned]:
        """Read what is complete and was not read yet, now."""
        for checkpoint in self._found():
            path = checkpoint.path
            try:
                scanned = self._scan.read(checkpoint)
            except CorruptFileError as error:
                self._wait(path, str(error))
                continue
            except FileNotFoundError:  # a run that keeps the last few has removed it
                logger.info("%s is gone.", path)
                self.outcomes.pop(path, None)
                continue
            except (CaptureError, ConfigError) as error:
                self._give_up(checkpoint, error)
                continue
            self._done[path] = identity_of(checkpoint)
            if scanned.verdict is not None:
                self.outcomes[path] = scanned.verdict.outcome
                if read_verdict(path) != scanned.verdict:
                    write_verdict(verdict_file(path), scanned.verdict)
            if scanned.is_new:
                yield scanned

    def until_idle(self, seconds: float | None) -> Iterator[Scanned]:
        """Go on from round to round until nothing new has come for so long; None for ever."""
        last = time.monotonic()
        while True:
            for scanned in self.round():
                last = time.monotonic()
                yield scanned
            if seconds is not None and time.monotonic() - last >= seconds:
                return
            time.sleep(self._every)

    def _found(self) -> list[Checkpoint]:
        """The checkpoints there that tell their step and were not read, or not as they are now, in order."""
        found: list[Checkpoint] = []
        for path in sorted(self._directory.iterdir()) if self._directory.is_dir() else ():
            if path in self._left_out or path.name.startswith("."):
                continue
            try:
                checkpoint = checkpoint_at(path)
                if path in self._done and self._done[path] == identity_of(checkpoint):
                    continue
            except (DiffSensorError, OSError):
                continue  # something else, or not far enough yet, or gone
            if checkpoint.step < 0:
                logger.warning("%s is left out: neither its name nor its files tell its step.", path)
                self._left_out.add(path)
            else:
                found.append(checkpoint)
        return sorted(found, key=lambda each: each.step)

    def _wait(self, path: Path, why: str) -> None:
        if self.outcomes.get(path) != "unknown":
            logger.warning("%s is waited for. %s", path, why)
        self.outcomes[path] = "unknown"

    def _give_up(self, checkpoint: Checkpoint, error: DiffSensorError) -> None:
        path = checkpoint.path
        self.outcomes[path] = "unknown"
        self._failed[path] = self._failed.get(path, 0) + 1
        if self._failed[path] < _ATTEMPTS:
            logger.warning("%s cannot be read, and is tried again. %s", path, error)
            return
        logger.error("%s cannot be read. %s", path, error)
        reason = f"The checkpoint could not be read. {error}"
        write_verdict(verdict_file(path), Verdict(step=checkpoint.step, outcome="unknown", reason=reason))
        self._left_out.add(path)


def verdict_file(checkpoint: Path) -> Path:
    """Where the verdict on a checkpoint is: in its directory, or beside it where it is a file."""
    return checkpoint / VERDICT_IN if checkpoint.is_dir() else checkpoint.with_name(checkpoint.name + VERDICT_BESIDE)
