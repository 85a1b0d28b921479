"""The same positions in batches of another size: what the noise floor is measured with."""

from dataclasses import replace

import torch

from diffsensor import ProbeSet
from diffsensor.capture import Capture, leave_no_trace
from diffsensor.probes import checksum_of, split_otherwise
from diffsensor.types import Plan
from tiny import llama, probe_set, texts


def counted_tokens(plan: Plan) -> list[tuple[int, ...]]:
    """What stands before each counted position in its row, read from the plan as a model would."""
    found = []
    for batch in plan.batches:
        ids = batch.inputs["input_ids"]
        for index in batch.index.tolist():
            row, column = divmod(index, ids.shape[1])
            found.append(tuple(ids[row, : column + 1].tolist()))
    return found


def test_another_split_counts_the_same_positions_in_the_same_order() -> None:
    for packed in (False, True):
        plan = probe_set(texts(num=30, longest=25)).plan(packed, batch_tokens=90, row_tokens=30)
        other = split_otherwise(plan)
        assert counted_tokens(other) == counted_tokens(plan)
        at = 0
        for batch in other.batches:
            assert batch.start == at
            at += len(batch.index)
        assert at == plan.num_positions
        assert all(plan.batches[0].leading != batch.leading for batch in other.batches[:2])


def test_a_batch_of_one_row_is_run_beside_a_copy() -> None:
    plan = probe_set(texts(num=1)).plan(packed=False)
    (other,) = split_otherwise(plan).batches
    assert other.leading[0] == 2
    assert torch.equal(other.index, plan.batches[0].index)
    assert torch.equal(other.inputs["input_ids"][0], other.inputs["input_ids"][1])


def test_inputs_that_are_no_text_are_split_too() -> None:
    inputs = torch.arange(30.0).reshape(5, 6)
    plan = ProbeSet.from_tensors((inputs,)).plan(packed=False)
    other = split_otherwise(plan)
    assert [batch.leading for batch in other.batches] == [(2,), (3,)]
    assert torch.equal(torch.cat([batch.args[0][batch.index] for batch in other.batches]), inputs)


def test_rows_of_which_nothing_counts_are_not_run() -> None:
    plan = ProbeSet.from_tensors((torch.arange(8.0).reshape(4, 2),)).plan(packed=False)
    (batch,) = plan.batches
    plan = replace(plan, batches=(replace(batch, index=batch.index[:2]),))
    assert [batch.index.tolist() for batch in split_otherwise(plan).batches] == [[0, 1]]


def test_another_split_gives_the_same_hidden_states_but_for_rounding() -> None:
    capture = Capture(llama(), ())
    plan = probe_set(texts(num=30, longest=25)).plan(packed=True)
    with leave_no_trace(capture.root):
        one, other = (
            torch.cat([piece.hidden for piece in capture.pieces(each)]) for each in (plan, split_otherwise(plan))
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_changed_token_or_position_changes_the_checksum() -> None:
    plan = probe_set().plan(packed=True)
    before = checksum_of(plan)
    assert checksum_of(probe_set().plan(packed=True)) == before
    plan.batches[0].inputs["input_ids"][0, 0] += 1
    assert checksum_of(plan) != before
    plan = probe_set(texts(num=30)).plan(packed=False, batch_tokens=60)
    before = checksum_of(plan)
    plan.batches[-1].index[0] -= 1
    assert checksum_of(plan) != before
    inputs = torch.arange(6.0).reshape(3, 2)
    before, inputs[2, 1] = checksum_of(ProbeSet.from_tensors((inputs,)).plan(packed=False)), 0
    assert checksum_of(ProbeSet.from_tensors((inputs,)).plan(packed=False)) != before
