"""A rule with its actions: what is asked of the run at an alert, and what next while the breach lasts."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, final

from diffsensor.actions.requests import ScaleKLCoefficient, ScaleLearningRate, SetKLCoefficient
from diffsensor.errors import ConfigError, listed
from diffsensor.protocols import Action, Rule
from diffsensor.types import Ability, Judgement, State

#: So many looks in a row at which its rule could not tell are a breach, for a response that may stop the run.
UNKNOWN_LOOKS = 2
#: What a rule that only ever warns may not ask for.
ENDS_OR_TURNS_BACK: frozenset[Ability] = frozenset({"stop", "pause", "rollback"})


def state_of(judgement: Judgement | None) -> State:
    """What a rule says as a whole: a breach of any subject counts before what it could not tell.

    None is for a rule that failed. One that judges no subject at this look has found nothing.
    """
    if judgement is None:
        return "unknown"
    states = {signal.state for signal in judgement.signals}
    return "breach" if "breach" in states else "unknown" if "unknown" in states else "quiet"


@final
class Response:
    """A rule with its actions.

        Response(Limit("kl_ref_live", above=0.3), SaveCheckpoint(), Stop())                    # both, at each alert
        Response(Limit("kl_ref_live", above=0.3), Log(), ScaleLearningRate(0.5), Stop(), patience=5)       # a ladder

    What the rule says of its subjects is taken together: one subject in breach is a breach. A response that may stop
    the run fails closed: where its rule fails or cannot tell at two looks in a row, that is a breach. Once it has asked
    for a stop it does so again at every look while the breach lasts: a run that is started again is stopped again.

    Arguments:
        rule: what decides.
        actions: what is asked of the run, in this order.
        patience: None asks for all actions at each alert of the rule. A number makes them a ladder: the first action
            at the alert (or after so many looks in breach, should the alert be withheld), the next one when the rule
            is in breach so many looks after that, and so on to the last. The ladder begins anew once the rule has been
            quiet for `cooldown` looks, at least one.
        cooldown: after it has acted, it does not act again within so many looks. An alert that comes meanwhile is
            answered afterwards, if the rule is in breach still.
    """

    def __init__(self, rule: Rule, *actions: Action, patience: int | None = None, cooldown: int = 0) -> None:
        if not isinstance(rule, Rule) or isinstance(rule, type):
            raise ConfigError(f"A Response was given {rule!r}, expected a rule first: Response(Limit(...), Stop()).")
        if patience is not None:
            _require_looks("patience", patience, 1)
        _require_looks("cooldown", cooldown, 0)
        self.rule, self.actions, self.patience, self.cooldown = rule, actions, patience, cooldown
        self._require_sense()
        self._last_step: int | None = None
        self._acted_step: int | None = None
        self._since_acted: int | None = None
        self._given = [0] * len(actions)
        self._unknown = 0
        self._in_breach = 0
        self._quiet = 0
        self._rung = 0
        self._owed = False
        self._stopping = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Response":
        """A response with the same actions, which may be bound to anything, a trainer or a model."""
        rule = copy.deepcopy(self.rule, memo)
        copied = Response(rule, *self.actions, patience=self.patience, cooldown=self.cooldown)
        copied.load_state_dict(self.state_dict())
        return copied

    @property
    def needs(self) -> frozenset[Ability]:
        """What the run must be able to do for it."""
        return frozenset(action.needs for action in self.actions if action.needs is not None)

    @property
    def fails_closed(self) -> bool:
        """Whether its last look counted as a breach because the rule could not tell."""
        return "stop" in self.needs and self._unknown >= UNKNOWN_LOOKS

    def due(self, step: int, state: State, has_alert: bool) -> list[Action]:
        """What to ask for now, to be called at every look; asked again about the same step, no action comes twice.

        **Arguments:** `state` is that of the rule as a whole, see `state_of`; `has_alert` whether it gave rise to an
        alert that was sent.
        """
        was_breach = self._in_breach > 0
        if step != self._last_step:
            self._count(state)
        is_breach = state == "breach" or (state == "unknown" and self.fails_closed)
        if is_breach and not self._in_breach:
            self._in_breach, self._quiet = 1, 0
        self._last_step = step
        # No alert comes of a rule that cannot tell, so its becoming a breach stands for one.
        has_alert = has_alert or (is_breach and (self._owed or (state == "unknown" and not was_breach)))
        if step == self._acted_step:
            return []
        if is_breach and self._stopping:
            # It has asked for the end, and the run goes on: because it was resumed, or because it has to go on a while.
            self._acted_step, self._since_acted = step, 0
            return [action for action in self.actions if action.needs == "stop"]
        is_cooling = self._since_acted is not None and self._since_acted <= self.cooldown
        self._owed = (has_alert and is_cooling) or (self._owed and state == "unknown" and not is_breach)
        if is_cooling:
            return []
        due = self._all(has_alert) if self.patience is None else self._next(has_alert, is_breach)
        if due:
            self._acted_step, self._since_acted = step, 0
            self._stopping = self._stopping or any(action.needs == "stop" for action in due)
        return due

    def _count(self, state: State) -> None:
        """Take in one more look."""
        self._since_acted = None if self._since_acted is None else self._since_acted + 1
        self._unknown = self._unknown + 1 if state == "unknown" else 0
        if state == "breach" or self.fails_closed:
            self._in_breach, self._quiet = self._in_breach + 1, 0
        elif state == "quiet":
            self._in_breach, self._quiet, self._stopping = 0, self._quiet + 1, False
            if self._quiet >= max(1, self.cooldown):
                self._rung = 0

    def _all(self, has_alert: bool) -> list[Action]:
        return [action for number, action in enumerate(self.actions) if has_alert and self._may_give(number)]

    def _next(self, has_alert: bool, is_breach: bool) -> list[Action]:
        """The next rung that may still be used, if it is time for it."""
        assert self.patience is not None
        if self._rung == 0:
            is_time = has_alert or (is_breach and self._in_breach > self.patience)
        else:
            is_time = is_breach and self._since_acted is not None and self._since_acted >= self.patience
        while is_time and self._rung < len(self.actions):
            self._rung += 1
            if self._may_give(self._rung - 1):
                return [self.actions[self._rung - 1]]
        return []

    def _may_give(self, number: int) -> bool:
        """Count one more use of an action, unless it has been used up."""
        at_most = self.actions[number].at_most
        if at_most is not None and self._given[number] >= at_most:
            return False
        self._given[number] += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, in plain types."""
        return {
            "actions": [action.name for action in self.actions],
            "last_step": self._last_step,
            "acted_step": self._acted_step,
            "since_acted": self._since_acted,
            "given": list(self._given),
            "unknown": self._unknown,
            "in_breach": self._in_breach,
            "quiet": self._quiet,
            "rung": self._rung,
            "owed": self._owed,
            "stopping": self._stopping,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that state was taken. Raises `ConfigError` where the actions were others."""
        names = [action.name for action in self.actions]
        if state["actions"] != names:
            raise ConfigError(
                f"The run that goes on had the actions {listed(state['actions'])} for the rule {self.rule.name!r}; "
                f"given were {listed(names)}. Give the same ones, or begin a new run."
            )
        self._last_step, self._acted_step = state["last_step"], state["acted_step"]
        self._since_acted, self._given = state["since_acted"], list(state["given"])
        self._unknown, self._in_breach = state["unknown"], state["in_breach"]
        self._quiet, self._rung, self._owed = state["quiet"], state["rung"], state["owed"]
        self._stopping = state["stopping"]

    def _require_sense(self) -> None:
        rule, actions = self.rule.name, self.actions
        if not actions:
            raise ConfigError(
                f"A Response to the rule {rule!r} was given no action. Name at least one, such as Log() or "
                "SaveCheckpoint(), or give the rule by itself: it alerts without a Response."
            )
        for action in actions:
            if isinstance(action, type) or not isinstance(action, Action):
                raise ConfigError(
                    f"A Response to the rule {rule!r} was given {action!r}, which is not an action. Actions are "
                    "objects: Stop(), with parentheses."
                )
        ends = [action.name for action in actions if action.needs in ENDS_OR_TURNS_BACK]
        if ends and not self.rule.may_stop:
            raise ConfigError(
                f"A Response to the rule {rule!r} holds {listed(ends)}, but that rule warns, never stops by itself. "
                "Give it Log(), SaveCheckpoint() or ScaleLearningRate(0.5), or stop on a Limit or an Envelope."
            )
        after = [action.needs for action in actions].index("stop") + 1 if "stop" in self.needs else len(actions)
        if after < len(actions):
            raise ConfigError(
                f"A Response to the rule {rule!r} holds {actions[after].name} after stop, where there is no run left "
                "to ask. Put Stop() last."
            )
        if self.patience is None:
            _require_each_once(rule, actions)
        for what, ups_and_downs in _directions(actions).items():
            if any(up > 0 for up in ups_and_downs) and any(up < 0 for up in ups_and_downs):
                raise ConfigError(
                    f"A Response to the rule {rule!r} both raises and lowers the {what} "
                    f"({listed(action.name for action in actions)}): one would undo the other. Keep one direction."
                )


def _directions(actions: Sequence[Action]) -> dict[str, list[float]]:
    """By what is changed: a number above 0 for each action that raises it, below 0 for each that lowers it."""
    rates = [action.factor - 1 for action in actions if isinstance(action, ScaleLearningRate)]
    coefficients = [action.factor - 1 for action in actions if isinstance(action, ScaleKLCoefficient)]
    values = [action.value for action in actions if isinstance(action, SetKLCoefficient)]
    steps = [later - earlier for earlier, later in pairwise(values)]
    return {"learning rate": rates, "KL coefficient": coefficients + steps}


def _require_each_once(rule: str, actions: Sequence[Action]) -> None:
    for number, action in enumerate(actions):
        sets_again = isinstance(action, SetKLCoefficient) and any(
            isinstance(other, SetKLCoefficient) for other in actions[:number]
        )
        if sets_again or action in actions[:number]:
            raise ConfigError(
                f"A Response to the rule {rule!r} asks at one alert for {listed(a.name for a in actions)}: "
                f"{action.name} is asked for what was asked for before. Leave it out, or give patience=5 to climb "
                "from one action to the next."
            )


def _require_looks(name: str, given: object, least: int) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ConfigError(
            f"Response was given {name}={given!r}. It counts looks, so give a whole number of at least {least}."
        )
