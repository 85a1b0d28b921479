"""Drift of the outputs: one number for each counted position, out of sums that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log

import torch
from jaxtyping import Float
from torch import Tensor

from diffsensor.metrics.tiles import PairTile, Sums, TileFold
from diffsensor.types import Cost, MetricInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMetric:
    """A drift metric on next-token distributions.

    `finish` makes the number of each position from the shared sums. A metric that needs every token's pair
    of probabilities gives a `fold`, whose results are added up over tiles of the vocabulary and handed to
    `finish` as `sums.folds[name]`.
    """

    info: MetricInfo
    cost: Cost
    finish: Callable[[Sums], Float[Tensor, " pos"] | None]
    fold: TileFold | None = None


def half_absolute_difference(tile: PairTile) -> Float[Tensor, " pos"]:
    """sum |p - q| / 2 over a tile: its share of the total variation distance."""
    return tile.moved.abs().sum(1).double() / 2


def jensen_shannon(tile: PairTile) -> Float[Tensor, " pos"]:
    """A tile's share of JS = 1/4 sum (p + q) F(u), u = |p - q| / (p + q), F(u) = (1+u) log(1+u) + (1-u) log(1-u).

    F(u) = log(1 - u^2) + u log(1 + 2u / (1 - u)): neither part loses digits, however small u is.
    """
    total = torch.add(tile.moved, tile.q, alpha=2)
    u = torch.div(tile.moved, total.clamp_min_(torch.finfo(total.dtype).tiny)).abs_()
    # Rounding may carry u to 1 and past it where one of the two probabilities is next to nothing.
    u.clamp_max_(1 - torch.finfo(u.dtype).eps / 2)
    f = (u * u).neg_().log1p_()
    other = 1 - u
    f += torch.div(u, other, out=other).mul_(2).log1p_().mul_(u)
    share: Tensor = torch.linalg.vecdot(f, total)
    return share.double() / 4


KL_REF_LIVE = OutputMetric(
    info=MetricInfo(
        name="kl_ref_live",
        unit="nats/token",
        low=0.0,
        high=inf,
        direction="KL(reference || live) = sum_v q_v (log q_v - log p_v)",
        estimator="exact over the whole vocabulary; with a frozen linear head by the Bregman form of log Z, "
        "which is exact to 3e-8 nats and can therefore read that much below 0",
        scale="log",
        blind_to="what the live model puts where the reference had nothing: see kl_live_ref",
    ),
    cost="light",
    finish=lambda sums: sums.kl_ref_live,
)
KL_LIVE_REF = OutputMetric(
    info=MetricInfo(
        name="kl_live_ref",
        unit="nats/token",
        low=0.0,
        high=inf,
        direction="KL(live || reference) = sum_v p_v (log p_v - log q_v)",
        estimator="exact over the whole vocabulary, in a form that does not cancel",
        scale="log",
        blind_to="what the live model has dropped: see kl_ref_live",
    ),
    cost="full",
    finish=lambda sums: sums.kl_live_ref,
)
JS = OutputMetric(
    info=MetricInfo(
        name="js",
        unit="nats/token",
        low=0.0,
        high=log(2),
        direction="symmetric: KL(q || m) / 2 + KL(p || m) / 2 with m = (p + q) / 2",
        estimator="exact over the whole vocabulary, in a form that does not cancel",
        scale="log",
        blind_to="how far, once p and q hardly overlap: it saturates at log 2",
    ),
    cost="full",
    finish=lambda sums: sums.folds["js"],
    fold=jensen_shannon,
)
TV = OutputMetric(
    info=MetricInfo(
        name="tv",
        unit="probability",
        low=0.0,
        high=1.0,
        direction="symmetric: sum_v |p_v - q_v| / 2",
        estimator="exact over the whole vocabulary",
        scale="log",
        blind_to="changes among tokens that both models find improbable",
    ),
    cost="full",
    finish=lambda sums: sums.folds["tv"],
    fold=half_absolute_difference,
)
TOP1_FLIP = OutputMetric(
    info=MetricInfo(
        name="top1_flip",
        unit="share of tokens",
        low=0.0,
        high=1.0,
        direction="symmetric: 1 where the two models' favourite tokens differ",
        estimator="exact; a tie with the reference's favourite is no flip",
        blind_to="any change that leaves the favourite token in place",
    ),
    cost="light",
    finish=lambda sums: sums.top1_flip,
)
ENTROPY_CHANGE = OutputMetric(
    info=MetricInfo(
        name="entropy_change",
        unit="nats/token",
        low=-inf,
        high=inf,
        direction="live minus reference: H(p) - H(q); below 0 the live model is surer",
        estimator="exact over the whole vocabulary",
        worst="furthest_from_zero",
        blind_to="which tokens are likely, as long as the spread is the same",
    ),
    cost="light",
    finish=lambda sums: sums.entropy_change,
)
NLL_CHANGE = OutputMetric(
    info=MetricInfo(
        name="nll_change",
        unit="nats/token",
        low=-inf,
        high=inf,
        direction="live minus reference: -log p(y) + log q(y) for the probe's own next token y; above 0 is worse",
        estimator="exact",
        blind_to="everything but the one token that the probe goes on with",
    ),
    cost="light",
    finish=lambda sums: sums.nll_change,
)

#: Every metric of this kind, in the order in which it is shown. To add one: a line here and a test.
OUTPUT_METRICS: dict[str, OutputMetric] = {
    metric.info.name: metric for metric in (KL_REF_LIVE, NLL_CHANGE, ENTROPY_CHANGE, TOP1_FLIP, KL_LIVE_REF, JS, TV)
}

KL_P95 = MetricInfo(
    name="kl_ref_live_p95",
    unit="nats/token",
    low=0.0,
    high=inf,
    direction=KL_REF_LIVE.info.direction,
    estimator="95 % quantile over counted positions; error by inverting the clustered error of the share below it",
    scale="log",
    blind_to="what happens on fewer than one position in twenty: see kl_ref_live_worst1",
)
KL_WORST1 = MetricInfo(
    name="kl_ref_live_worst1",
    unit="nats/token",
    low=0.0,
    high=inf,
    direction=KL_REF_LIVE.info.direction,
    estimator="mean over the worst 1 % of counted positions (at least one); error by its influence function",
    scale="log",
    blind_to="where it is: see the token table; needs about four times the probes of a mean",
)
MASS_MOVED = MetricInfo(
    name="mass_moved",
    unit="probability",
    low=0.0,
    high=1.0,
    direction="symmetric: sum_v |mean(p_v) - mean(q_v)| / 2, means over counted positions",
    estimator="exact; no standard error, since it is no mean over probes",
    blind_to="changes that even out over positions: a token gained here and lost there",
)
MAX_TOKEN_GAIN = MetricInfo(
    name="max_token_gain",
    unit="probability",
    low=0.0,
    high=1.0,
    direction="live minus reference: the largest p_v - q_v of one token at one position",
    estimator="exact in the full class; in the light class searched where a limit on the gain is largest, and `bound` "
    "says how much larger it may be. No standard error: it is a maximum",
    blind_to="many small gains",
)

#: What only the full cost class reads.
FULL_METRICS = frozenset(
    {metric.info.name for metric in OUTPUT_METRICS.values() if metric.cost == "full"} | {KL_P95.name, KL_WORST1.name}
)
