"""A rule that says what it is told to, and a run that notes what it is asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffsensor.errors import RefusedError
from diffsensor.types import Ability, Findings, Judgement, Reading, Scope, Severity, Signal, State


class Scripted:
    """A rule that says what it is told to, subject by subject, look by look."""

    def __init__(
        self,
        *looks: Mapping[str, State] | State | Exception,
        name: str = "scripted",
        cooldown: int = 0,
        metrics: Sequence[str] = (),
        may_stop: bool = True,
    ) -> None:
        self.looks, self.name, self.cooldown, self.at = looks, name, cooldown, 0
        self.metrics, self.may_stop = frozenset(metrics), may_stop
        self.severity: Severity = "warning"
        self.checked: list[Scope] = []

    def check(self, scope: Scope) -> None:
        self.checked.append(scope)

    def update(self, findings: Findings) -> Judgement:
        look = self.looks[self.at]
        self.at += 1
        if isinstance(look, Exception):
            raise look
        states = {"it": look} if isinstance(look, str) else look
        return Judgement(
            signals=tuple(
                Signal(subject=subject, state=state, what=f"{subject} is off", advice="Look at it.")
                for subject, state in states.items()
            ),
            evidence=(reading(findings.step, "evidence", self.at),),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]


class Run:
    """A controller that notes what it is asked for."""

    def __init__(self, *, unable: Sequence[Ability] = (), refuse: Sequence[str] = (), fail: Sequence[str] = ()) -> None:
        self.unable, self.refuse, self.fail = unable, refuse, fail
        self.asked: list[object] = []
        self.coefficient = 1.0

    def cannot(self, ability: Ability) -> str:
        return f"It has no {ability}. Get one." if ability in self.unable else ""

    def _ask(self, what: str, *details: object) -> str:
        if what in self.refuse:
            raise RefusedError(f"No {what} now.")
        if what in self.fail:
            raise ZeroDivisionError(what)
        self.asked.append((what, *details) if details else what)
        return f"did {what}"

    def stop(self, reason: str) -> str:
        return self._ask("stop")

    def save_checkpoint(self, reason: str) -> str:
        return self._ask("save_checkpoint")

    def scale_learning_rate(self, factor: float) -> str:
        return self._ask("scale", factor)

    def kl_coefficient(self) -> float:
        return self.coefficient

    def set_kl_coefficient(self, value: float) -> str:
        self.coefficient = value
        return self._ask("set", value)

    def keep(self, step: int) -> None:
        self._ask("keep", step)

    def rollback(self, reason: str) -> str:
        return self._ask("rollback")

    def pause(self, reason: str) -> str:
        return self._ask("pause")


def reading(step: int, metric: str = "kl_ref_live", value: float = 0.1) -> Reading:
    return Reading(step=step, sensor="outputs", metric=metric, value=value, unit="nats/token", scale="log")
