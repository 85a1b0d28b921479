"""Files that are there as a whole or not at all, whenever their writer is killed."""

import os
from pathlib import Path

TEMPORARY = ".tmp"


def store(file: Path, data: bytes) -> None:
    """Put a file in place, or leave what was there."""
    stage(file, data).replace(file)


def stage(file: Path, data: bytes) -> Path:
    """Write a temporary file beside `file`, down to the disk, to be renamed later; returns its path."""
    temporary = file.with_name(file.name + TEMPORARY)
    try:
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
