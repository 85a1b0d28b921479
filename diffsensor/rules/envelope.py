"""An envelope around healthy runs: the rule for when you have recorded some and want a stated rate of false alarms."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from diffsensor.errors import ConfigError, listed, unknown
from diffsensor.rules.arguments import require_finite, require_looks, require_severity, require_texts
from diffsensor.rules.pilots import Curves, Pilots, calibration_for, differing, pilots_for, read_pilots
from diffsensor.rules.select import EACH, PROGRESS, Select
from diffsensor.types import ALL_PROBES, WORST_GROUP, Findings, Judgement, Reading, Scope, Severity, Signal, Verdict

Side = Literal["above", "below", "both"]
#: A breach is over when the deviation is back at this share of the threshold.
BACK = 0.9


@final
class Envelope:
    """A run is further from the centre line of healthy pilots than those pilots allow.

        Envelope("pilots.json")                 # of `diffsensor calibrate RECORD... -o pilots.json`

    Each reading becomes a deviation, (x - centre) / scale, with x on the scale of its metric (the logarithm of a KL)
    and centre and scale those of one part of the pilots at this step. A pilot of the other part is scored by its
    largest deviation over all steps (and over all groups and hookpoints, where "*" is given); the threshold is the
    k-th largest of those m scores. A healthy run that is trained and read as the pilots were then breaches at any
    step, in any group, with a probability of at most k/(m + 1): split conformal prediction, which asks only that pilots
    and run could be exchanged for one another. This is the level of one rule in one run; two rules may add theirs up.

    It promises nothing for another recipe, and `check` refuses one. It does not see what moves within the envelope, nor
    a step that not every pilot read: there, and beyond their last step, it says "unknown". Where a pilot reads 0 on a
    log scale (at the first step, before any update) a 0 is quiet, and anything else is "unknown".

    A breach ends when the deviation is back at 0.9 of the threshold. Its evidence is the largest deviation of the look,
    a reading in standard deviations of the pilots; `threshold` is what it is compared with. As a criterion of a gate it
    judges one look by itself: fail outside, pass inside, else unknown.

    Source: Lei et al., Distribution-free predictive inference for regression, JASA 2018 (split conformal).

    Arguments:
        pilots: the file, or pilots that were read from it.
        metric: what is read, or what the loop tells of its progress ("loss"); the pilots must have it.
        group: "" for all probes, a group's name, "worst" for the group that reads worst, "*" for each of them.
        hookpoint: for metrics on activations: a hookpoint's name, or "*" for each of them.
        level: the probability that a healthy run breaches; None for the lowest that so many pilots allow.
        side: "above", "below", or "both" for a deviation either way.
        severity: "info", "warning" or "critical".
        cooldown: after an alert on a subject, further ones within so many looks are counted, not sent.
        name: tells rules apart; by default what it says.
    """

    may_stop = True

    def __init__(
        self,
        pilots: Pilots | str | os.PathLike[str],
        metric: str = "kl_ref_live",
        *,
        group: str = ALL_PROBES,
        hookpoint: str = "",
        level: float | None = None,
        side: Side = "above",
        severity: Severity = "warning",
        cooldown: int = 20,
        name: str | None = None,
    ) -> None:
        require_texts("Envelope", metric=metric, group=group, hookpoint=hookpoint)
        self._select = Select(metric, group, hookpoint)
        self._pilots = pilots if isinstance(pilots, Pilots) else read_pilots(pilots)
        self._side: Side = side
        self.severity: Severity = severity
        self.cooldown = cooldown
        given = ("" if side == "above" else f", side={side}") + ("" if level is None else f", level={level:g}")
        self.name = f"{self._select} in the envelope{given}" if name is None else name
        require_texts("Envelope", name=self.name)
        require_looks(self.name, "cooldown", cooldown, at_least=0)
        require_severity(self.name, severity)
        if side not in get_args(Side):
            raise ConfigError(f"The rule {self.name!r} cannot be built. " + unknown("side", str(side), get_args(Side)))
        self._lines = self._drawn()
        allowed = self._allowed(level)
        #: The probability with which a healthy run breaches at most.
        self.level = allowed / (self._pilots.num_calibration + 1)
        self.threshold = sorted(self._scores(), reverse=True)[allowed - 1]
        if self.threshold == math.inf:
            raise ConfigError(
                f"The rule {self.name!r} could never be breached: all pilots for its centre line read the same "
                "numbers, and one for its threshold read others. Record more pilots, or judge another metric."
            )
        self._subjects: tuple[str, ...] = ()
        self._breached: list[str] = []

    def _drawn(self) -> "dict[str, _Line]":
        curves = {key: one for key, one in self._pilots.curves.items() if _takes(self._select, one)}
        if not curves:
            raise ConfigError(
                f"The rule {self.name!r} cannot be built: the pilots did not read {self._select}. They have "
                f"{listed(self._pilots.curves)}. Calibrate with this metric, or use one of these."
            )
        lines = {key: _Line.through(one, self._pilots.num_centre) for key, one in curves.items()}
        if still := [key for key, line in lines.items() if not line.at]:
            raise ConfigError(
                f"The rule {self.name!r} cannot be built: at each step some pilot reads 0 for {listed(still)}, which "
                "has no place on a log scale. Record pilots that train."
            )
        return lines

    def _allowed(self, level: float | None) -> int:
        """How many of the pilots that set the threshold may lie outside."""
        if level is None:
            return 1
        require_finite(self.name, "level", level)
        if not 0 < level < 1:
            raise ConfigError(f"The rule {self.name!r} was given level={level!r}. Give a share such as 0.05.")
        number = self._pilots.num_calibration
        allowed = min(math.floor(level * (number + 1) + 1e-9), number)
        if allowed == 0:
            raise ConfigError(
                f"The rule {self.name!r} was given level={level:g}, which needs {calibration_for(level)} pilots for "
                f"the threshold, {pilots_for(level)} in all. There are {number} of {len(self._pilots.names)}, which "
                f"allow {self._pilots.level:.2g}. Record more healthy runs, or leave level out."
            )
        return allowed

    def _scores(self) -> list[float]:
        """The largest deviation of each pilot that sets the threshold."""
        return [
            max(
                self._deviation(self._lines[key], step, curves.values[pilot][column])
                for key, curves in self._pilots.curves.items()
                if key in self._lines
                for column, step in enumerate(curves.steps)
                if step in self._lines[key].at
            )
            for pilot in range(self._pilots.num_centre, len(self._pilots.names))
        ]

    def _deviation(self, line: "_Line", step: int, value: float) -> float:
        deviation = line.deviation(step, value)
        return {"above": deviation, "below": -deviation, "both": abs(deviation)}[self._side]

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset({self._select.metric})

    def check(self, scope: Scope) -> None:
        self._select.check(scope, self.name)
        for what in ("probes", "reference", "schedule", "recipe"):
            if differences := differing(what, getattr(scope, what), getattr(self._pilots, what)):
                told = listed(f"{name} {one} here, {other} there" for name, one, other in differences)
                raise ConfigError(
                    f"The rule {self.name!r} has pilots of another kind than this run: {told}. What is usual there "
                    "says nothing about here. Record pilots of this recipe and calibrate with them."
                )
        self._subjects = tuple(self._select.subjects(scope))
        if missing := [subject for subject in self._subjects if subject not in self._lines]:
            raise ConfigError(
                f"The rule {self.name!r} is to judge {listed(missing)}, which the pilots did not read. They have "
                f"{listed(self._lines)}. Calibrate with records that have it, or choose one of these."
            )

    def update(self, findings: Findings) -> Judgement:
        now = self._select.readings(findings)
        subjects = dict.fromkeys([*(self._subjects or self._lines), *now])
        seen = {subject: self._seen(subject, now.get(subject), findings.step) for subject in subjects}
        return Judgement(
            signals=tuple(self._signal(subject, seen[subject], now.get(subject)) for subject in subjects),
            evidence=self._evidence(seen, now, findings.step),
        )

    def _signal(self, subject: str, seen: "_Seen", reading: Reading | None) -> Signal:
        if seen.deviation is None:
            # It cannot be told whether a breach has ended, so it has not.
            return Signal(subject=subject, state="unknown", what=seen.what, reading=reading, threshold=seen.threshold)
        end = BACK * self.threshold if subject in self._breached and self.threshold > 0 else self.threshold
        is_breach = seen.deviation > end
        self._breached = sorted({*self._breached, subject} if is_breach else {*self._breached} - {subject})
        return Signal(
            subject=subject,
            state="breach" if is_breach else "quiet",
            what=seen.what,
            reading=reading,
            threshold=seen.threshold,
            advice=_advice(self._select) if is_breach else "",
        )

    def _evidence(self, seen: "Mapping[str, _Seen]", now: Mapping[str, Reading], step: int) -> tuple[Reading, ...]:
        """The largest deviation, where there is one."""
        finite = {
            subject: one.deviation
            for subject, one in seen.items()
            if one.deviation is not None and math.isfinite(one.deviation)
        }
        if not finite:
            return ()
        most = max(finite, key=lambda subject: finite[subject])
        evidence = Reading(
            step=step,
            sensor="envelope",
            metric=f"{self._select.metric}_deviation",
            value=finite[most],
            unit="standard deviations of the pilots",
            bank=now[most].bank,
            group=self._select.group,
            hookpoint=self._select.hookpoint,
            note=f"of {most}; the threshold is {self.threshold:.3g}",
        )
        return (evidence,)

    def _seen(self, subject: str, reading: Reading | None, step: int) -> "_Seen":
        line = self._lines.get(subject)
        if reading is None:
            return _Seen(what=f"{subject} was not read")
        told = f"{subject.removeprefix('diffsensor/')} is {reading.value:.3g}{_unit(reading)}"
        if math.isnan(reading.value):
            return _Seen(what=f"{told}, which cannot be compared")
        if line is None:
            return _Seen(what=f"{told}, which the pilots did not read")
        if step in line.zeros:
            what = f"{told} at step {step}, where pilots read 0"
            return _Seen(what=what, deviation=-math.inf if reading.value == 0 else None)
        if step not in line.at:
            steps = sorted(line.at)
            return _Seen(
                what=f"{told} at step {step}, which not every pilot read ({len(steps)} steps from {steps[0]} to "
                f"{steps[-1]} have all of them)"
            )
        deviation = self._deviation(line, step, reading.value)
        center, scale = line.at[step]
        upwards = self._side == "above" or (self._side == "both" and reading.value >= line.back(center))
        limit = line.back(center + (1 if upwards else -1) * self.threshold * scale)
        where = "above" if upwards else "below"
        verdict = f"{where} {limit:.3g}" if deviation > self.threshold else f"not {where} {limit:.3g}"
        chance = f"a healthy run is there at some step with probability at most {100 * self.level:.2g} %"
        what = f"{told}, {verdict} (pilots at step {step}: {line.back(center):.3g}; {chance})"
        return _Seen(what=what, deviation=deviation, threshold=limit)

    def verdict(self, findings: Findings) -> Verdict:
        now = self._select.readings(findings)
        subjects = dict.fromkeys([*(self._subjects or self._lines), *now])
        seen = {subject: self._seen(subject, now.get(subject), findings.step) for subject in subjects}
        worst = max(subjects, key=lambda subject: self._rank(seen[subject]))
        deviation, reading = seen[worst].deviation, now.get(worst)
        outcome: Literal["pass", "fail", "unknown"] = "unknown"
        if deviation is not None:
            outcome = "fail" if deviation > self.threshold else "pass"
        return Verdict(
            step=findings.step,
            outcome=outcome,
            reason=f"{seen[worst].what}.",
            rule=self.name,
            subject=worst,
            value=math.nan if reading is None else reading.value,
            stderr=math.nan if reading is None else reading.stderr,
            threshold=seen[worst].threshold,
            unit="" if reading is None else reading.unit,
        )

    def _rank(self, seen: "_Seen") -> tuple[int, float]:
        """What fails is worse than what is unknown, and that than what passes."""
        if seen.deviation is None:
            return 1, 0.0
        return (2 if seen.deviation > self.threshold else 0), seen.deviation

    def state_dict(self) -> dict[str, Any]:
        return {"breached": list(self._breached)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._breached = list(state["breached"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What one reading is against the envelope. `deviation` is None where that cannot be told."""

    what: str
    deviation: float | None = None
    threshold: float = math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """The centre and the scale by step, on the metric's own scale. At the steps in `zeros` a pilot reads 0 on a log."""

    is_log: bool
    at: Mapping[int, tuple[float, float]]
    zeros: frozenset[int]

    @classmethod
    def through(cls, curves: Curves, num_centre: int) -> "_Line":
        is_log = curves.scale == "log"
        columns = dict(zip(curves.steps, zip(*curves.values, strict=True), strict=True))
        zeros = frozenset(step for step, column in columns.items() if is_log and min(column) <= 0)
        centre = {
            step: [math.log(value) if is_log else value for value in column[:num_centre]]
            for step, column in columns.items()
            if step not in zeros
        }
        at = _centre_and_scale(centre)
        return cls(is_log=is_log, at=at, zeros=zeros)

    def deviation(self, step: int, value: float) -> float:
        centre, scale = self.at[step]
        if self.is_log:
            value = math.log(value) if value > 0 else -math.inf
        if scale == 0:
            return 0.0 if value == centre else math.copysign(math.inf, value - centre)
        return (value - centre) / scale

    def back(self, position: float) -> float:
        if not self.is_log:
            return position
        return math.exp(position) if position < 700 else math.inf


def _centre_and_scale(columns: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation at each step, half of the variance taken from all steps together.

    A few runs tell little of the variance at one step. Any scale is valid; a better one finds more.
    """
    means = {step: math.fsum(column) / len(column) for step, column in columns.items()}
    own = {
        step: math.fsum((value - means[step]) ** 2 for value in column) / (len(column) - 1)
        for step, column in columns.items()
    }
    overall = math.fsum(own.values()) / len(own) if own else 0.0
    return {step: (means[step], math.sqrt((own[step] + overall) / 2)) for step in columns}


def _takes(select: Select, curves: Curves) -> bool:
    fits_group = curves.group not in (ALL_PROBES, WORST_GROUP) if select.group == EACH else curves.group == select.group
    return curves.metric == select.metric and fits_group and select.hookpoint in (EACH, curves.hookpoint)


def _unit(reading: Reading) -> str:
    return "" if reading.sensor == PROGRESS else f" {reading.unit}"


def _advice(select: Select) -> str:
    return (
        f"Compare this run with the pilots: its data, its learning rate, its seed; then look at the groups and tokens "
        f"that moved since, and lower the learning rate or stop if {select.metric} goes on."
    )
