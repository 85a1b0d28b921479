"""A limit on one metric, with hysteresis: the rule for when you know how much drift is too much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, final

from diffsensor.errors import ConfigError
from diffsensor.rules.arguments import require_finite, require_looks, require_severity, require_texts
from diffsensor.rules.select import EACH, PROGRESS, ROLLOUTS, Select
from diffsensor.statistics import interval
from diffsensor.types import (
    ALL_PROBES,
    FIXED_BANK,
    WORST_GROUP,
    Findings,
    Judgement,
    MetricInfo,
    Reading,
    Scope,
    Severity,
    Signal,
    Verdict,
)

#: How many jumps between two looks say what is usual.
_JUMPS = 9
#: So many usual jumps inside the limit it is no noise that brought the value there: for white noise they are 5.7
#: standard deviations, for noise with an autocorrelation of 0.5 they are 4.
_FAR = 6.0
#: Nearer to the limit than that, a breach takes so many times as many looks to end.
_NEAR = 5


@final
class Limit:
    """A metric is above (or below) a limit: its confidence bound over probes is, `for_` looks in a row.

        Limit("kl_ref_live", above=0.3, group="*")

    A breach begins after `for_` looks in a row at which the one-sided bound is beyond the limit: for `above` the lower
    t bound over probes, for `below` the upper one, each on the scale of its metric. Where a reading has no standard
    error the value itself is compared, for `below` with what its `bound` leaves open added.

    It is over once the value is back at `clear` or past it, `for_` looks in a row, and there farther from the limit
    than by 6 times the usual jump between two looks (the median of the last 9); or else after 5 times as many looks in
    a row. To enter, the bound is compared, so that a few probes that happen to read high raise no alert; to leave, the
    value, so that the gap between the two grows with the error. The jumps keep noise from ending a breach that hovers
    at the limit, where 10 % would not do; and still one that is truly over ends within a few looks, so that the next
    one is found.

    A look at which a subject was not read, or is NaN, is "unknown", and neither adds to a count nor resets it. A
    reading below 3 noise floors counts as 0.

    The level, 1 - `confidence`, holds for one subject at one look, for the mean over all probes of the kind of which
    these are a sample. It is not divided by the number of groups, and "worst" picks the group that reads worst: with
    many groups some bound exceeds a true mean more often. A limit says nothing of a drift that stays below it.

    As a criterion of a gate it judges one look by itself: fail where the bound shows the metric beyond the limit, pass
    where the bound on the other side shows it within, else unknown. With several subjects the worst one decides.

    Arguments:
        metric: what is read, or what the loop tells of its progress ("loss").
        above, below: the limit, in the metric's unit; one of the two.
        group: "" for all probes, a group's name, "worst" for the group that reads worst, "*" for each by itself.
        hookpoint: for metrics on activations: a hookpoint's name, or "*" for each by itself.
        clear: where a breach ends; by default a tenth of the limit's size away from it, on the good side (for a limit
            of 0 that is 0).
        for_: how many looks in a row beyond the limit make a breach.
        cooldown: after an alert on a subject, further ones within so many looks are counted, not sent.
        severity: "info", "warning" or "critical".
        confidence: of the one-sided bound, above 0.5 and below 1.
        name: tells rules apart; by default what it says: "kl_ref_live in each group above 0.3".
    """

    may_stop = True

    def __init__(
        self,
        metric: str,
        *,
        above: float | None = None,
        below: float | None = None,
        group: str = ALL_PROBES,
        hookpoint: str = "",
        clear: float | None = None,
        for_: int = 2,
        cooldown: int = 20,
        severity: Severity = "warning",
        confidence: float = 0.95,
        name: str | None = None,
    ) -> None:
        require_texts("Limit", metric=metric, group=group, hookpoint=hookpoint)
        self._select = Select(metric, group, hookpoint)
        if (above is None) == (below is None):
            raise ConfigError(
                f"The limit on {metric} was given above={above!r}, below={below!r}. Give one of the two; a metric that "
                "must stay between two limits has two rules."
            )
        limit = above if above is not None else below
        assert limit is not None
        self._side: Literal["above", "below"] = "above" if above is not None else "below"
        self._sign = 1.0 if above is not None else -1.0
        require_finite(f"limit on {metric}", self._side, limit)
        self._limit = float(limit)
        plain_clear = self._limit - self._sign * 0.1 * abs(self._limit)
        self._clear = plain_clear if clear is None else clear
        self._for, self._confidence = for_, confidence
        self.severity: Severity = severity
        self.cooldown = cooldown
        given = {
            "clear": (clear, None),
            "for_": (for_, 2),
            "cooldown": (cooldown, 20),
            "severity": (severity, "warning"),
            "confidence": (confidence, 0.95),
        }
        unusual = "".join(f", {argument}={value}" for argument, (value, usual) in given.items() if value != usual)
        self.name = f"{self._select} {self._side} {self._limit:.15g}{unusual}" if name is None else name
        self._require_arguments()
        self._clear = float(self._clear)
        self._subjects: tuple[str, ...] = ()
        self._standings: dict[str, _Standing] = {}

    def _require_arguments(self) -> None:
        require_texts("Limit", name=self.name)
        require_finite(self.name, "clear", self._clear)
        require_finite(self.name, "confidence", self._confidence)
        require_looks(self.name, "for_", self._for, at_least=1)
        require_looks(self.name, "cooldown", self.cooldown, at_least=0)
        require_severity(self.name, self.severity)
        if not 0.5 < self._confidence < 1:
            raise ConfigError(
                f"The rule {self.name!r} was given confidence={self._confidence!r}. Give a share above 0.5 and below "
                "1, such as 0.95."
            )
        if self._sign * (self._clear - self._limit) > 0:
            good = "at or below" if self._side == "above" else "at or above"
            raise ConfigError(
                f"The rule {self.name!r} was given clear={self._clear:g}, which is beyond its limit: a breach would "
                f"end while it lasts. Give one {good} {self._limit:g}, such as "
                f"{self._limit - self._sign * 0.1 * abs(self._limit):g}."
            )

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset({self._select.metric})

    def check(self, scope: Scope) -> None:
        info = self._select.check(scope, self.name)
        self._subjects = tuple(self._select.subjects(scope))
        if info is not None:
            self._require_reachable(info)
            self._require_worst_is_worst(info)

    def _require_reachable(self, info: MetricInfo) -> None:
        """Raise where no reading can be beyond the limit, or an unchanged model is, or no reading can end a breach."""
        given, range_ = f"{self._side}={self._limit:g}", f"{info.name} lies between {info.low:g} and {info.high:g}"
        if not info.low <= self._limit <= info.high or self._limit == (info.high if self._sign > 0 else info.low):
            raise ConfigError(
                f"The rule {self.name!r} was given {given}, but {range_} ({info.unit}).{self._meant(info)}"
            )
        if not _is_still_within(info, self._sign, self._limit):
            raise ConfigError(
                f"The rule {self.name!r} was given {given}, which an unchanged model, at 0, would breach already."
                + self._meant(info)
            )
        if not info.low <= self._clear <= info.high:
            raise ConfigError(
                f"The rule {self.name!r} was given clear={self._clear:g}, but {range_} ({info.unit}): no breach would "
                f"ever end. Give one between {min(max(info.low, 0.0), info.high):g} and {self._limit:g}."
            )

    def _meant(self, info: MetricInfo) -> str:
        """The closest limit that makes sense, as a sentence: another sign or side, a share in place of a percentage."""
        sides = {1.0: "above", -1.0: "below"}
        numbers = [self._limit, -self._limit, *([self._limit / 100, -self._limit / 100] if info.high == 1 else [])]
        for number in numbers:
            for sign in (self._sign, -self._sign):
                if info.low < number < info.high and _is_still_within(info, sign, number):
                    return f" Did you mean {sides[sign]}={number:g}?"
        return f" Give a limit between {info.low:g} and {info.high:g}."

    def _require_worst_is_worst(self, info: MetricInfo) -> None:
        if self._select.group == WORST_GROUP and not (info.worst == "largest" and self._side == "above"):
            which = "furthest from zero" if info.worst == "furthest_from_zero" else "largest"
            raise ConfigError(
                f"The rule {self.name!r} was given group='worst' and {self._side}, but the worst group of {info.name} "
                f"is the one where it is {which}, and another may be further {self._side} the limit. Did you mean "
                "group='*', each by itself?"
            )

    def update(self, findings: Findings) -> Judgement:
        now = self._select.readings(findings)
        subjects = self._judged([*self._subjects, *self._standings], now)
        return Judgement(signals=tuple(self._signal(subject, now.get(subject), findings.step) for subject in subjects))

    def _judged(self, known: Sequence[str], now: Mapping[str, Reading]) -> list[str]:
        """What is known and what was read now, but for groups none of whose probes has a weight."""
        empty = {subject for subject, reading in now.items() if self._select.group == EACH and not reading.num_probes}
        return [subject for subject in dict.fromkeys([*known, *now]) if subject not in empty]

    def _signal(self, subject: str, reading: Reading | None, step: int) -> Signal:
        standing = self._standings.setdefault(subject, _Standing())
        if reading is None:
            return Signal(subject=subject, state="unknown", what=f"{subject} was not read", threshold=self._limit)
        seen = _Seen.of(reading, self._confidence)
        if self._is_unknown(seen):
            what = f"{_described(reading)} is {reading.value}, which is no drift that can be compared"
            return Signal(subject=subject, state="unknown", what=what, reading=reading, threshold=self._limit)
        self._follow(standing, seen, step)
        return Signal(
            subject=subject,
            state="breach" if standing.breached else "quiet",
            what=self._what(reading, seen, standing),
            since=standing.since if standing.breached else -1,
            reading=reading,
            threshold=self._limit,
            advice=_advice(reading) if standing.breached else "",
        )

    def _follow(self, standing: "_Standing", seen: "_Seen", step: int) -> None:
        distance = self._sign * (self._limit - seen.value)  # on the good side above 0
        is_back = self._sign * (self._clear - seen.value) >= 0
        if math.isfinite(seen.value):
            if standing.last is not None:
                standing.jumps = [*standing.jumps, abs(seen.value - standing.last)][-_JUMPS:]
            standing.last = seen.value
        noise = median(standing.jumps) if standing.jumps else 0.0
        standing.back = standing.back + 1 if is_back else 0
        standing.far_back = standing.far_back + 1 if is_back and distance >= _FAR * noise else 0
        if not self._is_beyond(seen):
            standing.beyond = 0
        else:
            standing.beyond += 1
            if standing.beyond == 1 and not standing.breached:
                standing.since = step
        if standing.breached:
            standing.breached = standing.far_back < self._for and standing.back < _NEAR * self._for
        else:
            standing.breached = standing.beyond >= self._for

    def _is_beyond(self, seen: "_Seen") -> bool:
        near = seen.low if self._side == "above" else seen.high
        return self._sign * (near - self._limit) > 0

    def _is_unknown(self, seen: "_Seen") -> bool:
        """Infinite on the bad side is beyond any limit; on the other it is as little a number as NaN."""
        return math.isnan(seen.value) or (math.isinf(seen.value) and not self._is_beyond(seen))

    def _what(self, reading: Reading, seen: "_Seen", standing: "_Standing") -> str:
        limit = f"the limit {self._limit:g}"
        if standing.beyond:
            verdict = f"{self._side} {limit}"
            if not standing.breached:
                verdict += f" for {standing.beyond} of {self._for} looks"
        elif standing.breached:
            verdict = f"after it was {self._side} {limit}, and not back at {self._clear:g} for long enough"
        elif self._sign * (seen.value - self._limit) > 0:
            verdict = f"not shown to be {self._side} {limit}"
        else:
            verdict = f"within {limit}"
        return f"{self._measured(reading, seen, self._near(seen))}, {verdict}"

    def _near(self, seen: "_Seen") -> str:
        """The bound that must be beyond the limit for a breach, in words."""
        low, high = f"at least {self._told(seen.low)}", f"at most {self._told(seen.high)}"
        return low if self._side == "above" else high

    def _far(self, seen: "_Seen") -> str:
        """The bound that must be within the limit for a pass."""
        low, high = f"at least {self._told(seen.low)}", f"at most {self._told(seen.high)}"
        return high if self._side == "above" else low

    def _measured(self, reading: Reading, seen: "_Seen", bound: str) -> str:
        """kl_ref_live of group 'code' is 0.34 nats/token (at least 0.31 with 95 % confidence)."""
        told = f"{_described(reading)} is {self._told(reading.value)}{_unit(reading)}"
        if not reading.is_measurable:
            return f"{told} (no measurable drift: below 3 noise floors of {reading.noise_floor:.2g})"
        if seen.has_error:
            return f"{told} ({bound} with {100 * self._confidence:g} % confidence)"
        return f"{told} (and may be up to {self._told(seen.high)})" if reading.bound > 0 else told

    def _told(self, number: float) -> str:
        """In three digits, or as many as it takes to tell it from the limit."""
        digits = 3
        while digits < 17 and number != self._limit and float(f"{number:.{digits}g}") == self._limit:
            digits += 1
        return f"{number:.{digits}g}"

    def verdict(self, findings: Findings) -> Verdict:
        now = self._select.readings(findings)
        subjects = self._judged(self._subjects, now)
        judged = [self._verdict(subject, now.get(subject), findings.step) for subject in subjects]
        if not judged:
            reason = f"{self._select} was not read."
            return Verdict(step=findings.step, outcome="unknown", reason=reason, rule=self.name, threshold=self._limit)
        order = {"pass": 0, "unknown": 1, "fail": 2}
        return max(judged, key=lambda each: (order[each[0].outcome], each[1]))[0]

    def _verdict(self, subject: str, reading: Reading | None, step: int) -> tuple[Verdict, float]:
        """The verdict on one subject, and by how much the bound that matters for it is beyond the limit."""
        if reading is None:
            verdict = Verdict(
                step=step,
                outcome="unknown",
                reason=f"{subject} was not read.",
                rule=self.name,
                subject=subject,
                threshold=self._limit,
            )
            return verdict, -math.inf
        seen = _Seen.of(reading, self._confidence)
        near, far = (seen.low, seen.high) if self._side == "above" else (seen.high, seen.low)
        limit = f"the limit {self._limit:g}"
        outcome: Literal["pass", "fail", "unknown"]
        if self._is_unknown(seen):
            outcome, reason = "unknown", f"{_described(reading)} is {reading.value}, which is no drift to be compared."
        elif self._is_beyond(seen):
            outcome = "fail"
            reason = f"{self._measured(reading, seen, self._near(seen))}, {self._side} {limit}."
        elif self._sign * (far - self._limit) <= 0:
            outcome, reason = "pass", f"{self._measured(reading, seen, self._far(seen))}, within {limit}."
        else:
            outcome, reason = "unknown", self._undecided(reading, seen)
        margin = self._sign * ((near if outcome == "fail" else far) - self._limit)
        verdict = Verdict(
            step=step,
            outcome=outcome,
            reason=reason,
            rule=self.name,
            subject=subject,
            value=reading.value,
            stderr=reading.stderr,
            threshold=self._limit,
            unit=reading.unit,
        )
        return verdict, -math.inf if math.isnan(margin) else margin

    def _undecided(self, reading: Reading, seen: "_Seen") -> str:
        question = f"which does not tell whether it is {self._side} {self._limit:g}"
        if seen.has_error and reading.is_measurable:
            bounds = f"{self._told(seen.low)} and {self._told(seen.high)}"
            return (
                f"{_described(reading)} is {self._told(reading.value)}{_unit(reading)} with {100 * self._confidence:g} "
                f"% bounds {bounds}, {question}; more probes would narrow them."
            )
        return f"{self._measured(reading, seen, '')}, {question}."

    def state_dict(self) -> dict[str, Any]:
        return {"subjects": {subject: asdict(standing) for subject, standing in self._standings.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._standings = {subject: _Standing(**standing) for subject, standing in state["subjects"].items()}


@dataclass(slots=True, kw_only=True)
class _Standing:
    """How one subject stands: looks in a row beyond the limit, since when, back at `clear`, and far back.

    `jumps` are the last differences between the values of two looks, `last` is the last value.
    """

    beyond: int = 0
    since: int = -1
    back: int = 0
    far_back: int = 0
    breached: bool = False
    last: float | None = None
    jumps: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What of a reading is compared: its value and the two one-sided bounds."""

    value: float
    low: float
    high: float
    has_error: bool

    @classmethod
    def of(cls, reading: Reading, confidence: float) -> "_Seen":
        value = reading.value
        # Each end of a two-sided interval with the confidence 2c - 1 is a one-sided bound with the confidence c.
        low, high = interval(value, reading.stderr, reading.num_probes, reading.scale, 2 * confidence - 1)
        has_error = not math.isnan(low)
        if not has_error:
            low = high = value
        high += reading.bound
        if not reading.is_measurable:
            value, low, high = 0.0, min(low, 0.0), max(high, 0.0)
        return cls(value=value, low=low, high=high, has_error=has_error)


def _is_still_within(info: MetricInfo, sign: float, limit: float) -> bool:
    """Whether an unchanged model, which reads 0 where that is in the range at all, does not breach the limit."""
    return sign * limit >= 0 or not info.low <= 0 <= info.high


def _described(reading: Reading) -> str:
    """kl_ref_live of group 'code'."""
    parts = [reading.metric]
    if reading.hookpoint:
        parts.append(f"at {reading.hookpoint!r}")
    if reading.group == WORST_GROUP:
        parts.append(f"of the worst group ({reading.note})" if reading.note else "of the worst group")
    elif reading.group:
        parts.append(f"of group {reading.group!r}")
    if reading.bank != FIXED_BANK:
        parts.append(f"on the bank {reading.bank!r}")
    return " ".join(parts)


def _unit(reading: Reading) -> str:
    """After a number: " nats/token", " (1 - cosine)"; nothing for what the loop tells, which has none."""
    if reading.sensor == PROGRESS:
        return ""
    return f" ({reading.unit})" if " " in reading.unit else f" {reading.unit}"


def _advice(reading: Reading) -> str:
    if reading.sensor == ROLLOUTS:
        return "Read completions of those steps beside their rewards, and compare with the readings on the probes."
    if reading.sensor == PROGRESS:
        return "Look at the batches and the learning rate of the steps since the last reading."
    if reading.hookpoint:
        return (
            "Compare the hookpoints and groups at that step to see where it moved most, then lower the learning rate "
            "or train fewer of the layers before it."
        )
    return (
        "Look at the token table of that step for what the model prefers now, then lower the learning rate or raise "
        "the KL coefficient."
    )
