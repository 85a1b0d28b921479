"""From numbers at positions to readings: overall, for each group, and for the worst group."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.statistics import Estimate, Strata
from diffsensor.types import WORST_GROUP, MetricInfo, Reading


def probe_sums(values: Float[Tensor, " pos"], owner: Int[Tensor, " pos"], num_probes: int) -> Float[Tensor, " probe"]:
    """The sums over the positions of each probe."""
    # bincount adds in a fixed order on a CPU; on a GPU it does not, and a reading must repeat to the last bit.
    return torch.bincount(owner.cpu(), weights=values.cpu().double(), minlength=num_probes)


def readings_of(
    estimates: Sequence[Estimate],
    info: MetricInfo,
    strata: Strata,
    *,
    sensor: str,
    step: int,
    hookpoint: str = "",
    bounds: Sequence[float] | None = None,
) -> list[Reading]:
    """One reading for each stratum, then the one of the group that is worst (a NaN is worse than any number)."""
    readings = [
        Reading(
            step=step,
            sensor=sensor,
            metric=info.name,
            value=found.value,
            stderr=found.stderr,
            unit=info.unit,
            num_probes=found.num_probes,
            group=group,
            hookpoint=hookpoint,
            bound=bound,
            scale=info.scale,
        )
        for group, found, bound in zip(strata.names, estimates, bounds or [0.0] * len(estimates), strict=True)
    ]
    groups = [reading for reading in readings[1:] if reading.num_probes]  # those that have any weight
    if not groups:
        return readings
    distance = abs if info.worst == "furthest_from_zero" else float
    worst = max(groups, key=lambda reading: math.inf if math.isnan(reading.value) else distance(reading.value))
    return [*readings, replace(worst, group=WORST_GROUP, note=f"group {worst.group!r}")]
