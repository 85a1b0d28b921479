"""Similarity of two representations up to rotation and scale: debiased linear CKA."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Below this distance the debiased estimate is dominated by rounding and by the choice of positions.
UNSTABLE_BELOW = 1e-4
#: How many positions are compared: fewer say too little, and the cost grows with their square.
POSITIONS = 256


def debiased_hsic(k: Float[Tensor, "pos pos"], l: Float[Tensor, "pos pos"]) -> float:  # noqa: E741
    """The unbiased estimate of HSIC between two Gram matrices, from at least 4 positions.

    (tr(KL) + sum(K) sum(L) / ((n-1)(n-2)) - 2 / (n-2) 1'KL1) / (n (n-3)) with zero diagonals. Can be below 0.
    Song et al. 2012 (Feature selection via dependence maximization), eq. 5.
    """
    k, l = _hollow(k), _hollow(l)  # noqa: E741
    kept = torch.ones(len(k), 1, dtype=k.dtype)
    return float(_hsic(k * l, k @ kept, l @ kept, kept)[0])


def cka_distance(
    ref: Float[Tensor, "pos width"], live: Float[Tensor, "pos other"], owner: Int[Tensor, " pos"]
) -> tuple[float, float]:
    """1 - debiased linear CKA of two representations of the same positions, and its jackknife error over probes.

    No unit, 0 for representations that differ by rotation, reflection, isotropic scale or translation only;
    slightly below 0 or above 1 by chance. NaN only where the reference, or the live model, does not vary at
    all over positions. `owner` is the probe of each position. Kornblith et al. 2019 (arXiv 1905.00414);
    debiasing as in Nguyen et al. 2021 (arXiv 2010.15327).
    """
    k, l = _hollow(_gram(ref)), _hollow(_gram(live))  # noqa: E741
    names, member = owner.unique(return_inverse=True)
    # The first column keeps all, the others leave out one probe each.
    kept = torch.cat([k.new_ones(len(k), 1), 1 - torch.nn.functional.one_hot(member, len(names)).to(k)], dim=1)
    row_k, row_l = k @ kept, l @ kept
    cross, own_k, own_l = (
        _hsic(k * l, row_k, row_l, kept),
        _hsic(k * k, row_k, row_k, kept),
        _hsic(l * l, row_l, row_l, kept),
    )
    # Two roots and not the root of a product, unless the two are the same: sqrt(x * x) is x to the last bit.
    scale = torch.where(own_k == own_l, own_k, (own_k.clamp_min(0).sqrt() * own_l.clamp_min(0).sqrt()))
    distance = 1 - cross / scale
    value, without = float(distance[0]), distance[1:]
    count = len(names)
    if count < 2:
        return value, math.nan
    return value, math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))


def _gram(x: Float[Tensor, "pos width"]) -> Float[Tensor, "pos pos"]:
    # Centred first: it changes nothing in exact arithmetic and keeps a large common mean from eating the digits.
    x = x - x.mean(0, keepdim=True)
    x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    return (x @ x.T).double()


def _hollow(gram: Float[Tensor, "pos pos"]) -> Float[Tensor, "pos pos"]:
    return gram - torch.diag(gram.diagonal())


def _hsic(
    product: Float[Tensor, "pos pos"],
    row_k: Float[Tensor, "pos case"],
    row_l: Float[Tensor, "pos case"],
    kept: Float[Tensor, "pos case"],
) -> Float[Tensor, " case"]:
    """Debiased HSIC of two hollow Gram matrices K and L for several cases at once, each with the positions it keeps.

    `product` is K times L, entry by entry; `row_k` and `row_l` are K and L times `kept`.
    """
    n = kept.sum(0)
    trace = (kept * (product @ kept)).sum(0)
    sum_k, sum_l = (kept * row_k).sum(0), (kept * row_l).sum(0)
    rows = (kept * row_k * row_l).sum(0)
    return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
