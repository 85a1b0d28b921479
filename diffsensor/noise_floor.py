"""The noise floor: by how much the same weights read differently."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from diffsensor.probes import split_otherwise
from diffsensor.types import Findings, Plan, Reading

logger = logging.getLogger(__name__)

UNMEASURABLE = "no measurable drift"


def measured_floor(look: Callable[[Plan], Findings], plan: Plan) -> dict[str, float]:
    """By log key, the largest difference between readings of the same weights: read again, and in another batch split.

    Read again in the same layout they should not differ at all; where they do, it is said in the log.
    """
    once, again, otherwise = (
        {reading.key: reading.value for reading in look(each).readings} for each in (plan, plan, split_otherwise(plan))
    )
    unstable = [key for key, value in once.items() if not _is_same(again.get(key, value), value)]
    if unstable:
        logger.warning(
            "The same weights, read twice in the same layout, differ in %d of %d readings, first in %s (%.3g, then "
            "%.3g). Something in the model is not deterministic in evaluation mode: a kernel that adds in any "
            "order (torch.use_deterministic_algorithms names it), or a module that draws random numbers or keeps "
            "state. The noise floor takes it in.",
            *(len(unstable), len(once), unstable[0], once[unstable[0]], again[unstable[0]]),
        )
    return {
        key: max(abs(other.get(key, math.nan) - value) for other in (otherwise, again)) for key, value in once.items()
    }


def _is_same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def with_floor(reading: Reading, floor: Mapping[str, float]) -> Reading:
    """The reading with its noise floor, and a note where it is no further from 0 than 3 of them."""
    reading = replace(reading, noise_floor=floor.get(reading.key, math.nan))
    if reading.is_measurable:
        return reading
    return replace(reading, note=f"{reading.note}; {UNMEASURABLE}" if reading.note else UNMEASURABLE)
