"""How often rules alarm on runs where nothing is wrong, beside what they promise, and how soon where something is.

    python benchmarks/bench_false_alarms.py [--runs 1000] [--workers 1] [--only ChangePoint ...] [--quick] [--json FILE]

Every run is synthetic, seeded and its own; each is judged by the rule itself, look by look. A false alarm is one where
nothing changed; a missed detection is a run without any alarm though something changed; the detection delay counts the
looks from the change to the alarm, 1 being the look of the change itself; of both, runs with a false alarm before the
change are left out. Shares have exact 95 % binomial intervals. Ends with 1 where the interval of a share lies above its
promise, or an average run length below it.
"""

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from streams import HEALTHY, Generator, Streams, binomial_interval, iid, slope_from, step_from

from diffsensor.protocols import Rule
from diffsensor.rules.change_point import ChangePoint
from diffsensor.rules.envelope import Envelope
from diffsensor.rules.group_shift import GroupShift
from diffsensor.rules.limit import Limit
from diffsensor.rules.pilots import Curves, Pilots, pilots_for, split
from diffsensor.types import Findings, MetricInfo, Reading, Scope, log_key

LENGTH = 500
#: Where something changes, it does so in the middle.
CHANGE = 250
RUN_LENGTH = 2000
LEVEL = 0.05
LIMIT = 0.3
NUM_PROBES, SPREAD = 64, 0.35
GROUPS, PER_GROUP = 4, 16
#: A mean over hookpoints costs as many updates as there are.
LAYERS, MOVED_LAYERS = 32, 4
METRIC = "kl_ref_live"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The looks at which a breach began, and whether the last look by itself, as for a gate, fails."""

    alarms: list[int]
    length: int
    fails: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One rule on one kind of run.

    `share`: which runs are counted, those with any alarm, or those whose last look fails. `at_most` is what is promised
    of that share, `run_length` of the average run length; None where nothing is.
    """

    rule: str
    stream: str
    run: Callable[[int], Run]
    part: float = 1.0
    changes: bool = False
    share: str = "run"
    at_most: float | None = None
    run_length: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    rule: str
    stream: str
    num_runs: int
    false_alarms: float
    interval: tuple[float, float]
    share: str
    at_most: float | None
    num_alarms: int
    run_length: float | None
    run_length_promised: float | None
    missed: float | None
    delay: float | None

    @property
    def is_missed(self) -> bool:
        too_often = self.at_most is not None and self.interval[0] > self.at_most
        too_short = (
            self.run_length_promised is not None
            and self.run_length is not None
            and self.num_alarms > 0
            and self.run_length < self.run_length_promised
        )
        return too_often or too_short


def followed(rule: Rule, looks: Sequence[Findings]) -> Run:
    alarms, was_breach = [], False
    for number, findings in enumerate(looks):
        is_breach = any(signal.state == "breach" for signal in rule.update(findings).signals)
        if is_breach and not was_breach:
            alarms.append(number)
        was_breach = is_breach
    return Run(alarms=alarms, length=len(looks))


def reading(step: int, value: float, *, hookpoint: str = "", stderr: float = math.nan) -> Reading:
    return Reading(
        step=step,
        sensor="outputs",
        metric=METRIC,
        value=value,
        unit="nats/token",
        stderr=stderr,
        num_probes=NUM_PROBES,
        hookpoint=hookpoint,
        scale="log",
    )


def looks_at(values: Streams) -> list[Findings]:
    """A look for each column, with a reading for each row: at the outputs if it is the only one."""
    places = [""] if len(values) == 1 else [f"layer {number}" for number in range(len(values))]
    return [
        Findings(
            step=step,
            readings=tuple(
                reading(step, float(value), hookpoint=at) for at, value in zip(places, values[:, step], strict=True)
            ),
        )
        for step in range(values.shape[1])
    ]


def change_point(values: Streams) -> Run:
    return followed(
        ChangePoint(METRIC, hookpoint="" if len(values) == 1 else "*", run_length=RUN_LENGTH), looks_at(values)
    )


def grown(growth: Streams) -> Streams:
    """A drift whose log-growth is the stream, at 2 % a standard deviation."""
    drift: Streams = 0.1 * np.exp(np.cumsum(0.02 * growth, axis=1))
    return drift


def level(stream: Streams) -> Streams:
    """A drift whose logarithm is the stream, at 5 % a standard deviation."""
    drift: Streams = 0.3 * np.exp(0.05 * stream)
    return drift


def saturating(stream: Streams) -> Streams:
    """A drift that goes to a level of 0.3 as a trend does, from near 0, with the trend's own noise of 5 %."""
    return level(10 * np.log(np.maximum(stream, 0.1) / 10))


def layers(rng: np.random.Generator, common: float) -> Streams:
    """One stream for each layer; a share `common` of the variance is that of all of them."""
    own, shared = iid(rng, LAYERS, LENGTH), iid(rng, 1, LENGTH)
    mixed: Streams = math.sqrt(common) * shared + math.sqrt(1 - common) * own
    return mixed


def change_point_cases() -> list[Case]:
    def on(make: Callable[[np.random.Generator], Streams]) -> Callable[[int], Run]:
        return lambda seed: change_point(make(np.random.default_rng([1, seed])))

    at_most = LENGTH / RUN_LENGTH
    cases = []
    for name, healthy in HEALTHY.items():
        is_exchangeable = name in ("iid", "heavy tails")
        if name != "saturating trend":
            cases.append(
                Case(
                    rule="ChangePoint",
                    stream=f"log-growth {name}",
                    run=on(lambda rng, healthy=healthy: grown(healthy(rng, 1, LENGTH))),  # type: ignore[misc]
                    at_most=at_most if is_exchangeable else None,
                    run_length=RUN_LENGTH if is_exchangeable else None,
                )
            )
        make = saturating if name == "saturating trend" else level
        cases.append(
            Case(
                rule="ChangePoint",
                stream=f"level {name}",
                run=on(lambda rng, healthy=healthy, make=make: make(healthy(rng, 1, LENGTH))),  # type: ignore[misc]
            )
        )
    cases += [
        Case(
            rule="ChangePoint",
            stream=f"log-growth iid, {LAYERS} layers, common {common:g}",
            run=on(lambda rng, common=common: grown(layers(rng, common))),  # type: ignore[misc]
            part=0.1,
            at_most=at_most,
            run_length=RUN_LENGTH if common == 0 else None,
        )
        for common in (0.0, 0.5, 0.9)
    ]
    changes: dict[str, Callable[[np.random.Generator], Streams]] = {
        "log-growth iid + 1 sd": lambda rng: grown(step_from(iid(rng, 1, LENGTH), CHANGE, 1)),
        "log-growth iid + 2 sd": lambda rng: grown(step_from(iid(rng, 1, LENGTH), CHANGE, 2)),
        "log-growth AR(.5) + 2 sd": lambda rng: grown(step_from(HEALTHY["AR(.5)"](rng, 1, LENGTH), CHANGE, 2)),
        "log-growth AR(.9) + 2 sd": lambda rng: grown(step_from(HEALTHY["AR(.9)"](rng, 1, LENGTH), CHANGE, 2)),
        "level saturating, slope 2 % a look": lambda rng: (
            saturating(HEALTHY["saturating trend"](rng, 1, LENGTH))
            * np.exp(slope_from(np.zeros((1, LENGTH)), CHANGE, 0.02))
        ),
        "level saturating, slope 5 % a look": lambda rng: (
            saturating(HEALTHY["saturating trend"](rng, 1, LENGTH))
            * np.exp(slope_from(np.zeros((1, LENGTH)), CHANGE, 0.05))
        ),
        "level iid + 2 sd (one jump)": lambda rng: level(step_from(iid(rng, 1, LENGTH), CHANGE, 2)),
        f"log-growth iid + 2 sd, {MOVED_LAYERS} of {LAYERS} layers": lambda rng: grown(
            step_from(layers(rng, 0.0), CHANGE, 2, MOVED_LAYERS)
        ),
    }
    for name, make_changed in changes.items():
        part = 0.1 if "layers" in name else 0.3
        cases.append(Case(rule="ChangePoint", stream=name, run=on(make_changed), part=part, changes=True))
    return cases


def limit_cases() -> list[Case]:
    def on(healthy: Generator, size: float = 0.0) -> Callable[[int], Run]:
        """Probes whose drift has, in the long run, a mean of exactly the limit; and each its own noise of 20 %."""

        def run(seed: int) -> Run:
            rng = np.random.default_rng([2, seed])
            probe = np.exp(SPREAD * rng.standard_normal((NUM_PROBES, 1)) - SPREAD**2 / 2)
            noise = healthy(rng, NUM_PROBES, LENGTH)
            is_trend = healthy is HEALTHY["saturating trend"]
            course = np.maximum(noise, 0) / 10 if is_trend else 1 + 0.2 * noise
            drift = LIMIT * probe * step_from(course, CHANGE, size)
            means, errors = drift.mean(0), drift.std(0, ddof=1) / math.sqrt(NUM_PROBES)
            looks = [
                Findings(step=step, readings=(reading(step, float(mean), stderr=float(error)),))
                for step, (mean, error) in enumerate(zip(means, errors, strict=True))
            ]
            rule = Limit(METRIC, above=LIMIT)
            verdict = rule.verdict(looks[-1])
            return replace(followed(rule, looks), fails=verdict.outcome == "fail")

        return run

    cases = [
        Case(rule=rule, stream=f"mean at the limit, {name}", run=on(healthy), share=share, at_most=at_most)
        for rule, share, at_most in (("Limit, one look", "look", LEVEL), ("Limit, whole run", "run", None))
        for name, healthy in HEALTHY.items()
    ]
    for more in (0.3, 1.0):
        name = f"iid, {100 * more:.0f} % above the limit"
        cases.append(Case(rule="Limit, whole run", stream=name, run=on(iid, more), part=0.3, changes=True))
    return cases


def envelope_cases() -> list[Case]:
    num_pilots = pilots_for(LEVEL)

    def on(healthy: Generator, change: Callable[[Streams], Streams] = lambda stream: stream) -> Callable[[int], Run]:
        """Fresh pilots for each run: the promise is one over both."""

        def run(seed: int) -> Run:
            streams = healthy(np.random.default_rng([3, seed]), num_pilots + 1, LENGTH)
            curves = Curves(
                metric=METRIC,
                group="",
                hookpoint="",
                scale="log",
                steps=tuple(range(LENGTH)),
                values=tuple(tuple(row) for row in level(streams[:-1]).tolist()),
            )
            names = tuple(f"pilot {number}" for number in range(num_pilots))
            pilots = Pilots(
                reference="",
                probes="",
                schedule="",
                recipe={},
                names=names,
                fingerprints=names,
                num_centre=split(num_pilots),
                left_out=(),
                curves={log_key(METRIC): curves},
            )
            return followed(Envelope(pilots, METRIC, level=LEVEL), looks_at(level(change(streams[-1:]))))

        return run

    cases = [
        Case(rule=f"Envelope, {num_pilots} pilots", stream=f"level {name}", run=on(healthy), at_most=LEVEL)
        for name, healthy in HEALTHY.items()
    ]
    changes: dict[str, Callable[[Streams], Streams]] = {
        "+ 2 sd": lambda stream: step_from(stream, CHANGE, 2),
        "+ 4 sd": lambda stream: step_from(stream, CHANGE, 4),
        "slope 0.2 sd a look": lambda stream: slope_from(stream, CHANGE, 0.2),
    }
    for name, change in changes.items():
        cases.append(
            Case(
                rule=f"Envelope, {num_pilots} pilots",
                stream=f"level saturating trend, {name}",
                run=on(HEALTHY["saturating trend"], change),
                part=0.1,
                changes=True,
            )
        )
    return cases


def group_shift_cases() -> list[Case]:
    group_of = tuple(f"group {number}" for number in range(GROUPS) for _ in range(PER_GROUP))
    info = MetricInfo(name=METRIC, unit="nats/token", low=0, high=math.inf, direction="", estimator="")
    scope = Scope(metrics={METRIC: info}, groups=dict.fromkeys(dict.fromkeys(group_of), PER_GROUP), group_of=group_of)
    #: One rule for all runs of a process: dealing the arrangements out takes longer than some looks.
    rule = GroupShift(METRIC, permutations=2000)
    rule.check(scope)
    fresh = rule.state_dict()

    def on(healthy: Generator, own: float, factor: float = 1.0, length: int = 100) -> Callable[[int], Run]:
        """Probes that differ by a factor of their own, and each with its own stream beside; group 0 moves."""

        def run(seed: int) -> Run:
            rng = np.random.default_rng([4, seed])
            stream = healthy(rng, len(group_of), length)
            logs = own * rng.standard_normal((len(group_of), 1)) + math.sqrt(1 - own**2) * stream
            logs = step_from(logs, length // 2, math.log(factor), PER_GROUP)
            drift = torch.from_numpy(0.1 * np.exp(logs))
            rule.load_state_dict(fresh)
            return followed(rule, [Findings(step=step, by_probe={METRIC: drift[:, step]}) for step in range(length)])

        return run

    return [
        Case(rule="GroupShift", stream="probes differ, iid noise", run=on(iid, 0.8), at_most=LEVEL),
        Case(rule="GroupShift", stream="heavy tails", run=on(HEALTHY["heavy tails"], 0.5), at_most=LEVEL),
        Case(rule="GroupShift", stream="AR(.5)", run=on(HEALTHY["AR(.5)"], 0.5), at_most=LEVEL),
        Case(rule="GroupShift", stream="AR(.9)", run=on(HEALTHY["AR(.9)"], 0.5), at_most=LEVEL),
        Case(rule="GroupShift", stream="saturating trend", run=on(HEALTHY["saturating trend"], 0.5), at_most=LEVEL),
        Case(rule="GroupShift", stream="group 0 times 2", run=on(iid, 0.8, 2.0), part=0.3, changes=True),
        Case(rule="GroupShift", stream="group 0 times 4", run=on(iid, 0.8, 4.0), part=0.3, changes=True),
    ]


CASES = [*change_point_cases(), *limit_cases(), *envelope_cases(), *group_shift_cases()]


def one_run(job: tuple[int, int]) -> tuple[int, Run]:
    """The case's number and what became of one run of it; with numbers, so that processes can be told."""
    case, seed = job
    return case, CASES[case].run(seed)


def row_of(case: Case, runs: Sequence[Run]) -> Row:
    middle = runs[0].length // 2
    if case.share == "look":
        counted = sum(run.fails for run in runs)
    else:
        counted = sum(any(alarm < middle or not case.changes for alarm in run.alarms) for run in runs)
    num_alarms = sum(len(run.alarms) for run in runs)
    # A run that alarmed falsely may still be in breach, and has nothing left to detect.
    clean = [run for run in runs if not any(alarm < middle for alarm in run.alarms)]
    delays = [run.alarms[0] - middle + 1 for run in clean if run.alarms]
    is_run_length = case.rule == "ChangePoint" and not case.changes
    return Row(
        rule=case.rule,
        stream=case.stream,
        num_runs=len(runs),
        false_alarms=counted / len(runs),
        interval=binomial_interval(counted, len(runs)),
        share=case.share,
        num_alarms=num_alarms,
        at_most=case.at_most,
        run_length=sum(run.length for run in runs) / max(num_alarms, 1) if is_run_length else None,
        run_length_promised=case.run_length,
        missed=1 - len(delays) / len(clean) if case.changes and clean else None,
        delay=statistics.median(delays) if case.changes and delays else None,
    )


def table(rows: Sequence[Row]) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = (
        f"{'rule':<20} {'runs where':<44} {'runs':>5} {'false alarms':>12} {'95 % interval':>14} {'promised':>8} "
        f"{'run length':>10} {'promised':>8} {'missed':>6} {'delay':>5}"
    )
    lines = [
        f"{row.rule:<20} {row.stream:<44} {row.num_runs:>5} {row.false_alarms:>12.3f} "
        f"{row.interval[0]:>6.3f} .. {row.interval[1]:.3f} {number(row.at_most, '.3g'):>8} "
        f"{number(row.run_length, '.0f'):>10} {number(row.run_length_promised, '.0f'):>8} "
        f"{number(row.missed, '.2f'):>6} {number(row.delay, 'g'):>5}"
        + ("  missed its promise" if row.is_missed else "")
        for row in rows
    ]
    return "\n".join([head, *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="healthy runs of each kind (layers: a tenth of them)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="rules whose names begin so")
    parser.add_argument("--quick", action="store_true", help="two runs of each kind, or one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_runs = 2 if options.quick else options.runs
    chosen = [number for number, case in enumerate(CASES) if case.rule.startswith(tuple(options.only))]
    jobs = [(number, seed) for number in chosen for seed in range(max(1, round(num_runs * CASES[number].part)))]
    began = time.perf_counter()
    runs: dict[int, list[Run]] = {number: [] for number in chosen}
    if options.workers > 1:
        # Forked, so that the cases, which are functions, need not be sent.
        with multiprocessing.get_context("fork").Pool(options.workers) as pool:
            for number, run in pool.imap(one_run, jobs, chunksize=16):
                runs[number].append(run)
    else:
        for number, run in map(one_run, jobs):
            runs[number].append(run)
    rows = [row_of(CASES[number], runs[number]) for number in chosen]
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {time.perf_counter() - began:.0f} s")
    print(f"{LENGTH} looks a run (GroupShift: 100); a change comes in the middle. A false alarm is a run with one, for")
    print("`Limit, one look` a run whose last look, judged by itself, fails.")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    missed = [row for row in rows if row.is_missed]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} rows within what is promised.")
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
