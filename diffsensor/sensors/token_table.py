"""Which tokens the live model prefers more, or less, than the reference, with their error and an example."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffsensor.head import LinearHead
from diffsensor.protocols import OutputHead, ReferenceAnswers
from diffsensor.statistics import ratio_means, strata_of
from diffsensor.types import TokenShift

#: Lines in each direction and by each of the two rankings, for all probes and for each group.
LINES, LINES_PER_GROUP = 10, 5
#: How many tokens of context stand before the position of an example.
CONTEXT_TOKENS = 24

RankedBy = Literal["mass_moved", "logit_difference"]


class _Candidate(NamedTuple):
    stratum: int
    ranked_by: RankedBy
    prefers: Literal["live", "reference"]
    rank: int
    token: int


def token_table(
    *,
    reference: ReferenceAnswers,
    ref_head: OutputHead,
    live_head: OutputHead,
    hidden: Float[Tensor, "pos dim"],
    mass_moved: Float[Tensor, "stratum vocab"],
    logit_sums: Float[Tensor, "stratum vocab"] | None,
    log_ratio: Float[Tensor, " pos"],
    step: int,
) -> tuple[TokenShift, ...]:
    """The tokens with the largest change in each stratum, by mass moved and by mean logit difference.

    Errors and examples need each position's probabilities, which are computed again for the tokens in the
    table alone. `logit_sums` are the sums of z_live - z_ref over positions where the head is not linear;
    with a linear head they are the head of a mean. `log_ratio` is log(Z_live / Z_ref) at each position.
    """
    everywhere = slice(0, reference.plan.num_positions)
    strata = reference.strata(everywhere, hidden.device)
    ref = reference.rows(everywhere, hidden.device)
    if logit_sums is None:
        mean_logits = _mean_logit_difference(ref_head, live_head, ref.hidden, hidden, strata)
    else:
        mean_logits = logit_sums / strata.sum(1, keepdim=True)
    candidates = list(_candidates(mass_moved, mean_logits))
    if not candidates:
        return ()
    tokens = torch.tensor(sorted({candidate.token for candidate in candidates}), device=hidden.device)
    column = {int(token): place for place, token in enumerate(tokens)}
    some = len(tokens)
    log_partition = ref.log_partition.double() + ref.log_sum
    q = (ref_head.rows(tokens).logits(ref.hidden, 0, some).double() - log_partition[:, None]).exp()
    p = (live_head.rows(tokens).logits(hidden, 0, some).double() - (log_partition + log_ratio)[:, None]).exp()
    gained = (p - q).cpu()
    groups, owner = strata_of(reference.probes), reference.plan.probe
    # As a product: it adds in a fixed order.
    member = torch.nn.functional.one_hot(owner, groups.weights.shape[1]).double()
    sums, counts = gained.T @ member, member.sum(0)
    errors = [[mean.stderr for mean in ratio_means(sums, counts, weights[None])] for weights in groups.weights]
    inside = groups.weights[:, owner] > 0
    shifts = []
    for candidate in candidates:
        moved = gained[:, column[candidate.token]]
        sign = 1.0 if candidate.prefers == "live" else -1.0
        place = int((sign * moved).masked_fill(~inside[candidate.stratum], -math.inf).argmax())
        probe, offset = int(owner[place]), int(reference.plan.offset[place])
        shifts.append(
            TokenShift(
                step=step,
                group=groups.names[candidate.stratum],
                ranked_by=candidate.ranked_by,
                prefers=candidate.prefers,
                rank=candidate.rank,
                token_id=candidate.token,
                token=reference.probes.decode([candidate.token]),
                mass_moved=float(mass_moved[candidate.stratum, candidate.token]),
                mass_moved_stderr=errors[candidate.stratum][column[candidate.token]],
                logit_difference=float(mean_logits[candidate.stratum, candidate.token]),
                probe=reference.probes.names[probe],
                position=offset,
                context=_context(reference, probe, offset),
            )
        )
    return tuple(shifts)


def _mean_logit_difference(
    ref_head: OutputHead,
    live_head: OutputHead,
    ref_hidden: Float[Tensor, "pos dim"],
    hidden: Float[Tensor, "pos dim"],
    strata: Float[Tensor, "stratum pos"],
) -> Float[Tensor, "stratum vocab"]:
    """mean(z_live - z_ref) for every token: the head applied to mean hidden states, since it is linear."""
    share = (strata / strata.sum(1, keepdim=True)).float()
    live, ref = share @ hidden.float(), share @ ref_hidden.float()
    if live_head is ref_head and isinstance(live_head, LinearHead):
        bare = replace(live_head, bias=None)
        return bare.logits(live - ref, 0, bare.vocab_size).double()
    size = live_head.vocab_size
    return live_head.logits(live, 0, size).double() - ref_head.logits(ref, 0, size).double()


def _candidates(mass: Float[Tensor, "stratum vocab"], logits: Float[Tensor, "stratum vocab"]) -> Iterator[_Candidate]:
    rankings: tuple[tuple[RankedBy, Tensor], ...] = (("mass_moved", mass), ("logit_difference", logits))
    for ranked_by, table in rankings:
        for stratum, row in enumerate(table):
            lines = min(LINES if stratum == 0 else LINES_PER_GROUP, len(row))
            for prefers, signed in (("live", row), ("reference", -row)):
                values, tokens = signed.topk(lines)
                for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True)):
                    if value > 0:
                        yield _Candidate(stratum, ranked_by, prefers, rank, token)  # type: ignore[arg-type]


def _context(reference: ReferenceAnswers, probe: int, offset: int) -> str:
    tokens = reference.probes.tokens_of(probe)[: offset + 1]
    return reference.probes.decode(tokens[-CONTEXT_TOKENS:].tolist()) if len(tokens) else ""
