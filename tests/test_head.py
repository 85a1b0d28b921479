"""The output head: its logits, its parts, and the checksum that notices any change."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsensor.checksums import checksum
from diffsensor.head import GivenLogits, LinearHead, full_precision

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = [(5,), (3, 4), (7, 3), (2, 3, 5), (1, 1), (4, 1), ()]


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape) * 50
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_tells_every_single_bit_from_every_other(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, shape)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    seen = {before}
    count = tensor.numel() * tensor.element_size()
    for place, bit in itertools.product(range(count), range(1 if dtype == torch.bool else 8)):
        changed = tensor.clone()
        raw = changed.reshape(-1).view(torch.uint8)
        raw[place] ^= 1 << bit
        seen.add(checksum(changed.reshape(shape)))
    assert len(seen) == 1 + count * (1 if dtype == torch.bool else 8)


def test_a_checksum_notices_order_shape_and_dtype() -> None:
    tensor = torch.randn(6, 8)
    others = [tensor[[1, 0, 2, 3, 4, 5]], tensor[:, [1, 0, 2, 3, 4, 5, 6, 7]], tensor[:, [2, 3, 0, 1, 4, 5, 6, 7]],
              tensor.reshape(8, 6), tensor.reshape(48), tensor.T.contiguous(), tensor.view(torch.int32),
              tensor[:5], -tensor, tensor.flip(0), tensor.flip(1)]  # fmt: skip
    sums = [checksum(each) for each in (tensor, *others)]
    assert len(set(sums)) == len(sums)
    assert checksum(torch.empty(0, 3)) != checksum(torch.empty(3, 0))


@given(st.integers(0, 9), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_a_checksum_is_that_of_the_contents_wherever_they_lie(offset: int, width: int, dtype: torch.dtype) -> None:
    storage = some(dtype, (offset + 5 * width,))
    view = storage[offset:].view(5, width)
    assert checksum(view) == checksum(view.clone())
    wide = some(dtype, (5, width + 3))
    assert checksum(wide[:, :width]) == checksum(wide[:, :width].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checksum_notices_any_two_signs_that_turn(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 4).to(dtype)
    before = checksum(tensor)
    for one, other in itertools.combinations(range(16), 2):
        changed = tensor.clone()
        changed.view(-1)[[one, other]] *= -1
        assert checksum(changed) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_trains_by_the_smallest_step_has_another_checksum(dtype: torch.dtype) -> None:
    head = LinearHead(weight=torch.randn(30, 8).to(dtype), bias=torch.randn(30).to(dtype))
    before = head.checksum()
    raw = head.weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    raw[17, 3] += 1
    assert head.checksum() != before
    raw[17, 3] -= 1
    assert head.checksum() == before
    head.bias[4] += 1
    assert head.checksum() != before
    assert LinearHead(weight=head.weight).checksum() != head.checksum()
    assert LinearHead(weight=head.weight, scale=2.0).checksum() != LinearHead(weight=head.weight).checksum()
    assert LinearHead(weight=head.weight, softcap=2.0).checksum() != LinearHead(weight=head.weight).checksum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [{}, {"bias": True}, {"scale": 0.3}, {"softcap": 2.0}, {"bias": True, "scale": 3.0, "softcap": 1.0}],
    ids=str,
)
def test_logits_are_float32_and_right_whatever_the_dtype(shape: dict[str, object], dtype: torch.dtype) -> None:
    weight, hidden = torch.randn(40, 9).to(dtype), torch.randn(6, 9).to(dtype)
    bias = torch.randn(40).to(dtype) if shape.get("bias") else None
    head = LinearHead(weight=weight, bias=bias, scale=shape.get("scale", 1.0), softcap=shape.get("softcap"))
    expected = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected *= head.scale
    if head.softcap:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    whole = head.logits(hidden, 0, 40)
    assert whole.dtype == torch.float32
    assert whole.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-5)
    buffer = torch.full((6, 7), torch.nan)
    given_back = head.logits(hidden, 11, 18, out=buffer)
    assert given_back is buffer
    assert buffer.numpy() == pytest.approx(expected[:, 11:18].numpy(), rel=1e-5, abs=1e-5)
    tokens = torch.tensor([7, 3, 39, 3])
    assert head.rows(tokens).logits(hidden, 0, 4).numpy() == pytest.approx(
        expected[:, tokens].numpy(), rel=1e-5, abs=1e-5
    )
    assert head.is_linear == ("softcap" not in shape)


def test_given_logits_are_handed_on_as_they_are() -> None:
    logits = torch.randn(4, 12, dtype=torch.float64)
    head = GivenLogits(vocab_size=12)
    assert torch.equal(head.logits(logits, 3, 8), logits[:, 3:8].float())
    buffer = torch.empty(4, 5)
    assert torch.equal(head.logits(logits, 3, 8, out=buffer), logits[:, 3:8].float())
    picked = head.rows(torch.tensor([9, 2, 5]))
    assert torch.equal(picked.logits(logits, 1, 3), logits[:, [2, 5]].float())
    assert torch.equal(picked.rows(torch.tensor([2])).logits(logits, 0, 1), logits[:, [5]].float())
    assert not head.is_linear


def test_full_precision_holds_inside_and_puts_back_what_was() -> None:
    hidden, weight = torch.randn(64, 64), torch.randn(64, 64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                product = hidden @ weight
            assert torch.is_autocast_enabled("cpu")
            assert (hidden @ weight).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype == torch.float32
    assert product.double().numpy() == pytest.approx((hidden.double() @ weight.double()).numpy(), abs=1e-4)
