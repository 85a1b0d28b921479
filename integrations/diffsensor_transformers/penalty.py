"""The KL penalty in a run of transformers' Trainer or TRL's SFTTrainer: it is added to what `compute_loss` returns."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from diffsensor import ConfigError, KLPenalty

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("penalised needs transformers: pip install 'diffsensor[transformers]'") from error

#: TRL's trainers whose `beta` weighs how near the model is kept to a reference. Others call other things beta.
_WITH_BETA = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")


def own_beta(trainer: Trainer) -> str:
    """Which of TRL's trainers with a KL coefficient this is; "" where it is none of them."""
    return kind_in_trl(trainer, _WITH_BETA)


def kind_in_trl(trainer: Trainer, names: Sequence[str]) -> str:
    """Which of these trainers of TRL's this is, itself or built on it; "" where it is none of them."""
    kinds = (kind for kind in type(trainer).__mro__ if kind.__module__.startswith("trl."))
    return next((kind.__name__ for kind in kinds if kind.__name__ in names), "")


def penalised(trainer: Trainer, penalty: KLPenalty) -> "PenalisedLoss":
    """Add `penalty` to the loss of this trainer's training batches, from now on. Evaluation is as before.

        penalty = KLPenalty()                              # LoRA
        penalty = KLPenalty.frozen_copy(trainer.model)     # a full fine-tune: one more set of weights
        added = penalised(trainer, penalty)
        trainer.train()
        added.undo()

    The term is divided as the loss is: by the tokens of the whole accumulated batch where the trainer counts them, so
    that one batch of 8 gives the gradient of two of 4. Where the loss makes logits they are used; SFTTrainer's fused
    loss makes none, and then the penalty makes its own from hidden states, a few tokens at a time. With a coefficient
    of 0 the loss is bit for bit the trainer's own.

    Raises `ConfigError` for trainers that have a KL coefficient of their own (DPO, KTO, GRPO, RLOO), for several
    processes or GPUs, and for `torch_compile=True`; and what `KLPenalty.check` raises.
    """
    if isinstance(trainer.compute_loss, PenalisedLoss):
        raise ConfigError("This trainer's loss has a KL penalty already. Take that one off first: its undo().")
    if own_beta(trainer):
        raise ConfigError(
            f"{type(trainer).__name__} has a KL coefficient of its own, beta. Set that one instead of adding a "
            "penalty: set_kl_coefficient(trainer, value)."
        )
    if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        raise ConfigError(
            f"This run has {max(trainer.args.world_size, trainer.args.n_gpu)} processes or GPUs, and the penalty is "
            "for one of each. Make a single GPU visible to it."
        )
    if trainer.args.torch_compile:
        raise ConfigError(
            "This run has torch_compile=True, and hooks in a compiled model may never be called. Set "
            "torch_compile=False to use the penalty."
        )
    assert trainer.model is not None
    penalty.check(trainer.model)
    return PenalisedLoss(trainer, penalty)


class PenalisedLoss:
    """What stands in the place of a trainer's `compute_loss`, until `undo`."""

    def __init__(self, trainer: Trainer, penalty: KLPenalty) -> None:
        self.penalty = penalty
        self._trainer: Any = trainer
        self._own: Any = trainer.compute_loss
        self._is_of_class = "compute_loss" not in vars(trainer)
        vars(trainer)["compute_loss"] = self

    def undo(self) -> None:
        """Put the trainer's own `compute_loss` back."""
        vars(self._trainer)["compute_loss"] = self._own
        if self._is_of_class:
            del vars(self._trainer)["compute_loss"]

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.penalty.coefficient == 0 or not (model.training and torch.is_grad_enabled()):
            return self._own(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        # A trainer takes things out of its batch.
        batch = dict(inputs)
        with _Watched(self._trainer.model) as seen:
            result = self._own(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        term = self._term(seen, batch, num_items_in_batch)
        return (result[0] + term, result[1]) if return_outputs else result + term

    def _term(self, seen: "_Watched", batch: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        with seen.autocast:
            if seen.logits is not None:
                term: Tensor = self.penalty(self._trainer.model, seen.logits, batch, num_items=num_items)
            elif seen.hidden is not None:
                term = self.penalty.of_hidden(self._trainer.model, seen.hidden, batch, num_items=num_items)
            else:
                raise ConfigError(
                    f"{type(self._trainer).__name__} computed its loss without running the model that it trains, so "
                    "that the penalty sees no outputs. Add the penalty in your own compute_loss: "
                    "loss + penalty(model, outputs.logits, inputs)."
                )
        return term * self._factor(num_items)

    def _factor(self, num_items: Tensor | int | None) -> float:
        """What makes up for the trainer's own division by the number of accumulated batches, or stands in for it."""
        trainer, steps = self._trainer, self._trainer.current_gradient_accumulation_steps
        divides_itself = trainer.loss_is_scaled_for_ga
        if divides_itself is None:
            counted = trainer.model_accepts_loss_kwargs and num_items is not None
            divides_itself = counted or trainer.compute_loss_func is not None
        if num_items is not None:
            return 1.0 if divides_itself else float(steps)
        return 1.0 / steps if divides_itself else 1.0


class _Watched:
    """Keeps what the model gave when it was last run with gradients: logits, or what its body gave to a fused head."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: Tensor | None = None
        self.hidden: Tensor | None = None
        #: That of the forward pass: libraries wrap the model's own forward in it.
        self.autocast = torch.autocast("cpu", enabled=False)
        inner = getattr(model, "get_base_model", lambda: model)()
        self._model, self._body = model, getattr(inner, "base_model", inner)
        self._stack = ExitStack()

    def __enter__(self) -> "_Watched":
        self._stack.callback(self._model.register_forward_hook(self._after_model).remove)
        if self._body is not self._model:
            self._stack.callback(self._body.register_forward_hook(self._after_body).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _after_model(self, _module: nn.Module, _args: object, output: object) -> None:
        if torch.is_grad_enabled():
            logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            self.logits = logits if isinstance(logits, Tensor) else self.logits

    def _after_body(self, _module: nn.Module, _args: object, output: object) -> None:
        if torch.is_grad_enabled():
            hidden = getattr(output, "last_hidden_state", None)
            if isinstance(hidden, Tensor):
                self.hidden = hidden
                kind = hidden.device.type
                self.autocast = torch.autocast(
                    kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
                )
