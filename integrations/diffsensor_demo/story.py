"""What a run's record says at the three moments that matter: the start, the middle, the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffsensor import Alert, Reading, TokenShift
from diffsensor_demo.habit import Habit

Ranking = Literal["mass_moved", "logit_difference"]
RANKINGS: tuple[Ranking, ...] = ("mass_moved", "logit_difference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The readings and the token table of one run. `middle` is the last step before the planting, if there was one."""

    readings: Sequence[Reading]
    token_shifts: Sequence[TokenShift]
    alerts: Sequence[Alert]
    middle: int
    habit: Habit | None

    @property
    def steps(self) -> list[int]:
        return sorted({reading.step for reading in self.readings})

    @property
    def moments(self) -> tuple[int, int, int]:
        """The steps that were read first, last before or at `middle`, and last."""
        steps = self.steps
        return steps[0], max(step for step in steps if step <= self.middle), steps[-1]

    @property
    def groups(self) -> list[str]:
        """The groups of probes, in the order of the record."""
        names = dict.fromkeys(reading.group for reading in self.curve("kl_ref_live", None))
        return [name for name in names if name not in ("", "worst")]

    @property
    def hookpoints(self) -> list[str]:
        return [name for name in dict.fromkeys(reading.hookpoint for reading in self.readings) if name]

    def curve(self, metric: str, group: str | None = "", hookpoint: str = "") -> list[Reading]:
        """A metric's readings in the order of steps; of all groups where `group` is None."""
        found = [
            reading
            for reading in self.readings
            if reading.metric == metric and reading.hookpoint == hookpoint and group in (None, reading.group)
        ]
        return sorted(found, key=lambda reading: reading.step)

    def at(self, step: int, metric: str, group: str = "", hookpoint: str = "") -> Reading | None:
        return next((reading for reading in self.curve(metric, group, hookpoint) if reading.step == step), None)

    def up_weighted(self, step: int, ranking: Ranking) -> list[TokenShift]:
        """The tokens that the live model prefers most at `step`, over all probes, the strongest first."""
        found = [
            shift
            for shift in self.token_shifts
            if shift.step == step and shift.ranked_by == ranking and shift.prefers == "live" and shift.group == ""
        ]
        return sorted(found, key=lambda shift: shift.rank)

    def is_planted(self, shift: TokenShift) -> bool:
        return self.habit is not None and shift.token.strip() in self.habit.words

    def planted_ranks(self, step: int, ranking: Ranking) -> dict[str, int | None]:
        """The place of each planted word in the token table, from 1 on; None where it is not in the table."""
        words = self.habit.words if self.habit else ()
        places = {shift.token.strip(): shift.rank + 1 for shift in self.up_weighted(step, ranking)}
        return {word: places.get(word) for word in words}
