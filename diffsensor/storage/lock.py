"""One writer at a time for a directory."""

import errno
import logging
import os
import sys
from pathlib import Path

from diffsensor.errors import StorageError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".lock"
_locks: set[int] = set()


def take_lock(path: Path) -> int:
    """Become the only writer in `path`. The system lets go of the lock when this process ends, however it ends."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(lock)
    if sys.platform == "win32":
        logger.warning("Directories are not locked on Windows: take care that only one run writes to %s.", path)
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except BlockingIOError as error:
        holder = os.read(lock, 20).decode("ascii", "replace") or "unknown"
        release_lock(lock)
        raise StorageError(
            f"Another monitor (process {holder}) is writing to {path}. "
            "Give this run a directory of its own, or end the other one first."
        ) from error
    except OSError as error:
        # Some cluster file systems have no locks, and are where runs live.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            release_lock(lock)
            raise
        logger.warning("%s cannot be locked (%s): take care that only one run writes to it.", path, error.strerror)
    return lock


def release_lock(lock: int) -> None:
    """Let others write. Harmless in a child process, which never has its parent's lock."""
    if lock in _locks:
        _locks.remove(lock)
        os.close(lock)


def _close_inherited_locks() -> None:
    # A data loader's worker that outlives a killed run would otherwise keep the directory locked.
    for lock in list(_locks):
        release_lock(lock)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_inherited_locks)
