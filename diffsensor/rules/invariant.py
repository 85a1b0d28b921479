"""What must never be, however far a model may move: each kind of fault is a breach at once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from diffsensor.errors import ConfigError, listed, unknown
from diffsensor.rules.arguments import require_looks, require_severity, require_texts
from diffsensor.rules.select import TOLD
from diffsensor.types import WORST_GROUP, Fault, Findings, Judgement, Reading, Scope, Severity, Signal, Verdict

#: What a person should do next, for each kind of fault.
_ADVICE: dict[str, str] = {
    "nonfinite": "Look at the loss and the gradient norm of the steps before, and go on from an earlier checkpoint "
    "with a lower learning rate or gradient clipping.",
    "sensor": "Look in the log for its traceback; until that is mended, what it read is not watched.",
    "frozen": "Look at which parameters the optimizer holds, at weight decay on frozen ones, and at what else writes "
    "into the model.",
    "fingerprint": "Readings from here on do not compare with those before: bring back what was changed, or begin a "
    "new run.",
    "replicas": "Stop, and go on from a checkpoint that one process wrote; then look at what only some processes do.",
}


@final
class Invariant:
    """Something happened that must not, whatever the drift: a fault, by its kind. Immediate, without a level.

    - `nonfinite`: a reading is NaN or infinite although probes were counted, or the loop told such a number.
    - `sensor`: a sensor failed and gave no reading.
    - `frozen`: a parameter that does not train has moved.
    - `fingerprint`: probes, reference or circumstances are not those of the start.
    - `replicas`: processes that should hold the same weights do not.

    Each kind is a subject of its own; it is in breach at a look that found one and quiet at the next that did not. A
    NaN of a group no probe of which counts is no fault. As a criterion of a gate any fault fails, except that a sensor
    that gave no reading leaves it unknown, as does a look that read nothing.

    Arguments:
        severity: "info", "warning" or "critical".
        cooldown: after an alert on a kind, further ones within so many looks are counted, not sent.
        name: tells rules apart.
        allow: kinds that are not judged.
    """

    may_stop = True

    def __init__(
        self,
        *,
        severity: Severity = "critical",
        cooldown: int = 0,
        name: str = "invariant",
        allow: Sequence[str] = (),
    ) -> None:
        require_texts("Invariant", name=name)
        require_severity(name, severity)
        require_looks(name, "cooldown", cooldown, at_least=0)
        if isinstance(allow, str):
            raise ConfigError(f"The rule {name!r} was given allow={allow!r}. Give a list: allow=[{allow!r}].")
        for kind in allow:
            if kind not in _ADVICE:
                raise ConfigError(f"The rule {name!r} cannot be built. " + unknown("kind of fault", str(kind), _ADVICE))
        self._kinds = [kind for kind in _ADVICE if kind not in allow]
        if not self._kinds:
            raise ConfigError(f"The rule {name!r} allows every kind of fault, so it judges nothing. Leave it out.")
        self.name, self.severity, self.cooldown = name, severity, cooldown

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset()

    def check(self, scope: Scope) -> None:
        """Nothing is needed: it judges whatever is read."""

    def update(self, findings: Findings) -> Judgement:
        broken = [reading for reading in findings.readings if _is_broken(reading)]
        faults = _by_kind(findings, broken)
        signals = [
            Signal(
                subject=kind,
                state="breach" if faults[kind] else "quiet",
                what=_what(faults[kind]) if faults[kind] else "",
                reading=broken[0] if kind == "nonfinite" and broken else None,
                advice=_ADVICE[kind] if faults[kind] else "",
            )
            for kind in self._kinds
        ]
        return Judgement(signals=tuple(signals))

    def verdict(self, findings: Findings) -> Verdict:
        broken = [reading for reading in findings.readings if _is_broken(reading)]
        faults = _by_kind(findings, broken)
        found = [kind for kind in self._kinds if faults[kind]]
        # Whatever else was found weighs more than a reading that is missing.
        for kind in sorted(found, key=lambda kind: kind == "sensor"):
            reading = broken[0] if kind == "nonfinite" and broken else None
            return Verdict(
                step=findings.step,
                outcome="unknown" if kind == "sensor" else "fail",
                reason=f"{_what(faults[kind])}.",
                rule=self.name,
                subject=kind,
                value=reading.value if reading else math.nan,
                unit=reading.unit if reading else "",
            )
        if all(reading.sensor in TOLD for reading in findings.readings):
            return Verdict(step=findings.step, outcome="unknown", reason="Nothing was read.", rule=self.name)
        reason = f"No fault was found ({listed(self._kinds)})."
        return Verdict(step=findings.step, outcome="pass", reason=reason, rule=self.name)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each look is judged by itself, so there is nothing to go on with."""


def _is_broken(reading: Reading) -> bool:
    """Whether it should be a number and is not. The worst group's reading is that of a group, which counts already."""
    should_be = reading.num_probes > 0 or reading.sensor in TOLD
    return should_be and reading.group != WORST_GROUP and not math.isfinite(reading.value)


def _by_kind(findings: Findings, broken: Iterable[Reading]) -> dict[str, list[Fault]]:
    own = [
        Fault(kind="nonfinite", subject=reading.key, detail=f"{reading.key} reads {reading.value}")
        for reading in broken
    ]
    faults = [*findings.faults, *own]
    return {kind: [fault for fault in faults if fault.kind == kind] for kind in _ADVICE}


def _what(faults: Sequence[Fault]) -> str:
    """embed.weight does not train, and has moved; head.weight does not train, and has moved; and 3 more."""
    told = [fault.detail for fault in faults[:3]]
    if len(faults) > 3:
        told.append(f"and {len(faults) - 3} more")
    return "; ".join(told)
