"""One tiny random model of each family: it is read as it is, packed only where that is right, and left as it was."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import naive
from diffsensor import Monitor, ProbeSet, Reference
from diffsensor.capture import Capture, leave_no_trace
from diffsensor.errors import CaptureError, ProbeError
from tiny import VOCAB, WIDTH, bloom, divided, drifted, gpt2, head_with_bias, llama, opt, probe_set, scaled, texts
from tiny_lightning import num_hooks, random_state

#: Distributions with peaks: with the usual 0.02 so small a model answers almost nothing but "all tokens alike".
STEEP = 0.3
#: Attention windows of four tokens, where probes have up to twenty.
WINDOW = 4
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = _ENDS | {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": STEEP,
}
_FEW_SIZES = {name: _SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}


def made_of(kind: type[nn.Module], config: object) -> nn.Module:
    torch.manual_seed(1)
    return kind(config).train()


def mamba(steep: float = STEEP) -> nn.Module:
    sizes = _ENDS | _FEW_SIZES | {"initializer_range": steep}
    return made_of(MambaForCausalLM, MambaConfig(**sizes, state_size=4))


def lfm2(steep: float = STEEP) -> nn.Module:
    """Short convolutions: a token sees the two before it, over the border of a probe too."""
    sizes = _SIZES | {"initializer_range": steep, "block_auto_adjust_ff_dim": False}
    return made_of(Lfm2ForCausalLM, Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))


def falcon(alibi: bool) -> nn.Module:
    return made_of(FalconForCausalLM, FalconConfig(**_ENDS, **_FEW_SIZES, num_attention_heads=2, alibi=alibi))


def hybrid() -> nn.Module:
    """Attention and a recurrence side by side, and logits multiplied by a factor."""
    state = {"mamba_d_state": 4, "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_chunk_size": 4}
    return made_of(FalconH1ForCausalLM, FalconH1Config(**_SIZES, **state, head_dim=8, lm_head_multiplier=0.5))


def recurrent_gemma() -> nn.Module:
    sizes = {
        name: value for name, value in _SIZES.items() if name not in ("max_position_embeddings", "initializer_range")
    }
    config = RecurrentGemmaConfig(
        **sizes, lru_width=WIDTH, attention_window_size=WINDOW, block_types=("recurrent", "attention"),
        logits_soft_cap=5.0, w_init_variance_scale=4.0,
    )  # fmt: skip
    return made_of(RecurrentGemmaForCausalLM, config)


def short_context() -> nn.Module:
    """Keeps a table for 64 positions; packed rows are wider."""
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=WINDOW, max_position_embeddings=64, initializer_range=STEEP, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return made_of(GPTNeoForCausalLM, config)


#: Families whose rows may hold several probes, by name.
PACKED: dict[str, Callable[[], nn.Module]] = {
    "Llama": llama,
    "Qwen2": lambda: made_of(Qwen2ForCausalLM, Qwen2Config(**_SIZES)),
    "Qwen3": lambda: made_of(Qwen3ForCausalLM, Qwen3Config(**_SIZES, head_dim=8)),
    "Gemma2": lambda: made_of(
        Gemma2ForCausalLM,
        Gemma2Config(
            **(_SIZES | {"initializer_range": 1.0}),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            final_logit_softcapping=5.0,
        ),
    ),
    "Gemma3": lambda: made_of(
        Gemma3ForCausalLM, Gemma3TextConfig(**_SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW)
    ),
    "Mistral": lambda: made_of(MistralForCausalLM, MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "GPT-2": gpt2,
    "GPT-NeoX": lambda: made_of(
        GPTNeoXForCausalLM, GPTNeoXConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"})
    ),
    "Phi": head_with_bias,
    "Cohere": scaled,
    "Granite": divided,
    "Mixtral": lambda: made_of(
        MixtralForCausalLM,
        MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1),
    ),
    "Qwen3 MoE": lambda: made_of(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
}
#: Families that get one probe a row, and why.
UNPACKED: dict[str, Callable[[], nn.Module]] = {
    "OPT, which numbers positions itself": opt,
    "OPT with projections": lambda: made_of(
        OPTForCausalLM,
        OPTConfig(
            **_ENDS,
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=8,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            init_std=STEEP,
        ),
    ),
    "BioGPT, which numbers positions itself": lambda: made_of(
        BioGptForCausalLM, BioGptConfig(**{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"})
    ),
    "BLOOM, with ALiBi": bloom,
    "MPT, with ALiBi": lambda: made_of(
        MptForCausalLM,
        MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_layers=2, n_heads=2, max_seq_len=640, initializer_range=STEEP),
    ),
    "Falcon": lambda: falcon(alibi=False),
    "Falcon with ALiBi": lambda: falcon(alibi=True),
    "Mamba, a recurrence": mamba,
    "Falcon-H1, attention and a recurrence": hybrid,
    "RecurrentGemma, a recurrence and a cap": recurrent_gemma,
    "LFM2, short convolutions": lfm2,
    "GPT-Neo, a short context": short_context,
}
FAMILIES = PACKED | UNPACKED


def one_by_one(capture: Capture, probes: ProbeSet, packed: bool) -> float:
    """How far what the head gets is from what it gets of each probe alone, at worst, relative to its size."""
    alone, plan = probes.plan(packed=False, batch_tokens=1), probes.plan(packed=packed)
    expected = {
        (int(probe), int(offset)): row
        for piece in capture.pieces(alone)
        for probe, offset, row in zip(
            alone.probe[piece.positions], alone.offset[piece.positions], piece.hidden, strict=True
        )
    }
    found = torch.cat([piece.hidden for piece in capture.pieces(plan)])
    wanted = torch.stack([expected[int(p), int(o)] for p, o in zip(plan.probe, plan.offset, strict=True)])
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def for_double(model: nn.Module) -> nn.Module:
    """Experts are multiplied group by group in kernels that know no float64."""
    model = copy.deepcopy(model)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        num_hooks(model),
        random_state(),
        model.config.to_dict(),
    )


def require_same(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    weights, others = one[0], other[0]
    assert isinstance(weights, dict)
    assert isinstance(others, dict)
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert one[1:] == other[1:]


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_as_its_own_logits_say_and_left_as_it_was(family: str, tmp_path: Path) -> None:
    made = texts()
    probes, model = probe_set(made), FAMILIES[family]()
    before = state_of(model)
    reference = Reference.build(model, probes, tmp_path)
    monitor = Monitor(probes, reference, sensors="full")
    same = monitor.read(model, 0)
    require_same(before, state_of(model))
    assert {reading.key: reading.value for reading in same if reading.value != 0.0} == {}
    assert len(reference.hookpoints) == 2
    assert all(name.endswith((".0", ".1")) for name in reference.hookpoints)

    live = drifted(model)
    found = {(reading.metric, reading.group): reading for reading in monitor.read(live, 1) if not reading.hookpoint}
    assert monitor.failures == {}
    assert found["kl_ref_live", ""].value > 1e-4
    expected = naive.output_readings(for_double(model), for_double(live), made)
    assert {key for key in found if key[1] != "worst"} == set(expected)
    for key, (value, stderr) in expected.items():
        # What two layers of rounding in float32 leave, where the second implementation has float64.
        assert found[key].value == pytest.approx(value, rel=1e-4, abs=3e-6), key
        if not math.isnan(stderr):
            assert found[key].stderr == pytest.approx(stderr, rel=1e-4, abs=3e-6), key


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_share_rows_exactly_where_that_changes_nothing(family: str, tmp_path: Path) -> None:
    probes, model = probe_set(), FAMILIES[family]()
    reference = Reference.build(model, probes, tmp_path)
    assert reference.plan.packed == (family in PACKED)
    capture = Capture(model, ())
    with leave_no_trace(model):
        assert one_by_one(capture, probes, packed=reference.plan.packed) < 1e-5
        if family in UNPACKED:
            try:
                wrong = one_by_one(capture, probes, packed=True)
            except RuntimeError:  # rows wider than the context
                wrong = math.inf
            assert wrong > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steep", [0.02, 0.1])
@pytest.mark.parametrize("family", [mamba, lfm2], ids=["Mamba", "LFM2"])
def test_a_state_that_leaks_is_seen_before_training_made_it_large(
    family: Callable[[float], nn.Module], steep: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    # Of LFM2 with weights of 0.02, packed rows are wrong by 1e-5: nothing, until it is trained.
    assert not Reference.build(family(steep).to(dtype), probe_set(), tmp_path).plan.packed


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mixtral", "Gemma2"])
def test_probes_share_rows_in_bfloat16_too(family: str, tmp_path: Path) -> None:
    assert Reference.build(PACKED[family]().bfloat16(), probe_set(), tmp_path).plan.packed


@pytest.mark.parametrize("family", ["MPT, with ALiBi", "GPT-2", "GPT-Neo, a short context"])
def test_probes_longer_than_the_context_are_refused(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    long = ProbeSet.from_tensors(torch.randint(3, VOCAB, (2, 700)))
    with pytest.raises(ProbeError, match=r"700 tokens, but the model reads (64|640) at most"):
        Reference.build(model, long, tmp_path)


class OwnHead(nn.Module):
    """Says where its head is, as models of transformers do, and knows none of their words."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        hidden = self.body(tokens)
        return self.out(hidden.cumsum(1) / (1 + torch.arange(hidden.shape[1])[:, None])), None


def test_a_model_with_a_head_and_words_of_its_own_is_read(tmp_path: Path) -> None:
    made, model = texts(), OwnHead()
    live = drifted(model)
    reference = Reference.build(model, probe_set(made), tmp_path)
    assert not reference.plan.packed
    found = {(r.metric, r.group): r.value for r in Monitor(probe_set(made), reference, sensors="full").read(live, 0)}
    expected = naive.output_readings(_FirstOf(model), _FirstOf(live), made)
    for key, (value, _) in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=3e-6), key


class _FirstOf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids)[0]
        return logits


class Doubled(nn.Module):
    """Does to the logits what no configuration tells."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnHead()
        self.config = SimpleNamespace(logit_scale=3.0)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.out

    def forward(self, input_ids: Tensor) -> Tensor:
        return 2 * self.inner(input_ids)[0]


def test_logits_that_the_head_does_not_give_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"does not give this model's own logits: they differ by 5\.0e-01"):
        Reference.build(Doubled(), probe_set(), tmp_path)


def test_a_model_that_cannot_pack_says_so_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diffsensor.reference"):
        Reference.build(bloom(), probe_set(), tmp_path)
    assert "Packed rows are wrong" in caplog.text


class OwnNumbers(OwnHead):
    """Looks at nothing but the token and its place in the row, whatever place it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(512, WIDTH)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits: Tensor = self.out(self.body(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        return logits


def test_a_model_that_numbers_positions_itself_gets_one_probe_a_row_though_nothing_leaks(tmp_path: Path) -> None:
    assert not Reference.build(OwnNumbers(), probe_set(), tmp_path).plan.packed
