"""The output head: the map from the last hidden state to logits, computed in float32 a few tokens at a time."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """z = cap(scale * (W h + b)), with cap(z) = softcap * tanh(z / softcap) where the model has one.

    Logits are float32 whatever the model's dtype: two bfloat16 logits that are subtracted from each other
    are wrong by more than an early fine-tune moves them (+488 % at a KL of 5e-6).
    """

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    @property
    def is_linear(self) -> bool:
        return self.softcap is None

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        tile = self.product(hidden, start, stop, out=out)
        if self.bias is not None:
            bias = self.bias[start:stop].float()
            tile += bias if self.scale == 1.0 else bias * self.scale
        if self.softcap is not None:
            tile = tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile

    def product(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        """scale * W h alone: of the difference of two hidden states, the difference of their logits."""
        weight = self.weight[start:stop]
        if weight.is_cuda and hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16):
            tile = torch.mm(hidden, weight.T, out_dtype=torch.float32)
            tile = tile if out is None else out.copy_(tile)
        else:
            tile = torch.mm(hidden.float(), weight.float().T, out=out)
        return tile if self.scale == 1.0 else tile.mul_(self.scale)

    def mean_row(self, probabilities: Float[Tensor, "pos tile"], start: int, stop: int) -> Float[Tensor, "pos dim"]:
        """scale * sum_v p_v w_v over a tile of the vocabulary: its share of the expected unembedding."""
        return (probabilities @ self.weight[start:stop].float()).mul_(self.scale)

    def rows(self, tokens: Int[Tensor, " token"]) -> "LinearHead":
        tokens = tokens.to(self.weight.device)
        bias = None if self.bias is None else self.bias[tokens]
        return LinearHead(weight=self.weight[tokens], bias=bias, scale=self.scale, softcap=self.softcap)

    def checksum(self) -> str:
        """The same for the same bits, here and on every later day; two passes over the weights."""
        bias = "" if self.bias is None else checksum(self.bias)
        return digest(checksum(self.weight), bias, repr(self.scale), repr(self.softcap))


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenLogits:
    """The head of a module whose logits are taken as they come: the hidden state is the logits already."""

    vocab_size: int
    is_linear: bool = False

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        tile = hidden[:, start:stop]
        return tile.float() if out is None else out.copy_(tile)

    def rows(self, tokens: Int[Tensor, " token"]) -> "PickedLogits":
        return PickedLogits(tokens=tokens)

    def checksum(self) -> str:
        return digest("given logits", str(self.vocab_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class PickedLogits:
    """Some of the logits of a module whose logits are taken as they come."""

    tokens: Int[Tensor, " token"]
    is_linear: bool = False

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        tile = hidden[:, self.tokens[start:stop].to(hidden.device)].float()
        return tile if out is None else out.copy_(tile)

    def rows(self, tokens: Int[Tensor, " token"]) -> "PickedLogits":
        return PickedLogits(tokens=self.tokens[tokens])


def linear_map(module: nn.Module, width: int) -> tuple[Float[Tensor, "vocab dim"], Float[Tensor, " vocab"] | None]:
    """The weight and bias of a head: its own, or in float32 what its adapters make of them.

    A head with an adapter (LoRA, DoRA, a copy that trains, single trained tokens) is any linear map, so it
    shows its weight when it is run on the identity; in float32, because the sum in bfloat16 would lose a
    young adapter. Costs as much as `width` tokens, and a copy of the head.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    exact = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    device = next(iter(exact.values())).device
    with torch.no_grad(), full_precision(device):
        bias = torch.func.functional_call(module, exact, (torch.zeros(1, width, dtype=torch.float32, device=device),))[
            0
        ]
        weight = (
            torch.func.functional_call(module, exact, (torch.eye(width, dtype=torch.float32, device=device),)).T
            - bias[:, None]
        )
    return weight.contiguous(), bias if bool(bias.any()) else None


#: How many 8-byte words are added up at once.
_CHECKSUM_WORDS = 2**17


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products are float32 in here: no autocast, no TF32, no bfloat16 behind the caller's back."""
    with torch.autocast(device.type, enabled=False), _exact_products():
        yield


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    # torch keeps two interfaces to the same switch and refuses to mix them: use the one that the run uses.
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        kept = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, kept, strict=True):
                backend.fp32_precision = precision
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def checksum(tensor: Tensor) -> str:
    """A hash of 64-bit sums of the tensor's words over each row and over each column.

    The sums are made where the tensor lies, at the speed of its memory, which a cryptographic hash of all of it
    is not. It tells changed weights from unchanged ones; it is no defence against someone who wants a collision.
    """
    if tensor.numel() == 0:
        return digest(str(tuple(tensor.shape)), str(tensor.dtype))
    rows = tensor.detach().contiguous().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    words = _as_words(rows)
    # Some rows at a time, which are still in the cache when they are added up the other way.
    parts = words.split(max(1, _CHECKSUM_WORDS // max(1, words.shape[1])))
    by_row = torch.cat([part.sum(1, dtype=torch.int64) for part in parts])
    by_column = torch.stack([part.sum(0, dtype=torch.int64) for part in parts]).sum(0)
    # Each sum by itself: added up with weights, the highest bits of two words would cancel.
    sums = torch.cat([by_row, by_column]).cpu()
    return digest(hashlib.sha256(sums.numpy().tobytes()).hexdigest(), str(tuple(tensor.shape)), str(tensor.dtype))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _as_words(rows: Tensor) -> Tensor:
    """The rows' bytes as the widest integers that fill a row exactly."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    row_bytes, offset = rows.shape[1] * rows.element_size(), rows.storage_offset() * rows.element_size()
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if row_bytes % size == 0:
            return (rows if offset % size == 0 else rows.clone()).view(dtype)
    return rows.view(torch.uint8)
