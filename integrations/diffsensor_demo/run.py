"""The fine-tuning run: a plain Lightning module, and a DriftMonitor among the trainer's callbacks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from diffsensor import ProbeSet
from diffsensor.rules import Invariant, Limit
from diffsensor_demo.quiet import repeatable
from diffsensor_lightning import DriftMonitor

#: Called after each step with its number, its loss in nats and the latest KL that was read.
Progress = Callable[[int, float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the run goes. `batch` rows of `length` tokens a step; a reading every `every` steps."""

    steps: int = 240
    every: int = 10
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-4
    seed: int = 0


class LanguageModelling(pl.LightningModule):
    """Next-token prediction, as anyone would write it: nothing in it knows of the monitor."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: Int[Tensor, "row token"], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)


class ShowSteps(pl.Callback):
    """Tells `progress` of each step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        drift = trainer.callback_metrics.get("diffsensor/kl_ref_live", torch.tensor(0.0))
        self.progress(trainer.global_step, float(outputs["loss"]), float(drift))


def fine_tune(
    model: PreTrainedModel,
    rows: Int[Tensor, "row token"],
    probes: ProbeSet,
    settings: Settings,
    record: Path,
    limit: Limit,
    progress: Progress,
) -> None:
    """Fine-tune `model` on `rows`, in their order, and leave readings and alerts in the directory `record`."""
    with repeatable(settings.seed):
        model.train()
        trainer = pl.Trainer(
            max_steps=settings.steps,
            accelerator="cpu",
            devices=1,
            deterministic=True,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                DriftMonitor(probes, every_n_train_steps=settings.every, record=record, rules=[limit, Invariant()]),
                ShowSteps(progress),
            ],
        )
        batches: DataLoader[Tensor] = DataLoader(rows, batch_size=settings.batch)  # type: ignore[arg-type]
        trainer.fit(LanguageModelling(model, settings.learning_rate), batches)
