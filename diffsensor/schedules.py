"""When to look: schedules by step. Both look at step 0, before the first update."""

import math
from dataclasses import dataclass

from diffsensor.errors import ConfigError


# Lower case: they are read as verbs, `schedule=every(50)`, and shown by their repr as they are written.
@dataclass(frozen=True, slots=True)
class every:  # noqa: N801
    """Due at steps 0, n, 2n, ..."""

    n: int

    def __post_init__(self) -> None:
        _require_count("every(n)", self.n)

    def __call__(self, step: int) -> bool:
        return step >= 0 and step % self.n == 0


@dataclass(frozen=True, slots=True)
class log_spaced:  # noqa: N801
    """Due at step 0 and at round(10^(k / per_decade)) for k = 0, 1, 2, ...: dense early, when drift is fast.

    With ten per decade: 0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 79, 100, ...
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        _require_count("log_spaced(per_decade)", self.per_decade)

    def __call__(self, step: int) -> bool:
        if step <= 0:
            return step == 0
        # If any k rounds to this step, then one of the two nearest does.
        k = self.per_decade * math.log10(step)
        return any(round(10 ** (near / self.per_decade)) == step for near in (math.floor(k), math.ceil(k)))


def _require_count(what: str, given: object) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{what} was given {given!r}. It counts, so give a whole number of at least 1.")
