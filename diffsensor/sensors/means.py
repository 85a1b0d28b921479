"""From numbers at positions to readings: overall, for each group, and for the worst group."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.protocols import ReferenceAnswers
from diffsensor.statistics import Estimate, ratio_mean
from diffsensor.types import ALL_PROBES, WORST_GROUP, MetricInfo, Reading


class ProbeSums:
    """Sums over the positions of each probe, added up piece by piece."""

    def __init__(self, num_probes: int) -> None:
        self.sums = torch.zeros(num_probes, dtype=torch.float64)
        self.counts = torch.zeros(num_probes, dtype=torch.float64)

    def add(self, values: Float[Tensor, " pos"], owner: Int[Tensor, " pos"]) -> None:
        # bincount adds in a fixed order on a CPU; on a GPU it does not, and a reading must repeat to the last bit.
        owner, size = owner.cpu(), len(self.sums)
        self.sums += torch.bincount(owner, weights=values.cpu().double(), minlength=size)
        self.counts += torch.bincount(owner, minlength=size)


def mean_readings(
    sums: ProbeSums, info: MetricInfo, reference: ReferenceAnswers, *, sensor: str, step: int, hookpoint: str = ""
) -> list[Reading]:
    """The mean of a metric over counted positions, overall, in each group and in the worst group."""

    def estimate(weights: Float[Tensor, " probe"]) -> Estimate:
        return ratio_mean(sums.sums, sums.counts, weights)

    return grouped_readings(estimate, info, reference, sensor=sensor, step=step, hookpoint=hookpoint)


def grouped_readings(
    estimate: Callable[[Float[Tensor, " probe"]], Estimate],
    info: MetricInfo,
    reference: ReferenceAnswers,
    *,
    sensor: str,
    step: int,
    hookpoint: str = "",
) -> list[Reading]:
    """`estimate` at the weights of all probes, then of each group; then the worst group by its name."""
    readings = []
    for group, weights in strata_weights(reference):
        found = estimate(weights)
        readings.append(
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
                scale=info.scale,
            )
        )
    return with_worst(readings, info)


def strata_weights(reference: ReferenceAnswers) -> Iterator[tuple[str, Float[Tensor, " probe"]]]:
    weights = reference.probes.weights.double()
    yield ALL_PROBES, weights
    for name in reference.probes.group_names:
        yield name, weights * torch.tensor([group == name for group in reference.probes.groups])


def with_worst(readings: Sequence[Reading], info: MetricInfo) -> list[Reading]:
    """The readings, and once more the one of the group that is worst (a NaN is worse than any number)."""
    groups = [reading for reading in readings if reading.group != ALL_PROBES]
    if not groups:
        return list(readings)
    distance = abs if info.worst == "furthest_from_zero" else float
    worst = max(groups, key=lambda reading: math.inf if math.isnan(reading.value) else distance(reading.value))
    named = {name: getattr(worst, name) for name in worst.__slots__} | {
        "group": WORST_GROUP,
        "note": f"group {worst.group!r}",
    }
    return [*readings, Reading(**named)]
