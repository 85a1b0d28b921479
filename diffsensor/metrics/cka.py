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
    none = torch.zeros(len(k), 1, dtype=k.dtype)
    return float(_hsic_without(_hollow(k), _hollow(l), none)[0])


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
    left_out = torch.nn.functional.one_hot(member, len(names)).to(k)
    # The first column leaves nothing out, the others one probe each.
    left_out = torch.cat([torch.zeros_like(left_out[:, :1]), left_out], dim=1)
    cross, own_k, own_l = (_hsic_without(a, b, left_out) for a, b in ((k, l), (k, k), (l, l)))
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


def _hsic_without(
    k: Float[Tensor, "pos pos"],
    l: Float[Tensor, "pos pos"],  # noqa: E741
    left_out: Float[Tensor, "pos case"],
) -> Float[Tensor, " case"]:
    """Debiased HSIC of hollow Gram matrices for several cases at once, each without the positions it leaves out."""
    kept = 1 - left_out
    n = kept.sum(0)
    product = k * l
    trace = (kept * (product @ kept)).sum(0)
    row_k, row_l = k @ kept, l @ kept
    sum_k, sum_l = (kept * row_k).sum(0), (kept * row_l).sum(0)
    rows = (kept * row_k * row_l).sum(0)
    return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
