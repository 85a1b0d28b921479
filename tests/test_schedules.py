import itertools
import math

import pytest

from diffsensor.errors import ConfigError
from diffsensor.protocols import Schedule
from diffsensor.schedules import every, log_spaced


def due(schedule: Schedule, stop: int) -> list[int]:
    return [step for step in range(stop) if schedule(step)]


def test_every_n_is_due_at_the_multiples_of_n_and_at_step_zero() -> None:
    assert due(every(4), 13) == [0, 4, 8, 12]
    assert due(every(1), 3) == [0, 1, 2]


@pytest.mark.parametrize("per_decade", [1, 3, 10, 25])
def test_log_spaced_is_due_at_zero_and_at_the_rounded_powers(per_decade: int) -> None:
    powers = {round(10 ** (k / per_decade)) for k in range(4 * per_decade + 1)}
    assert due(log_spaced(per_decade), 10_001) == sorted({0} | powers)


def test_log_spaced_is_about_evenly_spaced_in_the_logarithm() -> None:
    steps = [step for step in due(log_spaced(10), 10_001) if step >= 20]
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(steps)]
    assert max(gaps) < 0.13
    assert min(gaps) > 0.075


@pytest.mark.parametrize("schedule", [every(3), log_spaced()])
def test_no_schedule_is_due_before_step_zero(schedule: Schedule) -> None:
    assert not any(schedule(step) for step in range(-10, 0))


def test_schedules_compare_by_value_and_show_how_they_are_written() -> None:
    assert every(3) == every(3) != every(4)
    assert log_spaced() == log_spaced(10)
    assert len({every(3), every(3), log_spaced()}) == 2
    assert eval(repr(every(50))) == every(50)
    assert repr(log_spaced(5)) == "log_spaced(per_decade=5)"
    assert isinstance(every(3), Schedule)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [0, -5, 2.5, True, "10", None])
def test_a_schedule_without_a_positive_count_is_refused_with_the_value_given(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"^every\(n\) was given .*at least 1\.$") as caught:
        every(wrong)  # type: ignore[arg-type]
    assert repr(wrong) in str(caught.value)
    with pytest.raises(ConfigError, match=r"^log_spaced\(per_decade\) was given"):
        log_spaced(wrong)  # type: ignore[arg-type]
