"""A language model and a tokenizer of a few words, and every trainer of transformers and TRL that takes callbacks."""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from diffsensor import ProbeSet

WORDS = ("cat", "dog", "tree", "mat", "sat", "ran", "slept", "under", "then", "and", "because", "old", "red", "blue")


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {word: number for number, word in enumerate([*special, *words])}
    own = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _config(**options: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 4 + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(sizes | options))


def tiny_model(path: Path, **options: Any) -> LlamaForCausalLM:
    """With dropout, so that a random number more or less shows in every loss; in a directory, as trainers want it."""
    if not path.exists():
        torch.manual_seed(1)
        LlamaForCausalLM(_config(**options)).save_pretrained(path)
        tokenizer().save_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    return model


def tiny_classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(_config(num_labels=1))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)
    )


def sentences(num: int, length: int = 6, seed: int = 2) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choice(WORDS) for _ in range(length)) for _ in range(num)]


def text_probes(**options: Any) -> ProbeSet:
    texts = [*sentences(3, 5, seed=3), *sentences(3, 9, seed=4)]
    return ProbeSet.from_texts(
        texts, options.pop("tokenizer", None) or tokenizer(), groups=["short"] * 3 + ["long"] * 3
    )


@dataclass
class Kept(TrainerCallback):
    """What the trainer told to its other callbacks: the logs that `report_to` would see, evaluations, checkpoints."""

    logs: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        self.logs.append({**logs, "step": state.global_step})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved.append(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        modes = [module.training for module in model.modules()]
        trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        self.seen.append(f"{random_state()} {hash_of((modes, trained, hooks))}")


def random_state() -> str:
    """A hash of all three generators."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    # The last is an int after seed() and a float after set_state(), of the same value.
    return hash_of((random.getstate(), (name, keys.tolist(), place, has_gauss, float(gauss)), torch.get_rng_state()))


def hash_of(what: Any) -> str:
    return hashlib.sha256(repr(what.tolist() if isinstance(what, Tensor) else what).encode()).hexdigest()[:16]


def _arguments(path: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return defaults | options


def _causal_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def plain(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    ids = tokenizer()(sentences(16))["input_ids"]
    data = Dataset.from_dict({"input_ids": ids})
    peft = options.pop("peft_config", None)
    if peft is not None:
        model = get_peft_model(model, peft)
    return Trainer(
        model=model,
        args=TrainingArguments(**_arguments(path, **options)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=_causal_batch,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def sft(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    return SFTTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        args=SFTConfig(**_arguments(path, **({"max_length": 32} | options))),
        train_dataset=Dataset.from_dict({"text": sentences(16)}),
        eval_dataset=Dataset.from_dict({"text": sentences(4, seed=9)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def _pairs() -> Dataset:
    return Dataset.from_dict(
        {"prompt": sentences(16, 3), "chosen": sentences(16, 3, seed=5), "rejected": sentences(16, 3, seed=6)}
    )


def dpo(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    return DPOTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        args=DPOConfig(**_arguments(path, **({"max_length": 32} | options))),
        train_dataset=_pairs(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def kto(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    data = {"prompt": sentences(16, 3), "completion": sentences(16, 3, seed=5), "label": [True, False] * 8}
    return KTOTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        args=KTOConfig(**_arguments(path, **({"max_length": 32} | options))),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def reward(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    data = {"chosen": sentences(16), "rejected": sentences(16, seed=5)}
    return RewardTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        args=RewardConfig(**_arguments(path, **({"max_length": 32} | options))),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


class Completions:
    """A reward that differs from text to text, and keeps what it was shown."""

    __name__ = "letters"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, completions: Sequence[str], **_: Any) -> list[float]:
        self.seen += completions
        return [sum(map(ord, completion)) % 7 / 7 for completion in completions]


_GENERATION = {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4}


def grpo(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    return GRPOTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        reward_funcs=Completions(),
        args=GRPOConfig(**_arguments(path, **(_GENERATION | options))),
        train_dataset=Dataset.from_dict({"prompt": sentences(16, 3)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def rloo(path: Path, callbacks: list[TrainerCallback], model: Any, **options: Any) -> Trainer:
    return RLOOTrainer(
        model=model,
        peft_config=options.pop("peft_config", None),
        reward_funcs=Completions(),
        args=RLOOConfig(**_arguments(path, **(_GENERATION | options))),
        train_dataset=Dataset.from_dict({"prompt": sentences(16, 3)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "Trainer": plain,
    "SFT": sft,
    "DPO": dpo,
    "GRPO": grpo,
    "KTO": kto,
    "RLOO": rloo,
}


def trace_of(
    name: str,
    path: Path,
    callbacks: Iterable[TrainerCallback],
    *,
    model: Callable[[Path], Any] = tiny_model,
    **options: Any,
) -> dict[str, Any]:
    """One run from its seed to its end, and everything about it that could differ from another."""
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)
    kept = Kept()
    trainer = TRAINERS[name](path / "run", [*callbacks, kept], model(path / "model"), **options)
    trainer.train()
    rewards = getattr(trainer, "reward_funcs", [])
    return {
        "history": without_ours(trainer.state.log_history),
        "logs": without_ours(kept.logs),
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "completions": [text for reward in rewards for text in reward.seen],
        "evaluated": kept.evaluated,
        "saved": kept.saved,
        "seen": kept.seen,
        "random": random_state(),
        "step": trainer.state.global_step,
        "ours": [entry for entry in trainer.state.log_history if any(map(_is_ours, entry))],
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two runs differ, bit for bit."""
    found = [key for key in one if key not in ("weights", "ours") and one[key] != other[key]]
    weights = [
        name
        for name in one["weights"].keys() | other["weights"].keys()
        if not torch.equal(one["weights"][name], other["weights"][name])
    ]
    return found + weights


def _is_ours(key: str) -> bool:
    return key.startswith("diffsensor/")


def without_ours(logs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a trainer logged, apart from our keys and from times."""
    times = ("runtime", "per_second", "step_time")
    return [
        {key: value for key, value in entry.items() if not key.endswith(times)}
        for entry in logs
        if not any(map(_is_ours, entry))
    ]
