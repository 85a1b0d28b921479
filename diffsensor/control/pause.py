"""Waiting for a person: a file appears, and the run goes on once somebody has removed it."""

import logging
import time
from pathlib import Path
from typing import Literal, final

from diffsensor.errors import ConfigError, RefusedError
from diffsensor.ranks import Ranks

logger = logging.getLogger(__name__)


@final
class PauseFile:
    """Writes a file that says why the run waits, and returns once it has been removed.

    Ctrl-C ends the wait as it would end a step, and removes the file. A file that an earlier run left is overwritten.
    In a run of several processes all of them wait: the first one looks at its file and tells the others at each look.

    Arguments:
        file: where. The default is PAUSED in the current directory.
        timeout: seconds; None waits for as long as it takes. Who is asked and does not answer has not agreed, so after
            the timeout the answer is no.
        every: seconds from one look at the file to the next.
    """

    def __init__(self, file: Path | str = "PAUSED", *, timeout: float | None = None, every: float = 1.0) -> None:
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"PauseFile was given timeout={timeout!r}, expected seconds above 0, or None to wait on.")
        if not every > 0:
            raise ConfigError(f"PauseFile was given every={every!r}, expected seconds above 0.")
        self.file, self.timeout, self.every = Path(file), timeout, every

    def wait(self, reason: str) -> bool:
        """Whether a person let the run go on; False after the timeout. Raises `RefusedError` where it cannot write."""
        ranks = Ranks.now()
        ranks.told("pause", lambda: self._begin(reason))
        begun = time.monotonic()
        try:
            while (answer := ranks.told("pause", lambda: self._answer(begun))) == "wait":
                time.sleep(self.every)
            return answer == "go on"
        finally:
            if ranks.is_first:
                self.file.absolute().unlink(missing_ok=True)

    def _begin(self, reason: str) -> None:
        file = self.file.absolute()
        until = "" if self.timeout is None else f" If it is still there after {self.timeout:g} s, the run stops."
        try:
            file.write_text(f"{reason}\n\nThe run waits. Remove this file to let it go on.{until}\n", encoding="utf-8")
        except OSError as error:
            raise RefusedError(
                f"The run cannot wait: {file} cannot be written ({error.strerror}). Name another place for it."
            ) from error
        logger.warning("The run waits until %s is removed.%s Reason: %s", file, until, reason)

    def _answer(self, begun: float) -> Literal["wait", "go on", "stop"]:
        if not self.file.absolute().exists():
            return "go on"
        is_over = self.timeout is not None and time.monotonic() - begun >= self.timeout
        return "stop" if is_over else "wait"
