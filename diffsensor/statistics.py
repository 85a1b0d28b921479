"""Means over probes and their errors. Tokens of one probe are not independent, so every error is over probes."""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.errors import ConfigError
from diffsensor.protocols import Probes
from diffsensor.types import ALL_PROBES, Reading, Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, its standard error over probes (NaN for fewer than two) and how many probes counted."""

    value: float
    stderr: float
    num_probes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Strata:
    """What a metric is read over: all probes, then each group; with the weight of every probe in it."""

    names: tuple[str, ...]
    weights: Float[Tensor, "stratum probe"]

    @property
    def grid(self) -> float:
        """To multiples of this, weighted sums of probabilities are rounded before they are added up.

        A power of 2, 2^-32 of the largest weight: such numbers add up in float64 without rounding, up to 2^20
        positions, so that the order, and how many processes share the work, changes no bit of the result.
        """
        return 2.0 ** (math.frexp(float(self.weights.max()))[1] - 32)


def strata_of(probes: Probes) -> Strata:
    weights = probes.weights.double()
    member = torch.tensor([[group == name for group in probes.groups] for name in probes.group_names], dtype=torch.bool)
    return Strata(
        names=(ALL_PROBES, *probes.group_names),
        weights=torch.cat([weights[None], weights * member.reshape(-1, len(weights))]),
    )


def clustered_mean(
    per_position: Float[Tensor, " pos"],
    probe: Int[Tensor, " pos"],
    weights: Float[Tensor, " probe"],
    num_probes: int,
) -> Estimate:
    """The weighted mean over positions, with its error clustered by probe: `ratio_mean` of the probes' sums.

    **Arguments:**

    - `probe`: the number of the probe that each position belongs to, as in `Plan.probe`.
    - `weights`: how much each probe counts. A probe with weight 0 takes no part, so a group is read by
        giving the others weight 0.
    """
    # bincount adds in a fixed order on a CPU; on a GPU it does not, and a reading must repeat to the last bit.
    values, owner = per_position.detach().cpu().double(), probe.cpu()
    sums = torch.bincount(owner, weights=values, minlength=num_probes)
    return ratio_mean(sums, torch.bincount(owner, minlength=num_probes), weights)


def ratio_mean(
    sums: Float[Tensor, " probe"],
    counts: Float[Tensor, " probe"] | Int[Tensor, " probe"],
    weights: Float[Tensor, " probe"],
) -> Estimate:
    """`ratio_means` of a single case."""
    return ratio_means(sums[None], counts, weights[None])[0]


def ratio_means(
    sums: Float[Tensor, "#case probe"],
    counts: Float[Tensor, " probe"] | Int[Tensor, " probe"],
    weights: Float[Tensor, "#case probe"],
) -> list[Estimate]:
    """sum_i w_i S_i / sum_i w_i n_i over probes i, with the error of a ratio of two sums over probes.

    With residuals r_i = w_i (S_i - value n_i), the variance is N/(N-1) sum_i r_i^2 / (sum_i w_i n_i)^2, N
    being the number of probes with a position and a weight above 0; the others take no part. Computed in
    float64, several cases at once. The value is NaN where a part is NaN or where no probe takes part.

    **Arguments:**

    - `sums`: S_i, the sum over the positions of each probe.
    - `counts`: n_i, how many positions that was.
    """
    sums, counts, weights = (part.detach().cpu().double() for part in (sums, counts, weights))
    if not bool((weights >= 0).logical_and(weights.isfinite()).all()):
        wrong = weights[~((weights >= 0) & weights.isfinite())][0].item()
        raise ConfigError(f"A probe has the weight {wrong}. Give each probe a finite weight of at least 0.")
    sums, weights = torch.broadcast_tensors(sums, weights)
    counted = (counts > 0) & (weights > 0)
    weights = torch.where(counted, weights, 0.0)
    # Not by a factor of 0, which would leave a NaN.
    sums = torch.where(counted, sums, 0.0)
    num_probes = counted.sum(-1)
    share = num_probes.double() / (num_probes - 1)
    total = (weights * counts).sum(-1)
    value = (weights * sums).sum(-1) / total + 0.0  # so that a zero is never shown as -0.0
    residuals = weights * (sums - value[:, None] * counts)
    stderr = share.sqrt() * torch.linalg.vector_norm(residuals, dim=-1) / total
    stderr = torch.where(num_probes > 1, stderr, torch.nan)
    return [
        Estimate(value=one, stderr=error, num_probes=number)
        for one, error, number in zip(value.tolist(), stderr.tolist(), num_probes.tolist(), strict=True)
    ]


def interval_of(reading: Reading, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a reading, on the scale its metric declares. What its bound leaves open is added above."""
    low, high = interval(reading.value, reading.stderr, reading.num_probes, reading.scale, confidence)
    return low, high + reading.bound


def interval(
    value: float, stderr: float, num_probes: int, scale: Scale, confidence: float = 0.95
) -> tuple[float, float]:
    """The t interval with num_probes - 1 degrees of freedom: value +- t stderr.

    For a positive value on the log scale exp(log value +- t stderr / value), which never reaches below 0.
    (NaN, NaN) where the value or its error is not known.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"The confidence was given as {confidence!r}. Give a share between 0 and 1, such as 0.95.")
    if num_probes < 2 or not math.isfinite(value) or not math.isfinite(stderr):
        return math.nan, math.nan
    half_width = quantile_t((1 + confidence) / 2, num_probes - 1) * stderr
    if scale == "log" and value > 0:
        # exp overflows above 709; so wide an interval says nothing, and is shown as such.
        factor = math.exp(half_width / value) if half_width / value < 700 else math.inf
        return value / factor, value * factor
    return value - half_width, value + half_width


@lru_cache(maxsize=4096)
def quantile_t(p: float, dof: float) -> float:
    """The number below which a share p of Student's t distribution with `dof` degrees of freedom lies.

    Relative error below 1e-9 for p from 1e-12 to 1 - 1e-12 and dof of at least 1.
    """
    if not 0 < p < 1:
        raise ConfigError(f"A quantile was asked for at the share {p!r}. Give a share between 0 and 1.")
    if not 1 <= dof < math.inf:
        raise ConfigError(
            f"A t quantile was asked for with {dof!r} degrees of freedom. Give a finite number of at least 1."
        )
    if p == 0.5:
        return 0.0
    tail = min(p, 1 - p)
    # The tails of t are heavier than the normal ones, so the normal quantile is a lower end.
    low = -NormalDist().inv_cdf(tail)
    high = 2 * low
    while _t_tail(high, dof) > tail:
        low, high = high, 2 * high
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if _t_tail(middle, dof) > tail else (low, middle)
    return math.copysign((low + high) / 2, p - 0.5)


def _t_tail(t: float, dof: float) -> float:
    """P(T > t) for t > 0: half the regularised incomplete beta function I_x(dof/2, 1/2), x = dof / (dof + t^2)."""
    a, b = dof / 2, 0.5
    x, rest = dof / (dof + t * t), t * t / (dof + t * t)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - a * math.log1p(t * t / dof) + b * math.log(rest)
    )
    # Either form converges quickly on its own side only.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / (2 * a)
    return (1 - front * _beta_fraction(b, a, rest) / b) / 2


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / ((1 + step * d) or tiny)
            c = (1 + step / c) or tiny
            change = c * d
            fraction *= change
        if abs(change - 1) < 1e-15:
            break
    return fraction
