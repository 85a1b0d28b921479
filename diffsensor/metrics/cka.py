"""Similarity of two representations up to rotation and scale: debiased linear CKA."""

import math
from dataclasses import dataclass

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
    return cka_distance_from(CkaSide.of(ref, owner), live)


@dataclass(frozen=True, slots=True, kw_only=True)
class CkaSide:
    """What one representation brings into the comparison; of the reference it is the same at every reading."""

    gram: Float[Tensor, "pos pos"]
    rows: Float[Tensor, "pos case"]
    own: Float[Tensor, " case"]
    #: Of each case the positions that it keeps: first all of them, then all but those of one probe.
    kept: Float[Tensor, "pos case"]

    @classmethod
    def of(cls, x: Float[Tensor, "pos width"], owner: Int[Tensor, " pos"]) -> "CkaSide":
        names, member = owner.unique(return_inverse=True)
        without = 1 - torch.nn.functional.one_hot(member, len(names)).double()
        return cls.keeping(x, torch.cat([torch.ones_like(without[:, :1]), without], dim=1))

    @classmethod
    def keeping(cls, x: Float[Tensor, "pos width"], kept: Float[Tensor, "pos case"]) -> "CkaSide":
        gram = _hollow(_gram(x))
        rows = gram @ kept
        return cls(gram=gram, rows=rows, own=_hsic(gram * gram, rows, rows, kept), kept=kept)


def cka_distance_from(ref: CkaSide, live: Float[Tensor, "pos width"]) -> tuple[float, float]:
    """`cka_distance` with the reference's side at hand."""
    other = CkaSide.keeping(live, ref.kept)
    cross = _hsic(ref.gram * other.gram, ref.rows, other.rows, ref.kept)
    # Two roots and not the root of a product, unless the two are the same: sqrt(x * x) is x to the last bit.
    scale = torch.where(ref.own == other.own, ref.own, ref.own.clamp_min(0).sqrt() * other.own.clamp_min(0).sqrt())
    distance = 1 - cross / scale
    value, without = float(distance[0]), distance[1:]
    count = len(without)
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
