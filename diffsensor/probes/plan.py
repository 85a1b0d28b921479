"""Which probes go through the model together: the same at every reading, as another layout moves the last digits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffsensor.checksums import checksum, digest
from diffsensor.errors import ConfigError
from diffsensor.types import Batch, Plan

# What one more forward pass costs beside its tokens: the weights are read once more. A rough figure will do.
_TOKENS_PER_PASS = 64
# Into how many batches the tokens are cut where that leaves enough for each: how many processes can share them.
_SHARES = 8
# Any id that every vocabulary has; nothing counted ever sees it. A tokenizer's pad id may lie outside the embedding.
_PADDING = 0


def plan_tokens(
    tokens: Sequence[Int[Tensor, " _"]],
    counted: Sequence[Bool[Tensor, " _"]],
    *,
    packed: bool,
    row_tokens: int = 256,
    batch_tokens: int | None = None,
    causal: bool = True,
) -> Plan:
    """The plan for probes that are text.

    Packed: probes share rows of up to `row_tokens` tokens, the longest first, each in the first row that has
    room; a longer probe gets a row as long as itself. `position_ids` begin at 0 at each probe, and once more at
    the padding, which is thus one more sequence that no probe sees (a model of transformers reads them so only with
    `use_cache=False`). Not packed: one probe a row, padded at the
    right; under causal attention that needs no mask, otherwise `attention_mask` is given too.

    Rows of similar width are stacked into batches of at most `batch_tokens` tokens with padding, at least one
    row, in the way that costs least. Where none is given that is an eighth of all tokens, from 256 to 1024: enough
    batches to be shared by several processes. A counted position is one whose next token is counted.
    """
    if batch_tokens is None:
        batch_tokens = min(max(sum(len(ids) for ids in tokens) // _SHARES, 256), 1024)
    if row_tokens < 1 or batch_tokens < 1:
        raise ConfigError(
            f"row_tokens={row_tokens} and batch_tokens={batch_tokens} were given; both must be at least 1."
        )
    if packed and not causal:
        raise ConfigError(
            "A packed plan was asked for with causal=False, but packed probes are kept apart by causal attention "
            "only. Use packed=False."
        )
    lengths = [len(ids) for ids in tokens]
    rows = _first_fit(lengths, row_tokens) if packed else [[probe] for probe in range(len(lengths))]
    fills = [sum(lengths[probe] for probe in row) for row in rows]
    batches: list[Batch] = []
    probes: list[Tensor] = []
    offsets: list[Tensor] = []
    targets: list[Tensor] = []
    start = 0
    for stack in _stacks(fills, batch_tokens):
        width = max(fills[row] for row in stack)
        input_ids = torch.full((len(stack), width), _PADDING)
        position_ids = torch.zeros_like(input_ids)
        attention_mask = torch.zeros_like(input_ids)
        index: list[Tensor] = []
        for line, row in enumerate(stack):
            at = 0
            for probe in rows[row]:
                stop = at + lengths[probe]
                input_ids[line, at:stop] = tokens[probe]
                position_ids[line, at:stop] = torch.arange(lengths[probe])
                offset = counted[probe][1:].nonzero()[:, 0]
                index.append(line * width + at + offset)
                probes.append(torch.full_like(offset, probe))
                offsets.append(offset)
                targets.append(tokens[probe][offset + 1])
                at = stop
            position_ids[line, at:] = torch.arange(width - at)
            attention_mask[line, :at] = 1
        inputs = {"input_ids": input_ids}
        if packed:
            inputs["position_ids"] = position_ids
        if not causal:
            inputs["attention_mask"] = attention_mask
        batches.append(Batch(inputs=inputs, leading=(len(stack), width), index=torch.cat(index), start=start))
        start += len(batches[-1].index)
    return Plan(
        batches=tuple(batches),
        probe=torch.cat(probes),
        offset=torch.cat(offsets),
        target=torch.cat(targets),
        packed=packed,
    )


def plan_dense(
    args: Sequence[Tensor], inputs: Mapping[str, Tensor], mask: Bool[Tensor, "probe pos"] | None, num_probes: int
) -> Plan:
    """The plan for probes that are no text: batches of an eighth of them, from 8 to 64.

    Without a mask each probe is one position. Nothing here has a next token, so each target is -1.
    """
    by_position = mask is not None
    mask = torch.ones(num_probes, 1, dtype=torch.bool) if mask is None else mask
    probe, offset = mask.nonzero(as_tuple=True)
    batches: list[Batch] = []
    at = 0
    size = min(max(num_probes // _SHARES, 8), 64)
    for first in range(0, num_probes, size):
        rows = slice(first, first + size)
        marks = mask[rows]
        index = marks.reshape(-1).nonzero()[:, 0]
        batches.append(
            Batch(
                args=tuple(value[rows] for value in args),
                inputs={name: value[rows] for name, value in inputs.items()},
                leading=tuple(marks.shape) if by_position else (len(marks),),
                index=index,
                start=at,
            )
        )
        at += len(index)
    assert at == len(probe)
    return Plan(batches=tuple(batches), probe=probe, offset=offset, target=torch.full_like(offset, -1), packed=False)


def checksum_of(plan: Plan) -> str:
    """Tells whether anything that goes into the model has changed."""
    return digest(
        *(
            checksum(tensor)
            for batch in plan.batches
            for tensor in (*batch.args, *(batch.inputs[name] for name in sorted(batch.inputs)), batch.index)
        )
    )


def shares_of(plan: Plan, size: int) -> list[list[int]]:
    """Which batches each of `size` processes runs: whole ones, for another layout would move the last digits.

    The largest first, each to whoever has fewest tokens so far, and fewest batches among those. A process may get
    none, but not the first one.
    """
    tokens = [torch.Size(batch.leading).numel() for batch in plan.batches]
    shares: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        least = min(shares, key=lambda share: (sum(tokens[other] for other in share), len(share)))
        least.append(place)
    return [sorted(share) for share in shares]


def split_otherwise(plan: Plan) -> Plan:
    """The same positions in the same order, in batches of another size: what a reading must not depend on, but does.

    A batch of several rows is cut in two; one of a single row is run with a second copy of it, which nobody reads.
    """
    batches: list[Batch] = []
    for batch in plan.batches:
        rows = batch.leading[0]
        row = batch.index // (torch.Size(batch.leading[1:]).numel())
        if rows == 1:
            batches.append(_with_rows(batch, torch.tensor([0, 0]), batch.index, batch.start))
            continue
        for first, stop in ((0, rows // 2), (rows // 2, rows)):
            here = (row >= first) & (row < stop)
            index = batch.index[here] - first * torch.Size(batch.leading[1:]).numel()
            start = batch.start + int((row < first).sum())
            batches.append(_with_rows(batch, torch.arange(first, stop), index, start))
    return replace(plan, batches=tuple(batch for batch in batches if len(batch.index)))


def _with_rows(batch: Batch, rows: Int[Tensor, " row"], index: Int[Tensor, " pos"], start: int) -> Batch:
    return Batch(
        args=tuple(value[rows] for value in batch.args),
        inputs={name: value[rows] for name, value in batch.inputs.items()},
        leading=(len(rows), *batch.leading[1:]),
        index=index,
        start=start,
    )


def _first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for probe in sorted(range(len(lengths)), key=lambda probe: -lengths[probe]):
        row = next((row for row, free in enumerate(room) if free >= lengths[probe]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(row_tokens, lengths[probe]))
        rows[row].append(probe)
        room[row] -= lengths[probe]
    return rows


def _stacks(widths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows stacked so that padded tokens and passes together cost least; the widest come first."""
    order = sorted(range(len(widths)), key=lambda row: -widths[row])
    least: list[float] = [0.0]
    begin: list[int] = [0]
    for stop in range(1, len(order) + 1):
        least.append(float("inf"))
        begin.append(stop - 1)
        for first in range(stop - 1, -1, -1):
            padded = (stop - first) * widths[order[first]]
            if padded > batch_tokens and stop - first > 1:
                break
            if least[first] + padded + _TOKENS_PER_PASS < least[stop]:
                least[stop] = least[first] + padded + _TOKENS_PER_PASS
                begin[stop] = first
    stacks: list[list[int]] = []
    stop = len(order)
    while stop:
        stacks.append(order[begin[stop] : stop])
        stop = begin[stop]
    return stacks[::-1]
