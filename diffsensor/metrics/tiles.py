"""The sums over the vocabulary that all output metrics are made of, a tile of tokens x vocabulary at a time.

Letters as in the formulas: q is the reference's distribution, p the live model's, Z a partition function.
No metric makes logits of its own, and no more than `TileShape.rows` tokens x vocabulary numbers are ever held.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.protocols import OutputHead
from diffsensor.types import ReferenceRows

#: Where the logits have moved together by more than this, they are moved back before they are compared.
_MAX_COMMON_SHIFT = 1.0
#: Beyond this the shift by the reference's partition function loses digits, and a row is computed the plain way.
_MAX_LOG_RATIO = 60.0
#: How many of the reference's probabilities are kept at each position. The others are at most 1 / (TOP_TOKENS + 1).
TOP_TOKENS = 16
#: What rounding does to the KL of one position, at most.
_KL_ROUNDING = 2e-6


class TileShape(NamedTuple):
    """How many tokens x vocabulary entries are worked on at once: what stays in cache on a CPU, what fills a GPU."""

    rows: int
    columns: int


def tile_shape(device: torch.device) -> TileShape:
    """One shape for all passes: a product of other than the same shape may round otherwise, and 0 must be 0."""
    return TileShape(rows=128, columns=4096) if device.type == "cpu" else TileShape(rows=1024, columns=16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTile:
    """Both distributions over one tile of the vocabulary, for metrics that need each token's pair of probabilities.

    `moved` is p - q, computed without subtracting one from the other, so that it is right for tiny drift.
    """

    q: Float[Tensor, "pos tile"]
    moved: Float[Tensor, "pos tile"]


TileFold = Callable[[PairTile], Float[Tensor, " pos"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What the sums over the vocabulary come to at each position, float64.

    `log_ratio` is log(Z_p / Z_q). No token gains more than `max_gain`; with both heads one gains just that,
    with one head it is an upper limit. `kl_live_ref` needs both heads and is missing where one was enough;
    `folds` holds the sums that single metrics asked for.
    """

    log_ratio: Float[Tensor, " pos"]
    kl_ref_live: Float[Tensor, " pos"]
    entropy_change: Float[Tensor, " pos"]
    nll_change: Float[Tensor, " pos"]
    top1_flip: Float[Tensor, " pos"]
    max_gain: Float[Tensor, " pos"]
    kl_live_ref: Float[Tensor, " pos"] | None = None
    folds: Mapping[str, Float[Tensor, " pos"]] = field(default_factory=dict)


class OneHeadRow(NamedTuple):
    """The sums of one head at each position, relative to a given log partition function, float64.

    `scale` is what the weights that come with them are to be divided by, to be probabilities.
    """

    log_sum: Float[Tensor, " pos"]
    scale: Float[Tensor, " pos"]
    mean_shifted: Float[Tensor, " pos"]
    at_target: Float[Tensor, " pos"]
    flipped: Float[Tensor, " pos"]


class OneHead:
    """KL(q||p) and the rest from the live head alone, exact where the head is linear and the same for both.

    KL(q||p) = log Z(h) - log Z(h_ref) - g . (h - h_ref) with the cached g = sum_v q_v w_v: the reference's
    logits are not needed. The cached log Z_ref also stands in for the running maximum of a stable softmax.
    Its error is about 3e-8 nats in float32, whatever the KL (no better: log Z itself has it).
    """

    def __init__(self, head: OutputHead, device: torch.device) -> None:
        self._head = head
        self.shape = tile_shape(device)
        self._tile = _buffer(self.shape.rows, min(self.shape.columns, head.vocab_size), device=device)
        self._weights = _buffer(self.shape.rows, head.vocab_size, device=device)

    def compare(
        self, hidden: Float[Tensor, "pos dim"], ref: ReferenceRows, strata: Float[Tensor, "stratum pos"]
    ) -> tuple[Sums, Float[Tensor, "stratum vocab"]]:
        """The sums at these positions, and the live model's token mass in each stratum."""
        assert ref.mean_unembedding is not None
        sums, weights = self.pass_over(hidden, ref.log_partition, ref.target, ref.top[:, 0])
        mass = token_mass(weights, sums.scale, strata)
        shift = hidden.double() - ref.hidden.double()
        log_ratio = sums.log_sum - ref.log_sum
        kl = log_ratio - (ref.mean_unembedding.double() * shift).sum(1)
        return Sums(
            log_ratio=log_ratio,
            kl_ref_live=kl,
            max_gain=_gain_limit(weights, sums.scale, ref, kl).masked_fill((shift == 0).all(1), 0.0),
            entropy_change=sums.log_sum - sums.mean_shifted - ref.entropy,
            nll_change=ref.target_logprob - (sums.at_target - sums.log_sum),
            top1_flip=sums.flipped,
        ), mass

    def pass_over(
        self,
        hidden: Float[Tensor, "pos dim"],
        log_partition: Float[Tensor, " pos"],
        target: Int[Tensor, " pos"],
        top1: Int[Tensor, " pos"],
    ) -> tuple[OneHeadRow, Float[Tensor, "pos vocab"]]:
        """One pass of the head over at most `shape.rows` positions.

        Returns the sums, and the probabilities times `scale`, a view of the one buffer that the next call overwrites.
        """
        count = len(hidden)
        weights = self._weights[:count]
        total, product = hidden.new_zeros(2, count, dtype=torch.float64)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        at_target, at_top1 = _Gathered(target), _Gathered(top1)
        for start, stop in tiles(self._head.vocab_size, self.shape.columns):
            shifted = self._head.logits(hidden, start, stop, out=self._tile[:count, : stop - start])
            shifted -= log_partition[:, None]
            part = torch.exp(shifted, out=weights[:, start:stop])
            total += part.sum(1)
            product += torch.linalg.vecdot(part, shifted)
            largest = torch.maximum(largest, shifted.amax(1))
            at_target.take(shifted, start, stop)
            at_top1.take(shifted, start, stop)
        log_sum, mean_shifted = total.log(), product / total
        scale = log_sum.exp()
        off = ~(log_sum.abs() < _MAX_LOG_RATIO) | ~mean_shifted.isfinite()
        for row in off.nonzero()[:, 0].tolist():
            exact = plain_logits(self._head, hidden[row : row + 1])[0] - log_partition[row].double()
            log_sum[row] = exact.logsumexp(0)
            probability = (exact - log_sum[row]).exp()
            mean_shifted[row] = torch.special.xlogy(probability, probability).sum() + log_sum[row]
            # exp(log_sum) may lie beyond all numbers, so these are probabilities as they are.
            weights[row], scale[row] = probability.float(), 1.0
        flipped = _flips(largest, at_top1.values)
        return OneHeadRow(log_sum, scale, mean_shifted, at_target.values.double(), flipped), weights


class _TwoHeadsRow(NamedTuple):
    """The sums of both heads at each position: S - 1, sum q d, sum q expm1(d) d, sum q expm1(d) log q."""

    excess: Float[Tensor, " pos"]
    mean_d: Float[Tensor, " pos"]
    gain_d: Float[Tensor, " pos"]
    gain_logq: Float[Tensor, " pos"]
    at_target: Float[Tensor, " pos"]
    flipped: Float[Tensor, " pos"]


class TwoHeads:
    """Everything from both heads, in forms that do not cancel: exact down to a KL of 1e-8 in float32.

    With d = z_live - z_ref: S - 1 = sum q expm1(d), KL(q||p) = log1p(S - 1) - sum q d,
    KL(p||q) = sum p d - log S, p - q = q (expm1(d) - (S - 1)) / S. None of them changes when d is shifted, but
    they cancel where S is near 0: with d shifted by its mean, S = exp KL(q||p), which is at least 1.
    """

    def __init__(self, ref_head: OutputHead, live_head: OutputHead, device: torch.device) -> None:
        self._ref_head, self._live_head = ref_head, live_head
        self.shape = tile_shape(device)
        columns = min(self.shape.columns, live_head.vocab_size)
        self._tiles = _buffer(2, self.shape.rows, columns, device=device)
        self._q, self._gain = _buffer(2, self.shape.rows, live_head.vocab_size, device=device)

    def compare(
        self,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        strata: Float[Tensor, "stratum pos"],
        folds: Mapping[str, TileFold],
        *,
        logit_sums: Float[Tensor, "stratum vocab"] | None = None,
    ) -> tuple[Sums, Float[Tensor, "stratum vocab"]]:
        """The sums at these positions, and in each stratum the mass that moved, sum of p - q.

        `logit_sums`, where given, takes up the sums of z_live - z_ref in each stratum.
        """
        count = len(hidden)
        q, gain = self._q[:count], self._gain[:count]
        shift = hidden.new_zeros(count, dtype=torch.float32)
        found = self._pass_over(hidden, ref, shift, strata, logit_sums)
        if not bool((found.excess.log1p().abs() < _MAX_COMMON_SHIFT).all()):
            # Not by an infinite or unknown mean: such a row is computed the plain way.
            shift = found.mean_d.nan_to_num(0.0, 0.0, 0.0).float()
            found = self._pass_over(hidden, ref, shift, strata, None)
        excess, mean_d = found.excess, found.mean_d
        total = 1 + excess
        log_ratio = excess.log1p()
        mean_log_q = -ref.entropy
        live_d = (mean_d + found.gain_d) / total
        sums = {
            "log_ratio": log_ratio + shift,
            "kl_ref_live": log_ratio - mean_d,
            "kl_live_ref": live_d - log_ratio,
            "entropy_change": -(found.gain_logq - excess * mean_log_q) / total - live_d + log_ratio,
            "nll_change": log_ratio - found.at_target.double(),
        }
        off = ~(log_ratio.abs() < _MAX_LOG_RATIO) | ~torch.stack([*sums.values()]).isfinite().all(0)
        for row in off.nonzero()[:, 0].tolist():
            self._plain_row(row, hidden, ref, sums, q, gain)
            excess[row], total[row] = 0.0, 1.0
        max_gain = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        moved_mass = hidden.new_zeros(len(strata), self._live_head.vocab_size, dtype=torch.float32)
        folded = {name: hidden.new_zeros(count, dtype=torch.float64) for name in folds}
        scale, back = (1 / total).float()[:, None], (-excess / total).float()[:, None]
        for start, stop in tiles(self._live_head.vocab_size, self.shape.columns):
            moved = gain[:, start:stop].mul_(scale).addcmul_(q[:, start:stop], back)
            max_gain = torch.maximum(max_gain, moved.amax(1))
            torch.mm(strata.float(), moved, out=moved_mass[:, start:stop])
            for name, fold in folds.items():
                folded[name] += fold(PairTile(q=q[:, start:stop], moved=moved))
        return Sums(**sums, top1_flip=found.flipped, max_gain=max_gain.double(), folds=folded), moved_mass

    def _pass_over(
        self,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        shift: Float[Tensor, " pos"],
        strata: Float[Tensor, "stratum pos"],
        logit_sums: Float[Tensor, "stratum vocab"] | None,
    ) -> "_TwoHeadsRow":
        """One pass of both heads, with d less `shift`; leaves q and q expm1(d) in the buffers."""
        count = len(hidden)
        q, gain = self._q[:count], self._gain[:count]
        columns = self.shape.columns
        excess, mean_d, gain_d, gain_logq = hidden.new_zeros(4, count, dtype=torch.float64)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        at_target, at_top1 = _Gathered(ref.target), _Gathered(ref.top[:, 0])
        for start, stop in tiles(self._live_head.vocab_size, columns):
            log_q, d = self._tiles[:, :count, : stop - start]
            self._ref_head.logits(ref.hidden, start, stop, out=log_q)
            self._live_head.logits(hidden, start, stop, out=d)
            largest = torch.maximum(largest, d.amax(1))
            at_top1.take(d, start, stop)
            d -= log_q
            log_q -= ref.log_partition[:, None]
            if logit_sums is not None:
                logit_sums[:, start:stop] += strata @ d.double()
            d -= shift[:, None]
            at_target.take(d, start, stop)
            part = torch.exp(log_q, out=q[:, start:stop])
            more = torch.expm1(d, out=gain[:, start:stop]).mul_(part)
            mean_d += torch.linalg.vecdot(part, d)
            excess += more.sum(1)
            gain_d += torch.linalg.vecdot(more, d)
            gain_logq += torch.linalg.vecdot(more, log_q)
        flipped = _flips(largest, at_top1.values)
        return _TwoHeadsRow(excess, mean_d, gain_d, gain_logq, at_target.values, flipped)

    def _plain_row(
        self,
        row: int,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        sums: Mapping[str, Tensor],
        q: Float[Tensor, "pos vocab"],
        gain: Float[Tensor, "pos vocab"],
    ) -> None:
        """The same for one position whose logits moved so far that exponentials overflow: plain, in float64."""
        log_q = plain_logits(self._ref_head, ref.hidden[row : row + 1])[0].log_softmax(0)
        raw = plain_logits(self._live_head, hidden[row : row + 1])[0]
        log_p = raw.log_softmax(0)
        p, q_row, difference = log_p.exp(), log_q.exp(), log_p - log_q
        sums["log_ratio"][row] = raw.logsumexp(0) - ref.log_partition[row].double()
        sums["kl_ref_live"][row] = -(q_row * difference).sum()
        sums["kl_live_ref"][row] = (p * difference).sum()
        sums["entropy_change"][row] = (q_row * log_q).sum() - (p * log_p).sum()
        sums["nll_change"][row] = -difference[ref.target[row]] if ref.target[row] >= 0 else 0.0
        q[row], gain[row] = q_row.float(), (p - q_row).float()


def reference_rows(
    head: OutputHead, hidden: Float[Tensor, "pos dim"], target: Int[Tensor, " pos"]
) -> tuple[ReferenceRows, Float[Tensor, "pos vocab"]]:
    """What is cached of the reference at these positions.

    The numbers that a reading is compared with (`log_sum`, `entropy`, `target_logprob`) come out of the same
    pass that the live model will go through, so that an unchanged model reads exactly 0. Returned with
    exp(z - log_partition), tokens x vocabulary: call with few positions.
    """
    top = hidden.new_zeros(len(hidden), 0, dtype=torch.int64)
    top_logits = hidden.new_zeros(len(hidden), 0, dtype=torch.float32)
    log_partition = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
    columns = tile_shape(hidden.device).columns
    for start, stop in tiles(head.vocab_size, columns):
        tile = head.logits(hidden, start, stop)
        here = tile.topk(min(TOP_TOKENS, stop - start), dim=1)
        logits, tokens = torch.cat([top_logits, here.values], 1), torch.cat([top, here.indices + start], 1)
        top_logits, order = logits.topk(min(TOP_TOKENS, logits.shape[1]), dim=1)
        top = tokens.gather(1, order)
        log_partition = torch.logaddexp(log_partition, tile.double().logsumexp(1))
    stabiliser = log_partition.float()
    sums, weights = OneHead(head, hidden.device).pass_over(hidden, stabiliser, target, top[:, 0])
    rows = ReferenceRows(
        hidden=hidden,
        target=target,
        top=top,
        top_probability=(weights / sums.log_sum.exp().float()[:, None]).gather(1, top),
        log_partition=stabiliser,
        log_sum=sums.log_sum,
        entropy=sums.log_sum - sums.mean_shifted,
        target_logprob=sums.at_target - sums.log_sum,
    )
    return rows, weights


def token_mass(
    weights: Float[Tensor, "pos vocab"], scale: Float[Tensor, " pos"], strata: Float[Tensor, "stratum pos"]
) -> Float[Tensor, "stratum vocab"]:
    """Sums of probabilities over the positions of each stratum; `weights` are probabilities times `scale`."""
    return (strata.float() / scale.float()) @ weights


def tiles(size: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _buffer(*shape: int, device: torch.device) -> Tensor:
    # float32 by name: the process may have another default.
    return torch.empty(shape, dtype=torch.float32, device=device)


def plain_logits(head: OutputHead, hidden: Float[Tensor, "pos dim"]) -> Float[Tensor, "pos vocab"]:
    """All logits in float64 from float32 products, for a handful of positions."""
    return head.logits(hidden, 0, head.vocab_size).double()


class _Gathered:
    """One entry of each row, picked out of the tiles as they pass. Rows without one (index -1) keep 0."""

    def __init__(self, index: Int[Tensor, " pos"]) -> None:
        self._index = index
        self.values = index.new_zeros(len(index), dtype=torch.float32)

    def take(self, tile: Float[Tensor, "pos tile"], start: int, stop: int) -> None:
        here = (self._index >= start) & (self._index < stop)
        found = tile.gather(1, (self._index - start).clamp(0, stop - start - 1)[:, None])[:, 0]
        self.values = torch.where(here, found, self.values)


def _gain_limit(
    weights: Float[Tensor, "pos vocab"], scale: Float[Tensor, " pos"], ref: ReferenceRows, kl: Float[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """What no p_v - q_v exceeds, without the reference's distribution. Overwrites `weights`.

    The largest of p_v - q_v over the tokens whose q_v is kept and p_v over all others; nor does any gain exceed
    the total variation distance, which is at most sqrt(KL / 2) (Pinsker).
    """
    weights.scatter_add_(1, ref.top, -(ref.top_probability.double() * scale[:, None]).float())
    pinsker = ((kl.clamp_min(0) + _KL_ROUNDING) / 2).sqrt()
    return torch.minimum(weights.amax(1).double() / scale, pinsker)


def _flips(largest: Float[Tensor, " pos"], at_top1: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    # A comparison with NaN is False and would be shown as "nothing flipped".
    return torch.where(largest.isnan(), torch.nan, (largest > at_top1).double())
