"""The KL penalty in transformers' Trainer and TRL's SFTTrainer, and the coefficient of trainers that have their own."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from diffsensor import ConfigError, DiffSensorError, KLPenalty, RefusedError
from diffsensor_transformers.coefficient import kl_coefficient, set_kl_coefficient, why_no_coefficient
from diffsensor_transformers.penalty import PenalisedLoss, penalised
from tiny_trainers import TRAINERS, differences, hash_of, lora, tiny_model, trace_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),  # what evaluation asks of TRL
]


def trainer_of(name: str, path: Path, *, peft: bool = False, callbacks: Any = (), **options: Any) -> Any:
    """Without dropout, so that the loss can be computed again."""
    model = tiny_model(path / "model", attention_dropout=0.0)
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    # Adapters that do something from the start, or there would be nothing to penalise.
    options |= {"peft_config": lora(lora_dropout=0.0, init_lora_weights=False)} if peft else {}
    return TRAINERS[name](path / "run", list(callbacks), model, **options)


def moved(trainer: Any) -> nn.Module:
    """The model as it was; a full one is then moved away from it."""
    before = copy.deepcopy(trainer.model)
    for module in before.modules():
        vars(module).pop("forward", None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return before


def plain_kl(live: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_p = live(**inputs).logits.log_softmax(-1)[:, :-1]
    with torch.no_grad():
        log_q = reference(**inputs).logits.log_softmax(-1)[:, :-1]
    return (log_q.exp() * (log_q - log_p)).sum(-1)[batch["labels"][:, 1:] != -100]


def batches(trainer: Any) -> list[dict[str, Tensor]]:
    return list(trainer.get_train_dataloader())


def gradients(trainer: Any, act: Callable[[], Tensor]) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    act().backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def answers_without_adapter(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with model.disable_adapter(), torch.no_grad():
        answers: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return answers


@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_the_gradient_of_the_penalty_is_added(name: str, peft: bool, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, peft=peft)
    before, batch, live = moved(trainer), batches(trainer)[0], trainer.model
    trainer.current_gradient_accumulation_steps = 1
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    answers = answers_without_adapter(live, batch) if peft else before(**inputs).logits.detach()
    live.train()

    def kl() -> Tensor:
        log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (live(**inputs).logits, answers))
        return (log_q.exp() * (log_q - log_p)).sum(-1)[batch["labels"][:, 1:] != -100].mean()

    own = trainer.compute_loss(live, dict(batch))
    expected = gradients(trainer, lambda: trainer.compute_loss(live, dict(batch)))
    for key, gradient in gradients(trainer, lambda: 3.0 * kl()).items():
        expected[key] = expected[key] + gradient
    penalty = KLPenalty(None if peft else before, coefficient=3.0)
    added = penalised(trainer, penalty)
    loss = trainer.compute_loss(live, dict(batch))
    assert float(kl().detach()) > 1e-3
    torch.testing.assert_close(loss.detach(), (own + 3.0 * kl()).detach())
    assert penalty.last_kl == pytest.approx(float(kl().detach()), rel=1e-4)
    found = gradients(trainer, lambda: trainer.compute_loss(live, dict(batch)))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)
    assert not any(module._forward_hooks for module in live.modules() if "Embedding" not in type(module).__name__)
    added.undo()
    assert torch.equal(trainer.compute_loss(live, dict(batch)), own)


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_a_coefficient_of_zero_is_bit_for_bit_the_run_without(
    name: str, peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TRAINERS[name]
    options: dict[str, Any] = {"peft_config": lora()} if peft else {}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    without = trace_of(name, tmp_path, [], **options)
    for coefficient, expected in ((0.0, True), (1.0, False)):

        def wrapped(*arguments: Any, coefficient: float = coefficient, **given: Any) -> Any:
            trainer = own(*arguments, **given)
            random_state = torch.get_rng_state()
            penalty = KLPenalty() if peft else KLPenalty.frozen_copy(trainer.model)
            penalty.coefficient = coefficient
            penalised(trainer, penalty)
            assert torch.equal(torch.get_rng_state(), random_state)
            return trainer

        monkeypatch.setitem(TRAINERS, name, wrapped)
        assert (differences(without, trace_of(name, tmp_path, [], **options)) == []) == expected


def test_a_frozen_copy_of_a_trainer_s_model_is_not_moved_by_the_training(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path)
    penalty = KLPenalty.frozen_copy(trainer.model, coefficient=0.1)
    penalised(trainer, penalty)
    trainer.train()
    assert penalty.last_kl > 1e-3  # TRL's forward would have answered with the live weights, and so with 0
    start = tiny_model(tmp_path / "model")
    copied = penalty._given
    assert copied is not None
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize("counts", [True, False], ids=["divided by tokens", "divided by steps"])
@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_one_batch_of_8_is_two_of_4(name: str, counts: bool, tmp_path: Path) -> None:
    weights = []
    for size, steps in ((8, 1), (4, 2)):
        options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        trainer = trainer_of(
            name, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
        )
        if not counts:
            # As for a model that takes no loss arguments: the trainer divides by the number of batches.
            trainer.model_accepts_loss_kwargs = False
        before = moved(trainer)
        penalised(trainer, KLPenalty(before, coefficient=5.0))
        trainer.train()
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
    unpenalised = trainer_of(name, tmp_path, per_device_train_batch_size=8, **options)
    moved(unpenalised)
    unpenalised.train()
    far = max(float((unpenalised.model.state_dict()[key] - value).abs().max()) for key, value in weights[0].items())
    assert far > 1e-2


@pytest.mark.parametrize(
    ("is_scaled", "num_items", "expected"),
    [(True, 20, "sum / 20"), (False, 20, "sum / 20 * 2"), (True, None, "mean / 2"), (False, None, "mean")],
)
def test_the_term_makes_up_for_the_trainer_s_own_division(
    is_scaled: bool, num_items: int | None, expected: str, tmp_path: Path
) -> None:
    """The trainer divides by 2, the accumulated batches, where the loss is not scaled already."""
    trainer = trainer_of("Trainer", tmp_path)
    before, batch = moved(trainer), batches(trainer)[0]
    trainer.current_gradient_accumulation_steps, trainer.loss_is_scaled_for_ga = 2, is_scaled
    trainer.model.train()
    own = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    penalised(trainer, KLPenalty(before, coefficient=1.0))
    found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items) - own
    kl = plain_kl(trainer.model, before, batch).detach()
    term = {"sum / 20": kl.sum() / 20, "sum / 20 * 2": kl.sum() / 10, "mean / 2": kl.mean() / 2, "mean": kl.mean()}
    torch.testing.assert_close(found.detach(), term[expected], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_prompts_that_do_not_count_in_the_loss_do_not_count_in_the_penalty(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path)
    before, batch = moved(trainer), batches(trainer)[0]
    trainer.current_gradient_accumulation_steps = 1
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :4] = -100
    trainer.model.train()
    penalty = KLPenalty(before, coefficient=1.0)
    penalised(trainer, penalty)
    trainer.compute_loss(trainer.model, dict(batch))
    assert penalty.last_kl == pytest.approx(float(plain_kl(trainer.model, before, batch).mean().detach()), rel=1e-4)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_nothing(peft: bool, tmp_path: Path) -> None:
    """SFTTrainer's default."""
    weights = []
    for checkpointing in (False, True):
        trainer = trainer_of("SFT", tmp_path, peft=peft, gradient_checkpointing=checkpointing, learning_rate=1e-3)
        penalised(trainer, KLPenalty(None if peft else moved(trainer), coefficient=5.0))
        trainer.train()
        weights.append(trainer.model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_compute_loss_that_a_user_put_there_is_kept_and_put_back(tmp_path: Path) -> None:
    trainer = trainer_of("Trainer", tmp_path)
    before, batch = moved(trainer), batches(trainer)[0]
    trainer.current_gradient_accumulation_steps, of_class = 1, trainer.compute_loss
    trainer.model.train()

    def own(*arguments: Any, **options: Any) -> Tensor:
        return 2 * of_class(*arguments, **options)

    trainer.compute_loss = own
    penalty = KLPenalty(before, coefficient=1.0)
    added = penalised(trainer, penalty)
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert float(found.detach()) == pytest.approx(float(own(trainer.model, dict(batch)).detach()) + penalty.last_kl)
    added.undo()
    assert trainer.compute_loss is own


@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_evaluation_is_untouched(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path)
    before = moved(trainer)
    own = trainer.evaluate()["eval_loss"]
    penalty = KLPenalty(before, coefficient=5.0)
    penalised(trainer, penalty)
    assert trainer.evaluate()["eval_loss"] == own
    assert math.isnan(penalty.last_kl)


def test_under_autocast_both_sides_are_rounded_alike(tmp_path: Path) -> None:
    for name in ("Trainer", "SFT"):
        trainer = trainer_of(name, tmp_path, bf16=True, learning_rate=0.0, max_steps=1)
        penalty = KLPenalty.frozen_copy(trainer.model, coefficient=1.0)
        penalised(trainer, penalty)
        trainer.train()
        assert penalty.last_kl == pytest.approx(0.0, abs=1e-6)


def test_what_cannot_take_a_penalty_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path)
    with pytest.raises(DiffSensorError, match="has no adapter that could be switched off"):
        penalised(trainer, KLPenalty())
    assert not isinstance(trainer.compute_loss, PenalisedLoss)
    penalty = KLPenalty.frozen_copy(trainer.model)
    penalised(trainer, penalty)
    with pytest.raises(ConfigError, match="has a KL penalty already"):
        penalised(trainer, penalty)
    with pytest.raises(ConfigError, match="DPOTrainer has a KL coefficient of its own"):
        penalised(trainer_of("DPO", tmp_path), penalty)
    trainer.compute_loss.undo()
    trainer.args.torch_compile = True
    with pytest.raises(ConfigError, match="torch_compile=True"):
        penalised(trainer, penalty)


class SetsAt(TrainerCallback):
    """Sets the coefficient after step 2, as a controller does."""

    def __init__(self, value: float) -> None:
        self.value, self.trainer = value, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            set_kl_coefficient(self.trainer, self.value)


def run_of(name: str, path: Path, value: float | None, **options: Any) -> tuple[list[str], Any]:
    """The hashes of the weights at the beginning of each step, and the trainer."""

    class Hashes(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seen.append(hash_of([value.tolist() for value in model.state_dict().values()]))

    torch.manual_seed(4)
    hashes, sets = Hashes(), SetsAt(0.0 if value is None else value)
    trainer = trainer_of(name, path, callbacks=[hashes, *([] if value is None else [sets])], **options)
    sets.trainer = trainer
    assert why_no_coefficient(trainer) == ""
    trainer.train()
    return [*hashes.seen, hash_of([v.tolist() for v in trainer.model.state_dict().values()])], trainer


BETAS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "DPO": ("DPO", False, {"beta": 0.1}),
    "DPO with LoRA": ("DPO", True, {"beta": 0.1}),
    "KTO": ("KTO", False, {"beta": 0.1}),
    "GRPO": ("GRPO", False, {"beta": 1e-6}),
    "GRPO with LoRA, from 0": ("GRPO", True, {"beta": 0.0}),
    "RLOO": ("RLOO", False, {"beta": 1e-6}),
}


@pytest.mark.parametrize("case", BETAS)
def test_beta_that_is_set_takes_effect_at_the_next_step(case: str, tmp_path: Path) -> None:
    name, peft, options = BETAS[case]
    own, _ = run_of(name, tmp_path, None, peft=peft, **options)
    changed, trainer = run_of(name, tmp_path, 50.0, peft=peft, **options)
    assert kl_coefficient(trainer) == trainer.beta == 50.0
    assert changed[:3] == own[:3]
    assert changed[3] != own[3]


def test_a_penalty_s_coefficient_is_set_by_the_same_functions(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path)
    assert "penalty=KLPenalty() with LoRA" in why_no_coefficient(trainer)
    with pytest.raises(RefusedError, match="SFTTrainer has no KL coefficient"):
        set_kl_coefficient(trainer, 1.0)
    penalty = KLPenalty.frozen_copy(trainer.model, coefficient=0.5)
    penalised(trainer, penalty)
    assert why_no_coefficient(trainer) == ""
    assert set_kl_coefficient(trainer, 2.0) == "KL coefficient 0.5 -> 2"
    assert kl_coefficient(trainer) == penalty.coefficient == 2.0


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_full_run_that_began_with_beta_0_has_no_reference_and_is_told_so(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, beta=0.0)
    assert f"{name}Config(beta=1e-6)" in why_no_coefficient(trainer)
    with pytest.raises(RefusedError, match="loads no reference model"):
        set_kl_coefficient(trainer, 0.1)
    trainer.beta = 0.1
    with pytest.raises(AttributeError, match="peft_config"):  # what it is told instead of
        trainer.train()


def test_completions_that_are_used_again_need_a_beta_from_the_start(tmp_path: Path) -> None:
    options = {"beta": 0.0, "num_iterations": 2}
    trainer = trainer_of("GRPO", tmp_path, peft=True, **options)
    assert "uses its completions for several steps" in why_no_coefficient(trainer)

    class AfterOne(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.beta = 0.1

    trainer.add_callback(AfterOne())
    with pytest.raises(KeyError, match="ref_per_token_logps"):  # what it is told instead of
        trainer.train()


def test_a_beta_that_means_nothing_is_refused(tmp_path: Path) -> None:
    assert "beta takes no part in" in why_no_coefficient(trainer_of("DPO", tmp_path, loss_type=["sft"]))
    for name in ("DPO", "GRPO"):
        with pytest.raises(RefusedError, match="Set a small number instead, such as 1e-6"):
            set_kl_coefficient(trainer_of(name, tmp_path, beta=0.1), 0.0)
