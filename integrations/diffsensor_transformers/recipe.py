"""How a trainer trains, in plain types: what has to agree for two runs to be runs of one recipe."""

import math
from typing import Any

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("recipe_of needs transformers: pip install 'diffsensor[transformers]'") from error

#: Of the trainer's arguments, where it has them: no seeds, no paths, nothing on logs and evaluation.
_ARGUMENTS = (
    *("learning_rate", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("label_smoothing_factor", "neftune_noise_alpha", "max_length", "packing", "loss_type", "beta", "epsilon"),
    *("num_generations", "num_iterations", "max_completion_length", "temperature"),
)
_OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "use_dora")


def recipe_of(trainer: Trainer) -> dict[str, object]:
    """The kind of trainer, its batches and steps, optimizer, schedule and adapters."""
    args = trainer.args
    recipe: dict[str, object] = {
        "trainer": type(trainer).__name__,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "max_steps": trainer.state.max_steps,
    }
    recipe |= {name: _plain(vars(args)[name]) for name in _ARGUMENTS if name in vars(args)}
    for name, config in getattr(trainer.model, "peft_config", {}).items():
        kept = {each: _plain(vars(config)[each]) for each in _OF_ADAPTERS if each in vars(config)}
        recipe[f"adapter {name}"] = {"type": str(getattr(config.peft_type, "value", config.peft_type)), **kept}
    return recipe


def _plain(value: Any) -> object:
    """`value` as JSON has it; an enumeration by its value, all else that JSON does not have by its text."""
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    return str(value)
