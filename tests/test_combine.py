import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsensor.errors import ConfigError
from diffsensor.protocols import Rule
from diffsensor.rules.combine import AllOf, AnyOf, KOf
from diffsensor.rules.invariant import Invariant
from diffsensor.rules.limit import Limit
from diffsensor.types import Findings, Judgement, MetricInfo, Reading, Scope, Severity, Signal, State

STATES: tuple[State, ...] = ("quiet", "breach", "unknown")
KL = MetricInfo(name="kl_ref_live", unit="nats/token", low=0.0, high=10.0, direction="", estimator="")


class Said:
    """A rule that says what it is told to, look by look, of one subject or several."""

    def __init__(
        self,
        *said: State | Sequence[State],
        name: str = "said",
        severity: Severity = "warning",
        cooldown: int = 5,
        metrics: Sequence[str] = ("kl_ref_live",),
        may_stop: bool = True,
        since: int = -1,
    ) -> None:
        self._said: list[Sequence[Any]] = [(each,) if isinstance(each, str) else each for each in said]
        self.name, self.severity, self.cooldown = name, severity, cooldown
        self.metrics, self.may_stop, self._since = frozenset(metrics), may_stop, since
        self.look = 0
        self.checked = 0

    def check(self, scope: Scope) -> None:
        self.checked += 1

    def update(self, findings: Findings) -> Judgement:
        states = self._said[self.look % len(self._said)]
        self.look += 1
        reading = Reading(step=findings.step, sensor=self.name, metric=f"{self.name}_evidence", value=0.5, unit="")
        signals = [
            Signal(
                subject=f"{number}",
                state=state,
                what=f"{self.name} says {state} of {number}",
                since=self._since if state == "breach" else -1,
                reading=reading,
                threshold=1.0,
                advice=f"Mind {self.name}.",
            )
            for number, state in enumerate(states)
        ]
        return Judgement(signals=tuple(signals), evidence=(reading,))

    def state_dict(self) -> dict[str, Any]:
        return {"look": self.look}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.look = state["look"]


def members(*said: State | Sequence[State], **arguments: Any) -> list[Said]:
    return [Said(each, name=f"m{number}", **arguments) for number, each in enumerate(said)]


def signal_of(rule: Rule) -> Signal:
    (signal,) = rule.update(Findings(step=7)).signals
    return signal


def possible(k: int, states: Sequence[State]) -> set[bool]:
    """By going through every truth that the unknown ones may have."""
    truths = product(*({"quiet": [False], "breach": [True], "unknown": [False, True]}[state] for state in states))
    return {sum(truth) >= k for truth in truths}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_three_valued_logic_is_that_of_every_truth_the_unknown_ones_may_have(number: int) -> None:
    for states in product(STATES, repeat=number):
        for k in range(1, number + 1):
            expected = {frozenset({True}): "breach", frozenset({False}): "quiet"}.get(
                frozenset(possible(k, states)), "unknown"
            )
            assert signal_of(KOf(k, *members(*states))).state == expected
            if k == 1:
                assert signal_of(AnyOf(*members(*states))).state == expected
            if k == number:
                assert signal_of(AllOf(*members(*states))).state == expected


@given(st.lists(st.sampled_from(STATES), max_size=4))
def test_a_member_is_in_breach_if_any_of_its_subjects_is(states: list[State]) -> None:
    expected = "breach" if "breach" in states else "unknown" if "unknown" in states else "quiet"
    assert signal_of(AllOf(*members(states, "breach"))).state == expected


def test_it_is_one_subject_and_says_what_its_members_said() -> None:
    signal = signal_of(KOf(2, *members(["quiet", "breach", "breach"], "quiet", "breach")))
    assert signal.subject == "2 of (m0; m1; m2)"
    assert signal.what == "2 of 3 rules are in breach: m0 says breach of 1 (and 1 more); m2 says breach of 0"
    assert signal.advice == "Mind m0. Mind m2."
    assert signal.reading is not None
    assert (signal.reading.sensor, signal.threshold) == ("m0", 1.0)


def test_one_member_of_any_speaks_for_itself() -> None:
    assert signal_of(AnyOf(*members("quiet", "breach"))).what == "m1 says breach of 0"


def test_what_cannot_be_told_names_those_that_could_not() -> None:
    signal = signal_of(AllOf(*members("breach", "unknown")))
    assert signal.what == "1 of 2 rules cannot tell: m1 says unknown of 0"


def test_a_breach_began_when_enough_members_were_in_one() -> None:
    def since(k: int, *steps: int) -> int:
        rules = [Said("breach", name=f"m{number}", since=step) for number, step in enumerate(steps)]
        return signal_of(KOf(k, *rules)).since

    assert since(1, 3, 5) == 3
    assert since(2, 3, 5) == 5
    assert since(2, 3, -1) == -1
    assert since(2, 3, -1, 4) == 4


def test_it_is_as_grave_and_as_patient_as_the_most_of_its_members() -> None:
    rules = [Said("quiet", name="a", severity="info", cooldown=7), Said("quiet", name="b", severity="critical")]
    assert (AnyOf(*rules).severity, AnyOf(*rules).cooldown) == ("critical", 7)
    assert (AnyOf(*rules, severity="info", cooldown=0).severity, AnyOf(*rules, cooldown=0).cooldown) == ("info", 0)


def test_it_looks_at_what_its_members_look_at() -> None:
    rules = [Said("quiet", name="a"), Said("quiet", name="b", metrics=["js"])]
    assert AnyOf(*rules).metrics == {"kl_ref_live", "js"}
    assert AnyOf(*rules, Invariant()).metrics == frozenset()


def test_it_may_stop_only_if_warnings_alone_cannot_breach_it() -> None:
    for warners, stoppers in product(range(4), range(4)):
        for k in range(1, warners + stoppers + 1):
            if warners + stoppers >= 2:
                rules = [Said("quiet", name=f"w{number}", may_stop=False) for number in range(warners)]
                rules += [Said("quiet", name=f"s{number}") for number in range(stoppers)]
                by_warnings_alone = possible(k, ["breach"] * warners + ["quiet"] * stoppers)
                assert KOf(k, *rules).may_stop == (by_warnings_alone == {False})


def test_evidence_is_passed_on() -> None:
    judgement = AllOf(*members("quiet", "breach")).update(Findings(step=7))
    assert [reading.metric for reading in judgement.evidence] == ["m0_evidence", "m1_evidence"]


def test_each_member_is_checked() -> None:
    rules = members("quiet", "quiet")
    AnyOf(*rules).check(Scope(metrics={}, groups={}))
    assert [rule.checked for rule in rules] == [1, 1]
    wrong = AnyOf(Limit("kl_ref_liv", above=0.3), Invariant())
    with pytest.raises(ConfigError, match="Did you mean 'kl_ref_live'"):
        wrong.check(Scope(metrics={"kl_ref_live": KL}, groups={}))


def built() -> KOf:
    lower = Limit("kl_ref_live", above=0.2)
    both = AllOf(Limit("kl_ref_live", above=0.3), Limit("loss", above=2.0), name="both")
    return AnyOf(both, KOf(2, lower, Invariant(), Limit("loss", above=3.0)))


def test_saved_and_loaded_after_any_look_it_goes_on_as_if_nothing_had_happened() -> None:
    kl = [0.1, 0.25, 0.31, 0.35, 0.4, 0.25, 0.1, 0.1, 0.1, 0.35, 0.35, 0.35]
    loss = [2.5, 2.5, 2.5, 2.5, 2.5, 1.0, 1.0, 3.5, 3.5, 3.5, 3.5, 1.0]

    def look(step: int) -> Findings:
        readings = (
            Reading(step=step, sensor="outputs", metric="kl_ref_live", value=kl[step], unit="nats/token", num_probes=8),
            Reading(step=step, sensor="progress", metric="loss", value=loss[step], unit="as given"),
        )
        return Findings(step=step, readings=readings)

    seen = [look(step) for step in range(len(kl))]
    whole = built()
    uninterrupted = [repr(whole.update(each)) for each in seen]
    assert "state='breach'" in str(uninterrupted)
    for cut in range(len(seen)):
        first, second = built(), built()
        begun = [repr(first.update(each)) for each in seen[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [repr(second.update(each)) for each in seen[cut:]] == uninterrupted


def test_the_state_of_other_members_is_refused() -> None:
    state = AnyOf(*members("quiet", "quiet")).state_dict()
    with pytest.raises(ConfigError, match="had the rules m0, m1"):
        AnyOf(Said("quiet", name="m0"), Said("quiet", name="m2"), name="any").load_state_dict(state)


def test_names_are_nested() -> None:
    assert built().name == (
        "any of (both; 2 of (kl_ref_live above 0.2; invariant; loss above 3))"
    )  # fmt: skip


def test_a_rule_stands_in_a_combination_once() -> None:
    rule, other = members("quiet", "quiet")
    with pytest.raises(ConfigError, match="'m0' stands twice"):
        AnyOf(rule, other, rule)
    with pytest.raises(ConfigError, match="'m0' stands twice"):
        AnyOf(rule, AllOf(rule, other))
    with pytest.raises(ConfigError, match="'m0 2'"):
        AnyOf(rule, *members("quiet"))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AnyOf(), "0 rules"),
        (lambda: AllOf(Invariant()), "1 rules"),
        (lambda: KOf(0, *members("quiet", "quiet")), "from 1 to 2"),
        (lambda: KOf(3, *members("quiet", "quiet")), "from 1 to 2"),
        (lambda: KOf(*members("quiet", "quiet", "quiet")), "Give first how many"),
        (lambda: AnyOf(Limit, Invariant()), "expected rules"),
        (lambda: AnyOf("kl_ref_live", Invariant()), "expected rules"),
        (lambda: AnyOf(*members("quiet", "quiet"), severity="grave"), "severity"),
        (lambda: AnyOf(*members("quiet", "quiet"), cooldown=-1), "at least 0"),
        (lambda: AnyOf(*members("quiet", "quiet"), name=3), "Give a text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_means_nothing_is_refused(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()
