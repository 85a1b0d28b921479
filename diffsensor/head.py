"""The output head: the map from the last hidden state to logits, computed in float32 a few tokens at a time."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsensor.checksums import checksum, digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """z = cap(scale * (W h + b)) / temperature, with cap(z) = softcap * tanh(z / softcap) where the model has one.

    Logits are float32 whatever the model's dtype: two bfloat16 logits that are subtracted from each other
    are wrong by more than an early fine-tune moves them (+488 % at a KL of 5e-6).
    """

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

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
            tile += bias if self.factor == 1.0 else bias * self.factor
        if self.softcap is not None:
            tile = tile.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return tile

    @property
    def factor(self) -> float:
        """What W h + b is multiplied by; a temperature acts after the cap."""
        return self.scale if self.softcap is not None else self.scale / self.temperature

    def product(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        """W h alone, scaled: of the difference of two hidden states, with a linear head, that of their logits."""
        weight = self.weight[start:stop]
        if weight.is_cuda and hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16):
            tile = torch.mm(hidden, weight.T, out_dtype=torch.float32)
            tile = tile if out is None else out.copy_(tile)
        else:
            tile = torch.mm(hidden.float(), weight.float().T, out=out)
        return tile if self.factor == 1.0 else tile.mul_(self.factor)

    def mean_row(self, probabilities: Float[Tensor, "pos tile"], start: int, stop: int) -> Float[Tensor, "pos dim"]:
        """sum_v p_v w_v, scaled, over a tile of the vocabulary: its share of the expected unembedding."""
        return (probabilities @ self.weight[start:stop].float()).mul_(self.factor)

    def rows(self, tokens: Int[Tensor, " token"]) -> "LinearHead":
        tokens = tokens.to(self.weight.device)
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias)

    def checksum(self) -> str:
        """The same for the same bits, here and on every later day; two passes over the weights."""
        bias = "" if self.bias is None else checksum(self.bias)
        return digest(checksum(self.weight), bias, repr(self.scale), repr(self.softcap), repr(self.temperature))


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenLogits:
    """The head of a module whose logits are taken as they come: the hidden state is the logits already."""

    vocab_size: int
    temperature: float = 1.0
    is_linear: bool = False

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        return _given(hidden[:, start:stop], self.temperature, out)

    def rows(self, tokens: Int[Tensor, " token"]) -> "PickedLogits":
        return PickedLogits(tokens=tokens, temperature=self.temperature)

    def checksum(self) -> str:
        return digest("given logits", str(self.vocab_size), repr(self.temperature))


@dataclass(frozen=True, slots=True, kw_only=True)
class PickedLogits:
    """Some of the logits of a module whose logits are taken as they come."""

    tokens: Int[Tensor, " token"]
    temperature: float = 1.0
    is_linear: bool = False

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        return _given(hidden[:, self.tokens[start:stop].to(hidden.device)], self.temperature, out)

    def rows(self, tokens: Int[Tensor, " token"]) -> "PickedLogits":
        return replace(self, tokens=self.tokens[tokens])


def _given(logits: Tensor, temperature: float, out: Tensor | None) -> Float[Tensor, "pos tile"]:
    tile = logits.float() if out is None else out.copy_(logits)
    return tile if temperature == 1.0 else tile / temperature if out is None else tile.div_(temperature)


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
