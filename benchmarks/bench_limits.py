"""What `Limit` does at its limit: alerts while a metric hovers there, how late a real breach is found, false alarms.

    python benchmarks/bench_limits.py [--streams 200] [--runs 1000] [--quick] [--json FILE]

Every stream is synthetic, seeded and judged by the rule itself, look by look. Noise is normal, its standard deviation a
share of the limit.

Hovering: 500 looks whose mean is such that the number that is compared with the limit is at the limit. "plain" counts
how often that number goes above it; "Limit" the times that the rule goes from quiet to breach, which are its alerts
with cooldown=0; "20" its alerts with the default cool-down.

Real breaches: the drift goes above the limit, in a step or a ramp. Delays are counted in looks from the first one at
which the drift itself is above; "later" is by how much that of the rule is longer than that of a plain threshold on
the number that is compared (the lower bound where there is an error), which is what two looks in a row cost; and, in
the last column, than that of one on the value, to which the error adds: what is within the error is not shown.

False alarms: drift that is, in the mean over all probes of the kind, truly at a share of the limit, read with some
probes that stay the same through a run of 100 looks and each have noise of their own. "look" is the share of single
looks whose verdict is fail, against 1 - confidence; "run" the share of runs with an alert, for which nothing is
promised. Shares have exact 95 % binomial intervals.

Ends with 1 where a target is missed: 2.5 alerts while hovering (white noise and AR(.5)), 1 look later (the median, and
in nine cases of ten), or an interval that lies above the level.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from streams import HEALTHY, Streams, binomial_interval

from diffsensor.rules.limit import Limit
from diffsensor.statistics import interval
from diffsensor.types import Findings, Reading, State

LIMIT, CONFIDENCE, NUM_PROBES = 0.3, 0.95, 64
ALERTS, LATER = 2.5, 1.0
HOVERING, RUN = 500, 100
NOISE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hovering:
    noise: str
    sd: float
    error: str
    plain: float
    alerts: float
    half_width: float
    with_cooldown: float
    target: float | None

    @property
    def misses(self) -> bool:
        return self.target is not None and self.alerts > self.target

    def __str__(self) -> str:
        return (
            f"{self.noise:<7} {self.sd:>5.0%}  {self.error:<14} {self.plain:>7.1f} {self.alerts:>6.2f} "
            f"+-{self.half_width:<5.2f}{self.with_cooldown:>6.2f}{_target(self.target, 7)}{_missed(self.misses)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    course: str
    sd: float
    stderr: float
    missed: int
    delay: float
    later: float
    later_ninth: float
    later_than_value: float
    target: float | None

    @property
    def misses(self) -> bool:
        return self.target is not None and (self.missed > 0 or self.later_ninth > self.target)

    def __str__(self) -> str:
        return (
            f"{self.course:<18} {self.sd:>5.0%} {self.stderr:>6.0%} {self.missed:>6} {self.delay:>6.1f} "
            f"{self.later:>6.1f} {self.later_ninth:>7.1f} {self.later_than_value:>10.1f}{_target(self.target, 7)}"
            f"{_missed(self.misses)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarms:
    at: float
    probes: int
    spread: float
    sd: float
    look: float
    low: float
    high: float
    run: float
    level: float

    @property
    def misses(self) -> bool:
        return self.low > self.level

    def __str__(self) -> str:
        return (
            f"{self.at:>4.1f} x {self.probes:>7} {self.spread:>7.2f} {self.sd:>6.0%} {self.look:>8.3f} "
            f"[{self.low:.3f}, {self.high:.3f}] {self.level:>7.2f} {self.run:>8.3f}{_missed(self.misses)}"
        )


HOVERING_COLUMNS = f"{'noise':<7} {'sd':>5}  {'error':<14} {'plain':>7} {'Limit':>6}   95 %{'20':>6}{'target':>8}"
BREACH_COLUMNS = (
    f"{'drift goes to':<18} {'sd':>5} {'error':>6} {'missed':>6} {'delay':>6} {'later':>6} {'9 in 10':>7} "
    f"{'than value':>10}{'target':>7}"
)
FALSE_COLUMNS = f"{'at':>6} {'probes':>7} {'spread':>7} {'noise':>6} {'look':>8} {'95 %':^14} {'level':>7} {'run':>8}"


def _target(target: float | None, width: int) -> str:
    return f"{'' if target is None else f'{target:g}':>{width}}"


def _missed(misses: bool) -> str:
    return "  missed" if misses else ""


def look(step: int, value: float, stderr: float, num_probes: int = NUM_PROBES) -> Findings:
    reading = Reading(
        step=step, sensor="outputs", metric="kl_ref_live", value=value, stderr=stderr, num_probes=num_probes,
        unit="nats/token", scale="log",
    )  # fmt: skip
    return Findings(step=step, readings=(reading,))


def states(values: Sequence[float], stderrs: Sequence[float]) -> list[State]:
    rule = Limit("kl_ref_live", above=LIMIT, confidence=CONFIDENCE)
    looks = (look(step, *seen) for step, seen in enumerate(zip(values, stderrs, strict=True)))
    return [rule.update(each).signals[0].state for each in looks]


def alerts(said: Sequence[State], cooldown: int) -> int:
    """How many alerts follow: one on each breach, withheld or put off while the cool-down of the last one is on."""
    number, last, is_told = 0, -math.inf, False
    for step, state in enumerate(said):
        if state != "breach":
            is_told = False
        elif not is_told and step - last > cooldown:
            number, last, is_told = number + 1, step, True
    return number


def bounds(values: Sequence[float], stderrs: Sequence[float]) -> list[float]:
    """What is compared with the limit: the lower bound, or the value where there is no error."""
    low = (
        interval(value, stderr, NUM_PROBES, "log", 2 * CONFIDENCE - 1)[0]
        for value, stderr in zip(values, stderrs, strict=True)
    )
    return [value if math.isnan(bound) else bound for value, bound in zip(values, low, strict=True)]


def hovering(name: str, sd: float, error: float, num: int, seed: int) -> Hovering:
    """`error` is the standard error in units of the noise, 0 for none."""
    noise = HEALTHY[name](np.random.default_rng([1, seed]), num, HOVERING)
    stderr = error * sd * LIMIT if error else math.nan
    # The value at which the bound is at the limit, for this error: v exp(-t s / v) = limit.
    value = LIMIT
    for _ in range(100):
        value = LIMIT * value / bounds([value], [stderr])[0]
    found: list[tuple[int, int, int]] = []
    for stream in (value + LIMIT * sd * noise).tolist():
        errors = [stderr] * HOVERING
        said = states(stream, errors)
        plain: list[State] = ["breach" if bound > LIMIT else "quiet" for bound in bounds(stream, errors)]
        found.append((alerts(plain, 0), alerts(said, 0), alerts(said, 20)))
    means, spread = np.mean(found, axis=0).tolist(), float(np.std(found, axis=0, ddof=1)[1])
    return Hovering(
        noise=name, sd=sd, error="none" if not error else f"{error:g} x noise", plain=means[0], alerts=means[1],
        half_width=1.96 * spread / math.sqrt(num), with_cooldown=means[2],
        target=ALERTS if name in ("iid", "AR(.5)") else None,
    )  # fmt: skip


def courses() -> dict[str, np.ndarray]:
    """The drift, in units of the limit: quiet for 20 looks, then above the limit."""
    steps = {f"{size:g} x, a step": np.where(np.arange(80) < 20, 0.7, size) for size in (1.1, 1.2, 1.5, 2.0, 4.0)}
    rising = np.maximum(np.arange(80) - 20, 0)
    ramps = {f"+{slope:.0%} a look": 0.75 + slope * rising for slope in (0.02, 0.05, 0.1, 0.3)}
    return {**steps, **ramps}


def breach(name: str, course: np.ndarray, sd: float, error: float, num: int, seed: int) -> Breach:
    noise = HEALTHY["iid"](np.random.default_rng([2, seed]), num, len(course))
    begin = int((course > 1).argmax())
    delays: list[tuple[float, float, float]] = []
    for stream in (LIMIT * (course + sd * noise)).tolist():
        errors = [error * value if error else math.nan for value in stream]
        said = states(stream, errors)

        def first(beyond: Sequence[bool]) -> float:
            return next((step - begin for step in range(begin, len(beyond)) if beyond[step]), math.inf)

        delays.append(
            (
                first([state == "breach" for state in said]),
                first([bound > LIMIT for bound in bounds(stream, errors)]),
                first([value > LIMIT for value in stream]),
            )
        )
    found = [each for each in delays if math.isfinite(each[0])]
    later = sorted(rule - plain for rule, plain, _ in found)
    # What no error shows, and what the noise covers, is no breach that could be found at once.
    is_clear = float(course[min(begin + 1, len(course) - 1)]) - 1 > 2 * sd + 2 * error
    return Breach(
        course=name, sd=sd, stderr=error, missed=num - len(found),
        delay=float(np.median([rule for rule, _, _ in found])) if found else math.inf,
        later=float(np.median(later)) if later else math.inf,
        later_ninth=float(np.quantile(later, 0.9, method="higher")) if later else math.inf,
        later_than_value=float(np.median([rule - value for rule, _, value in found])) if found else math.inf,
        target=LATER if is_clear else None,
    )  # fmt: skip


def false_alarms(at: float, probes: int, spread: float, sd: float, runs: int) -> FalseAlarms:
    """Probes whose drift is log-normal with mean 1 (times the level), each with its own noise from look to look."""
    rng = np.random.default_rng([3, probes, round(100 * spread)])
    fails, alarmed = 0, 0
    for _ in range(runs):
        probe = np.exp(spread * rng.standard_normal((probes, 1)) - spread**2 / 2)
        drift: Streams = at * LIMIT * probe * (1 + sd * rng.standard_normal((probes, RUN)))
        means = drift.mean(0).tolist()
        errors = (drift.std(0, ddof=1) / math.sqrt(probes)).tolist()
        rule = Limit("kl_ref_live", above=LIMIT, confidence=CONFIDENCE)
        looks = [look(step, *seen, probes) for step, seen in enumerate(zip(means, errors, strict=True))]
        alarmed += any(rule.update(each).signals[0].state == "breach" for each in looks)
        fails += rule.verdict(looks[-1]).outcome == "fail"
    low, high = binomial_interval(fails, runs)
    return FalseAlarms(
        at=at, probes=probes, spread=spread, sd=sd, look=fails / runs, low=low, high=high, run=alarmed / runs,
        level=1 - CONFIDENCE,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="for hovering and for breaches, in each row")
    parser.add_argument("--runs", type=int, default=1000, help="for false alarms, in each row")
    parser.add_argument("--quick", action="store_true", help="a few rows with few streams: seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.streams, options.runs = 20, 60
    rows: list[Hovering | Breach | FalseAlarms] = []

    def show(row: Hovering | Breach | FalseAlarms) -> None:
        rows.append(row)
        print(row, flush=True)

    print(f"Hovering at the limit, {options.streams} streams of {HOVERING} looks\n\n{HOVERING_COLUMNS}")
    for name in ("iid", "AR(.5)") if options.quick else ("iid", "AR(.5)", "AR(.9)"):
        for sd in (0.1,) if options.quick else NOISE:
            for error in (0.0, 1.0) if options.quick else (0.0, 0.5, 1.0):
                show(hovering(name, sd, error, options.streams, len(rows)))
    print(f"\nReal breaches, {options.streams} streams in each row\n\n{BREACH_COLUMNS}")
    for name, course in list(courses().items())[:: 4 if options.quick else 1]:
        for sd, error in ((0.02, 0.0),) if options.quick else ((0.02, 0.0), (0.05, 0.0), (0.02, 0.04)):
            show(breach(name, course, sd, error, options.streams, len(rows)))
    print(f"\nFalse alarms, {options.runs} runs in each row\n\n{FALSE_COLUMNS}")
    for at in (1.0,) if options.quick else (0.8, 0.9, 1.0):
        for probes in (32,) if options.quick else (8, 32, 128):
            for spread, sd in ((0.35, 0.2),) if options.quick else ((0.35, 0.0), (0.35, 0.2), (1.0, 0.2)):
                show(false_alarms(at, probes, spread, sd, options.runs))
    if options.json:
        found = [{"table": type(row).__name__} | asdict(row) | {"missed_target": row.misses} for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.misses for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
