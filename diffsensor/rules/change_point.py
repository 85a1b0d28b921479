"""Whether a metric has begun to grow faster than it did, without a limit and without pilots."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from random import Random
from statistics import NormalDist
from typing import Any, final

import numpy as np
from jaxtyping import Float

from diffsensor.errors import ConfigError
from diffsensor.rules.arguments import require_finite, require_looks, require_severity, require_texts
from diffsensor.rules.select import Select
from diffsensor.types import ALL_PROBES, FIXED_BANK, Findings, Judgement, Reading, Scope, Severity, Signal, log_key

#: How far, in standard deviations, what is bet on has moved: one bet each.
SHIFTS = (0.5, 1.0, 2.0)
#: How many growths are remembered at each hookpoint. Ranks among all there ever were would need unbounded state.
MEMORY = 200
#: The first look at which the evidence was this high is taken for the beginning of the change.
RISING = 0.5
#: Values are compared between these, so that a ratio is never infinite.
SMALLEST, LARGEST = 1e-100, 1e100


@final
class ChangePoint:
    """The metric grows faster than it used to: a Shiryaev-Roberts e-detector on ranks of its whitened log-growth.

        ChangePoint("relative_l2", hookpoint="*")

    At each look the growth g_t = log(value_t / value_(t-1)) is whitened with the AR(1) coefficient of the growths
    before it (corrected for its bias in short series), r_t = g_t - phi g_(t-1), and r_t is ranked among the last 200
    such. Where nothing changes, each rank is as likely as any other, and a bet on high ranks multiplies its stake by e
    with mean 1: n times the probability of the rank's cell, (k/n, (k+1)/n) in the normal quantiles, after a shift of
    0.5, 1 or 2 standard deviations. M_t = (M_(t-1) + 1) e_t, averaged over the three shifts and over the hookpoints or
    groups; an alarm is raised at M_t >= `run_length`, and then everything is learnt anew, so that one change is told
    once and what follows is compared with what follows. Bets are on growth alone: a run whose drift slows down, as
    healthy ones do, loses them. The signal is "breach" at the look of the alarm only.

    What is promised: where the residuals of one stream are exchangeable, the mean number of readings until a false
    alarm is at least `run_length`. That is a theorem for ranks among all residuals of one stream. It is approximate,
    and measured in `benchmarks/bench_false_alarms.py`, for the whitened residuals, beyond 200 readings, and for the
    mean over hookpoints where these depend on one another in a way that is not the same at all times. It is no promise
    about a single run: one of n readings raises a false alarm with a probability of at most about n / `run_length`.

    Blind to a jump of one look, however high (one rank is worth little; use `Limit`), to a growth that rises so slowly
    that it becomes usual, to growth that slows down or to a shrinking drift, and to all of the first `warm_up` looks,
    also after an alarm. A look is a look, however many steps it is from the last. A value of 0 or below, or below 3
    noise floors, is no measurable drift and has no growth: such a look is left out. A look at which something was not
    read, or is not finite, is "unknown" and leaves that stream as it was.

    Its evidence log(1 + M) / log(1 + run_length), cut at 1, is a reading between 0 and 1.

    It warns and never stops a run by itself.

    Source: Shin, Ramdas, Rinaldo, E-detectors (2023), with the ranks of Vovk, Testing randomness online (2021).

    Arguments:
        metric: what is read, never negative; or what the loop tells of its progress ("loss").
        group: "" for all probes, a group's name, "worst", or "*" for the mean over groups.
        hookpoint: for metrics on activations: a hookpoint's name, or "*" for the mean over hookpoints.
        run_length: how many readings, on average, until a false alarm, at least; 1/alpha.
        warm_up: how many residuals are only learnt from.
        cooldown: after an alert, further ones within so many looks are counted, not sent.
        severity: "info", "warning" or "critical".
        name: tells rules apart; by default what it says: "kl_ref_live grows faster".
    """

    may_stop = False

    def __init__(
        self,
        metric: str,
        *,
        group: str = ALL_PROBES,
        hookpoint: str = "",
        run_length: float = 2000,
        warm_up: int = 20,
        severity: Severity = "warning",
        cooldown: int = 0,
        name: str | None = None,
    ) -> None:
        require_texts("ChangePoint", metric=metric, group=group, hookpoint=hookpoint)
        self._select = Select(metric, group, hookpoint)
        self.name = f"{self._select} grows faster" if name is None else name
        require_texts("ChangePoint", name=self.name)
        require_finite(self.name, "run_length", run_length)
        require_looks(self.name, "warm_up", warm_up, at_least=5)
        require_looks(self.name, "cooldown", cooldown, at_least=0)
        require_severity(self.name, severity)
        if warm_up >= MEMORY:
            raise ConfigError(
                f"The rule {self.name!r} was given warm_up={warm_up}, but it remembers {MEMORY} looks. Give fewer, "
                "such as 20."
            )
        if run_length < 2:
            raise ConfigError(
                f"The rule {self.name!r} was given run_length={run_length!r}. It is how many readings pass, on "
                "average, until a false alarm: give at least 2, such as 2000."
            )
        self._run_length, self._warm_up = float(run_length), warm_up
        self.severity: Severity = severity
        self.cooldown = cooldown
        self._bank = FIXED_BANK
        self._subjects: tuple[str, ...] = ()
        self._streams: dict[str, _Stream] = {}
        self._rising_since = -1

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset({self._select.metric})

    def check(self, scope: Scope) -> None:
        info = self._select.check(scope, self.name)
        if info is not None and info.low < 0:
            known = sorted(name for name, other in scope.metrics.items() if other.low >= 0 and other.at == info.at)
            hint = f" Did you mean {known[0]!r}?" if known else ""
            raise ConfigError(
                f"The rule {self.name!r} compares how fast {info.name} grows, but it may be negative (from "
                f"{info.low:g}), and then it has no growth rate. Give a distance.{hint}"
            )
        self._bank = scope.bank
        self._subjects = tuple(self._select.subjects(scope))

    def update(self, findings: Findings) -> Judgement:
        now = self._select.readings(findings)
        subjects = dict.fromkeys([*self._subjects, *self._streams, *now])
        missing = [subject for subject in subjects if subject not in now or not math.isfinite(now[subject].value)]
        for subject in subjects:
            stream = self._streams.setdefault(subject, _Stream())
            if subject not in missing and now[subject].is_measurable:
                stream.take(now[subject].value, self._warm_up, subject)
        of_each = {subject: sum(self._streams[subject].bets) / len(SHIFTS) for subject in subjects}
        total = sum(of_each.values()) / max(len(of_each), 1)
        evidence = self._evidence(total, findings.step)
        if evidence.value < RISING:
            self._rising_since = -1
        elif self._rising_since < 0:
            self._rising_since = findings.step
        signal = self._signal(total, of_each, evidence, missing)
        if signal.state == "breach":
            self._rising_since = -1
            for stream in self._streams.values():
                stream.forget()
        return Judgement(signals=(signal,), evidence=(evidence,))

    def _evidence(self, total: float, step: int) -> Reading:
        return Reading(
            step=step,
            sensor="change_point",
            metric=f"{self._select.metric}_change_point_evidence",
            value=min(math.log1p(total) / math.log1p(self._run_length), 1.0),
            unit="log(1 + M) / log(1 + run length)",
            bank=self._bank,
            group=self._select.group,
            hookpoint=self._select.hookpoint,
        )

    def _signal(self, total: float, of_each: Mapping[str, float], evidence: Reading, missing: list[str]) -> Signal:
        subject = log_key(
            self._select.metric, bank=self._bank, group=self._select.group, hookpoint=self._select.hookpoint
        )
        if total >= self._run_length:
            return Signal(
                subject=subject,
                state="breach",
                what=f"{self._what(of_each)}; the evidence is {total:.3g} and the alarm at {self._run_length:g} (about "
                f"one false alarm in {self._run_length:g} readings, or fewer)",
                since=self._rising_since,
                reading=evidence,
                threshold=1.0,
                advice="Look at what the run was given since then: its data, its learning rate, its token table.",
            )
        if missing or not of_each:
            what = f"{missing[0] if missing else subject} was not read or is not finite"
            return Signal(subject=subject, state="unknown", what=what, reading=evidence, threshold=1.0)
        learnt = min(stream.num_residuals for stream in self._streams.values())
        what = f"{self._select} grows as before: the evidence of a change is {evidence.value:.2f} and the alarm at 1"
        if learnt < self._warm_up:
            what = f"{self._select} is learnt: {learnt} of {self._warm_up} looks"
        return Signal(subject=subject, state="quiet", what=what, reading=evidence, threshold=1.0)

    def _what(self, of_each: Mapping[str, float]) -> str:
        most = max(of_each, key=lambda subject: of_each[subject])
        growths = self._streams[most].growths
        where = f", most in {most}" if len(of_each) > 1 else ""
        factor, usual = math.exp(np.mean(growths[-5:])), math.exp(np.median(growths))
        return (
            f"{self._select} has begun to grow faster{where}: by a factor of {factor:.3g} a look over the last five, "
            f"where {usual:.3g} was usual"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rising_since": self._rising_since,
            "streams": {subject: asdict(stream) for subject, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rising_since = state["rising_since"]
        self._streams = {subject: _Stream(**kept) for subject, kept in state["streams"].items()}


@dataclass(slots=True, kw_only=True)
class _Stream:
    """One metric in one place: its last value (0 before the first), its growths, and what each bet has come to."""

    last: float = 0.0
    seen: int = 0
    growths: list[float] = field(default_factory=list)
    bets: list[float] = field(default_factory=lambda: [0.0] * len(SHIFTS))

    @property
    def num_residuals(self) -> int:
        return max(len(self.growths) - 1, 0)

    def take(self, value: float, warm_up: int, subject: str) -> None:
        if value < SMALLEST:
            return
        value = min(value, LARGEST)
        # A quotient, because the difference of two logarithms would depend on the unit in its last digits.
        growth = math.log(value / self.last) if self.last > 0 else None
        self.last = value
        self.seen += 1
        if growth is None:
            return
        if self.num_residuals >= warm_up:
            residuals = whitened(self.growths, growth)
            below, tied = int((residuals[:-1] < residuals[-1]).sum()), int((residuals[:-1] == residuals[-1]).sum())
            if tied:
                # Drawn among those tied, a rank is as likely as any other; and a resumed run draws the same.
                below += Random(f"{subject}:{self.seen}").randrange(tied + 1)
            self.bets = [(bet + 1) * e for bet, e in zip(self.bets, e_values(below, len(residuals)), strict=True)]
        self.growths = [*self.growths, growth][-MEMORY:]

    def forget(self) -> None:
        self.growths, self.bets = [], [0.0] * len(SHIFTS)


def whitened(growths: Iterable[float], growth: float) -> Float[np.ndarray, " look"]:
    """What an AR(1) model of the growths before the last one leaves of each; the last one's is the last.

    The coefficient is that of least squares, plus (1 + 3 phi) / n for its bias in a series of n (Marriott and Pope,
    1954): without it the residuals of a slow series stay correlated and raise false alarms.
    """
    series = np.array([*growths, growth])
    past = series[:-1]
    before, after = past[:-1] - past.mean(), past[1:] - past.mean()
    spread = float(before @ before)
    if spread <= 1e-24 * float(past @ past):  # all the same, but for rounding
        return series[1:]
    phi = float(before @ after) / spread
    phi = min(max(phi + (1 + 3 * phi) / len(past), -0.95), 0.99)
    return series[1:] - phi * series[:-1]


@lru_cache(maxsize=1 << 16)
def e_values(below: int, num: int) -> tuple[float, ...]:
    """What each bet pays where `below` of `num` residuals, the newest among them, are below the newest.

    num P(z_k < Z + shift < z_(k+1)) with Z normal and z_k its quantiles at k / num: over all ranks the mean is 1.
    """
    normal = NormalDist()
    low = normal.inv_cdf(below / num) if below else -math.inf
    high = normal.inv_cdf((below + 1) / num) if below + 1 < num else math.inf
    return tuple(num * (normal.cdf(high - shift) - normal.cdf(low - shift)) for shift in SHIFTS)
