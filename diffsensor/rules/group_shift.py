"""Which groups of probes have moved more than the others, against chance: by permuting the probes' labels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from diffsensor.errors import ConfigError, listed
from diffsensor.rules.arguments import require_finite, require_looks, require_severity, require_texts
from diffsensor.rules.select import Select
from diffsensor.types import ALL_PROBES, FIXED_BANK, Findings, Judgement, Reading, Scope, Severity, Signal, log_key

#: So many looks into the run, half of the level is spent.
HALF_SPENT = 20
#: A probe's drift counts as no less than this share of the median one: the logarithm of next to nothing would outweigh
#: all others.
LEAST_SHARE = 0.1


@final
class GroupShift:
    """Which groups have moved more than the others: a permutation test on the log of each probe's drift.

        GroupShift("kl_ref_live")

    Each probe is compared with the reference on its own text, so its drift is a paired difference. The statistic of a
    group is z = (mean log drift in the group - mean of all others) / (s sqrt(1/n + 1/m)), s the spread over all n + m
    probes; one-sided, for groups that moved more. The null: which probe bears which label has nothing to do with how
    far it drifts, at any look. Under it the labels as they are are one arrangement among many, drawn once for the run
    (all of them where they are at most `permutations`). At look k, floor(level (B + 1) k / (k + 20)) of these B + 1
    arrangements may have crossed, those with the largest z of any group first, and a group is found where its own z is
    among them. So under the null the probability that any group is ever found, in a run of any length, is at most
    `level`. It holds for all groups at once, whatever the dependence between groups and looks, so it bounds the false
    discovery rate over groups, too. That is a theorem where no group moved more; where some did, the others are
    compared with a rest that moved more, which lowers their z, but no bound is proven. Half of the level is spent in
    the first 20 looks; later, a few looks may pass until the next crossing is allowed. Fewer permutations make such
    gaps longer: with 10 000, and a level of 0.05, about 5 looks at look 200.

    A group that was found is in breach until its p at one look, (1 + arrangements with a larger z of any group) /
    (1 + B), is above the level. That p, at each look and not corrected for the number of looks, is its evidence.

    Blind to a group that moves with all others, or less. A group that by its nature answers more freely drifts farther
    on any fine-tune, and is found, too: the rule says which groups moved more, not that they should not have. It tells
    nothing while there is no measurable drift; less than a tenth of the median drift, 0 and below too, counts as a
    tenth. Probes without a number (no counted position) are left out. A group with too few probes to reach half of the
    level is "unknown", at every look; where all are, the rule is refused.

    It warns and never stops a run by itself: groups that drift differently are no fault as such.

    Source: Westfall and Young, Resampling-based multiple testing (1993), for the maximum over groups.

    Arguments:
        metric: one that is read on the outputs for each probe, and never negative.
        level: how likely a run in which labels mean nothing ever finds a group, at most.
        permutations: how many arrangements of the labels are drawn.
        seed: of these draws.
        cooldown: after an alert on a group, further ones within so many looks are counted, not sent.
        severity: "info", "warning" or "critical".
        name: tells rules apart; by default what it says: "kl_ref_live moves more in a group".
    """

    may_stop = False

    def __init__(
        self,
        metric: str = "kl_ref_live",
        *,
        level: float = 0.05,
        permutations: int = 10_000,
        seed: int = 0,
        severity: Severity = "warning",
        cooldown: int = 20,
        name: str | None = None,
    ) -> None:
        require_texts("GroupShift", metric=metric)
        self._metric = metric
        self.name = f"{metric} moves more in a group" if name is None else name
        require_texts("GroupShift", name=self.name)
        require_finite(self.name, "level", level)
        require_looks(self.name, "cooldown", cooldown, at_least=0)
        require_severity(self.name, severity)
        if not 0 < level < 1:
            raise ConfigError(f"The rule {self.name!r} was given level={level!r}. Give a share between 0 and 1.")
        for argument, number in (("permutations", permutations), ("seed", seed)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigError(f"The rule {self.name!r} was given {argument}={number!r}. Give a whole number.")
        enough = math.ceil(2 / level) - 1
        if permutations < enough:
            raise ConfigError(
                f"The rule {self.name!r} was given permutations={permutations}, with which half of the level {level:g} "
                f"is never reached. Give at least {enough}; 10000 are plenty."
            )
        self._level, self._permutations, self._seed = level, permutations, seed
        self.severity: Severity = severity
        self.cooldown = cooldown
        self._bank = FIXED_BANK
        self._group_of: tuple[str, ...] = ()
        self._looks = 0
        self._left_out: list[int] | None = None
        self._crossed: list[int] = []
        self._since: dict[str, int] = {}
        self._deal: _Deal | None = None

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset({self._metric})

    def check(self, scope: Scope) -> None:
        info = Select(self._metric).check(scope, self.name)
        known = sorted(
            name for name, other in scope.metrics.items() if other.at == "outputs" and other.by_group and other.low >= 0
        )
        hint = f" Metrics of which it can: {listed(known)}."
        if info is None or info.at != "outputs" or not info.by_group:
            raise ConfigError(
                f"The rule {self.name!r} compares the drift of single probes, and {self._metric} has none.{hint}"
            )
        if info.low < 0:
            raise ConfigError(
                f"The rule {self.name!r} compares logarithms, and {self._metric} may be negative (from {info.low:g})."
                + hint
            )
        if scope.is_rolling:
            raise ConfigError(
                f"The rule {self.name!r} compares the same probes look by look, and the bank {scope.bank!r} holds "
                "others at each look. Give it to a monitor of fixed probes, or limit a group: Limit(metric, group=...)."
            )
        sizes = _sizes(scope.group_of)
        if len(sizes) < 2:
            raise ConfigError(
                f"The rule {self.name!r} compares groups with one another, but the probes have "
                f"{'no groups' if not sizes or ALL_PROBES in sizes else 'only one'}. Give the probes groups."
            )
        names = [name for name in sizes if name != ALL_PROBES]
        if not any(self._reaches(name, sizes) for name in names):
            raise ConfigError(
                f"The rule {self.name!r} has too few probes for the level {self._level:g}: "
                + "; ".join(self._too_few(name, sizes) for name in names[:3])
                + f". Give at least {self._enough_for(len(names))} probes in each of {len(names)} groups, or a higher "
                "level."
            )
        self._bank = scope.bank
        self._group_of = tuple(scope.group_of)
        self._deal = None

    def _smallest_p(self, name: str, sizes: Mapping[str, int]) -> float:
        """No group of this size gets a smaller one: any of its size may be the one with the largest drifts."""
        alike = sum(size == sizes[name] for other, size in sizes.items() if other != ALL_PROBES)
        return alike / math.comb(sum(sizes.values()), sizes[name])

    def _reaches(self, name: str, sizes: Mapping[str, int]) -> bool:
        return self._smallest_p(name, sizes) <= self._level / 2

    def _too_few(self, name: str, sizes: Mapping[str, int]) -> str:
        return (
            f"group {name!r} has {sizes[name]} of {sum(sizes.values())} probes, so that its p is never below "
            f"{self._smallest_p(name, sizes):.2g}"
        )

    def _enough_for(self, num_groups: int) -> int:
        groups = [str(number) for number in range(max(num_groups, 2))]
        return next(n for n in range(1, 10_000) if self._reaches(groups[0], dict.fromkeys(groups, n)))

    def update(self, findings: Findings) -> Judgement:
        if self._metric not in findings.by_probe:
            return self._unknown(f"{self._metric} was not read for each probe")
        drift = findings.by_probe[self._metric].detach().cpu().double().numpy()
        if len(drift) != len(self._group_of):
            return self._unknown(f"{self._metric} was read for {len(drift)} probes, not {len(self._group_of)}")
        if self._left_out is None:
            self._left_out = np.flatnonzero(np.isnan(drift)).tolist()
        counted = np.ones(len(drift), dtype=bool)
        counted[self._left_out] = False
        if not np.isfinite(drift[counted]).all():
            return self._unknown(f"{self._metric} is not finite on a probe that had a number before")
        if self._deal is None:
            self._deal = self._dealt(counted)
        if not self._deal.groups:
            return self._unknown(f"{self._metric} has a number for too few probes, {int(counted.sum())}")
        logs = _logs(drift[counted])
        whole = [
            reading
            for reading in findings.readings
            if reading.metric == self._metric and reading.group == ALL_PROBES and not reading.hookpoint
        ]
        if logs is None or any(not reading.is_measurable for reading in whole):
            self._since.clear()
            return self._judgement({name: _Found() for name in self._deal.groups}, findings.step)
        return self._judgement(self._found(self._deal, logs, findings.step), findings.step)

    def _dealt(self, counted: Bool[ndarray, " probe"]) -> "_Deal":
        labels = [group for group, counts in zip(self._group_of, counted, strict=True) if counts]
        sizes = _sizes(labels)
        groups = [name for name in sizes if name != ALL_PROBES and self._reaches(name, sizes)]
        return _Deal.of(labels, groups, self._permutations, self._seed)

    def _found(self, deal: "_Deal", logs: Float[ndarray, " probe"], step: int) -> dict[str, "_Found"]:
        """What each group's z and p are, and whether it is found. The arrangements that cross now are remembered."""
        gaps = deal.gaps(logs)
        # Sums in another order differ in their last digits, and ties must be ties.
        z = np.round(gaps / deal.spreads(logs), 9)
        largest = z.max(1)
        self._looks += 1
        spent = math.floor(self._level * len(largest) * self._looks / (self._looks + HALF_SPENT))
        allowed = spent - len(self._crossed)
        is_left = np.ones(len(largest), dtype=bool)
        is_left[self._crossed] = False
        found = {}
        for number, name in enumerate(deal.groups):
            reaches = largest >= z[0, number]
            p = float(reaches.mean())
            if p > self._level:
                self._since.pop(name, None)
            # Beside the arrangement as it is, which is the first.
            elif name not in self._since and int((reaches & is_left)[1:].sum()) < allowed:
                self._since[name] = step
            found[name] = _Found(p=p, times=math.exp(gaps[0, number]))
        if allowed > 0:
            left = np.flatnonzero(is_left)
            left = left[np.argsort(-largest[left], kind="stable")]
            # Those that are tied cross together or not at all: which of them is the one as it is cannot be told.
            while 0 < allowed < len(left) and largest[left[allowed - 1]] == largest[left[allowed]]:
                allowed -= 1
            self._crossed += left[:allowed].tolist()
        return found

    def _judgement(self, found: Mapping[str, "_Found"], step: int) -> Judgement:
        assert self._deal is not None
        signals = []
        for name in dict.fromkeys(self._group_of):
            if name == ALL_PROBES:
                continue
            if name in found:
                signals.append(self._signal(name, found[name], step))
            else:
                few = self._too_few(name, {name: 0} | self._deal.sizes) + f" and cannot reach the level {self._level:g}"
                signals.append(Signal(subject=self._subject(name), state="unknown", what=few))
        return Judgement(
            signals=tuple(signals), evidence=tuple(self._evidence(name, found[name], step) for name in found)
        )

    def _signal(self, name: str, found: "_Found", step: int) -> Signal:
        assert self._deal is not None
        is_found = name in self._since
        advice = "Look at that group's lines of the token table, and whether the training data should have touched it."
        return Signal(
            subject=self._subject(name),
            state="breach" if is_found else "quiet",
            what=f"{self._metric} in group {name!r} is {found.times:.3g} times that in the other probes (geometric "
            f"means; p = {found.p:.2g} at this look over {len(self._deal.groups)} groups, level {self._level:g} for "
            "the whole run)",
            since=self._since.get(name, -1),
            reading=self._evidence(name, found, step),
            threshold=self._level,
            advice=advice if is_found else "",
        )

    def _evidence(self, name: str, found: "_Found", step: int) -> Reading:
        return Reading(
            step=step,
            sensor="group_shift",
            metric=f"{self._metric}_group_shift_p",
            value=found.p,
            unit="p of one look",
            bank=self._bank,
            group=name,
        )

    def _subject(self, name: str) -> str:
        return log_key(self._metric, bank=self._bank, group=name)

    def _unknown(self, what: str) -> Judgement:
        groups = [name for name in dict.fromkeys(self._group_of) if name != ALL_PROBES]
        return Judgement(
            signals=tuple(Signal(subject=self._subject(name), state="unknown", what=what) for name in groups)
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "looks": self._looks,
            "left_out": None if self._left_out is None else list(self._left_out),
            "crossed": list(self._crossed),
            "since": dict(self._since),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._looks, self._crossed, self._since = state["looks"], list(state["crossed"]), dict(state["since"])
        self._left_out = None if state["left_out"] is None else list(state["left_out"])
        self._deal = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one look says of one group: its p, and how many times as far it moved as the others."""

    p: float = 1.0
    times: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deal:
    """Arrangements of the labels over the probes; the first is the one as it is.

    Each row of `orders` puts the probes into the order of `sizes`: so many bear the first label, then so many the
    next."""

    groups: tuple[str, ...]
    sizes: dict[str, int]
    orders: Int[ndarray, "arrangement probe"]

    @classmethod
    def of(cls, labels: Sequence[str], groups: Sequence[str], permutations: int, seed: int) -> "_Deal":
        sizes = _sizes(labels)
        as_it_is = [number for name in sizes for number, label in enumerate(labels) if label == name]
        count = math.factorial(len(labels))
        for size in sizes.values():
            count //= math.factorial(size)
        if count <= permutations:
            every = _arrangements(as_it_is, list(sizes.values()))
            rows = [as_it_is, *(row for row in every if row != as_it_is)]
        else:
            shuffled = np.random.default_rng(seed).permuted(np.tile(as_it_is, (permutations, 1)), axis=1)
            return cls(groups=tuple(groups), sizes=sizes, orders=np.concatenate([np.array([as_it_is]), shuffled]))
        return cls(groups=tuple(groups), sizes=sizes, orders=np.array(rows))

    def gaps(self, logs: Float[ndarray, " probe"]) -> Float[ndarray, "arrangement group"]:
        """Mean in each group minus mean of all others."""
        sizes = np.array([*self.sizes.values()])
        sums = np.add.reduceat((logs - logs.mean())[self.orders], np.cumsum(sizes) - sizes, axis=1)
        # Centred, the sums in and out add up to 0.
        gaps = sums * (1 / sizes + 1 / (len(logs) - sizes))
        return gaps[:, [list(self.sizes).index(name) for name in self.groups]]

    def spreads(self, logs: Float[ndarray, " probe"]) -> Float[ndarray, " group"]:
        """The standard error of each gap, if all probes were alike."""
        sizes = np.array([self.sizes[name] for name in self.groups])
        return (float(logs.std(ddof=1)) or 1.0) * np.sqrt(1 / sizes + 1 / (len(logs) - sizes))


def _sizes(labels: Sequence[str]) -> dict[str, int]:
    return {name: labels.count(name) for name in dict.fromkeys(labels)}


def _arrangements(probes: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Every way to give the labels out, each once: the probes of the first label, then those of the next."""
    if len(sizes) == 1:
        yield list(probes)
        return
    for chosen in combinations(probes, sizes[0]):
        rest = [probe for probe in probes if probe not in chosen]
        for others in _arrangements(rest, sizes[1:]):
            yield [*chosen, *others]


def _logs(drift: Float[ndarray, " probe"]) -> Float[ndarray, " probe"] | None:
    """The logarithms, none far below the others; None where nothing has moved."""
    moved = drift[drift > 0]
    if not len(moved):
        return None
    logs: Float[ndarray, " probe"] = np.log(np.maximum(drift, LEAST_SHARE * np.median(moved)))
    return logs
