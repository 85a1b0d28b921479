"""False alarms of the rules on real healthy fine-tunes, and what they find of faults.

    python benchmarks/bench_benign.py [--healthy 130] [--mixed 70] [--bad 20] [--workers 2] [--quick] [--json FILE]

The runs are those of fine_tunes.py (made now where they are not on disk: 15 minutes on two cores). For each way of
training the first 28 healthy runs are pilots (9 for the centre line, 19 for the threshold, which allows a level of
5 %), and the other healthy ones are tested. All rules judge kl_ref_live over all probes:

    Limit                above 1.25 x the largest reading of the pilots, 2 looks in a row, with its 95 % lower bound
    Envelope             of the 28 pilots, at a level of 5 %
    ChangePoint          as it comes, and with a warm-up of 8 looks (a run has 38)

A run has a false alarm if the rule is in breach at any look. Intervals are exact binomial ones (Clopper and Pearson):
over test runs they hold for these pilots, while the level of an envelope is promised on average over sets of pilots. So
that is shown, too: five sets that share no run, each with the other runs as tests, and 200 random ones, which do share
runs and are not independent.

Of a fault are shown: the share of runs found at or after its first step, how many readings later (median), and the
AUROC of the rule's largest evidence in the run against that of healthy runs (of the task for `flips`). Below, the same
AUROC for scores without a rule: raw drift, and the residual of log drift that a ridge regression on the pilots'
progress does not explain. The latter was to be a rule, `Unexpected`; it is one only if it beats raw drift.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from fine_tunes import FAULTS, FULL, HEALTHY, QUICK, Run, runs_of
from numpy import ndarray
from streams import binomial_interval

from diffsensor import Reading, cache_directory
from diffsensor.protocols import Rule
from diffsensor.rules.change_point import ChangePoint
from diffsensor.rules.envelope import Envelope
from diffsensor.rules.limit import Limit
from diffsensor.rules.pilots import PilotRun, Pilots, gather

METRIC, LEVEL, MULTIPLE = "kl_ref_live", 0.05, 1.25
ON_TARGET, OFF_TARGET = "docstrings", "code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What one rule said of one run: the looks at which it was in breach, and its largest evidence."""

    breaches: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    family: str
    rule: str
    fault: str
    runs: int
    alarms: int
    share: float
    low: float
    high: float
    delay: float = math.nan
    early: int = 0
    auroc: float = math.nan


def series(run: Run, metric: str = METRIC, group: str = "") -> ndarray:
    return np.array(
        [one.value for look in run.looks for one in look.readings if one.metric == metric and one.group == group]
    )


def pilots_of(runs: Sequence[Run]) -> Pilots:
    return gather(
        [
            PilotRun(
                name=f"{run.told.fault}-{run.told.seed}",
                reference="",
                probes="",
                schedule="",
                readings=tuple(
                    one for look in run.looks for one in look.readings if one.metric == METRIC and not one.group
                ),
            )
            for run in runs
        ]
    )


def passed(rule: Rule, run: Run, evidence: Callable[[Reading], bool]) -> Passed:
    """One run past a rule that has seen none yet."""
    breaches, score = [], -math.inf
    for look in run.looks:
        judgement = rule.update(look)
        if any(signal.state == "breach" for signal in judgement.signals):
            breaches.append(look.step)
        seen = [one.value for one in (*judgement.evidence, *look.readings) if evidence(one)]
        score = max([score, *seen])
    return Passed(breaches=tuple(breaches), score=score)


def rules_of(pilots: Sequence[Run], level: float) -> dict[str, tuple[Callable[[], Rule], Callable[[Reading], bool]]]:
    """How each rule is made, and which readings are its evidence."""
    limit = MULTIPLE * max(float(series(run).max()) for run in pilots)
    learnt = pilots_of(pilots)
    return {
        f"Limit {MULTIPLE} x largest": (
            lambda: Limit(METRIC, above=limit),
            lambda one: one.metric == METRIC and not one.group,
        ),
        f"Envelope {100 * level:.2g} %": (
            lambda: Envelope(learnt, METRIC, level=level),
            lambda one: one.sensor == "envelope",
        ),
        "ChangePoint": (lambda: ChangePoint(METRIC), lambda one: one.sensor == "change_point"),
        "ChangePoint warm_up=8": (
            lambda: ChangePoint(METRIC, warm_up=8),
            lambda one: one.sensor == "change_point",
        ),
    }


def auroc(healthy: Sequence[float], bad: Sequence[float]) -> float:
    pairs = np.subtract.outer(np.array(bad), np.array(healthy))
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def comparable(fault: str, healthy: Sequence[Run]) -> list[int]:
    """The healthy runs that a fault is told from: labels are flipped where there are labels."""
    return [place for place, run in enumerate(healthy) if fault != "flips" or run.told.kind == "task"]


def judged(
    family: str, pilots: Sequence[Run], tests: Sequence[Run], bad: dict[str, list[Run]], level: float
) -> list[Row]:
    rows = []
    for name, (make, evidence) in rules_of(pilots, level).items():
        healthy = [passed(make(), run, evidence) for run in tests]
        alarms = sum(bool(one.breaches) for one in healthy)
        rows.append(_row(family, name, HEALTHY, len(tests), alarms))
        for fault, runs in bad.items():
            found = [(run.told.onset, passed(make(), run, evidence)) for run in runs]
            times = [next((step for step in one.breaches if step >= onset), None) for onset, one in found]
            every = runs[0].looks[1].step - runs[0].looks[0].step
            delays = [(step - onset) / every for (onset, _), step in zip(found, times, strict=True) if step is not None]
            against = [healthy[place].score for place in comparable(fault, tests)]
            rows.append(
                _row(
                    family,
                    name,
                    fault,
                    len(runs),
                    len(delays),
                    delay=statistics.median(delays) if delays else math.nan,
                    early=sum(any(step < onset for step in one.breaches) for onset, one in found),
                    auroc=auroc(against, [one.score for _, one in found]),
                )
            )
    return rows


def _row(family: str, rule: str, fault: str, runs: int, alarms: int, **more: float) -> Row:
    low, high = binomial_interval(alarms, runs)
    early = int(more.pop("early", 0))
    return Row(
        family=family, rule=rule, fault=fault, runs=runs, alarms=alarms, share=alarms / runs, low=low, high=high,
        early=early, **more,
    )  # fmt: skip


def alarm_share(pilots: Sequence[Run], tests: Sequence[Run], level: float) -> float:
    learnt = pilots_of(pilots)
    return statistics.mean(
        bool(passed(Envelope(learnt, METRIC, level=level), run, lambda one: False).breaches) for run in tests
    )


def scores(pilots: Sequence[Run]) -> dict[str, Callable[[Run], float]]:
    """Scores of a run without a rule, by name: raw drift, and what progress does not explain of it."""

    def log_kl(run: Run) -> ndarray:
        return np.log(series(run)[1:])

    def log_ratio(run: Run) -> ndarray:
        return np.log(series(run, METRIC, OFF_TARGET)[1:]) - np.log(series(run, METRIC, ON_TARGET)[1:])

    def growth(values: ndarray, looks: int = 12) -> ndarray:
        return np.array([value - values[max(0, at - looks) : at + 1].mean() for at, value in enumerate(values)])

    def log_growth(run: Run) -> ndarray:
        return growth(log_kl(run))

    def by_step(run: Run) -> ndarray:
        return np.eye(len(run.looks) - 1)

    def by_rates(run: Run) -> ndarray:
        learnt = np.log(np.cumsum(series(run, "learning_rate")[1:]))
        return np.stack([np.ones_like(learnt), learnt, learnt**2], 1)

    def by_start(run: Run) -> ndarray:
        step = np.log([look.step for look in run.looks[1:]])
        rate, loss = series(run, "learning_rate")[3], series(run, "loss")[0]  # after the warm-up, before any fault
        return np.stack([np.ones_like(step), step, step**2, *np.full((2, len(step)), [[math.log(rate)], [loss]])], 1)

    def by_all(run: Run) -> ndarray:
        rate, norm, loss = (series(run, name) for name in ("learning_rate", "update_norm", "loss"))
        smooth = np.array([loss[: at + 1][-5:].mean() for at in range(len(loss))])[1:]
        step = np.log([look.step for look in run.looks[1:]])
        learnt, moved = np.log(np.cumsum(rate[1:])), np.log(np.cumsum(norm[1:]))
        columns = [step, step**2, learnt, learnt**2, moved, np.log(rate[1:]), np.log(norm[1:]), smooth - loss[0]]
        return np.stack([np.ones_like(step), *columns, np.full_like(step, loss[0])], 1)

    def by_growth(run: Run) -> ndarray:
        columns = [growth(column) for column in by_all(run)[:, 1:].T]
        return np.stack([np.ones(len(columns[0])), *columns, *by_rates(run)[:, 1:].T], 1)

    def unexplained(target: Callable[[Run], ndarray], given: Callable[[Run], ndarray]) -> Callable[[Run], float]:
        design = np.concatenate([given(run) for run in pilots])
        centre, scale = design.mean(0), design.std(0)
        still = scale < 1e-9  # the constant, which is not penalised
        centre[still], scale[still] = 0.0, 1.0
        columns = (design - centre) / scale
        penalty = np.diag(np.where(still, 1e-9, 1.0))
        weights = np.linalg.solve(
            columns.T @ columns + penalty, columns.T @ np.concatenate([target(run) for run in pilots])
        )

        def left(run: Run) -> ndarray:
            return target(run) - ((given(run) - centre) / scale) @ weights

        rest = np.stack([left(run) for run in pilots])
        spread = np.sqrt((rest.var(0) + rest.var(0).mean()) / 2)
        return lambda run: float(((left(run) - rest.mean(0)) / spread).max())

    def online(run: Run) -> float:
        """Without pilots: each look against a ridge regression on the run's own looks before it, from the 8th."""
        steps = np.log([look.step for look in run.looks[1:]])
        given, values = np.stack([np.ones_like(steps), steps, by_rates(run)[:, 1]], 1), log_kl(run)
        surprises = []
        for at in range(min(8, len(values) - 1), len(values)):
            seen = given[:at]
            weights = np.linalg.solve(seen.T @ seen + 1e-3 * np.eye(3), seen.T @ values[:at])
            spread = (values[:at] - seen @ weights).std() + 1e-9
            surprises.append(float((values[at] - given[at] @ weights) / spread))
        return max(surprises)

    return {
        "raw: largest KL": lambda run: float(log_kl(run).max()),
        "raw: last KL": lambda run: float(log_kl(run)[-1]),
        "raw: KL for its step": unexplained(log_kl, by_step),
        "KL given step, learning rate": unexplained(log_kl, by_rates),
        "KL given step, rate, 1st loss": unexplained(log_kl, by_start),
        "KL given all progress": unexplained(log_kl, by_all),
        "KL given own looks before": online,
        "raw: growth for its step": unexplained(log_growth, by_step),
        "growth given rate, 1st loss": unexplained(log_growth, by_start),
        "growth given all progress": unexplained(log_growth, by_growth),
        "off/on target for its step": unexplained(log_ratio, by_step),
        "off/on target given all": unexplained(log_ratio, by_all),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=130, help="healthy runs of one recipe")
    parser.add_argument("--mixed", type=int, default=70, help="healthy runs of mixed ways of training")
    parser.add_argument("--bad", type=int, default=20, help="runs of each fault, in each family")
    parser.add_argument("--pilots", type=int, default=28)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--quick", action="store_true", help="a toy model and a few runs: seconds, and no true rates")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    size, level, directory = FULL, LEVEL, options.cache or cache_directory()
    if options.quick:
        size, level = QUICK, 1 / 4
        options.healthy, options.mixed, options.bad, options.pilots, options.workers = 10, 8, 1, 5, 1
    rows: list[Row] = []
    missed: list[str] = []
    sets: dict[str, list[float]] = {}
    areas: dict[str, dict[str, dict[str, float]]] = {}
    for family, number in (("same", options.healthy), ("mixed", options.mixed)):
        healthy = list(runs_of(size, directory, family, HEALTHY, number, options.workers))
        bad = {fault: list(runs_of(size, directory, family, fault, options.bad, options.workers)) for fault in FAULTS}
        pilots, tests = healthy[: options.pilots], healthy[options.pilots :]
        rows += judged(family, pilots, tests, bad, level)
        areas[family] = {
            name: {
                fault: auroc([score(tests[place]) for place in comparable(fault, tests)], [score(run) for run in runs])
                for fault, runs in bad.items()
            }
            for name, score in scores(pilots).items()
        }
        places = range(len(healthy))
        starts = range(0, min(len(healthy) - options.pilots, 4 * options.pilots) + 1, options.pilots)
        apart = [places[start : start + options.pilots] for start in starts]
        draw = np.random.default_rng(0)
        drawn = [draw.permutation(len(healthy))[: options.pilots] for _ in range(4 if options.quick else 200)]
        shares = {
            kind: [
                alarm_share(
                    [healthy[place] for place in chosen],
                    [healthy[place] for place in places if place not in set(chosen)],
                    level,
                )
                for chosen in some
            ]
            for kind, some in (("apart", apart), ("drawn", drawn))
        }
        sets |= {f"{family}, {kind}": found for kind, found in shares.items()}
        # Over all ways to draw pilots and one test run the share is at most the level; over 200 it is near that.
        error = statistics.stdev(shares["drawn"]) / math.sqrt(len(drawn))
        if statistics.mean(shares["drawn"]) > level + 3 * error:
            missed.append(f"Envelope on {family}: {statistics.mean(shares['drawn']):.1%} of healthy runs alarm")
    _show(rows, sets, areas)
    missed += [
        f"{row.rule} on {row.family}: {row.share:.1%} of healthy runs alarm"
        for row in rows
        if row.fault == HEALTHY and row.rule.startswith("Limit") and row.low > LEVEL
    ]
    for line in missed:
        print(f"missed: {line}")
    if options.json:
        content = {"rows": [asdict(row) for row in rows], "sets": sets, "auroc": areas, "missed": missed}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if missed and not options.quick else 0


def _show(rows: Sequence[Row], sets: dict[str, list[float]], areas: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'runs':<6} {'rule':<22} {'healthy runs with an alarm':<36}")
    for row in (row for row in rows if row.fault == HEALTHY):
        told = f"{row.alarms} of {row.runs} = {row.share:.1%} ({row.low:.1%} to {row.high:.1%})"
        print(f"{row.family:<6} {row.rule:<22} {told}")
    print("\nEnvelope with other pilots: healthy runs with an alarm")
    for name, found in sets.items():
        each = ", ".join(f"{share:.1%}" for share in found) if len(found) < 10 else f"{len(found)} sets"
        print(f"{name:<14} mean {statistics.mean(found):.1%}  ({each})")
    print("\nfaults: found at or after the first step, readings later, runs with an alarm before it, AUROC")
    print(f"{'runs':<6} {'rule':<22}" + "".join(f"{fault:^26}" for fault in FAULTS))
    for family, rule in dict.fromkeys((row.family, row.rule) for row in rows):
        cells = [
            f"{row.share:>5.0%} {row.delay:>5.1f} {row.early:>3} {row.auroc:>6.2f}".center(26)
            for row in rows
            if (row.family, row.rule) == (family, rule) and row.fault != HEALTHY
        ]
        print(f"{family:<6} {rule:<22}" + "".join(cells))
    print("\nAUROC of scores without a rule")
    print(f"{'runs':<6} {'score':<30}" + "".join(f"{fault:>8}" for fault in FAULTS) + f"{'mean':>8}")
    for family, scored in areas.items():
        for name, found in scored.items():
            cells = "".join(f"{found[fault]:>8.2f}" for fault in FAULTS)
            print(f"{family:<6} {name:<30}{cells}{statistics.mean(found.values()):>8.2f}")
    print()


if __name__ == "__main__":
    sys.exit(main())
