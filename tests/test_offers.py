"""Rolling probes are fed with what a trainer trains on, or samples; and the trainer notices nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from diffsensor import ConfigError, Monitor, RollingProbes, read_record
from diffsensor.errors import ReferenceMismatchError
from diffsensor.types import BankProbe
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import TRAINERS, differences, lora, sentences, text_probes, tiny_model, tokenizer, trace_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
]
SAMPLERS = ("GRPO", "RLOO")


def rolling(**options: Any) -> RollingProbes:
    arguments: dict[str, Any] = {"size": 16, "max_tokens": 32} | options
    return RollingProbes(tokenizer(), **arguments)


def callback(probes: RollingProbes, every_n_steps: int = 2, **options: Any) -> DriftMonitorCallback:
    return DriftMonitorCallback(probes, every_n_steps, bank="contextual", **options)


def trainer_of(name: str, path: Path, *callbacks: DriftMonitorCallback, **options: Any) -> Any:
    return TRAINERS[name](path / "run", list(callbacks), tiny_model(path / "model", attention_dropout=0.0), **options)


def bank_of(path: Path) -> tuple[BankProbe, ...]:
    return read_record(path / "run" / "diffsensor-contextual").bank_probes


def words(tokens: Sequence[int]) -> str:
    return str(tokenizer().decode(list(tokens), skip_special_tokens=True))


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("peft", [False, True])
def test_a_run_whose_texts_are_offered_is_bit_for_bit_the_one_without(name: str, peft: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"peft_config": lora()} if peft else {}
    off, on = (trace_of(name, tmp_path, callbacks, **options) for callbacks in ([], [callback(rolling())]))
    assert differences(off, on) == []
    found = {each.step for each in bank_of(tmp_path)}
    assert found == {2, 4}  # before the first step nothing was offered
    drift = [each for each in on["ours"][-1] if each.startswith("diffsensor/kl_ref_live")]
    assert "diffsensor/kl_ref_live/bank=contextual" in drift


@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_the_rows_of_training_batches_are_offered_and_no_others(name: str, tmp_path: Path) -> None:
    probes = rolling()
    trainer = trainer_of(name, tmp_path, callback(probes), gradient_accumulation_steps=2, eval_strategy="steps")
    trainer.train()
    assert probes.num_offered == 4 * 2 * 2  # steps, batches, rows; none of the evaluation
    texts = {words(one.tokens) for one in probes.held()}
    assert texts <= set(sentences(16))
    assert len(texts) > 8
    assert all(one.counted == (False, *[True] * (len(one.tokens) - 1)) for one in probes.held())


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_where_completions_are_told_from_prompts_they_alone_count(name: str, tmp_path: Path) -> None:
    probes = rolling()
    trainer_of(name, tmp_path, callback(probes)).train()
    # The tokenizer takes the last word of a prompt and the first one of its completion for one, which it does not know.
    prompts = {text.rpartition(" ")[0] for text in sentences(16, 3)}
    for one in probes.held():
        prompt = [token for token, counts in zip(one.tokens, one.counted, strict=True) if not counts]
        assert words(prompt) in prompts
        assert sum(one.counted) >= 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_completion_of_each_prompt_is_offered_and_counts(name: str, tmp_path: Path) -> None:
    probes = rolling()
    trainer = trainer_of(name, tmp_path, callback(probes))
    trainer.train()
    (reward,) = trainer.reward_funcs
    assert len(reward.seen) == 4 * 4
    assert probes.num_offered == 4 * 2
    seen = set(reward.seen)
    for one in probes.held():
        completion = [token for token, counts in zip(one.tokens, one.counted, strict=True) if counts]
        assert words(completion) in {words(tokenizer()(text)["input_ids"]) for text in seen}
        prompt = one.tokens[: len(one.tokens) - len(completion)]
        assert words(prompt) in set(sentences(16, 3))


def test_completions_that_are_used_for_several_steps_are_offered_once(tmp_path: Path) -> None:
    probes = rolling()
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer = trainer_of("GRPO", tmp_path, callback(probes), max_steps=8, **options)
    trainer.train()
    # 8 steps of 2 batches; each batch is used twice; of 4 completions two are of one prompt.
    assert probes.num_offered == 8 * 2 // 2 * 2


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_a_resumed_run_draws_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "peft_config": lora()}
    whole = rolling(size=4, half_life=6)
    trainer_of(name, tmp_path / "whole", callback(whole), **options).train()
    torch.manual_seed(99)
    resumed = rolling(size=4, half_life=6)
    again = trainer_of(name, tmp_path / "whole", callback(resumed), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-3"))
    assert resumed.num_offered == whole.num_offered
    if name == "SFT":  # what is sampled anew after a checkpoint is another matter
        assert resumed.held() == whole.held()


def test_a_full_fine_tune_that_goes_on_needs_the_model_that_it_began_with(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_of("SFT", tmp_path, callback(rolling()), **options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ReferenceMismatchError, match="A copy of the model that the run began with is not kept"):
        trainer_of("SFT", tmp_path, callback(rolling()), **options).train(resume_from_checkpoint=checkpoint)
    start = tiny_model(tmp_path / "start", attention_dropout=0.0)
    again = trainer_of("SFT", tmp_path, callback(rolling(), reference=start), **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert {each.step for each in bank_of(tmp_path)} == {2, 4}


def test_the_trainer_is_left_as_it_was_found_and_a_second_run_begins_anew(tmp_path: Path) -> None:
    probes = rolling()
    trainer = trainer_of("SFT", tmp_path, callback(probes))
    trainer.train()
    assert "get_batch_samples" not in vars(trainer)
    trainer.train()
    assert probes.num_offered == 4 * 2


def test_fixed_and_rolling_probes_stand_side_by_side(tmp_path: Path) -> None:
    probes = rolling()
    fixed = DriftMonitorCallback(text_probes(), 2)
    trainer_of("GRPO", tmp_path, fixed, callback(probes), beta=0.1).train()
    readings = {bank: read_record(tmp_path / "run" / bank).readings for bank in ("diffsensor", "diffsensor-contextual")}
    told = {bank: {each.metric for each in of if each.sensor == "rollouts"} for bank, of in readings.items()}
    assert "rollout_kl_minus_kl_ref_live" in told["diffsensor"]
    assert not any("minus" in metric for metric in told["diffsensor-contextual"])  # they are on policy themselves


def test_batches_without_token_ids_are_refused(tmp_path: Path) -> None:
    class Pictures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model(tmp_path / "model")

        def forward(self, input_ids: Any = None, pixels: Any = None, **_: Any) -> Any:
            return self.model(input_ids=input_ids)

    ours = callback(rolling(), model_path="model")
    trainer = Trainer(
        model=Pictures(),
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=Dataset.from_dict({"pixels": [[1.0]] * 8}),
        callbacks=[ours],
    )
    with pytest.raises(ConfigError, match=r"trains on batches of .*'pixels'.*rolling probes need 'input_ids'"):
        trainer.train()
    ours.close()


def test_the_monitor_knows_a_tokenizer_that_is_not_the_trainer_s(tmp_path: Path) -> None:
    probes = RollingProbes(tokenizer(["other", "words"]), max_tokens=32)
    assert Monitor(probes, bank="contextual").probes is probes
    with pytest.raises(ValueError, match="The tokenizer has the fingerprint"):
        trainer_of("SFT", tmp_path, callback(probes)).train()
