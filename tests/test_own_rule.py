import copy
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from diffsensor.errors import ConfigError
from diffsensor.protocols import Rule
from diffsensor.rules.own import Own
from diffsensor.types import Findings, MetricInfo, Scope, Signal

LOOK = Findings(step=3)
KL = MetricInfo(name="kl_ref_live", unit="nats/token", low=0.0, high=10.0, direction="", estimator="")


@pytest.fixture(autouse=True)
def rules_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package in which a user keeps rules."""
    package = tmp_path / "rules_of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "odd.py").write_text(
        "limit = 3\n"
        "def at_odd_steps(findings):\n    return f'step {findings.step} is odd' if findings.step % 2 else None\n"
        "class Kept:\n    def __call__(self, findings):\n        return None\n"
        "kept = Kept()\n"
    )
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("rules_of_a_user")]:
        del sys.modules[name]


def quiet(findings: Findings) -> None:
    """Nothing is ever wrong."""


class Counts:
    """In breach from its third look."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self, findings: Findings) -> bool:
        self.looks += 1
        return self.looks >= 3

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.looks = state["looks"]


@pytest.mark.parametrize("path", ["rules_of_a_user.odd:at_odd_steps", "rules_of_a_user.odd.at_odd_steps"])
def test_a_rule_is_found_by_its_path(path: str) -> None:
    rule = Own(path)
    assert isinstance(rule, Rule)
    assert rule.name == path
    (signal,) = rule.update(LOOK).signals
    assert (signal.subject, signal.state, signal.what) == (path, "breach", "step 3 is odd")
    assert rule.update(Findings(step=4)).signals[0].state == "quiet"


def test_a_callable_is_named_after_where_it_is_defined() -> None:
    assert Own(quiet).name == f"{__name__}:quiet"
    assert Own(Counts()).name == f"{__name__}:Counts"
    assert Own(quiet, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("said", "state"), [(None, "quiet"), (False, "quiet"), (True, "breach"), ("it is wrong", "breach")]
)
def test_none_and_false_are_quiet_true_and_a_clause_a_breach(said: Any, state: str) -> None:
    (signal,) = Own(lambda _: said, name="mine").update(LOOK).signals
    assert (signal.subject, signal.state) == ("mine", state)
    assert bool(signal.what) == (state == "breach")


def test_signals_are_passed_on_as_they_are() -> None:
    one, other = Signal(subject="a", state="unknown"), Signal(subject="b", state="breach", what="b is wrong")
    assert Own(lambda _: one).update(LOOK).signals == (one,)
    assert Own(lambda _: [one, other]).update(LOOK).signals == (one, other)
    assert Own(lambda _: ()).update(LOOK).signals == ()
    with pytest.raises(ConfigError, match="two signals on 'a'"):
        Own(lambda _: [one, one]).update(LOOK)


@pytest.mark.parametrize("said", [3, 0.5, "", {"a": 1}, ["a clause"], [None], b"wrong"])
def test_anything_else_is_an_error_that_says_what_may_be_returned(said: Any) -> None:
    with pytest.raises(ConfigError, match=r"'mine' returned .* None or False where all is well"):
        Own(lambda _: said, name="mine").update(LOOK)


def test_a_callable_with_a_state_goes_on_where_it_was() -> None:
    for cut in range(5):
        first, second = Own(Counts()), Own(Counts())
        begun = [first.update(LOOK).signals[0].state for _ in range(cut)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [second.update(LOOK).signals[0].state for _ in range(5 - cut)]
        assert begun + rest == ["quiet", "quiet", "breach", "breach", "breach"]


def test_a_callable_without_a_state_has_none() -> None:
    rule = Own(quiet)
    assert rule.state_dict() == {}
    rule.load_state_dict({})


def test_it_looks_at_everything_unless_it_says_at_what() -> None:
    scope = Scope(metrics={"kl_ref_live": KL}, groups={}, progress=("loss",))
    assert Own(quiet).metrics == frozenset()
    assert not Own(quiet).may_stop
    rule = Own(quiet, metrics=["kl_ref_live", "loss"], may_stop=True)
    assert (rule.metrics, rule.may_stop) == ({"kl_ref_live", "loss"}, True)
    for fine in (Own(quiet), rule):
        fine.check(scope)
    with pytest.raises(ConfigError, match="Did you mean 'kl_ref_live'"):
        Own(quiet, metrics=["kl_ref_liv"]).check(scope)


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("rules_of_a_user.odd:at_odd_step", {}, "Did you mean 'at_odd_steps'"),
        ("rules_of_a_user.odd.at_odd_step", {}, "Did you mean 'at_odd_steps'"),
        ("rules_of_a_usr.odd:at_odd_steps", {}, "no module 'rules_of_a_usr'"),
        ("rules_of_a_user.od:at_odd_steps", {}, "no module 'rules_of_a_user.od'"),
        ("rules_of_a_user.odd:limit", {}, "cannot be called"),
        ("rules_of_a_user.odd:Kept", {}, r"Kept\(\.\.\.\)"),
        ("at_odd_steps", {}, "package.module:function"),
        ("rules_of_a_user.odd:", {}, "package.module:function"),
        (3, {}, "cannot be called"),
        (quiet, {"metrics": "kl_ref_live"}, r"\['kl_ref_live'\]"),
        (quiet, {"severity": "warnin"}, "Did you mean 'warning'"),
        (quiet, {"cooldown": 1.5}, "whole number"),
        (quiet, {"name": 3}, "Give a text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_a_rule_is_refused(function: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Own(function, **arguments)


def test_a_module_that_lacks_what_it_imports_says_so_itself() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        Own("rules_of_a_user.broken:rule")


def test_a_copy_of_the_rule_shares_the_callable_and_not_its_state() -> None:
    class Uncopyable:
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("a model would be copied here")

        def judge(self, findings: Findings) -> None:
            return None

    class Counting:
        def __init__(self) -> None:
            self.num_looks = 0

        def __call__(self, findings: Findings) -> bool:
            self.num_looks += 1
            return self.num_looks > 1

        def state_dict(self) -> dict[str, int]:
            return {"num_looks": self.num_looks}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.num_looks = state["num_looks"]

    rule = Own(Uncopyable().judge, severity="info", cooldown=3, may_stop=True, metrics=["kl"], name="mine")
    copied = copy.deepcopy(rule)
    assert copied.update(Findings(step=0)) == rule.update(Findings(step=0))
    for name in ("severity", "cooldown", "may_stop", "metrics", "name"):
        assert getattr(copied, name) == getattr(rule, name)
    first = Own(Counting(), name="counts")
    second = copy.deepcopy(first)
    assert [one.update(Findings(step=0)).signals[0].state for one in (first, first, second)] == [
        "quiet",
        "breach",
        "quiet",
    ]
