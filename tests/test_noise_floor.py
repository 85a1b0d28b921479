"""The noise floor: the largest difference between looks at the same weights, and what it makes of a reading."""

import logging
import math

import pytest

from diffsensor.noise_floor import UNMEASURABLE, measured_floor, with_floor
from diffsensor.types import Findings, Plan
from tiny import probe_set
from tiny_rules import reading


def floor(*looks: dict[str, float]) -> dict[str, float]:
    """The floor of readings that are given, look by look: once, again, and in another split."""
    plan, seen = probe_set().plan(packed=False), list[Plan]()

    def look(asked: Plan) -> Findings:
        seen.append(asked)
        return Findings(
            step=-1, readings=tuple(reading(-1, name, value) for name, value in looks[len(seen) - 1].items())
        )

    found = measured_floor(look, plan)
    assert [each is plan for each in seen] == [True, True, False]
    return {key.removeprefix("diffsensor/"): value for key, value in found.items()}


def test_the_floor_is_the_largest_difference_and_nan_where_it_was_not_measured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    once = {"a": 1.0, "b": 2.0, "c": math.nan, "d": 3.0}
    found = floor(once, {"a": 1.5, "b": 2.0, "c": math.nan}, {"a": 1.25, "b": 2.5, "c": math.nan})
    assert found == pytest.approx({"a": 0.5, "b": 0.5, "c": math.nan, "d": math.nan}, nan_ok=True)
    assert "differ in 1 of 4 readings, first in diffsensor/a (1, then 1.5)" in caplog.text


def test_what_is_no_number_both_times_does_not_differ(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        floor(*[{"a": math.nan, "b": 1.0}] * 3)
        assert caplog.text == ""
        floor({"a": math.nan}, {"a": 1.0}, {"a": 1.0})
    assert "differ in 1 of 1 readings" in caplog.text


def test_a_reading_below_its_floor_says_so_beside_what_it_said_before() -> None:
    low = {"diffsensor/a": 1.0}
    assert with_floor(reading(0, "a", 2.0), low).note == UNMEASURABLE
    assert with_floor(with_floor(reading(0, "a", 2.0), low), low).note == f"{UNMEASURABLE}; {UNMEASURABLE}"
    assert with_floor(reading(0, "a", 4.0), low).note == ""
    assert math.isnan(with_floor(reading(0, "b", 2.0), low).noise_floor)
