"""The tail of a metric over positions: where the mean hides a few large changes."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.statistics import Estimate, clustered_mean


def quantile(
    values: Float[Tensor, " pos"],
    owner: Int[Tensor, " pos"],
    weights: Float[Tensor, " probe"],
    num_probes: int,
    share: float = 0.95,
) -> Estimate:
    """The smallest value that a share of all positions (by weight) does not exceed.

    Error: the standard error of the share below it, clustered by probe, carried over to the scale of the
    values (Woodruff 1952, Confidence intervals for medians and other position measures).
    """
    if (unknown := _unknown(values, owner, weights)) is not None:
        return unknown
    ordered, position_weight = _ordered(values, owner, weights)
    value = _at_share(ordered, position_weight, share)
    below = clustered_mean((values <= value).double(), owner, weights, num_probes)
    if math.isnan(below.stderr):
        return Estimate(value=value, stderr=math.nan, num_probes=below.num_probes)
    low, high = (_at_share(ordered, position_weight, share + sign * below.stderr) for sign in (-1, 1))
    return Estimate(value=value, stderr=(high - low) / 2, num_probes=below.num_probes)


def worst_mean(
    values: Float[Tensor, " pos"],
    owner: Int[Tensor, " pos"],
    weights: Float[Tensor, " probe"],
    num_probes: int,
    share: float = 0.01,
) -> Estimate:
    """The mean over the largest values that make up a share of all positions by weight (at least one position).

    Error: of the mean of its influence function, threshold + max(value - threshold, 0) / share, clustered.
    """
    if (unknown := _unknown(values, owner, weights)) is not None:
        return unknown
    ordered, position_weight = _ordered(values, owner, weights)
    wanted = max(share * float(position_weight.sum()), float(position_weight[-1]))
    from_top = position_weight.flip(0)
    # Of the last position that belongs to the worst share, only the part that fits in counts.
    before = from_top.cumsum(0) - from_top
    taken = torch.minimum((wanted - before).clamp_min(0), from_top)
    value = float((ordered.flip(0) * taken).sum() / taken.sum())
    threshold = float(ordered.flip(0)[taken > 0][-1])
    influence = threshold + (values - threshold).clamp_min(0) / (wanted / float(position_weight.sum()))
    error = clustered_mean(influence, owner, weights, num_probes)
    return Estimate(value=value, stderr=error.stderr, num_probes=error.num_probes)


def _unknown(values: Tensor, owner: Tensor, weights: Tensor) -> Estimate | None:
    """The estimate where no position counts, or one that does is NaN."""
    counted = weights[owner] > 0
    if bool(counted.any()) and not bool(values[counted].isnan().any()):
        return None
    num_probes = int(torch.bincount(owner[counted]).count_nonzero())
    return Estimate(value=math.nan, stderr=math.nan, num_probes=num_probes)


def _ordered(values: Tensor, owner: Tensor, weights: Tensor) -> tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]]:
    position_weight = weights[owner]
    counted = position_weight > 0
    ordered, order = values[counted].sort()
    return ordered, position_weight[counted][order]


def _at_share(ordered: Float[Tensor, " pos"], weight: Float[Tensor, " pos"], share: float) -> float:
    reached = weight.cumsum(0) / weight.sum() >= min(max(share, 0.0), 1.0) - 1e-12
    place = int(reached.nonzero()[0]) if bool(reached.any()) else len(ordered) - 1
    return float(ordered[place])
