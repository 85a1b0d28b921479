"""A language model of 40 000 parameters inside a LightningModule, its data, and a trainer that prints nothing."""

import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from diffsensor import ProbeSet

VOCAB, WIDTH = 64, 16


def tiny_llama(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class TinyModule(pl.LightningModule):
    """Next-token loss on a causal LM. `around` is a module beside it that takes part in the loss."""

    def __init__(self, model: nn.Module | None = None, around: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = model if model is not None else tiny_llama()
        self.around = around
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (ids,) = batch
        logits = self.model(input_ids=ids, use_cache=False).logits
        if self.around is not None:
            logits = self.around(logits.transpose(1, 2)).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ValidatedModule(TinyModule):
    """The same with a validation."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (ids,) = batch
        self.log("val_loss", self.model(input_ids=ids, labels=ids, use_cache=False).loss)


def data(num: int = 24, *, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
    ids = torch.randint(3, VOCAB, (num, WIDTH), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(ids), batch_size=4, shuffle=shuffle, num_workers=workers)


def tiny_probes() -> ProbeSet:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (5, 9, 12, 7)]
    width = max(map(len, ids))
    return ProbeSet.from_tensors(
        torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in ids]),
        mask=torch.stack([torch.arange(width) < len(row) for row in ids]),
        groups=["a", "a", "b", "b"],
    )


def trainer(callbacks: Iterable[pl.Callback], root: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def random_state() -> str:
    """A hash of all three generators."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    # The last is an int after seed() and a float after set_state(), of the same value.
    numpy = (name, keys.tolist(), place, has_gauss, float(gauss))
    state = repr((random.getstate(), numpy, torch.get_rng_state().tolist()))
    return hashlib.sha256(state.encode()).hexdigest()


def num_hooks(module: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, table)) for part in module.modules() for table in tables)


class Witness(pl.Callback):
    """Notes, after the callbacks before it, all that a reading could have changed."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen.append(
            (
                trainer.global_step,
                random_state(),
                [part.training for part in module.modules()],
                num_hooks(module),
                [parameter.requires_grad for parameter in module.parameters()],
                [None if p.grad is None else p.grad.clone() for p in module.parameters()],
                [buffer.clone() for buffer in module.buffers()],
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
            )
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nests of lists, dicts and tensors are not the same, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            found
            for number, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{where}[{number}]")
        ]
    return [] if type(one) is type(other) and one == other else [f"{where}: {one!r} is not {other!r}"]


def trace_of(
    callbacks: Iterable[pl.Callback],
    root: Path,
    *,
    module: Callable[[], TinyModule] = TinyModule,
    loader: Callable[[], DataLoader[Any]] = data,
    wrap: Callable[[Any], Any] = lambda module: module,
    **options: Any,
) -> dict[str, Any]:
    """One run from its seed to its end, and everything about it that could differ from another."""
    pl.seed_everything(4, verbose=False)
    random.seed(4)
    torch._dynamo.reset()
    counters.clear()
    tiny, witness = module(), Witness()
    runner = trainer([*callbacks, witness], root, **options)
    runner.fit(wrap(tiny), loader())
    return {
        "losses": tiny.losses,
        "weights": dict(tiny.state_dict()),
        "optimizer": [optimizer.state_dict() for optimizer in runner.optimizers],
        "seen": witness.seen,
        "step": runner.global_step,
        "random": random_state(),
        "graphs": counters["stats"]["unique_graphs"],
    }
