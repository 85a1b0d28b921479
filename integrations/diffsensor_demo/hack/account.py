"""What the record of a run says, beside what its completions say: when the hack began, and when it was told."""

from dataclasses import dataclass
from typing import Literal

from diffsensor import Alert, Reading, TokenShift
from diffsensor_demo.hack.goal import beginning
from diffsensor_demo.hack.grpo import Run, Sampled

#: What of the completions is averaged over how many last steps.
Wanted = Literal["reward", "score", "hacked"]
LAST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One run. A reading at a step is of the model that made the completions of that step."""

    run: Run

    @property
    def began(self) -> int | None:
        """The step at which the hack begins, by what the completions say; None where it does not."""
        return beginning([each.hacked for each in self.run.sampled])

    @property
    def alert(self) -> Alert | None:
        """The first one."""
        return min(self.run.record.alerts, key=lambda alert: alert.step, default=None)

    def curve(self, metric: str) -> list[Reading]:
        """A metric's readings over all probes, in the order of steps."""
        return [
            reading
            for reading in self.run.record.readings
            if reading.metric == metric and not reading.group and not reading.hookpoint
        ]

    def at(self, metric: str, step: int) -> Reading:
        """The last reading at `step` or before."""
        return [reading for reading in self.curve(metric) if reading.step <= step][-1]

    def sampled(self, step: int) -> Sampled:
        """The completions of a step; after the last update there are none, and those before it stand for them."""
        return self.run.sampled[min(step, len(self.run.sampled) - 1)]

    def last(self, wanted: Wanted) -> float:
        """The mean of the last 10 steps."""
        values: list[float] = [getattr(each, wanted) for each in self.run.sampled[-LAST:]]
        return sum(values) / len(values)

    def tokens(self, step: int) -> list[TokenShift]:
        """Those that gained most probability, over all probes, by the last reading at `step` or before."""
        found = [
            shift
            for shift in self.run.record.token_shifts
            if shift.ranked_by == "mass_moved" and shift.prefers == "live" and not shift.group and shift.step <= step
        ]
        last = max((shift.step for shift in found), default=0)
        return sorted((shift for shift in found if shift.step == last), key=lambda shift: shift.rank)
