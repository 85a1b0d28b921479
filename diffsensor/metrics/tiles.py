"""The sums over the vocabulary that all output metrics are made of, a tile of tokens x vocabulary at a time.

Letters as in the formulas: q is the reference's distribution, p the live model's, Z a partition function.
No metric makes logits of its own, and no more than `TileShape.rows` tokens x vocabulary numbers are ever held.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.head import LinearHead
from diffsensor.protocols import OutputHead
from diffsensor.types import ReferenceRows

#: Where the logits have moved together by more than this, they are moved back before they are compared.
_MAX_COMMON_SHIFT = 1.0
#: Beyond this the shift by the reference's partition function loses digits, and a row is computed the plain way.
_MAX_LOG_RATIO = 60.0
#: How many of the reference's probabilities are kept at each position. The others are at most 1 / (TOP_TOKENS + 1).
TOP_TOKENS = 16
#: Weights below this are near the end of float32, where they lose digits.
_MIN_WEIGHT = 1e-30
#: What rounding does to the KL of one position, at most.
_KL_ROUNDING = 2e-6


class TileShape(NamedTuple):
    """How many tokens x vocabulary entries are worked on at once: what stays in cache on a CPU, what fills a GPU."""

    rows: int
    columns: int


def tile_shape(device: torch.device) -> TileShape:
    """One shape for all passes: a product of other than the same shape may round otherwise, and 0 must be 0."""
    return TileShape(rows=256, columns=2048) if device.type == "cpu" else TileShape(rows=1024, columns=16384)


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


class _LightRow(NamedTuple):
    """The sums of one head at each position, relative to a given log partition function, float64.

    `scale` is what the weights that come with them are to be divided by, to be probabilities. `mean_d` is
    sum q (z_live - z_ref), where both heads were run.
    """

    log_sum: Float[Tensor, " pos"]
    scale: Float[Tensor, " pos"]
    mean_shifted: Float[Tensor, " pos"]
    at_target: Float[Tensor, " pos"]
    flipped: Float[Tensor, " pos"]
    mean_d: Float[Tensor, " pos"]


class LightPass:
    """KL(q||p) and all else that the light cost class reads, from the live head and as little more as will do.

    KL(q||p) = log Z(h) - log Z(h_ref) - sum_v q_v (z_v - z_v,ref). With a linear head that is the same for both,
    the sum is g . (h - h_ref) with the cached g = sum_v q_v w_v, and the reference's logits are not needed;
    otherwise `ref_head` is run beside. The cached log Z_ref also stands in for the running maximum of a
    stable softmax. The error is about 3e-8 nats in float32, whatever the KL (no better: log Z itself has it).
    """

    def __init__(self, live_head: OutputHead, device: torch.device, ref_head: OutputHead | None = None) -> None:
        self._live_head, self._ref_head = live_head, ref_head
        self.shape = tile_shape(device)
        columns = min(self.shape.columns, live_head.vocab_size)
        self._tiles = _buffer(1 if ref_head is None else 3, self.shape.rows, columns, device=device)
        self._weights = _buffer(self.shape.rows, live_head.vocab_size, device=device)

    def compare(
        self,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        strata: Float[Tensor, "stratum pos"],
        logit_sums: Float[Tensor, "stratum vocab"] | None = None,
    ) -> tuple[Sums, Float[Tensor, "stratum vocab"]]:
        """The sums at these positions, and the live model's token mass in each stratum.

        `logit_sums`, where given, takes up the sums of z_live - z_ref in each stratum (with both heads only).
        """
        sums, weights = self.pass_over(hidden, ref, strata, logit_sums)
        mass = token_mass(weights, sums.scale, strata)
        shift = hidden.double() - ref.hidden.double()
        log_ratio = sums.log_sum - ref.log_sum
        if self._ref_head is None:
            assert ref.mean_unembedding is not None
            mean_d = (ref.mean_unembedding.double() * shift).sum(1)
        else:
            mean_d = sums.mean_d / ref.log_sum.exp()
        kl = log_ratio - mean_d
        same = (shift == 0).all(1)
        if self._ref_head is not None and bool(same.any()):
            same &= _is_same_head(self._ref_head, self._live_head)
        return Sums(
            log_ratio=log_ratio,
            kl_ref_live=kl,
            max_gain=_gain_limit(weights, sums.scale, ref, kl).masked_fill(same, 0.0),
            entropy_change=sums.log_sum - sums.mean_shifted - ref.entropy,
            nll_change=ref.target_logprob - (sums.at_target - sums.log_sum),
            top1_flip=sums.flipped,
        ), mass

    def forget(self) -> None:
        """Give back the memory; there is nothing more to compare."""
        self._tiles = self._weights = torch.empty(0)

    def pass_over(
        self,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        strata: Float[Tensor, "stratum pos"] | None = None,
        logit_sums: Float[Tensor, "stratum vocab"] | None = None,
    ) -> tuple[_LightRow, Float[Tensor, "pos vocab"]]:
        """One pass over at most `shape.rows` positions.

        Returns the sums, and the probabilities times `scale`, a view of the one buffer that the next call overwrites.
        """
        count = len(hidden)
        weights, stabiliser = self._weights[:count], ref.log_partition[:, None]
        total, product, mean_d = hidden.new_zeros(3, count, dtype=torch.float64)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        for start, stop in tiles(self._live_head.vocab_size, self.shape.columns):
            tile = self._tiles[:, :count, : stop - start]
            shifted = self._live_head.logits(hidden, start, stop, out=tile[0])
            shifted -= stabiliser
            part = torch.exp(shifted, out=weights[:, start:stop])
            total += part.sum(1)
            product += torch.linalg.vecdot(part, shifted)
            largest = torch.maximum(largest, part.amax(1))
            if self._ref_head is not None:
                log_q = self._ref_head.logits(ref.hidden, start, stop, out=tile[1])
                log_q -= stabiliser
                d = torch.sub(shifted, log_q, out=tile[2])
                mean_d += torch.linalg.vecdot(log_q.exp_(), d)
                if logit_sums is not None and strata is not None:
                    logit_sums[:, start:stop] += strata @ d.double()
        log_sum, mean_shifted = total.log(), product / total
        scale = log_sum.exp()
        has_target = ref.target >= 0
        of_target = weights.gather(1, ref.target.clamp_min(0)[:, None])[:, 0]
        at_target = torch.where(has_target, of_target.double().log(), 0.0)
        of_top1 = weights.gather(1, ref.top[:, :1])[:, 0]
        # A comparison with NaN is False and would be shown as "nothing flipped".
        flipped = torch.where(largest.isnan(), torch.nan, (largest > of_top1).double())
        off = ~(log_sum.abs() < _MAX_LOG_RATIO) | ~mean_shifted.isfinite() | ~mean_d.isfinite()
        off |= has_target & ~(of_target > _MIN_WEIGHT)
        found = _LightRow(log_sum, scale, mean_shifted, at_target, flipped, mean_d)
        for row in off.nonzero()[:, 0].tolist():
            self._plain_row(row, hidden, ref, found, weights)
        return found, weights

    def _plain_row(
        self,
        row: int,
        hidden: Float[Tensor, "pos dim"],
        ref: ReferenceRows,
        found: _LightRow,
        weights: Float[Tensor, "pos vocab"],
    ) -> None:
        """The same for one position whose exponentials overflow, or underflow where it matters: plain, in float64."""
        shifted = plain_logits(self._live_head, hidden[row : row + 1])[0] - ref.log_partition[row].double()
        log_sum = shifted.logsumexp(0)
        probability = (shifted - log_sum).exp()
        found.log_sum[row] = log_sum
        found.mean_shifted[row] = torch.special.xlogy(probability, probability).sum() + log_sum
        found.at_target[row] = shifted[ref.target[row]] if ref.target[row] >= 0 else 0.0
        found.flipped[row] = (
            torch.nan if bool(shifted.isnan().any()) else float(shifted.amax() > shifted[ref.top[row, 0]])
        )
        # exp(log_sum) may lie beyond all numbers, so these are probabilities as they are.
        weights[row], found.scale[row] = probability.float(), 1.0
        if self._ref_head is not None:
            log_q = plain_logits(self._ref_head, ref.hidden[row : row + 1])[0] - ref.log_partition[row].double()
            found.mean_d[row] = (log_q.exp() * (shifted - log_q)).sum()


class _FullRow(NamedTuple):
    """The sums of both heads at each position: S - 1, sum q d, sum q expm1(d) d, sum q expm1(d) log q."""

    excess: Float[Tensor, " pos"]
    mean_d: Float[Tensor, " pos"]
    gain_d: Float[Tensor, " pos"]
    gain_logq: Float[Tensor, " pos"]
    at_target: Float[Tensor, " pos"]
    flipped: Float[Tensor, " pos"]


class FullPass:
    """Everything from both heads, in forms that do not cancel: exact down to a KL of 1e-8 in float32.

    With d = z_live - z_ref: S - 1 = sum q expm1(d), KL(q||p) = log1p(S - 1) - sum q d,
    KL(p||q) = sum p d - log S, p - q = q (expm1(d) - (S - 1)) / S. None of them changes when d is shifted, but
    they cancel where S is near 0: with d shifted by its mean, S = exp KL(q||p), which is at least 1.
    """

    def __init__(self, ref_head: OutputHead, live_head: OutputHead, device: torch.device) -> None:
        self._ref_head, self._live_head = ref_head, live_head
        self.shape = tile_shape(device)
        columns = min(self.shape.columns, live_head.vocab_size)
        self._tiles = _buffer(3, self.shape.rows, columns, device=device)
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
    ) -> _FullRow:
        """One pass of both heads, with d less `shift`; leaves q and q expm1(d) in the buffers."""
        count = len(hidden)
        q, gain = self._q[:count], self._gain[:count]
        columns = self.shape.columns
        excess, mean_d, gain_d, gain_logq = hidden.new_zeros(4, count, dtype=torch.float64)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        at_target, at_top1 = _Gathered(ref.target), _Gathered(ref.top[:, 0])
        step = hidden.float() - ref.hidden.float()
        exact = _difference_at(self._ref_head, self._live_head, hidden, ref)
        for start, stop in tiles(self._live_head.vocab_size, columns):
            log_q, d, live = self._tiles[:, :count, : stop - start]
            self._ref_head.logits(ref.hidden, start, stop, out=log_q)
            if (
                self._ref_head is self._live_head
                and isinstance(self._live_head, LinearHead)
                and self._live_head.is_linear
            ):
                # The difference of two logits, without subtracting one from the other.
                self._live_head.product(step, start, stop, out=d)
                torch.add(log_q, d, out=live)
            else:
                self._live_head.logits(hidden, start, stop, out=live)
                torch.sub(live, log_q, out=d)
                if exact is not None:
                    row, place = ((ref.top >= start) & (ref.top < stop)).nonzero(as_tuple=True)
                    d[row, ref.top[row, place] - start] = exact[row, place]
            largest = torch.maximum(largest, live.amax(1))
            at_top1.take(live, start, stop)
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
        flipped = torch.where(largest.isnan(), torch.nan, (largest > at_top1.values).double())
        return _FullRow(excess, mean_d, gain_d, gain_logq, at_target.values, flipped)

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
) -> tuple[ReferenceRows, Float[Tensor, "pos vocab"], Float[Tensor, " pos"]]:
    """What is cached of the reference at these positions.

    The numbers that a reading is compared with (`log_sum`, `entropy`, `target_logprob`) come out of the same
    pass that the live model will go through, so that an unchanged model reads exactly 0. Returned with
    its probabilities times a scale, tokens x vocabulary, and that scale: call with few positions.
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
    nothing = log_partition.new_zeros(len(hidden))
    rows = ReferenceRows(
        hidden=hidden,
        target=target,
        top=top,
        top_probability=torch.zeros_like(top_logits),
        log_partition=log_partition.float(),
        log_sum=nothing,
        entropy=nothing,
        target_logprob=nothing,
    )
    sums, weights = LightPass(head, hidden.device).pass_over(hidden, rows)
    rows = replace(
        rows,
        top_probability=weights.gather(1, top) / sums.scale.float()[:, None],
        log_sum=sums.log_sum,
        entropy=sums.log_sum - sums.mean_shifted,
        target_logprob=sums.at_target - sums.log_sum,
    )
    return rows, weights, sums.scale


def token_mass(
    weights: Float[Tensor, "pos vocab"], scale: Float[Tensor, " pos"], strata: Float[Tensor, "stratum pos"]
) -> Float[Tensor, "stratum vocab"]:
    """Sums of probabilities over the positions of each stratum; `weights` are probabilities times `scale`."""
    return (strata.float() / scale.float()) @ weights


def on_grid(sums: Float[Tensor, "stratum vocab"], grid: float) -> Float[Tensor, "stratum vocab"]:
    """In float64, rounded to multiples of `grid`: see `Strata.grid`."""
    return sums.double().div_(grid).round_().mul_(grid)


def tiles(size: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _buffer(*shape: int, device: torch.device) -> Tensor:
    # float32 by name: the process may have another default.
    return torch.empty(shape, dtype=torch.float32, device=device)


def plain_logits(head: OutputHead, hidden: Float[Tensor, "pos dim"]) -> Float[Tensor, "pos vocab"]:
    """All logits in float64 from float32 products, for a handful of positions."""
    return head.logits(hidden, 0, head.vocab_size).double()


def _difference_at(
    ref_head: OutputHead, live_head: OutputHead, hidden: Float[Tensor, "pos dim"], ref: ReferenceRows
) -> Float[Tensor, "pos top"] | None:
    """z_live - z_ref at the reference's favourite tokens, to the last digit, for two heads that are linear.

    (w_live - w_ref) . h_live + w_ref . (h_live - h_ref): nothing large is subtracted. These few tokens carry most of
    the probability, and the rounding of their logits would otherwise be the error of a tiny drift.
    """
    if not (isinstance(ref_head, LinearHead) and isinstance(live_head, LinearHead)):
        return None
    if ref_head is live_head or not (ref_head.is_linear and live_head.is_linear):
        return None
    if ref_head.factor != live_head.factor:
        return None
    live, step = hidden.float(), hidden.float() - ref.hidden.float()
    columns = []
    for tokens in ref.top.T:
        there, here = ref_head.weight[tokens].float(), live_head.weight[tokens].float()
        difference = torch.linalg.vecdot(here - there, live) + torch.linalg.vecdot(there, step)
        if ref_head.bias is not None and live_head.bias is not None:
            difference += live_head.bias[tokens].float() - ref_head.bias[tokens].float()
        columns.append(difference * live_head.factor)
    return torch.stack(columns, dim=1)


def _is_same_head(one: OutputHead, other: OutputHead) -> bool:
    if not (isinstance(one, LinearHead) and isinstance(other, LinearHead)):
        return one is other
    forms = [(head.factor, head.softcap, head.temperature, head.bias is None) for head in (one, other)]
    if forms[0] != forms[1]:
        return False
    biases = one.bias is None or other.bias is None or torch.equal(one.bias, other.bias)
    return biases and torch.equal(one.weight, other.weight)


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
