"""What follows from a look: rules make alerts of it, responses ask the run for something, the gate gives a verdict."""

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from diffsensor.actions import UNKNOWN_LOOKS, Response, state_of
from diffsensor.control import LoopController
from diffsensor.errors import ConfigError, RefusedError, listed
from diffsensor.gate import Gate
from diffsensor.protocols import Action, Budget, Controller, Rule
from diffsensor.types import (
    ActionTaken,
    Alert,
    Findings,
    Judgement,
    MetricInfo,
    Reading,
    Scope,
    Signal,
    State,
    Verdict,
)

logger = logging.getLogger(__name__)

BUDGET = "drift budget"
#: The subject of an alert on a rule that could not be judged, at `UNKNOWN_LOOKS` looks in a row.
UNJUDGED = "unjudged"


@final
class Oversight:
    """Judges looks one after the other, and carries out what responses ask for.

    `judge` first, then the findings are to be stored with their alerts, then `act`: so a stop is on record before
    it happens, and what was still to be done when a run was killed is done when it goes on. Its state is of plain
    types: a run that goes on with it alerts and acts as the uninterrupted one would have. It works on copies of what
    it is given, so that the same rules can be given to several monitors, one after the other or at once.
    """

    def __init__(
        self,
        rules: Sequence[Rule | Response] = (),
        gate: Gate | None = None,
        budget: Budget | None = None,
        *,
        contain: Callable[[str, Exception], None],
    ) -> None:
        for part in rules:
            if not isinstance(part, (Rule, Response)) or isinstance(part, type):
                raise ConfigError(f"rules holds {part!r}, expected rules and responses, such as Limit(...).")
        if gate is not None and not isinstance(gate, Gate):
            raise ConfigError(f"gate={gate!r} was given, expected a gate: Gate(Limit('kl_ref_live', above=0.3)).")
        if budget is not None and not isinstance(budget, Budget):
            raise ConfigError(
                f"budget={budget!r} was given, expected a budget, such as DriftBudget({_number(budget)})."
            )
        parts = [copy.deepcopy(part) for part in rules]
        gate, budget = copy.deepcopy(gate), copy.deepcopy(budget)
        self._responses = tuple(part for part in parts if isinstance(part, Response))
        self._rules = tuple(part.rule if isinstance(part, Response) else part for part in parts)
        names = [rule.name for rule in self._rules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"Two rules are named {twice[0]!r}, so their alerts and their states could not be told apart. "
                f"Give one of them another name: name='{twice[0]} 2'. A response needs no second rule beside it."
            )
        self.gate, self.budget = gate, budget
        self._contain = contain
        #: Whether what is asked of the run is told in the log: by one of several processes.
        self.speaks = True
        self._tracks: dict[str, dict[str, _Track]] = {name: {} for name in names}
        self._unknown = {name: _Track() for name in names}
        self._said: dict[str, dict[str, Any]] = {}
        self._num_looks = 0
        self._sealed: frozenset[str] = frozenset()
        #: The metrics of evidence that came of sealed readings, and is as sealed as they are.
        self.sealed_evidence: set[str] = set()
        self._told_last: tuple[int, list[Alert]] = -1, []
        self._pending: dict[str, Any] | None = None
        self._coefficient: float | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self._rules

    @property
    def looks_at_faults(self) -> bool:
        """Whether anything here would notice that weights which do not train have moved."""
        return bool(self._rules) or self.gate is not None

    def refuse_sealed(self, metrics: Mapping[str, MetricInfo], *, bank_is_sealed: bool) -> None:
        """Raise where something sealed would drive an action, a budget or a gate.

        What looks at everything, as `Invariant` does, is allowed there, and is shown all but what is sealed.
        """
        self._sealed = frozenset(name for name, info in metrics.items() if info.sealed)
        parts: list[tuple[str, Collection[str]]] = [
            (f"The response to {response.rule.name!r}", response.rule.metrics) for response in self._responses
        ]
        parts += [("The gate", self.gate.metrics)] if self.gate is not None else []
        parts += [("The drift budget", self.budget.metrics)] if self.budget is not None else []
        for who, used in parts:
            sealed = sorted(self._sealed.intersection(used))
            if bank_is_sealed or sealed:
                what = "a sealed bank" if bank_is_sealed else f"the sealed metric {sealed[0]!r}"
                raise ConfigError(
                    f"{who} would act on {what}. Sealed readings may alert a person, but they never drive an action: "
                    "what a run is steered by becomes a training target, and then it no longer tells the truth. Give "
                    "the rule alone, without actions, or respond to a bank that is not sealed."
                )

    def check(self, scope: Scope, controller: Controller | None) -> None:
        """Raise where a rule cannot be judged on what will be read, or the run cannot do what is asked of it."""
        for rule in self._rules:
            rule.check(scope)
        if self.gate is not None:
            self.gate.check(scope)
        if self.budget is not None:
            self.budget.check(scope)
        for who, action in self._wanted():
            needs = action.needs
            if needs is None:
                continue
            if controller is None:
                raise ConfigError(
                    f"{who} asks for {action.name}, and nothing here can carry it out. Give the monitor a controller: "
                    "Monitor(..., controller=LoopController(model, optimizer)), or use the callback of your trainer."
                )
            if reason := controller.cannot(needs):
                raise ConfigError(f"{who} asks for {action.name}, which this run cannot do. {reason}")
        if self.budget is not None:
            if controller is None:
                raise ConfigError(
                    "A drift budget was given, and nothing here can move the coefficient of a KL penalty. Give the "
                    "monitor a controller with one: Monitor(..., controller=LoopController(penalty=KLPenalty(...)))."
                )
            if reason := controller.cannot("set_kl_coefficient"):
                raise ConfigError(
                    f"The drift budget moves the coefficient of a KL penalty, and this run has none. {reason}"
                )

    def _wanted(self) -> list[tuple[str, Action]]:
        return [
            (f"The response to {response.rule.name!r}", action)
            for response in self._responses
            for action in response.actions
        ]

    def begin(self, controller: Controller | None) -> None:
        """Give the run the KL coefficient that it had, or that the budget begins with."""
        if controller is None:
            return
        if self._coefficient is None and self.budget is not None:
            self._coefficient = self.budget.coefficient
        if self._coefficient is None:
            return
        is_other = controller.kl_coefficient() != self._coefficient
        told = controller.set_kl_coefficient(self._coefficient)
        if is_other and self.speaks:  # it may take the place of what the trainer was configured with
            logger.warning("The run is steered by its KL coefficient, and begins with another one: %s.", told)

    def judge(self, findings: Findings, told: Collection[tuple[str, str, int]] = ()) -> Findings:
        """The findings with the evidence of rules among the readings, and with alerts.

        `told` are the rule, subject and step of alerts that were on record before.
        """
        self._num_looks += 1
        step = findings.step
        alerts: list[Alert] = []
        states: dict[str, State] = {}
        open_states: list[State] = []
        evidence: list[Reading] = []
        acted_on = {response.rule.name for response in self._responses}
        for rule in self._rules:
            judgement = self._judged(rule, self._unsealed(findings) if rule.name in acted_on else findings)
            evidence += judgement.evidence
            states[rule.name] = state_of(judgement)
            if rule.name not in acted_on and self._sealed.intersection(rule.metrics or self._sealed):
                self.sealed_evidence.update(reading.metric for reading in judgement.evidence)
            elif rule.may_stop or states[rule.name] == "breach":  # of one that only warns it is enough that it does not
                open_states.append(states[rule.name])
            raised = [self._follow(rule, signal, step) for signal in judgement.signals]
            raised.append(self._follow_unknown(rule, judgement, step))
            alerts += (alert for alert in raised if alert is not None)
            if (breach := next((signal for signal in judgement.signals if signal.state == "breach"), None)) is not None:
                track = self._tracks[rule.name][breach.subject]
                self._said[rule.name] = asdict(_alert(rule, breach, step, track))  # what an action is told
        coefficient: float | None = None
        if self.budget is not None:
            coefficient, steered = self._steered(self.budget, self._unsealed(findings))
            evidence += steered
        alerts = [replace(alert, is_repeat=(alert.rule, alert.subject, step) in told) for alert in alerts]
        self._said |= {alert.rule: asdict(alert) for alert in alerts if alert.subject == UNJUDGED}
        if step == self._told_last[0]:
            # This look takes the place of the one before on record, where what that one told is to stay.
            known = {(alert.rule, alert.subject) for alert in alerts}
            kept = [alert for alert in self._told_last[1] if (alert.rule, alert.subject) not in known]
            alerts = [*(replace(alert, is_repeat=True) for alert in kept), *alerts]
        self._told_last = step, alerts
        findings = replace(findings, readings=(*findings.readings, *evidence), alerts=tuple(alerts))
        if self._responses or self.budget is not None:
            self._pending = {
                "step": step,
                "states": {response.rule.name: states[response.rule.name] for response in self._responses},
                "alerted": sorted({alert.rule for alert in alerts}),
                "coefficient": coefficient,
                "passed": self._has_passed(findings, open_states),
                "rolled_back": False,
            }
        return findings

    def _unsealed(self, findings: Findings) -> Findings:
        """What may drive an action."""
        if not self._sealed:
            return findings
        sealed = self._sealed | self.sealed_evidence
        return replace(
            findings,
            readings=tuple(reading for reading in findings.readings if reading.metric not in sealed),
            by_probe={name: values for name, values in findings.by_probe.items() if name not in self._sealed},
            token_shifts=(),
            tensors={},
        )

    def verdict(self, gate: Gate, findings: Findings) -> Verdict:
        """What the gate says of a look; unknown where it fails."""
        try:
            return gate.verdict(self._unsealed(findings))
        except Exception as error:  # noqa: BLE001 - a gate fails closed
            self._contain("gate", error)
            return gate.unread(findings.step)

    def _judged(self, rule: Rule, findings: Findings) -> Judgement:
        try:
            judgement = rule.update(findings)
            if not isinstance(judgement, Judgement):
                raise TypeError(f"it returned {judgement!r}, expected a Judgement")
            return judgement
        except Exception as error:  # noqa: BLE001 - a broken rule is contained like a broken sensor
            self._contain(f"rule {rule.name!r}", error)
            return Judgement(signals=(Signal(subject="", state="unknown", what="the rule failed"),))

    def _steered(self, budget: Budget, findings: Findings) -> tuple[float | None, list[Reading]]:
        try:
            coefficient = budget.update(findings)
            return coefficient, [budget.evidence(findings.step)]
        except Exception as error:  # noqa: BLE001 - a broken budget leaves the coefficient as it is
            self._contain(BUDGET, error)
            return None, []

    def _follow(self, rule: Rule, signal: Signal, step: int) -> Alert | None:
        """The alert on a breach, once; later where the cool-down of the last one is still on."""
        track = self._tracks[rule.name].setdefault(signal.subject, _Track())
        if signal.state == "quiet":
            track.since, track.is_told = -1, False
        if signal.state != "breach" or track.is_told:
            return None
        is_new = track.since < 0
        if is_new:
            track.since = signal.since if signal.since >= 0 else step
        if track.alerted_at and self._num_looks - track.alerted_at <= rule.cooldown:
            track.suppressed += is_new
            return None
        alert = _alert(rule, signal, step, track)
        track.alerted_at, track.is_told, track.suppressed = self._num_looks, True, 0
        return alert

    def _follow_unknown(self, rule: Rule, judgement: Judgement, step: int) -> Alert | None:
        """The alert on a rule that could not be judged at `UNKNOWN_LOOKS` looks in a row.

        That is one none of whose subjects could be; of a rule that may stop the run, which fails closed, any of them.
        """
        track = self._unknown[rule.name]
        fails_closed = any("stop" in response.needs for response in self._responses if response.rule.name == rule.name)
        enough = any if fails_closed and state_of(judgement) == "unknown" else all
        if not judgement.signals or not enough(signal.state == "unknown" for signal in judgement.signals):
            track.since, track.suppressed = -1, 0
            return None
        if track.since < 0:
            track.since = step
        track.suppressed += 1
        if track.suppressed != UNKNOWN_LOOKS:
            return None
        why = next((signal.what for signal in judgement.signals if signal.state == "unknown" and signal.what), "")
        return Alert(
            step=step,
            rule=rule.name,
            severity="critical" if rule.name in {response.rule.name for response in self._responses} else "warning",
            subject=UNJUDGED,
            message=f"The rule {rule.name!r} cannot be judged{f' ({why})' if why else ''}, since step {track.since}. "
            "What is not read is not watched: look in the log for what failed.",
            first_step=track.since,
        )

    def _has_passed(self, findings: Findings, states: Collection[State]) -> bool:
        if self.gate is not None:
            return self.verdict(self.gate, findings).outcome == "pass"
        return not findings.faults and all(state == "quiet" for state in states)

    def act(self, controller: Controller | None, told: Callable[[ActionTaken], None]) -> None:
        """Ask the run for what the last look calls for. Each request is `told` with what became of it.

        Does nothing where that was done already, also in a run that goes on from a state taken in between.
        """
        if self._pending is None:
            return
        pending, step = self._pending, self._pending["step"]
        responses = {
            response.rule.name: response for response in self._responses if response.rule.name in pending["states"]
        }
        if "todo" not in pending:
            pending["todo"] = [
                [name, response.actions.index(action)]
                for name, response in responses.items()
                for action in response.due(step, pending["states"][name], name in pending["alerted"])
            ]
        # Taken off the list before it is done: a checkpoint that an action saves is gone on with after that action.
        while pending["todo"]:
            name, place = pending["todo"].pop(0)
            action = responses[name].actions[place]
            pending["rolled_back"] = pending["rolled_back"] or action.needs == "rollback"
            told(self._asked(action, self._alert_of(responses[name].rule, step), controller))
        coefficient, pending["coefficient"] = pending["coefficient"], None
        if coefficient is not None and controller is not None:
            told(self._moved(coefficient, step, controller))
        rolls_back = any(action.needs == "rollback" for response in self._responses for action in response.actions)
        if controller is not None and rolls_back and pending["passed"] and not pending["rolled_back"]:
            try:
                controller.keep(step)
            except Exception as error:  # noqa: BLE001
                self._contain("keeping a copy to roll back to", error)
        self._pending = None

    @property
    def has_to_act(self) -> bool:
        """Whether the last look calls for something that `act` has not done yet."""
        return self._pending is not None

    def _alert_of(self, rule: Rule, step: int) -> Alert:
        """What to tell with an action: the alert of this breach, or that the rule could not be judged."""
        if (last := self._said.get(rule.name)) is not None:
            return replace(Alert(**last), step=step)
        message = f"The rule {rule.name!r} cannot be judged since step {self._unknown[rule.name].since}."
        return Alert(step=step, rule=rule.name, severity="critical", subject=UNJUDGED, message=message, first_step=step)

    def _asked(self, action: Action, alert: Alert, controller: Controller | None) -> ActionTaken:
        taken = ActionTaken(step=alert.step, rule=alert.rule, action=action.name, outcome="done", detail="")
        if action.needs is not None and controller is None:
            return replace(taken, outcome="refused", detail="There is no controller.")
        try:
            detail = action(alert, controller or LoopController())
            if action.needs == "set_kl_coefficient" and controller is not None:
                self._coefficient = controller.kl_coefficient()
            if action.needs is not None and self.speaks:
                logger.warning("step %d, %s, as %r asks for: %s", alert.step, action.name, alert.rule, detail)
            return replace(taken, detail=detail)
        except RefusedError as error:
            logger.warning(
                "%s, asked for by %r at step %d, was refused. %s", action.name, alert.rule, alert.step, error
            )
            return replace(taken, outcome="refused", detail=str(error))
        except Exception as error:  # noqa: BLE001 - the run goes on, and what became of it is on record
            self._contain(f"action {action.name}", error)
            return replace(taken, outcome="failed", detail=f"{type(error).__name__}: {error}")

    def _moved(self, coefficient: float, step: int, controller: Controller) -> ActionTaken:
        name = f"set_kl_coefficient({coefficient:.4g})"
        taken = ActionTaken(step=step, rule=BUDGET, action=name, outcome="done", detail="")
        try:
            detail = controller.set_kl_coefficient(coefficient)
            self._coefficient = controller.kl_coefficient()
            return replace(taken, detail=detail)
        except RefusedError as error:
            return replace(taken, outcome="refused", detail=str(error))
        except Exception as error:  # noqa: BLE001
            self._contain(f"action {name}", error)
            return replace(taken, outcome="failed", detail=f"{type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_looks": self._num_looks,
            "rules": {rule.name: rule.state_dict() for rule in self._rules},
            "responses": {response.rule.name: response.state_dict() for response in self._responses},
            "budget": None if self.budget is None else self.budget.state_dict(),
            "tracks": {name: {key: asdict(track) for key, track in of.items()} for name, of in self._tracks.items()},
            "unknown": {name: asdict(track) for name, track in self._unknown.items()},
            "said": dict(self._said),
            "coefficient": self._coefficient,
            "told_last": {"step": self._told_last[0], "alerts": [asdict(alert) for alert in self._told_last[1]]},
            "pending": copy.deepcopy(self._pending),  # what is done of it later is not undone here
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that state was taken. A rule that it does not know begins anew, and says so."""
        self._num_looks = state["num_looks"]
        self._coefficient = state["coefficient"]
        names = {rule.name for rule in self._rules}
        if (new := sorted(names - state["rules"].keys())) and self.speaks:
            logger.warning("The run that goes on did not have the rules %s: they begin now.", listed(new))
        if (gone := sorted(state["rules"].keys() - names)) and self.speaks:
            logger.warning("The run that goes on had the rules %s, which are not given any more.", listed(gone))
        for rule in self._rules:
            if rule.name in state["rules"]:
                rule.load_state_dict(state["rules"][rule.name])
                self._tracks[rule.name] = {key: _Track(**kept) for key, kept in state["tracks"][rule.name].items()}
                self._unknown[rule.name] = _Track(**state["unknown"][rule.name])
        for response in self._responses:
            if response.rule.name in state["responses"]:
                response.load_state_dict(state["responses"][response.rule.name])
        if self.budget is not None and state["budget"] is not None:
            self.budget.load_state_dict(state["budget"])
        self._said = {name: kept for name, kept in state["said"].items() if name in names}
        told = state["told_last"]
        self._told_last = told["step"], [Alert(**alert) for alert in told["alerts"] if alert["rule"] in names]
        self._pending = copy.deepcopy(state["pending"])
        if self._pending is not None and "todo" in self._pending:
            known = {response.rule.name for response in self._responses}
            self._pending["todo"] = [each for each in self._pending["todo"] if each[0] in known]


@dataclass(slots=True, kw_only=True)
class _Track:
    """One subject of one rule: since which step it is in breach, and what was told of that."""

    since: int = -1
    is_told: bool = False
    alerted_at: int = 0  # the number of that look; 0 for never
    suppressed: int = 0


def _number(given: object) -> object:
    return given if isinstance(given, float | int) else 0.2


def _alert(rule: Rule, signal: Signal, step: int, track: _Track) -> Alert:
    reading = signal.reading
    withheld = f" {track.suppressed} earlier alerts on this were withheld." if track.suppressed else ""
    what = signal.what or f"{signal.subject} breaks the rule {rule.name!r}"
    return Alert(
        step=step,
        rule=rule.name,
        severity=rule.severity,
        subject=signal.subject,
        message=f"{what}, since step {track.since}.{withheld} {signal.advice}".rstrip(),
        value=reading.value if reading else math.nan,
        stderr=reading.stderr if reading else math.nan,
        threshold=signal.threshold,
        unit=reading.unit if reading else "",
        first_step=track.since,
        suppressed=track.suppressed,
    )
