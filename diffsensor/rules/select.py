"""Which readings a rule looks at: a metric, in one group or each of them, at one hookpoint or each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from diffsensor.errors import ConfigError, unknown
from diffsensor.metrics import FULL_METRICS
from diffsensor.types import ALL_PROBES, WORST_GROUP, Findings, MetricInfo, Reading, Scope, log_key

EACH = "*"
#: The sensor under whose name stands what the loop tells of its progress.
PROGRESS = "progress"
#: And that of what a trainer knows of its own completions.
ROLLOUTS = "rollouts"
#: And that of what a rolling bank holds.
BANK = "bank"
TOLD = frozenset({PROGRESS, ROLLOUTS, BANK})


@runtime_checkable
class Read(Protocol):
    """Something of which it is known what was read, and where: a reading, or many of them in a row."""

    @property
    def metric(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def hookpoint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Select:
    """The readings of one metric. `group` is a name, "" for all probes, "worst", or "*" for each group by itself.

    `hookpoint` is a name or "*", and "" for metrics on the outputs. A metric may also be what the loop tells of its
    progress, such as its loss.
    """

    metric: str
    group: str = ALL_PROBES
    hookpoint: str = ""

    def check(self, scope: Scope, rule: str) -> MetricInfo | None:
        """What the metric is, None for one that the loop tells; `ConfigError` unless such readings will be there."""
        info = require_metric(self.metric, scope, rule)
        if info is None:
            self._require_plain(rule)
            return None
        self._require_group(info, scope, rule)
        self._require_hookpoint(info, scope, rule)
        return info

    def subjects(self, scope: Scope) -> dict[str, tuple[str, str]]:
        """The log keys of the readings that there will be, with their group and hookpoint."""
        groups = list(scope.groups) if self.group == EACH else [self.group]
        hookpoints = list(scope.hookpoints) if self.hookpoint == EACH else [self.hookpoint]
        return {
            log_key(self.metric, bank=scope.bank, group=group, hookpoint=hookpoint): (group, hookpoint)
            for hookpoint in hookpoints
            for group in groups
        }

    def takes(self, read: "Read") -> bool:
        """Whether that is one of them."""
        fits = read.group not in (ALL_PROBES, WORST_GROUP) if self.group == EACH else read.group == self.group
        return read.metric == self.metric and fits and self.hookpoint in (EACH, read.hookpoint)

    def readings(self, findings: Findings) -> Mapping[str, Reading]:
        """Those that were read now, by log key. What is missing was not read."""
        return {reading.key: reading for reading in findings.readings if self.takes(reading)}

    def __str__(self) -> str:
        """In words: kl_ref_live in group 'code'."""
        groups = {ALL_PROBES: "", WORST_GROUP: " in the worst group", EACH: " in each group"}
        hookpoints = {"": "", EACH: " at each hookpoint"}
        where = hookpoints.get(self.hookpoint, f" at {self.hookpoint!r}")
        return self.metric + groups.get(self.group, f" in group {self.group!r}") + where

    def _require_group(self, info: MetricInfo, scope: Scope, rule: str) -> None:
        if self.group == ALL_PROBES:
            return
        if not info.by_group:
            raise ConfigError(
                f"The rule {rule!r} was given group={self.group!r}, but {self.metric} is read over all probes only. "
                "Leave group out."
            )
        if not scope.groups:
            raise ConfigError(
                f"The rule {rule!r} was given group={self.group!r}, but the probes have no groups. Leave group out, or "
                "give the probes groups."
            )
        if self.group not in (WORST_GROUP, EACH) and self.group not in scope.groups:
            known = [*scope.groups, WORST_GROUP, EACH]
            raise ConfigError(f"The rule {rule!r} cannot be judged. " + unknown("group", self.group, known))

    def _require_hookpoint(self, info: MetricInfo, scope: Scope, rule: str) -> None:
        if info.at == "outputs":
            if self.hookpoint:
                raise ConfigError(
                    f"The rule {rule!r} was given hookpoint={self.hookpoint!r}, but {self.metric} is read on the "
                    "outputs, once. Leave hookpoint out."
                )
            return
        if not scope.hookpoints:
            raise ConfigError(
                f"The rule {rule!r} needs a hookpoint, for {self.metric} is read at each of them, and there is none. "
                "Name some to the monitor: hookpoints=['layer.name', ...]."
            )
        if self.hookpoint != EACH and self.hookpoint not in scope.hookpoints:
            known = [*scope.hookpoints, EACH]
            raise ConfigError(
                f"The rule {rule!r} needs a hookpoint, for {self.metric} is read at each of them; '*' means each by "
                "itself. " + unknown("hookpoint", self.hookpoint, known)
            )

    def _require_plain(self, rule: str) -> None:
        if self.group or self.hookpoint:
            raise ConfigError(
                f"The rule {rule!r} was given group={self.group!r}, hookpoint={self.hookpoint!r} with "
                f"{self.metric!r}, which the loop tells and which has neither. Leave them out."
            )


def require_metric(metric: str, scope: Scope, rule: str) -> MetricInfo | None:
    """What the metric is, None for one that the loop tells; `ConfigError`, with the closest one, if it is not read."""
    if metric in scope.metrics:
        return scope.metrics[metric]
    if metric in scope.progress:
        return None
    sentence = unknown("metric that is read here", metric, [*scope.metrics, *scope.progress])
    if metric in FULL_METRICS:
        sentence += f" {metric!r} is read with sensors='full'."
    elif "Did you mean" not in sentence:
        sentence += f" What a loop of your own tells of its progress is named to the monitor: progress=[{metric!r}]."
    raise ConfigError(f"The rule {rule!r} cannot be judged. {sentence}")
