"""The drift budget: PI steps solved by hand, what holds it back, and that it goes on where it was."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsensor.actions.budget import DriftBudget
from diffsensor.errors import ConfigError
from diffsensor.sensors import resolve_sensors
from diffsensor.types import Findings, Reading, Scope

METRICS = {name: info for sensor in resolve_sensors("full") for name, info in sensor.metrics.items()}
SCOPE = Scope(metrics=METRICS, groups={"code": 8, "poems": 8}, hookpoints=("layers.0",))


def a_look(value: float, step: int = 0, *, metric: str = "kl_ref_live", group: str = "") -> Findings:
    other = Reading(step=step, sensor="outputs", metric="tv", value=0.9, unit="probability")
    reading = Reading(step=step, sensor="outputs", metric=metric, value=value, unit="nats/token", group=group)
    return Findings(step=step, readings=(other, reading))


def coefficients(budget: DriftBudget, values: Sequence[float]) -> list[float | None]:
    return [budget.update(a_look(value, step)) for step, value in enumerate(values)]


def test_the_steps_are_those_of_a_case_solved_by_hand() -> None:
    budget = DriftBudget(0.2, start=1.0, kp=0.6, ki=0.15)
    # e = +0.5: log c = 0.6 * 0.5 + 0.15 * 0.5 = 0.375
    # e = +0.25: log c = 0.6 * 0.25 + 0.15 * 0.75 = 0.2625
    # e = 0: log c = 0.15 * 0.75 = 0.1125
    # e = -0.5: log c = -0.3 + 0.15 * 0.25 = -0.2625
    found = coefficients(budget, [0.3, 0.25, 0.2, 0.1])
    assert found == pytest.approx([math.exp(x) for x in (0.375, 0.2625, 0.1125, -0.2625)], rel=1e-12)
    assert budget.coefficient == found[-1]


def test_it_moves_by_at_most_the_factor_at_one_reading() -> None:
    budget = DriftBudget(0.2, start=1.0, max_factor=1.5)
    # e is cut to 1 and asks for a factor exp(0.75); what was not followed is not added to the sum.
    assert coefficients(budget, [9.0]) == pytest.approx([1.5])
    assert coefficients(budget, [9.0]) == pytest.approx([math.exp(0.75)])
    # Down again: e = -1 asks for exp(-0.6 + 0.15 * (1 - 1)), and gets a factor of 1.5.
    assert coefficients(budget, [0.0]) == pytest.approx([math.exp(0.75) / 1.5])


@pytest.mark.parametrize(("reading", "end"), [(5.0, 10.0), (0.0, 0.1)])
def test_after_a_long_time_at_its_end_it_turns_at_once(reading: float, end: float) -> None:
    """Without anti-windup a sum of hundreds would have to be worked off first."""
    budget = DriftBudget(0.2, start=1.0, lowest=0.1, highest=10.0)
    assert coefficients(budget, [reading] * 300)[-1] == pytest.approx(end)
    turned = coefficients(budget, [0.2 - 0.1 * math.copysign(1, reading - 0.2)] * 2)
    assert all(value is not None and abs(math.log(value / end)) > 0.1 for value in turned)


def test_an_error_counts_alike_above_and_below_from_one_on() -> None:
    up, down = DriftBudget(0.2, start=1.0, max_factor=10), DriftBudget(0.2, start=1.0, max_factor=10)
    for value in (0.4, 0.7, 50.0):
        (above,), (below,) = coefficients(up, [value]), coefficients(down, [0.0])
        assert above is not None
        assert below is not None
        assert above * below == pytest.approx(1.0)


@given(
    st.lists(st.floats(-1e-8, 1e6), max_size=40),
    st.floats(1e-3, 10.0),
    st.floats(0.0, 3.0),
    st.floats(0.01, 2.0),
)
def test_it_stays_in_its_range_and_within_the_factor(values: list[float], limit: float, kp: float, ki: float) -> None:
    budget, before = DriftBudget(limit, kp=kp, ki=ki), 1.0
    for value in coefficients(budget, values):
        assert value is not None
        assert 1e-4 * (1 - 1e-12) <= value <= 1e2 * (1 + 1e-12)
        assert 1 / 1.5 - 1e-9 <= value / before <= 1.5 + 1e-9
        before = value


def test_the_scale_of_the_readings_does_not_matter() -> None:
    values = [0.1, 0.3, 0.5, 0.25, 0.19]
    one = coefficients(DriftBudget(0.2), values)
    other = coefficients(DriftBudget(0.2 * 64), [64 * value for value in values])
    assert one == other


def test_where_nothing_was_read_it_holds() -> None:
    budget = DriftBudget(0.2, group="code")
    before = budget.state_dict()
    for findings in (
        Findings(step=1),
        a_look(0.3),
        a_look(0.3, group="poems"),
        a_look(math.nan, group="code"),
        a_look(math.inf, group="code"),
        a_look(0.3, metric="js", group="code"),
    ):
        assert budget.update(findings) is None
        assert budget.state_dict() == before
    assert budget.update(a_look(0.3, group="code")) is not None


VALUES = [0.0, 0.01, 0.1, 0.24, 0.31, 2.0, 0.6, math.nan, 0.4, 0.2, 0.15, 0.22, 0.19]


@pytest.mark.parametrize("at", range(len(VALUES) + 1))
def test_saved_and_loaded_after_any_reading_it_goes_on_as_if_nothing_had_happened(at: int) -> None:
    uninterrupted = coefficients(DriftBudget(0.2, start=1.0), VALUES)
    first, second = DriftBudget(0.2, start=1.0), DriftBudget(0.2, start=1.0)
    found = coefficients(first, VALUES[:at])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.coefficient == first.coefficient
    assert second.evidence(at) == first.evidence(at)
    assert found + coefficients(second, VALUES[at:]) == uninterrupted


def plant(
    budget: DriftBudget, *, pull: float = 1.0, jump_at: int = 0, noise: float = 0.0, looks: int = 120
) -> list[float]:
    """Drift that goes towards `pull` / (1 + 3 * coefficient), a fifth of the way at each reading."""
    kl, seen = 0.0, []
    for look in range(120):
        goes_to = (2 * pull if jump_at and look >= jump_at else pull) / (1 + 3 * budget.coefficient)
        kl += 0.2 * (goes_to - kl)
        seen.append(kl)
        budget.update(a_look(kl * (1 + noise * math.sin(12.9898 * look * look)), look))
    return seen


@pytest.mark.parametrize("pull", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_in_a_closed_loop_the_reading_ends_at_the_limit(pull: float, noise: float) -> None:
    seen = plant(DriftBudget(0.2), pull=pull, noise=noise)
    assert max(abs(value / 0.2 - 1) for value in seen[-30:]) < (0.02 if noise == 0 else 0.15)


def test_after_a_disturbance_the_reading_comes_back_to_the_limit() -> None:
    seen = plant(DriftBudget(0.2), jump_at=60)
    assert max(seen[60:]) < 1.5 * 0.2
    assert seen[-1] == pytest.approx(0.2, rel=0.02)


def test_the_coefficient_is_a_reading_for_the_record() -> None:
    budget = DriftBudget(0.2, start=0.5)
    budget.check(replace(SCOPE, bank="mine"))
    assert budget.evidence(0).value == 0.5
    assert budget.evidence(0).note == ""
    budget.update(a_look(0.3))
    reading = budget.evidence(7)
    assert (reading.step, reading.metric, reading.bank) == (7, "kl_coefficient", "mine")
    assert reading.value == budget.coefficient
    assert reading.note == "kl_ref_live is 0.3, the budget 0.2"


def test_a_budget_that_can_be_kept_passes_the_check() -> None:
    for budget in (DriftBudget(0.2), DriftBudget(0.2, group="code"), DriftBudget(0.2, group="worst")):
        budget.check(SCOPE)
    DriftBudget(0.2, metric="kl_ref_live_p95").check(SCOPE)
    assert DriftBudget(0.2, group="code").name == "DriftBudget(0.2, metric='kl_ref_live', group='code')"
    assert DriftBudget(0.2).metrics == {"kl_ref_live"}


def test_what_cannot_be_kept_is_refused_with_the_closest_choice() -> None:
    def refused(budget: DriftBudget, match: str, scope: Scope = SCOPE) -> None:
        with pytest.raises(ConfigError, match=match):
            budget.check(scope)

    refused(DriftBudget(0.2, metric="kl_ref_liv"), "Did you mean 'kl_ref_live'")
    refused(DriftBudget(0.2, metric="nll_change"), "a change with a sign")
    refused(DriftBudget(0.2, metric="relative_l2"), "read at each hookpoint")
    refused(DriftBudget(1.2, metric="tv"), "tv is in .* goes from 0 to 1. Give a limit between these")
    refused(DriftBudget(0.2, group="cod"), "Did you mean 'code'")
    refused(DriftBudget(0.2, group="worst"), "the probes have no groups", replace(SCOPE, groups={}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": 0.0}, "limit=0.0. Give a number of more than 0"),
        ({"limit": -0.2}, "limit=-0.2"),
        ({"limit": math.nan}, "limit=nan"),
        ({"kp": -0.1}, "kp=-0.1. Give a number of at least 0"),
        ({"ki": 0.0}, "ki=0.0"),
        ({"max_factor": 1.0}, "max_factor=1.0. Give a number of more than 1"),
        ({"start": 1e3}, "start=1000.0, which is not between lowest=0.0001 and highest=100.0"),
        ({"lowest": 0.0}, "lowest=0.0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DriftBudget(**({"limit": 0.2} | options))
