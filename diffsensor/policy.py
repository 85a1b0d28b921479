"""The policy file: what is read, what is judged by, and what follows, in one YAML file for callbacks and commands.

    probes: probes.jsonl                # or a saved probe set, or "default"
    tokenizer: ./model                  # a directory or a name; needed for .jsonl and "default"
    sensors: light                      # or full, or a list
    schedule: {every: 50}               # or {log_spaced: 10}
    rules:
      - invariant
      - limit: {metric: kl_ref_live, above: 0.3, group: "*"}
        do: [scale_learning_rate: 0.5, stop]
      - any_of:
          - change_point: {metric: relative_l2, hookpoint: "*"}
          - envelope: {pilots: pilots.json}
    gate:
      - limit: {metric: kl_ref_live, above: 0.3}
    budget: {limit: 0.2}
    sinks:
      - webhook: {url: "https://..."}
    banks:                              # further probe sets, each with keys as above
      held_out: {probes: held_out.jsonl, sealed: true}

Rules, actions and sinks have the names and the arguments of their classes. Paths are relative to the file.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, final

import yaml

from diffsensor import actions, rules, sinks
from diffsensor.actions import Response
from diffsensor.actions.budget import DriftBudget
from diffsensor.checksums import digest
from diffsensor.errors import ConfigError, DiffSensorError, unknown
from diffsensor.gate import Gate
from diffsensor.probes import ProbeSet
from diffsensor.schedules import every, log_spaced
from diffsensor.sensors import resolve_sensors
from diffsensor.types import FIXED_BANK

#: Sinks of other packages, by the name that a policy gives them.
SINK_GROUP = "diffsensor.sinks"
#: What a policy may hold beside rules, gate, budget and sinks, with the type that is expected.
_PLAIN: dict[str, tuple[type, ...]] = {
    "hookpoints": (str, list),
    "log_text": (bool,),
    "noise_floor": (bool,),
    "sealed": (bool,),
    "temperature": (int, float),
}
_KEYS = ("probes", "tokenizer", "sensors", "schedule", "rules", "gate", "budget", "sinks", *_PLAIN)
_LISTED = {"any_of": rules.AnyOf, "all_of": rules.AllOf}


def _named(*classes: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """By the names of the classes as a file writes them: SetKLCoefficient is set_kl_coefficient."""
    words = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
    return {words.sub("_", each.__name__).lower(): each for each in classes}


RULES = _named(rules.ChangePoint, rules.Envelope, rules.GroupShift, rules.Invariant, rules.Limit)
ACTIONS = _named(
    *(actions.Log, actions.Pause, actions.Rollback, actions.SaveCheckpoint, actions.ScaleLearningRate, actions.Stop),
    *(actions.SetKLCoefficient, actions.ScaleKLCoefficient),
)
SINKS = _named(sinks.Webhook)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a policy file says, ready for a monitor. Made by `read_policy`.

    `arguments` are those of `Monitor` (and of the callbacks) other than the model, the record and the run's own;
    `banks` those of further monitors, by the name of their bank. `digest` is of the file's bytes.
    """

    path: Path
    digest: str
    arguments: Mapping[str, Any]
    banks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_policy(path: str | Path, tokenizer: Any = None) -> Policy:
    """The policy in a file. `tokenizer` is used where the file names none.

    Raises `ConfigError` with the line of whatever means nothing, and the closest name that would.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The policy {path} cannot be read ({error}). Expected a YAML file.") from error
    return Policy(path=path, digest=digest(text), **_Reader(path, tokenizer).read(text))


class _Entry(NamedTuple):
    """Something in the file that has a name and arguments: `limit: {metric: ...}`, or `stop` alone."""

    name: str
    node: yaml.Node
    arguments: yaml.Node | None


class _Reader:
    """Turns the nodes of a file, which know their lines, into parts of a monitor."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._loader = yaml.SafeLoader("")

    def read(self, text: str) -> dict[str, Any]:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}" if mark is not None else ""
            raise ConfigError(f"{self._path}{line}: this is no YAML ({getattr(error, 'problem', error)}).") from error
        if root is None:
            raise ConfigError(f"{self._path} is empty. Expected at least `probes:` and `rules:` or `gate:`.")
        given = self._mapping(root, "a policy", (*_KEYS, "banks"))
        banks = {}
        if "banks" in given:
            for name, node in self._mapping(given.pop("banks"), "banks").items():
                if not re.fullmatch(r"[\w.-]+", name) or name == FIXED_BANK:
                    raise self._at(node, f"a bank is named {name!r}. Use letters, digits, '_', '-', '.'; not 'fixed'")
                inherited = {key: given[key] for key in ("tokenizer",) if key in given}
                own = self._mapping(node, f"the bank {name!r}", _KEYS)
                banks[name] = self._arguments(inherited | own, node) | {"bank": name}
        return {"arguments": self._arguments(given, root), "banks": banks}

    def _arguments(self, given: Mapping[str, yaml.Node], whole: yaml.Node) -> dict[str, Any]:
        if "probes" not in given:
            raise self._at(whole, "no probes are named. Expected `probes:` with a .jsonl file or 'default'")
        found: dict[str, Any] = {"probes": self._probes(given["probes"], given.get("tokenizer"))}
        if "sensors" in given:
            wanted = self._plain(given["sensors"])
            found["sensors"] = self._made(given["sensors"], lambda: resolve_sensors(wanted))
        if "schedule" in given:
            found["schedule"] = self._schedule(given["schedule"])
        if "rules" in given:
            found["rules"] = [self._rule(node) for node in self._sequence(given["rules"], "rules")]
        if "gate" in given:
            node = given["gate"]
            criteria = [self._rule(each) for each in self._sequence(node, "gate")]
            found["gate"] = self._made(node, lambda: Gate(*criteria))
        if "budget" in given:
            found["budget"] = self._call(_Entry("budget", given["budget"], given["budget"]), "budget", DriftBudget)
        if "sinks" in given:
            found["sinks"] = [self._sink(node) for node in self._sequence(given["sinks"], "sinks")]
        for name, types in _PLAIN.items():
            if name in given:
                value = self._plain(given[name])
                if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                    expected = " or ".join(each.__name__ for each in types)
                    raise self._at(given[name], f"{name} is {value!r}, expected {expected}")
                found[name] = value
        return found

    def _probes(self, node: yaml.Node, tokenizer_node: yaml.Node | None) -> Any:
        name = self._plain(node)
        if not isinstance(name, str):
            raise self._at(node, f"probes is {name!r}, expected a .jsonl file, a saved probe set, or 'default'")
        tokenizer = self._tokenizer
        if tokenizer_node is not None:
            where = self._plain(tokenizer_node)
            if not isinstance(where, str):
                raise self._at(tokenizer_node, f"tokenizer is {where!r}, expected a directory or a name")
            from diffsensor.loading import load_tokenizer

            tokenizer = self._made(tokenizer_node, lambda: load_tokenizer(self._near(where)))
        return self._made(node, lambda: ProbeSet.read(name if name == "default" else self._near(name), tokenizer))

    def _schedule(self, node: yaml.Node) -> Any:
        return self._call(self._entry(node, "schedule"), "schedule", {"every": every, "log_spaced": log_spaced})

    def _rule(self, node: yaml.Node) -> Any:
        """A rule, or a response where it says what to `do`."""
        extra: dict[str, yaml.Node] = {}
        if isinstance(node, yaml.MappingNode):
            options = ("do", "patience", "cooldown")
            extra = {key.value: value for key, value in node.value if key.value in options}
            rest = [(key, value) for key, value in node.value if key.value not in options]
            known = (*RULES, *_LISTED, "k_of")
            for key, _ in rest if len(rest) > 1 else ():
                if key.value not in known:
                    raise self._at(key, unknown("part of a rule", str(key.value), (*options, *known)))
            node = yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark)
        entry = self._entry(node, "rule")
        rule = self._rule_of(entry)
        if "do" not in extra:
            if extra:
                raise self._at(node, f"{next(iter(extra))} is given without `do:`, the actions that it belongs to")
            return rule
        asked = [self._action(each) for each in self._sequence(extra.pop("do"), "do")]
        options_given = {name: self._plain(value) for name, value in extra.items()}
        return self._made(node, lambda: Response(rule, *asked, **options_given))

    def _rule_of(self, entry: _Entry) -> Any:
        if entry.name in _LISTED:
            parts = [self._rule(each) for each in self._sequence(entry.arguments or entry.node, entry.name)]
            return self._made(entry.node, lambda: _LISTED[entry.name](*parts))
        if entry.name == "k_of":
            given = self._mapping(entry.arguments or entry.node, "k_of")
            if not {"k", "rules"} <= given.keys():
                raise self._at(entry.node, "k_of needs `k:` and `rules:`")
            parts = [self._rule(each) for each in self._sequence(given.pop("rules"), "rules")]
            rest = {name: self._plain(node) for name, node in given.items()}
            return self._made(entry.node, lambda: rules.KOf(rest.pop("k"), *parts, **rest))
        return self._call(entry, "rule", RULES, also=(*_LISTED, "k_of"))

    def _action(self, node: yaml.Node) -> Any:
        return self._call(self._entry(node, "action"), "action", ACTIONS)

    def _sink(self, node: yaml.Node) -> Any:
        entry = self._entry(node, "sink")
        others = {each.name: each for each in entry_points(group=SINK_GROUP)}
        if entry.name in others and entry.name not in SINKS:
            try:
                return self._call(entry, "sink", {entry.name: others[entry.name].load()})
            except ImportError as error:
                raise self._at(entry.node, f"the sink {entry.name!r} cannot be loaded ({error})") from error
        return self._call(entry, "sink", SINKS, also=tuple(others))

    def _entry(self, node: yaml.Node, kind: str) -> _Entry:
        if isinstance(node, yaml.ScalarNode):
            return _Entry(str(self._plain(node)), node, None)
        if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
            ((key, value),) = node.value
            return _Entry(str(self._plain(key)), key, value)
        raise self._at(node, f"expected one {kind}, as a name or as `name: {{argument: value}}`")

    def _call(
        self,
        entry: _Entry,
        kind: str,
        known: Mapping[str, Callable[..., Any]] | Callable[..., Any],
        also: Sequence[str] = (),
    ) -> Any:
        """Make the thing that an entry names, from its arguments."""
        if isinstance(known, Mapping):
            if entry.name not in known:
                raise self._at(entry.node, unknown(kind, entry.name, sorted((*known, *also))).rstrip("."))
            make = known[entry.name]
        else:
            make = known
        parameters = {
            name: each
            for name, each in inspect.signature(make).parameters.items()
            if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        }
        node = entry.arguments
        if node is not None and not isinstance(node, yaml.MappingNode):
            return self._made(node, lambda: make(self._plain(node)))
        # An argument whose name is a word of Python has a "_" behind it there, and none in a file.
        named = {} if node is None else self._mapping(node, entry.name, [name.rstrip("_") for name in parameters])
        given = {name if name in parameters else f"{name}_": self._plain(value) for name, value in named.items()}
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in given:
                raise self._at(entry.node, f"{entry.name} needs `{name.rstrip('_')}:`")
        if isinstance(given.get("pilots"), str):
            given["pilots"] = self._near(given["pilots"])
        return self._made(entry.node, lambda: make(**given))

    def _made(self, node: yaml.Node, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigError as error:
            if str(error).startswith(f"{self._path} line "):
                raise
            raise self._at(node, str(error)) from error
        except (DiffSensorError, TypeError, ValueError) as error:
            raise self._at(node, str(error)) from error

    def _near(self, name: str) -> str | Path:
        """A path relative to the file; a name that is none there (of a model on a hub) as it is."""
        near = self._path.parent / name
        return near if near.exists() or name.startswith(".") or name.endswith((".jsonl", ".json")) else name

    def _mapping(self, node: yaml.Node, what: str, known: Sequence[str] = ()) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._at(node, f"{what} is {self._plain(node)!r}, expected names with values")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(self._plain(key))
            if name in found:
                raise self._at(key, f"{name!r} is given twice in {what}")
            if known and name not in known:
                raise self._at(key, unknown(f"part of {what}", name, known).rstrip("."))
            found[name] = value
        return found

    def _sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._at(node, f"{what} is {self._plain(node)!r}, expected a list: lines that begin with '- '")
        return list(node.value)

    def _plain(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (yaml.YAMLError, RecursionError) as error:
            raise self._at(node, f"this cannot be read ({getattr(error, 'problem', error)})") from error

    def _at(self, node: yaml.Node, sentence: str) -> ConfigError:
        mark = node.start_mark
        line = f" line {mark.line + 1}" if mark is not None else ""
        return ConfigError(f"{self._path}{line}: {sentence.rstrip('.')}.")
