"""Models of some thousand parameters, one for each kind of output head; probes for them; and how to make one drift."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from diffsensor import Monitor, ProbeSet, Reading, Reference

VOCAB, WIDTH = 61, 16
#: Peaked distributions: with the usual 0.02 so small a model answers almost nothing but "all tokens alike".
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(*, tied: bool = False, layers: int = 2, vocab: int = VOCAB, dropout: float = 0.0, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    sizes = _SIZES | {"num_hidden_layers": layers, "vocab_size": vocab, "attention_dropout": dropout}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).train()


def frozen_head(model: nn.Module | None = None) -> nn.Module:
    """A model whose output head does not train: one head is enough for both sides."""
    model = llama() if model is None else model
    model.get_output_embeddings().requires_grad_(False)
    return model


def head_with_bias() -> nn.Module:
    torch.manual_seed(1)
    model = PhiForCausalLM(PhiConfig(**_SIZES, partial_rotary_factor=0.5)).train()
    nn.init.normal_(model.lm_head.bias)
    return model


def softcapped() -> nn.Module:
    torch.manual_seed(1)
    sizes = _SIZES | {"initializer_range": 1.0}
    model = Gemma2ForCausalLM(
        Gemma2Config(**sizes, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0, sliding_window=16)
    )
    return model.train()


def scaled() -> nn.Module:
    torch.manual_seed(1)
    return CohereForCausalLM(CohereConfig(**(_SIZES | {"logit_scale": 0.5, "initializer_range": 0.8}))).train()


def divided() -> nn.Module:
    torch.manual_seed(1)
    return GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=2.0)).train()


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def opt() -> nn.Module:
    """Numbers its positions itself: packed rows are wrong with it."""
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).train()


def bloom() -> nn.Module:
    """Takes no position_ids at all."""
    torch.manual_seed(1)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return BloomForCausalLM(config).train()


class OwnModel(nn.Module):
    """A language model that is not from transformers: its logits are taken as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            # A running mean, so that a position depends on those before it.
            hidden = hidden + torch.tanh(block(hidden.cumsum(1) / (1 + torch.arange(hidden.shape[1])[:, None])))
        return 2 * self.out(hidden)


def own_model() -> nn.Module:
    torch.manual_seed(1)
    return OwnModel()


#: The kinds of output head, by what they are. With all but the first, both heads are needed.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": frozen_head,
    "frozen with bias": lambda: frozen_head(head_with_bias()),
    "frozen and scaled": lambda: frozen_head(scaled()),
    "frozen and capped": lambda: frozen_head(softcapped()),
    "trained": llama,
    "trained and tied": lambda: llama(tied=True),
    "trained with bias": head_with_bias,
    "trained, tied and capped": softcapped,
    "trained, tied and scaled": scaled,
    "trained and divided": divided,
    "unpacked": opt,
    "given logits": own_model,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One probe as a test knows it."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    group: str = ""
    weight: float = 1.0


def texts(*, num: int = 11, longest: int = 20, seed: int = 5) -> list[Text]:
    """Texts of several lengths in two groups and none, with weights; of some only the end counts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(num):
        length = 4 + int(torch.randint(longest - 3, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        prompt = length // 2 if number % 3 == 1 else 0
        made.append(
            Text(
                ids=tuple(ids),
                counted=tuple(place >= prompt for place in range(length)),
                group=("letters", "poems", "")[number % 3 if number != 4 else 0],
                weight=(1.0, 2.0, 0.5, 1.5)[number % 4],
            )
        )
    return made


def probe_set(made: Sequence[Text] | None = None) -> ProbeSet:
    made = texts() if made is None else made
    width = max(len(text.ids) for text in made)

    def padded(row: Sequence[int]) -> list[int]:
        return [*row, *[0] * (width - len(row))]

    return ProbeSet.from_tensors(
        {
            "input_ids": torch.tensor([padded(text.ids) for text in made]),
            "attention_mask": torch.tensor([padded([1] * len(text.ids)) for text in made]),
        },
        mask=torch.tensor([padded(text.counted) for text in made]) > 0,
        groups=[text.group for text in made],
        weights=[text.weight for text in made],
    )


def drifted(model: nn.Module, size: float = 0.05, seed: int = 7) -> nn.Module:
    """A copy after something like a fine-tune: noise on all parameters that train, relative to their size."""
    live = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (size * parameter.double().square().mean().sqrt() * noise).to(parameter.dtype)
    return live


def readings(
    reference: nn.Module, live: nn.Module, probes: ProbeSet, cache_dir: Path, sensors: object = "full", step: int = 0
) -> dict[str, Reading]:
    """What is read of one model against another, by log key."""
    built = Reference.build(reference, probes, cache_dir)
    monitor = Monitor(probes, built, sensors=sensors)
    found = {reading.key: reading for reading in monitor.read(live, step)}
    assert monitor.failures == {}
    return found


class Letters:
    """A tokenizer with one token for each letter."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}

    def decode(self, ids: Sequence[int], /) -> str:
        return "SECRET" * len(ids)


class Kept:
    """A sink that keeps all findings."""

    def __init__(self) -> None:
        self.findings: list[object] = []
        self.closed = False

    def write(self, findings: object) -> None:
        self.findings.append(findings)

    def close(self) -> None:
        self.closed = True
