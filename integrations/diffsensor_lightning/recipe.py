"""What identifies a way of training: runs that agree in it may be held against each other."""

from typing import Any

import lightning.pytorch as pl


def recipe_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """The recipe in plain types, without seeds, places and devices. Of the hyper-parameters those that are numbers.

    Optimizers are told as they are now, so it is to be asked for before the first step.
    """
    numbers = {name: value for name, value in pl_module.hparams.items() if isinstance(value, bool | int | float)}
    num_batches = trainer.num_training_batches
    return {
        "module": type(pl_module).__qualname__,
        "hparams": {name: value for name, value in sorted(numbers.items()) if "seed" not in name.lower()},
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "num_training_batches": num_batches if isinstance(num_batches, int) else None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": None
        if trainer.gradient_clip_val is None
        else _plain(trainer.gradient_clip_algorithm),
        "optimizers": [
            {
                "class": type(optimizer).__qualname__,
                "groups": [
                    {name: _plain(group[name]) for name in ("lr", "weight_decay") if name in group}
                    for group in optimizer.param_groups
                ],
            }
            for optimizer in trainer.optimizers
        ],
    }


def _plain(value: object) -> Any:
    """A learning rate may be a tensor, and a word a member of an enumeration."""
    return value if value is None or isinstance(value, str) else float(value)  # type: ignore[arg-type]
