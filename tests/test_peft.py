"""Adapters: the reference is the model without them, asked once, and no second model is ever held."""

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import naive
import tiny_trainers
from diffsensor import Monitor, ProbeSet, Reading, Reference
from diffsensor.errors import CaptureError, ReferenceMismatchError
from diffsensor_transformers import DriftMonitorCallback
from tiny import VOCAB, llama, probe_set, texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's call of it
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # about merging
]

TARGETS = ["q_proj", "v_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options))


def with_adapter(base: nn.Module, config: Any) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(base, config)


def trained(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Whatever trains has moved by some noise, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def read(live: nn.Module, cache_dir: Path, reference: Any = None) -> dict[tuple[str, str], Reading]:
    monitor = Monitor(probe_set(), reference, sensors="full", cache_dir=cache_dir)
    found = monitor.read(live, 0)
    assert monitor.failures == {}
    return {(reading.metric, reading.group): reading for reading in found if not reading.hookpoint}


def assert_all_close(found: dict[tuple[str, str], Reading], expected: dict[tuple[str, str], naive.Value]) -> None:
    for key, (value, stderr) in expected.items():
        assert found[key].value == pytest.approx(value, rel=1e-3, abs=1e-6), key
        if not math.isnan(stderr):
            assert found[key].stderr == pytest.approx(stderr, rel=1e-3, abs=1e-6), key


#: The kinds of adapter, on which model, and what trains beside them.
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "LoRA": (llama, lora),
    "DoRA": (llama, lambda: lora(use_dora=True)),
    "rank-stabilised LoRA": (llama, lambda: lora(use_rslora=True, lora_alpha=4)),
    "LoRA with bias": (llama, lambda: lora(lora_bias=True)),
    "IA3": (llama, lambda: IA3Config(target_modules=TARGETS, feedforward_modules=[], task_type="CAUSAL_LM")),
    "a head that is saved": (llama, lambda: lora(modules_to_save=["lm_head"])),
    "embeddings that are saved": (llama, lambda: lora(modules_to_save=["embed_tokens"])),
    "a norm that is saved": (llama, lambda: lora(modules_to_save=["norm"])),
    "LoRA on the head": (llama, lambda: lora(target_modules=[*TARGETS, "lm_head"])),
    "DoRA on the head": (llama, lambda: lora(target_modules=[*TARGETS, "lm_head"], use_dora=True)),
    "LoRA on the embeddings": (llama, lambda: lora(target_modules=[*TARGETS, "embed_tokens"])),
    "trained tokens": (llama, lambda: lora(trainable_token_indices=[5, 7])),
    "trained tokens, tied": (lambda: llama(tied=True), lambda: lora(trainable_token_indices=[5, 7])),
    "a tied head": (lambda: llama(tied=True), lora),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_readings_against_the_model_without_its_adapter_are_those_of_two_models(kind: str, tmp_path: Path) -> None:
    build, config = ADAPTERS[kind]
    live = trained(with_adapter(build(), config()))
    expected = naive.output_readings(build(), live, texts())
    assert expected["kl_ref_live", ""][0] > 1e-4
    assert_all_close(read(live, tmp_path), expected)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_building_and_reading_leaves_no_trace_on_the_adapters(kind: str, tmp_path: Path) -> None:
    build, config = ADAPTERS[kind]
    live = trained(with_adapter(build(), config()))
    # Things that switching an adapter off and on would set: a part of it frozen, a base parameter that trains.
    own = [parameter for name, parameter in live.named_parameters() if "layers.0" in name and parameter.requires_grad]
    own[0].requires_grad_(False)
    live.base_model.model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    live.base_model.model.model.layers[1].eval()
    before = state_of(live)
    read(live, tmp_path)
    assert state_of(live) == before


def state_of(model: PeftModel) -> list[Any]:
    parts = list(model.modules())
    return [
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        [(name, parameter.double().sum().item()) for name, parameter in model.named_parameters()],
        [part.training for part in parts],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts],
        [getattr(part, "active_adapters", None) for part in parts if not isinstance(part, PeftModel)],
        [getattr(part, "disable_adapters", None) for part in parts if isinstance(part, nn.Linear)],
        model.active_adapter,
        sorted(model.peft_config),
    ]


def several() -> PeftModel:
    model = with_adapter(llama(), lora())
    trained(model)
    model.add_adapter("second", lora(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    return trained(model)


def test_with_several_adapters_the_reference_has_none_and_the_live_model_the_active_one(tmp_path: Path) -> None:
    model = several()
    before = state_of(model)
    second = read(model, tmp_path)
    assert state_of(model) == before
    assert model.active_adapter == "second"
    assert_all_close(second, naive.output_readings(llama(), model, texts()))
    model.set_adapter("default")
    first = read(model, tmp_path)
    assert_all_close(first, naive.output_readings(llama(), model, texts()))
    assert first["kl_ref_live", ""].value != second["kl_ref_live", ""].value
    # One reference for both: what is switched off has no part in it.
    assert len(list((tmp_path).iterdir())) == 1


def test_an_adapter_that_was_trained_before_counts_as_drift_from_the_first_step(tmp_path: Path) -> None:
    model = tiny_trainers.tiny_model(tmp_path / "model")
    peft = trained(with_adapter(model, lora()), size=0.2)
    trainer = tiny_trainers.plain(
        tmp_path / "run", [DriftMonitorCallback(tiny_trainers.text_probes(), 2, cache_dir=tmp_path / "c")], peft
    )
    trainer.train()
    assert trainer.state.log_history[0]["step"] == 0
    assert trainer.state.log_history[0]["diffsensor/kl_ref_live"] > 1e-3


def test_a_reading_with_the_adapter_off_is_zero(tmp_path: Path) -> None:
    model = trained(with_adapter(llama(), lora()))
    reference = Reference.build(model, probe_set(), tmp_path)
    assert read(model, tmp_path, reference)["kl_ref_live", ""].value > 1e-4
    with model.disable_adapter():
        found = read(model, tmp_path, reference)
    assert {reading.value for (metric, _), reading in found.items() if metric != "cka_distance"} == {0.0}


def test_the_reference_of_the_adapters_model_is_that_of_the_model_itself(tmp_path: Path) -> None:
    bare = llama().requires_grad_(False)
    plain, peft = (
        Reference.build(model, probe_set(), tmp_path) for model in (bare, trained(with_adapter(llama(), lora())))
    )
    everywhere, cpu = slice(0, plain.plan.num_positions), torch.device("cpu")
    for name in ("hidden", "log_partition", "entropy", "target_logprob", "top"):
        assert torch.equal(getattr(plain.rows(everywhere, cpu), name), getattr(peft.rows(everywhere, cpu), name))
    assert plain.hookpoints == peft.hookpoints


def taken_in() -> nn.Module:
    """With an adapter by transformers' own `add_adapter`, and no model of PEFT around it."""
    model = llama()
    torch.manual_seed(2)
    model.add_adapter(lora())
    return trained(model)


@pytest.mark.parametrize("on", [True, False])
def test_an_adapter_that_transformers_took_in_is_switched_off_for_the_reference(on: bool, tmp_path: Path) -> None:
    model = taken_in()
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_A.default.weight.requires_grad_(False)
    if not on:
        model.disable_adapters()
    before = [(parameter.requires_grad, parameter.double().sum()) for parameter in model.parameters()]
    found = read(model, tmp_path)
    assert [(parameter.requires_grad, parameter.double().sum()) for parameter in model.parameters()] == before
    assert layer.disable_adapters != on
    assert (found["kl_ref_live", ""].value > 1e-4) == on
    assert_all_close(found, naive.output_readings(llama(), model, texts()))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_an_adapter_of_virtual_tokens_is_refused(config: type, tmp_path: Path) -> None:
    # Packed rows with a prefix before them would be wrong by a factor of three.
    model = with_adapter(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(CaptureError, match=rf"'default' \({config.__name__}\) puts virtual tokens"):
        Monitor(probe_set(), cache_dir=tmp_path).attach(model)


# Initialisations that move a part of the base into the adapter


def pissa() -> PeftModel:
    return with_adapter(llama(), lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused_with_the_remedy(init: str, tmp_path: Path) -> None:
    model = with_adapter(llama(), lora(init_lora_weights=init))
    with pytest.raises(ReferenceMismatchError, match=rf"init_lora_weights=.{init}.*Reference.build.*adapter=True"):
        Reference.build(model, probe_set(), tmp_path)
    with pytest.raises(ReferenceMismatchError, match="adapter=True"):
        Monitor(probe_set(), cache_dir=tmp_path).attach(model)


def test_the_remedy_gives_the_readings_of_two_models(tmp_path: Path) -> None:
    model = pissa()
    before = copy.deepcopy(model)
    reference = Reference.build(model, probe_set(), tmp_path, adapter=True)
    live = trained(model)
    assert_all_close(read(live, tmp_path, reference), naive.output_readings(before, live, texts()))


def test_the_remedy_works_in_a_trainer(tmp_path: Path) -> None:
    probes = tiny_trainers.text_probes()
    callbacks = [DriftMonitorCallback(probes, 2, cache_dir=tmp_path / "c")]
    model = with_adapter(tiny_trainers.tiny_model(tmp_path / "m"), lora(init_lora_weights="pissa"))
    trainer = tiny_trainers.plain(tmp_path / "run", callbacks, model)
    with pytest.raises(ReferenceMismatchError, match="adapter=True"):
        trainer.train()
    reference = Reference.build(model, probes, tmp_path / "c", adapter=True)
    callbacks = [DriftMonitorCallback(probes, 2, cache_dir=tmp_path / "c", reference=reference)]
    trainer = tiny_trainers.plain(tmp_path / "run", callbacks, model)
    trainer.train()
    values = [entry["diffsensor/kl_ref_live"] for entry in trainer.state.log_history if "diffsensor/js" not in entry
              and "diffsensor/kl_ref_live" in entry]  # fmt: skip
    assert values[0] == 0.0 < min(values[1:])


# No second model


def wide() -> PeftModel:
    """Of which the weights are much more than what a reading needs beside them."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return trained(with_adapter(LlamaForCausalLM(config), lora()), size=0.01)


def held() -> tuple[int, int]:
    """How many parameters Python holds, and the bytes of all its tensors."""
    # By exact type: an earlier test's torch.compile leaves tensors behind that have no memory.
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(isinstance(each, nn.Parameter) for each in tensors), sum(storages.values())


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """What is held in the middle of every forward pass, when all that a look needs is there."""
    seen: list[tuple[int, int]] = []
    part = model.get_submodule("base_model.model.model.norm")
    handle = part.register_forward_hook(lambda *_: seen.append(held()))
    yield seen
    handle.remove()


def test_no_second_model_exists_while_the_reference_is_built_and_readings_are_taken(tmp_path: Path) -> None:
    model = wide()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    gc.collect()
    num_before, bytes_before = held()
    with watched(model) as seen:
        monitor = Monitor(probe_set(), cache_dir=tmp_path, sensors="full")
        monitor.attach(model)
        num_looks = len(seen)
        monitor.read(model, 1)
    assert 0 < num_looks < len(seen)
    assert {num for num, _ in seen} == {num_before}
    assert max(held_then for _, held_then in seen) - bytes_before < size / 4


def test_this_count_notices_a_second_model() -> None:
    model = wide()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    gc.collect()
    num_before, bytes_before = held()
    second = copy.deepcopy(model)
    num, held_now = held()
    assert num - num_before == len(list(second.parameters()))
    assert held_now - bytes_before >= size


# A quantised base


def test_a_quantised_base_is_read_through_its_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises the base, is not installed")
    from transformers import BitsAndBytesConfig

    # Its blocks are of 64 weights.
    tiny_trainers.tiny_model(tmp_path / "m", hidden_size=128, intermediate_size=128)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(tmp_path / "m", quantization_config=four_bit, device_map="cpu")

    probes: ProbeSet = tiny_trainers.text_probes()
    live = trained(with_adapter(base(), lora()))
    reference = Reference.build(base().requires_grad_(False), probes, tmp_path / "one")
    built = Reference.build(live, probes, tmp_path / "two")
    one, two = (Monitor(probes, each, sensors="full").read(live, 0) for each in (reference, built))
    assert [reading.value for reading in one] == pytest.approx([reading.value for reading in two], nan_ok=True)
    assert next(reading.value for reading in one if reading.metric == "kl_ref_live") > 1e-4
