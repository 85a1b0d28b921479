"""A rule that a user writes as a function, named by its dotted path or given as it is."""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, final, runtime_checkable

from diffsensor.errors import ConfigError, unknown
from diffsensor.rules.arguments import require_looks, require_severity, require_texts
from diffsensor.rules.select import require_metric
from diffsensor.types import Findings, Judgement, Scope, Severity, Signal

#: What such a function says of a look.
Said = None | bool | str | Signal | Sequence[Signal]


@runtime_checkable
class Stateful(Protocol):
    """A callable that remembers something from look to look, and says it in plain types."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@final
class Own:
    """Your own callable as a rule: it is called with the `Findings` of each look.

        def too_many_flips(findings):
            worst = max((r.value for r in findings.readings if r.metric == "top1_flip"), default=0.0)
            return f"top-1 flips reach {worst:.0%}" if worst > 0.2 else None

        Own(too_many_flips)     # or, in a configuration: Own("my_package.rules:too_many_flips")

    It returns None or False (quiet), True or a clause without a full stop (a breach), or a `Signal`, or several with a
    subject each. Anything else is an error, which the monitor contains. A callable with `state_dict` and
    `load_state_dict` goes on where it was when a run does; any other must judge each look by itself.

    Arguments:
        function: the callable, or "package.module:function" or "package.module.function".
        metrics: those it looks at, which are then checked to be read; () for one that looks at everything. A callable
            that looks at other metrics than it says is not found out.
        severity: "info", "warning" or "critical".
        cooldown: after an alert on a subject, further ones within so many looks are counted, not sent.
        name: tells rules apart; by default where the callable is defined.
        may_stop: whether it may, by itself, end or turn back a run.
    """

    def __init__(
        self,
        function: str | Callable[[Findings], Said],
        *,
        metrics: Sequence[str] = (),
        severity: Severity = "warning",
        cooldown: int = 20,
        name: str | None = None,
        may_stop: bool = False,
    ) -> None:
        found: object = _resolved(function) if isinstance(function, str) else function
        if isinstance(found, type):
            raise ConfigError(
                f"A rule of your own was given the class {found.__name__}. Give a function, or an instance: "
                f"{found.__name__}(...)."
            )
        if not callable(found):
            raise ConfigError(
                f"A rule of your own was given {function!r}, which cannot be called. Give a function of the findings "
                "of a look, or where it is: 'package.module:function'."
            )
        self._function: Callable[[Findings], Said] = found
        self.name = (function if isinstance(function, str) else _name_of(function)) if name is None else name
        require_texts("own rule", name=self.name)
        require_severity(self.name, severity)
        require_looks(self.name, "cooldown", cooldown, at_least=0)
        if isinstance(metrics, str):
            raise ConfigError(f"The rule {self.name!r} was given metrics={metrics!r}. Give a list: [{metrics!r}].")
        self.metrics = frozenset(metrics)
        self.severity: Severity = severity
        self.cooldown, self.may_stop = cooldown, may_stop

    def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
        """A rule with the same callable, unless that has a state: it may be bound to anything, a trainer or a model."""
        function = copy.deepcopy(self._function, memo) if isinstance(self._function, Stateful) else self._function
        return Own(
            function,
            metrics=tuple(self.metrics),
            severity=self.severity,
            cooldown=self.cooldown,
            name=self.name,
            may_stop=self.may_stop,
        )

    def check(self, scope: Scope) -> None:
        for metric in sorted(self.metrics):
            require_metric(metric, scope, self.name)

    def update(self, findings: Findings) -> Judgement:
        return Judgement(signals=self._signals(self._function(findings)))

    def _signals(self, said: object) -> tuple[Signal, ...]:
        if said is None or said is False:
            return (Signal(subject=self.name, state="quiet"),)
        if said is True:
            return (Signal(subject=self.name, state="breach", what=f"the rule {self.name!r} is breached"),)
        if isinstance(said, str) and said:
            return (Signal(subject=self.name, state="breach", what=said),)
        signals = (said,) if isinstance(said, Signal) else said
        if isinstance(signals, str) or not isinstance(signals, Sequence):
            raise self._not_said(said)
        for signal in signals:
            if not isinstance(signal, Signal):
                raise self._not_said(signal)
        subjects = [signal.subject for signal in signals]
        if twice := sorted({subject for subject in subjects if subjects.count(subject) > 1}):
            raise ConfigError(f"The rule {self.name!r} gave two signals on {twice[0]!r}. Give one for each subject.")
        return tuple(signals)

    def _not_said(self, said: object) -> ConfigError:
        return ConfigError(
            f"The rule {self.name!r} returned {said!r} ({type(said).__name__}). A rule of your own returns None or "
            "False where all is well, True or a clause that says what is wrong, or Signals."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"function": self._function.state_dict()} if isinstance(self._function, Stateful) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if isinstance(self._function, Stateful) and "function" in state:
            self._function.load_state_dict(state["function"])


def _resolved(path: str) -> object:
    """What stands at package.module:name."""
    place, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not place or not name:
        raise ConfigError(f"A rule of your own was given {path!r}. Give where it is: 'package.module:function'.")
    module = _module(place, path)
    members = vars(module)
    if name not in members:
        known = [member for member, value in members.items() if callable(value) and not member.startswith("_")]
        raise ConfigError(
            f"A rule of your own was given {path!r}. " + unknown(f"function in {place}", name, sorted(known))
        )
    found: object = members[name]
    return found


def _module(place: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # Not so where the module is there and what it imports is not.
        if not f"{place}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"A rule of your own was given {path!r}, and Python finds no module {error.name!r}. Correct the path, or "
            "install the package; a file beside the script is found if the script is started from its folder."
        ) from error


def _name_of(function: object) -> str:
    if isinstance(function, (FunctionType, MethodType, BuiltinFunctionType)):
        return f"{function.__module__}:{function.__qualname__}"
    return f"{type(function).__module__}:{type(function).__qualname__}"
