"""Drift of activations at one hookpoint, a number for each counted position."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from diffsensor.types import MetricInfo

Activations = Float[Tensor, "pos width"]
_NO_SINKS = "counted, without attention sinks (reference norm over 10 x the median)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMetric:
    """A drift metric on the activations of one hookpoint: `measure(reference, live)`, both in float32."""

    info: MetricInfo
    measure: Callable[[Activations, Activations], Float[Tensor, " pos"]]


def relative_l2(ref: Activations, live: Activations) -> Float[Tensor, " pos"]:
    """||h - h_ref|| / ||h_ref|| at each position; 0 where both are 0.

    No unit, in [0, inf). Blind to direction: a change of norm and a turn look alike.
    """
    norm: Tensor = torch.linalg.vector_norm(ref, dim=1).clamp_min(torch.finfo(ref.dtype).tiny)
    distance: Tensor = torch.linalg.vector_norm(live - ref, dim=1)
    return distance / norm


def cosine_distance(ref: Activations, live: Activations) -> Float[Tensor, " pos"]:
    """1 - cos(h_ref, h) at each position, as half the squared distance of the two unit vectors, which does not cancel.

    No unit, in [0, 2]. Blind to a change of norm: pair it with `relative_l2`.
    """
    return (_unit(ref) - _unit(live)).square().sum(1) / 2


def _unit(vectors: Activations) -> Activations:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / norm.clamp_min(torch.finfo(vectors.dtype).tiny)


RELATIVE_L2 = ActivationMetric(
    info=MetricInfo(
        name="relative_l2",
        unit="share of the reference's norm",
        low=0.0,
        high=inf,
        direction="live minus reference, divided by the reference: ||h - h_ref|| / ||h_ref||",
        estimator="mean over positions of the ratio at each",
        positions=_NO_SINKS,
        at="hookpoints",
        scale="log",
        blind_to="direction: growth and turning look alike",
    ),
    measure=relative_l2,
)
COSINE_DISTANCE = ActivationMetric(
    info=MetricInfo(
        name="cosine_distance",
        unit="1 - cosine",
        low=0.0,
        high=2.0,
        direction="symmetric: 1 - cos(h_ref, h)",
        estimator="mean over positions",
        positions=_NO_SINKS,
        at="hookpoints",
        scale="log",
        blind_to="a change of norm",
    ),
    measure=cosine_distance,
)

#: Every metric of this kind. To add one: a line here and a test.
ACTIVATION_METRICS: dict[str, ActivationMetric] = {
    metric.info.name: metric for metric in (RELATIVE_L2, COSINE_DISTANCE)
}

MEAN_SHIFT = MetricInfo(
    name="mean_shift",
    unit="activation norm",
    low=0.0,
    high=inf,
    direction="live minus reference: ||mean(h - h_ref)||, the mean over counted positions",
    estimator="norm of the mean difference; error of its projection on its own direction, clustered by probe",
    positions=_NO_SINKS,
    at="hookpoints",
    scale="log",
    blind_to="changes that point in other directions at other positions",
)
CKA_DISTANCE = MetricInfo(
    name="cka_distance",
    unit="1 - CKA",
    low=0.0,
    high=inf,
    direction="symmetric: 1 - debiased linear CKA",
    estimator="debiased (U-statistic) over a fixed subset of 256 positions, left out where there are fewer; error by "
    "jackknife over probes; unstable below 1e-4, and then marked",
    positions=_NO_SINKS,
    at="hookpoints",
    by_group=False,
    blind_to="rotation and isotropic scaling of the space, and a shift of the mean",
)
