"""Several rules taken as one: any of them, all of them, or at least k."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from diffsensor.errors import ConfigError, listed
from diffsensor.protocols import Rule
from diffsensor.rules.arguments import SEVERITIES, require_looks, require_severity, require_texts
from diffsensor.types import Findings, Judgement, Scope, Severity, Signal, State


@final
class KOf:
    """At least k of several rules are in breach at once.

        KOf(2, Limit("kl_ref_live", above=0.3), Limit("top1_flip", above=0.1), ChangePoint("kl_ref_live"))

    A member is in breach if any of its subjects is, else unknown if any of those is, else quiet. The combination is in
    breach where at least k members are, quiet where so few are in breach or unknown that k cannot be reached, and
    unknown in between. It is one subject, named like the rule. `AnyOf` is k = 1, `AllOf` is k = all.

    Members are judged by their own state at each look; their own alerts, severities and cool-downs play no part, and a
    member's evidence is kept as if it stood alone. It may stop a run only if it cannot be breached by rules that only
    warn: if fewer than k of its members are such. It looks at everything if one of its members does.

    Arguments:
        k: how many must be in breach, from 1 to the number of rules.
        rules: two or more, each with a name of its own. A rule that stands in here must stand nowhere else: it would
            take in each look twice.
        severity: by default the gravest of its members.
        cooldown: by default the longest of its members.
        name: by default made of the members' names.
    """

    def __init__(
        self,
        k: int,
        *rules: Rule,
        severity: Severity | None = None,
        cooldown: int | None = None,
        name: str | None = None,
    ) -> None:
        for rule in rules:
            if not isinstance(rule, Rule) or isinstance(rule, type):
                raise ConfigError(
                    f"A combination of rules was given {rule!r}, expected rules, such as Limit('kl_ref_live', "
                    "above=0.3)."
                )
        if len(rules) < 2:
            raise ConfigError(f"A combination was given {len(rules)} rules. Give two or more, or the rule by itself.")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(rules):
            raise ConfigError(
                f"KOf was given k={k!r} and {len(rules)} rules. Give first how many must be in breach, from 1 to "
                f"{len(rules)}, then the rules."
            )
        self.rules, self._k = rules, k
        how = "any" if k == 1 else "all" if k == len(rules) else f"{k}"
        self.name = f"{how} of ({'; '.join(rule.name for rule in rules)})" if name is None else name
        require_texts("combination", name=self.name)
        self._require_distinct()
        self.severity: Severity = max((rule.severity for rule in rules), key=SEVERITIES.index)
        if severity is not None:
            require_severity(self.name, severity)
            self.severity = severity
        self.cooldown = max(rule.cooldown for rule in rules) if cooldown is None else cooldown
        require_looks(self.name, "cooldown", self.cooldown, at_least=0)

    def _require_distinct(self) -> None:
        parts = [part for rule in self.rules for part in _parts(rule)]
        if twice := [rule for rule, count in Counter(map(id, parts)).items() if count > 1]:
            name = next(rule.name for rule in parts if id(rule) == twice[0])
            raise ConfigError(
                f"The rule {name!r} stands twice in {self.name!r}, where it would take in each look twice. Leave one "
                "out, or build a second rule with a name of its own."
            )
        names = [rule.name for rule in self.rules]
        if same := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(
                f"Two rules of a combination are named {same[0]!r}, so their states could not be told apart. Give one "
                f"of them another name: name={same[0] + ' 2'!r}."
            )

    @property
    def metrics(self) -> frozenset[str]:
        if not all(rule.metrics for rule in self.rules):
            return frozenset()
        return frozenset[str]().union(*(rule.metrics for rule in self.rules))

    @property
    def may_stop(self) -> bool:
        return sum(not rule.may_stop for rule in self.rules) < self._k

    def check(self, scope: Scope) -> None:
        for rule in self.rules:
            rule.check(scope)

    def update(self, findings: Findings) -> Judgement:
        judgements = [rule.update(findings) for rule in self.rules]
        states = [_state_of(judgement) for judgement in judgements]
        counts = Counter(states)
        state: State
        if counts["breach"] >= self._k:
            state = "breach"
        elif counts["breach"] + counts["unknown"] < self._k:
            state = "quiet"
        else:
            state = "unknown"
        # What decided: of a breach the members in breach, of what cannot be told those that could not.
        deciding = [
            [signal for signal in judgement.signals if signal.state == state]
            for judgement, own in zip(judgements, states, strict=True)
            if own == state
        ]
        signal = Signal(subject=self.name, state=state) if state == "quiet" else self._signal(state, deciding)
        return Judgement(signals=(signal,), evidence=tuple(one for each in judgements for one in each.evidence))

    def _signal(self, state: State, deciding: Sequence[Sequence[Signal]]) -> Signal:
        """In the members' words; with the reading of the first member that decided."""
        whats = [_joined(signals) for signals in deciding]
        count = f"{len(deciding)} of {len(self.rules)} rules {'are in breach' if state == 'breach' else 'cannot tell'}"
        first = deciding[0][0]
        return Signal(
            subject=self.name,
            state=state,
            what=whats[0] if self._k == len(whats) == 1 and state == "breach" else f"{count}: {'; '.join(whats)}",
            since=self._since(deciding) if state == "breach" else -1,
            reading=first.reading,
            threshold=first.threshold,
            advice=" ".join(
                dict.fromkeys(signal.advice for signals in deciding for signal in signals if signal.advice)
            ),
        )

    def _since(self, deciding: Sequence[Sequence[Signal]]) -> int:
        """The step at which the k-th member's breach began; -1, for now, if fewer than k began before."""
        since = [[signal.since for signal in signals if signal.since >= 0] for signals in deciding]
        begun = sorted(min(steps) for steps in since if steps)
        return begun[self._k - 1] if len(begun) >= self._k else -1

    def state_dict(self) -> dict[str, Any]:
        return {"members": {rule.name: rule.state_dict() for rule in self.rules}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        members = state["members"]
        if members.keys() != {rule.name for rule in self.rules}:
            raise ConfigError(
                f"The run that goes on had the rules {listed(members)} in {self.name!r}; given were "
                f"{listed(rule.name for rule in self.rules)}. Give the same ones, or the combination another name."
            )
        for rule in self.rules:
            rule.load_state_dict(members[rule.name])


def AnyOf(  # noqa: N802 - it makes a rule, and stands beside KOf
    *rules: Rule, severity: Severity | None = None, cooldown: int | None = None, name: str | None = None
) -> KOf:
    """At least one of the rules is in breach: `KOf` with k = 1. May stop a run only if each of them may."""
    return KOf(1, *rules, severity=severity, cooldown=cooldown, name=name)


def AllOf(  # noqa: N802
    *rules: Rule, severity: Severity | None = None, cooldown: int | None = None, name: str | None = None
) -> KOf:
    """All of the rules are in breach at once: `KOf` with k = their number. May stop a run if one of them may."""
    # With too few rules KOf says so itself.
    return KOf(max(len(rules), 1), *rules, severity=severity, cooldown=cooldown, name=name)


def _parts(rule: Rule) -> Iterator[Rule]:
    """The rule and all that it is made of."""
    yield rule
    if isinstance(rule, KOf):
        for part in rule.rules:
            yield from _parts(part)


def _state_of(judgement: Judgement) -> State:
    """Of all subjects together: one in breach is a breach, else one that could not be judged leaves it open."""
    states = {signal.state for signal in judgement.signals}
    return "breach" if "breach" in states else "unknown" if "unknown" in states else "quiet"


def _joined(signals: Sequence[Signal]) -> str:
    more = f" (and {len(signals) - 1} more)" if len(signals) > 1 else ""
    return (signals[0].what or signals[0].subject) + more
