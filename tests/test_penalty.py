"""The KL penalty on training batches: its value and gradients against the plain formula, and no trace."""

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tiny
from diffsensor.control import penalty as module
from diffsensor.control.penalty import KLPenalty
from diffsensor.errors import CaptureError, ConfigError, ReferenceMismatchError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's call of it
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

ROWS, LENGTH = 3, 9


def a_batch(seed: int = 3) -> dict[str, Tensor]:
    """Three texts with padding and a prompt that does not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_kl(live: nn.Module, reference: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The formula, over all logits of both models at once."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    log_p = live(**inputs).logits.log_softmax(-1)[:, :-1]
    with torch.no_grad():
        log_q = reference.eval()(**inputs).logits.log_softmax(-1)[:, :-1]
    counted = batch["labels"][:, 1:] != -100
    return (log_q.exp() * (log_q - log_p)).sum(-1)[counted].mean()


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_logits(penalty: KLPenalty, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    return penalty(model, model(**batch).logits, batch, **options)


def by_hidden(penalty: KLPenalty, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return penalty.of_hidden(model, hidden, batch, **options)


WAYS = {"logits": by_logits, "hidden states": by_hidden}
HEADS = {
    name: tiny.HEADS[name]
    for name in (
        "frozen", "trained", "trained and tied", "trained with bias", "trained, tied and capped",
        "trained, tied and scaled", "trained and divided",
    )
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 4 * tiny.VOCAB, 2**21], ids=["one by one", "in fours", "at once"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
def test_value_and_gradients_are_those_of_the_plain_formula(
    head: str, way: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    reference = HEADS[head]().double()
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    penalty = KLPenalty(reference, coefficient=2.5)
    value = WAYS[way](penalty, live, batch)
    expected = 2.5 * plain_kl(live, reference, batch)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    assert expected > 0.05
    assert penalty.last_kl == pytest.approx(float(expected.detach()) / 2.5, rel=1e-10)
    ours, theirs = gradients(live, value), gradients(live, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-13)


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))
    return get_peft_model(model, config)


LORA: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a head that is trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LORA)
def test_with_an_adapter_the_reference_is_the_model_without_it(kind: str, way: str) -> None:
    base = tiny.llama().double()
    live, batch = with_lora(copy.deepcopy(base), **LORA[kind]).double(), a_batch()
    # In single precision the weight of a head with an adapter is read off; the rest is exact.
    rel = 1e-5 if kind != "LoRA" else 1e-10
    value, expected = WAYS[way](KLPenalty(coefficient=1.0), live, batch), plain_kl(live, base, batch)
    torch.testing.assert_close(value, expected, rtol=rel, atol=0)
    ours, theirs = gradients(live, value), gradients(live, expected)
    assert ours.keys() == theirs.keys()
    assert any("lora_A" in name for name in ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=rel, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_adapter_costs_nothing_and_pulls_nowhere(way: str) -> None:
    live = with_lora(tiny.llama(), init_lora_weights=True)
    value = WAYS[way](KLPenalty(coefficient=1.0), live, a_batch())
    assert float(value.detach()) == 0.0
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in gradients(live, value).values())


def test_a_module_of_one_s_own_gives_its_logits() -> None:
    reference = tiny.own_model()
    live, ids = tiny.drifted(reference, 0.3), a_batch()["input_ids"]
    penalty = KLPenalty(reference, coefficient=1.0)
    value = penalty(live, live(ids), ids)
    log_q, log_p = reference(ids).detach().log_softmax(-1), live(ids).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    ours, theirs = gradients(live, value), gradients(live, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)
    with pytest.raises(CaptureError, match="OwnModel has no output head of its own"):
        penalty.of_hidden(live, live(ids), ids)


def test_without_labels_all_that_the_mask_keeps_is_counted() -> None:
    reference = tiny.llama()
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q, log_p = (one(**inputs).logits.detach().log_softmax(-1) for one in (reference, live))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    penalty = KLPenalty(reference, coefficient=1.0)
    value = penalty(live, live(**inputs).logits, inputs)
    torch.testing.assert_close(value.detach(), kl[batch["attention_mask"] > 0].mean())
    shifted = inputs | {"shift_labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    torch.testing.assert_close(
        penalty(live, live(**inputs).logits, shifted).detach(), plain_kl(live, reference, batch).detach()
    )


def test_divided_by_the_tokens_of_an_accumulated_batch_the_parts_add_up() -> None:
    reference = tiny.llama().double()
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    penalty = KLPenalty(reference, coefficient=1.0)
    whole = by_logits(penalty, live, batch)
    num_items = (batch["labels"][:, 1:] != -100).sum()
    parts = [
        by_logits(penalty, live, {name: value[rows] for name, value in batch.items()}, num_items=num_items)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_a_batch_in_which_nothing_counts_adds_nothing() -> None:
    reference = tiny.llama()
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    penalty = KLPenalty(reference)
    for way in WAYS.values():
        value = way(penalty, live, batch)
        assert float(value.detach()) == 0.0
        assert math.isnan(penalty.last_kl)
        value.backward()


def test_a_coefficient_of_zero_runs_no_reference() -> None:
    ran: list[object] = []
    reference = tiny.llama()
    reference.register_forward_hook(lambda *_: ran.append(1))
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    ran.clear()
    live._forward_hooks.clear()
    penalty = KLPenalty(reference, coefficient=1.0)
    for way in WAYS.values():
        penalty.coefficient = 1.0
        way(penalty, live, batch)
        assert len(ran) == 1
        penalty.coefficient = 0.0
        assert float(way(penalty, live, batch).detach()) == 0.0
        assert math.isnan(penalty.last_kl)
        assert len(ran) == 1
        ran.clear()


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        [m.training for m in model.modules()],
        [(n, p.requires_grad, None if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter off", "frozen copy"])
def test_the_reference_answers_without_dropout_and_leaves_no_trace(adapter: bool) -> None:
    base = tiny.llama(dropout=0.5)
    live = with_lora(base, lora_dropout=0.5) if adapter else base
    live.get_submodule("base_model.model.model.layers.1" if adapter else "model.layers.1").eval()
    next(p for p in live.parameters() if p.requires_grad).requires_grad_(False)
    penalty = KLPenalty() if adapter else KLPenalty.frozen_copy(live)
    batch = a_batch()
    live(**batch).loss.backward()
    logits = live(**batch).logits
    before = state_of(live)
    values = [float(penalty(live, logits, batch).detach()) for _ in range(3)]
    assert state_of(live) == before
    assert len(set(values)) == 1  # with dropout each would be another


def test_a_frozen_copy_stays_where_the_model_was() -> None:
    live, batch = tiny.llama(), a_batch()
    live(**batch).loss.backward()
    was = live.forward
    live.forward = lambda *args, **kwargs: was(*args, **kwargs)  # as trainers do
    penalty, before = KLPenalty.frozen_copy(live, coefficient=1.0), copy.deepcopy(live.state_dict())
    assert float(by_logits(penalty, live, batch).detach()) == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.2)
    assert float(by_logits(penalty, live, batch).detach()) > 0.01
    copied = penalty._given
    assert copied is not None
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.requires_grad or p.grad is not None for p in copied.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
def test_in_bfloat16_it_is_right_to_a_few_percent(how: str, way: str) -> None:
    reference = tiny.llama()
    live, batch = tiny.drifted(reference, 0.3), a_batch()
    expected = plain_kl(live, reference, batch)
    theirs = gradients(live, expected)
    if how == "bfloat16 weights":
        live, reference = live.bfloat16(), reference.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        value = WAYS[way](KLPenalty(reference, coefficient=1.0), live, batch)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=0.05)
    ours = gradients(live, value)
    for name, gradient in theirs.items():
        assert nn.functional.cosine_similarity(ours[name].float().flatten(), gradient.flatten(), 0) > 0.99


@pytest.mark.parametrize("way", WAYS)
def test_both_sides_are_rounded_alike_so_that_equal_models_do_not_differ(way: str) -> None:
    live, batch = tiny.llama(), a_batch()
    penalty = KLPenalty.frozen_copy(live, coefficient=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = WAYS[way](penalty, live, batch)
    assert float(value.detach()) == 0.0
    # The backward pass is outside of autocast, as in most loops.
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in gradients(live, value).values())


def most_bytes(act: Callable[[], object]) -> int:
    """The most that the CPU allocator held at once, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    sizes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(sizes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_no_table_of_tokens_by_vocabulary_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, tokens = 20_000, 4 * 32
    monkeypatch.setattr(module, "_CHUNK", 8 * vocab)
    reference = tiny.llama(vocab=vocab)
    live = tiny.drifted(reference, 0.1)
    batch = {"input_ids": torch.randint(vocab, (4, 32))}
    penalty, table = KLPenalty(reference, coefficient=1.0), tokens * vocab * 4
    penalty(live, live(**batch).logits, batch)
    logits = live(**batch).logits
    assert most_bytes(lambda: penalty(live, logits, batch)) < table / 2
    hidden = live.base_model(**batch).last_hidden_state.detach().requires_grad_()
    live.requires_grad_(False)
    penalty.of_hidden(live, hidden, batch)  # the first batch is looked at more closely
    assert most_bytes(lambda: penalty.of_hidden(live, hidden, batch).backward()) < table / 2
    logits = logits.detach().requires_grad_()
    # Beside the gradient of the logits, which is such a table.
    assert most_bytes(lambda: penalty(live, logits, batch).backward()) < 1.5 * table


class Penalised(pl.LightningModule):
    def __init__(self, model: nn.Module, penalty: KLPenalty) -> None:
        super().__init__()
        self.model, self.penalty = model, penalty
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Float[Tensor, ""]:
        out = self.model(**batch)
        added = self.penalty(self.model, out.logits, batch)
        self.seen.append(self.penalty.last_kl)
        return out.loss + added

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def test_in_lightning_a_larger_coefficient_keeps_the_model_nearer() -> None:
    ends = []
    for coefficient in (0.0, 0.5, 3.0):
        model = tiny.llama()
        run = Penalised(model, KLPenalty.frozen_copy(model, coefficient=coefficient))
        reference = copy.deepcopy(model)
        trainer = pl.Trainer(
            max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(run, torch.utils.data.DataLoader([a_batch()] * 12, batch_size=None))
        ends.append(float(plain_kl(model, reference, a_batch()).detach()))
        assert all(math.isnan(value) for value in run.seen) == (coefficient == 0)
        assert not [name for name, _ in run.named_parameters() if "penalty" in name]
    assert ends[0] > 1.5 * ends[1] > 2 * ends[2]


def test_what_cannot_work_is_refused_with_a_sentence() -> None:
    live, batch = tiny.llama(), a_batch()
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no adapter .* KLPenalty.frozen_copy\(model\)"):
        KLPenalty().check(live)
    with pytest.raises(ConfigError, match="is the model that is trained"):
        KLPenalty(live).check(live)
    with pytest.raises(ReferenceMismatchError, match="has 50 output tokens, the live model 61"):
        KLPenalty(tiny.llama(vocab=50)).check(live)
    with pytest.raises(ConfigError, match=r"no logits.*of_hidden"):
        KLPenalty.frozen_copy(live)(live, None, batch)
    with pytest.raises(ConfigError, match=r"shape \[3, 1, 61\] for a batch of \[3, 9\] tokens"):
        KLPenalty.frozen_copy(live)(live, live(**batch).logits[:, -1:], batch)
    with pytest.raises(ConfigError, match=r"labels of shape \[3\] for \[3, 9\] tokens"):
        KLPenalty.frozen_copy(live)(live, live(**batch).logits, batch | {"labels": torch.ones(3, dtype=torch.int64)})
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"coefficient is {wrong}, expected a number of at least 0"):
            KLPenalty(coefficient=wrong)
    penalty = KLPenalty.frozen_copy(live)
    penalty.coefficient = math.nan
    with pytest.raises(ConfigError, match="coefficient is nan"):
        by_logits(penalty, live, batch)


def test_an_own_model_of_another_vocabulary_is_refused_at_its_first_batch() -> None:
    live, other, ids = tiny.own_model(), tiny.own_model(), a_batch()["input_ids"]
    other.out = nn.Linear(tiny.WIDTH, tiny.VOCAB + 2)
    with pytest.raises(ReferenceMismatchError, match="has 63 output tokens, the live model 61"):
        KLPenalty(other)(live, live(ids), ids)


def test_an_adapter_that_changes_the_base_is_refused() -> None:
    pissa = with_lora(tiny.llama(), init_lora_weights="pissa")
    with pytest.raises(ReferenceMismatchError, match=r"pissa.*KLPenalty.frozen_copy\(model\)"):
        KLPenalty().check(pissa)
    trains_biases = with_lora(tiny.llama(), bias="all")
    with pytest.raises(ReferenceMismatchError, match="bias='all', which trains biases of the base model"):
        KLPenalty().check(trains_biases)


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    class Masked(type(tiny.llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * torch.linspace(0.5, 1.5, out.logits.shape[-1])
            return out

    live, reference = tiny.llama(), tiny.llama()
    reference.__class__ = Masked
    with pytest.raises(CaptureError, match="does not give this model's own logits"):
        by_logits(KLPenalty(reference), live, a_batch())
