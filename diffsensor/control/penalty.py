"""A penalty that holds the model near its reference on the batches that it trains on."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffsensor.capture import (
    adapter_off,
    find_model,
    frozen_copy,
    has_adapter,
    leave_no_trace,
    refuse_changed_base,
)
from diffsensor.capture.answers import accepts, known_forms, logits_of, text_config
from diffsensor.capture.find import output_embeddings, refuse_virtual_tokens, require_one_device
from diffsensor.capture.no_trace import device_of
from diffsensor.capture.zero3 import is_zero3
from diffsensor.errors import CaptureError, ConfigError, ReferenceMismatchError
from diffsensor.head import linear_map

#: What a batch tells the loss and not the model.
_NOT_FOR_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch", "use_cache")
_NOT_COUNTED = -100
#: So many numbers of float32 are made at once, of each of a handful of tables.
_CHUNK = 2**21
#: At so many positions of each row of the first batch the model's own logits show what it does after its head.
_TRIED = 2
#: Where a drift budget begins as well.
_START = 1.0


@final
class KLPenalty:
    """coefficient * KL(reference || live), the mean over the counted tokens of a training batch, exact over all tokens.

        penalty = KLPenalty(coefficient=1.0)  # LoRA; for a full fine-tune KLPenalty.frozen_copy(model, coefficient=1.0)
        out = model(**batch)
        loss = out.loss + penalty(model, out.logits, batch)

    The same line stands in Lightning's `training_step`. In nats per token. Counted are the tokens that the loss counts:
    those whose next label is not -100, or without labels all that the attention mask keeps. Penalise training batches,
    never the probes: a run penalised on its probes reads a fraction of the drift that it has.

    The reference is the model with its adapter off, at the price of one more forward pass a batch; or, for a full
    fine-tune, a frozen copy, which holds one more set of weights as well. It answers without dropout, and leaves no
    trace: modes, random numbers, gradients and `requires_grad` are as before. Call it under the autocast of the forward
    pass, so that both sides are rounded alike.

    Neither side makes a table tokens x vocabulary: both are compared a few tokens at a time, once in the forward and
    once in the backward pass. What remains is the gradient of the logits that were given, in their dtype.
    `of_hidden` does without that too, at the price of one more product with the head.

    Arguments:
        reference: the reference model, with the live one's vocabulary. None switches the live model's adapter off.
        coefficient: how much it counts, at least 0. A plain number that may be set at any time; at 0 the reference is
            not run, and the penalty costs nothing.
        model_path: where in the live model the language model is, needed only where there are several.

    Raises `ConfigError` where there is neither adapter nor reference, `ReferenceMismatchError` where the reference has
    another vocabulary, `CaptureError` where a model's logits cannot be made from its head: all at the first batch, or
    when `check` is called.
    """

    def __init__(
        self, reference: nn.Module | None = None, *, coefficient: float = _START, model_path: str | None = None
    ) -> None:
        self.coefficient = coefficient
        self._require_coefficient()
        self._given = reference
        self._model_path = model_path
        self._seen: tuple[nn.Module, _Side, _Side] | None = None
        self._last_kl: Tensor | None = None

    @classmethod
    def frozen_copy(
        cls, model: nn.Module, *, coefficient: float = _START, model_path: str | None = None
    ) -> "KLPenalty":
        """With a copy of the model as it is now, which is held beside it: one more set of weights, without gradients.

        Make it before the first update, and before a checkpoint is loaded into a run that goes on.
        """
        return cls(frozen_copy(model, model_path), coefficient=coefficient, model_path=model_path)

    @property
    def last_kl(self) -> float:
        """KL(reference || live) of the last training batch, in nats per token; NaN where none was computed.

        It is of other texts at every batch, and of texts that are trained on: a log, no reading.
        """
        return math.nan if self._last_kl is None else float(self._last_kl)

    def check(self, model: nn.Module) -> None:
        """Raise what a training batch would raise, as far as it can be told without one."""
        self._sides(model)

    def __call__(
        self,
        model: nn.Module,
        logits: Float[Tensor, "row width vocab"] | None,
        batch: Mapping[str, Any] | Tensor,
        *,
        num_items: int | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The term to be added to the loss.

        Arguments:
            model: the live model, or a module that holds it.
            logits: what it gave for this batch, with their graph.
            batch: what it was given: a mapping, or the token ids alone.
            num_items: the tokens of the whole accumulated batch, where the loss is divided by them; the counted tokens
                of this batch where nothing is given.
        """
        self._require_coefficient()
        if logits is None:
            raise ConfigError(
                "The penalty was given no logits. Expected those of the batch, [row, position, vocabulary], as in "
                "penalty(model, outputs.logits, batch). Where a fused loss makes none, give hidden states to of_hidden."
            )
        if self.coefficient == 0:
            self._last_kl = None
            return logits.new_zeros(())
        _, reference = self._sides(model)
        states, index = self._of_reference(reference, batch, logits)
        answer = reference.answering()
        _require_same_vocabulary(logits.shape[-1], answer.vocab_size(states))
        size = max(1, _CHUNK // logits.shape[-1])
        values: Tensor = _KLAtPositions.apply(logits.flatten(0, 1), index, states, answer, size)  # type: ignore[no-untyped-call]
        return self._term(values, num_items)

    def of_hidden(
        self,
        model: nn.Module,
        hidden: Float[Tensor, "row width dim"],
        batch: Mapping[str, Any] | Tensor,
        *,
        num_items: int | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The same from what the live model's head gets, for losses that never make logits.

        The live logits are made here, a few tokens at a time, and once more in the backward pass.
        """
        self._require_coefficient()
        if self.coefficient == 0:
            self._last_kl = None
            return hidden.new_zeros(())
        live, reference = self._sides(model)
        if live.head is None:
            raise CaptureError(
                f"{type(live.root).__name__} has no output head of its own, so that its logits cannot be made from "
                "hidden states. Give the penalty its logits."
            )
        if live.form is None and live is not reference:
            with leave_no_trace(live.root):
                live.states(batch)
        states, index = self._of_reference(reference, batch, hidden)
        answer = reference.answering()
        moved = hidden.flatten(0, 1)[index]

        def one(live_states: Tensor, reference_states: Tensor) -> Tensor:
            logits = live.logits(live_states)
            _require_same_vocabulary(logits.shape[-1], answer.vocab_size(reference_states))
            return _kl(_widened(logits).log_softmax(-1), _widened(answer(reference_states)).log_softmax(-1))

        size = max(1, _CHUNK // answer.vocab_size(states))
        parts = [
            checkpoint(one, here, there, use_reentrant=False)
            for here, there in zip(moved.split(size), states.split(size), strict=True)
        ]
        return self._term(torch.cat(parts), num_items)

    def _term(self, values: Float[Tensor, " pos"], num_items: int | Tensor | None) -> Float[Tensor, ""]:
        self._last_kl = values.detach().mean() if len(values) else None
        return self.coefficient * values.sum() / (max(1, len(values)) if num_items is None else num_items)

    def _of_reference(
        self, reference: "_Side", batch: Mapping[str, Any] | Tensor, live: Float[Tensor, "row width last"]
    ) -> tuple[Float[Tensor, "pos last_reference"], Int[Tensor, " pos"]]:
        """What the reference's head gets at the counted positions, and which ones these are."""
        with leave_no_trace(reference.root), adapter_off(reference.root, leave_on=self._given is not None):
            states = reference.states(batch)
        if states.shape[:2] != live.shape[:2]:
            raise ConfigError(
                f"The penalty was given a tensor of shape {list(live.shape)} for a batch of {list(states.shape[:2])} "
                "tokens. Expected one row for each token of the batch: leave logits_to_keep out, and give the batch "
                "that these are of."
            )
        index = _counted(batch, states.shape[0], states.shape[1]).flatten().nonzero()[:, 0].to(states.device)
        return states.flatten(0, 1)[index], index

    def _sides(self, model: nn.Module) -> tuple["_Side", "_Side"]:
        """The live model and its reference; all that can be wrong with them is found at first sight."""
        if self._seen is None or self._seen[0] is not model:
            live = _Side(find_model(model, self._model_path))
            require_one_device(live.root)
            refuse_virtual_tokens(live.root)
            if is_zero3(live.root):
                raise CaptureError(
                    f"The parameters of {type(live.root).__name__} are cut up by DeepSpeed's ZeRO-3, and KLPenalty "
                    "needs the output head whole. Train with ZeRO-2, or without this penalty."
                )
            self._seen = (model, live, self._reference_of(live))
        return self._seen[1], self._seen[2]

    def _reference_of(self, live: "_Side") -> "_Side":
        if self._given is None:
            _require_adapter(live.root)
            return live
        root = find_model(self._given)
        if root is live.root:
            raise ConfigError(
                "The reference given is the model that is trained, so that the penalty would always be 0. Give a copy "
                "that stays as it is: KLPenalty.frozen_copy(model)."
            )
        reference = _Side(root.to(device_of(live.root)))
        heads = [getattr(side.head, "weight", None) for side in (live, reference)]
        if isinstance(heads[0], Tensor) and isinstance(heads[1], Tensor):
            _require_same_vocabulary(len(heads[0]), len(heads[1]))
        return reference

    def _require_coefficient(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ConfigError(
                f"The penalty's coefficient is {self.coefficient!r}, expected a number of at least 0. Set one between "
                "1e-4 and 1e2, or 0 for no penalty."
            )


class _Side:
    """One language model: what its head gets for a batch, and how its logits are made from that."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.head = output_embeddings(root)
        #: Scale and soft cap after the head, once the model has been run.
        self.form: tuple[float, float | None] | None = (1.0, None) if self.head is None else None
        self._map: tuple[Tensor, Tensor | None] | None = None

    def states(self, batch: Mapping[str, Any] | Tensor) -> Float[Tensor, "row width dim"]:
        """What the head gets; of a model without a head of its own, the logits. To be called in `leave_no_trace`."""
        head = self.head
        if head is None:
            return logits_of(self._run(batch))
        got: list[Tensor] = []

        def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            got.append(args[0])
            # The model itself makes no logits of its own, or few: nobody reads them.
            return (args[0][..., : _TRIED if self.form is None else 0, :], *args[1:])

        with head.register_forward_pre_hook(take):
            output = self._run(batch)
        if len(got) != 1 or got[0].ndim != 3:
            raise CaptureError(
                f"The output head of {type(self.root).__name__} ran {len(got)} times for a batch, expected once, with "
                "a hidden state for each token. Name the sub-module that is the language model: model_path='...'."
            )
        if self.form is None:
            self._find_form(head(got[0][:, :_TRIED]), logits_of(output))
        if not isinstance(head, nn.Linear) and self._map is None:
            # An adapter on the head can be off in here only; the reference's head never changes, so once will do.
            weight, bias = linear_map(head, got[0].shape[-1])
            self._map = (weight.to(got[0].dtype), None if bias is None else bias.to(got[0].dtype))
        return got[0]

    def answering(self) -> "_Answer":
        """How the reference's logits are made, after `states`, with its adapter off or on."""
        assert self.form is not None
        weight, bias = None, None
        if isinstance(self.head, nn.Linear):
            weight, bias = self.head.weight.detach(), None if self.head.bias is None else self.head.bias.detach()
        elif self._map is not None:
            weight, bias = self._map
        return _Answer(weight, bias, self.form)

    def logits(self, states: Float[Tensor, "pos dim"]) -> Float[Tensor, "pos vocab"]:
        """The live logits, with their graph."""
        assert self.head is not None and self.form is not None
        logits: Tensor = self.head(states)
        return _formed(logits, self.form)

    def _run(self, batch: Mapping[str, Any] | Tensor) -> object:
        if isinstance(batch, Tensor):
            return self.root(batch)
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
        if accepts(self.root, "use_cache"):
            inputs["use_cache"] = False
        return self.root(**inputs)

    def _find_form(self, made: Tensor, own: Tensor) -> None:
        """Find out what the model does after its head. Raises where that is nothing known."""
        low = {made.dtype, own.dtype} & {torch.bfloat16, torch.float16}
        tolerance = 3e-2 if low else 1e-4
        size = own.float().abs().max().clamp_min(1e-30)
        for form in known_forms(text_config(self.root)):
            if own.shape == made.shape and float((_formed(made, form) - own).float().abs().max() / size) <= tolerance:
                self.form = form
                return
        raise CaptureError(
            f"The output head of {type(self.root).__name__} does not give this model's own logits: something scales, "
            "masks or changes them after the head. A penalty made from the head would be of another model."
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """The reference's logits from what its head gets, without a graph, rounded as the model itself would."""

    weight: Tensor | None
    bias: Tensor | None
    form: tuple[float, float | None]

    def __call__(self, states: Float[Tensor, "pos dim"]) -> Float[Tensor, "pos vocab"]:
        with torch.no_grad():
            return states if self.weight is None else _formed(F.linear(states, self.weight, self.bias), self.form)

    def vocab_size(self, states: Float[Tensor, "pos dim"]) -> int:
        return states.shape[-1] if self.weight is None else len(self.weight)


class _KLAtPositions(torch.autograd.Function):
    """KL(reference || live) at each counted position, from the live logits; their gradient is p_live - p_reference.

    Both distributions are made again in the backward pass, a few positions at a time, so that no table of them is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "token vocab"],
        index: Int[Tensor, " pos"],
        states: Float[Tensor, "pos dim"],
        answer: Callable[[Tensor], Tensor],
        size: int,
    ) -> Float[Tensor, " pos"]:
        ctx.save_for_backward(logits, index, states)
        ctx.answer, ctx.size = answer, size
        # The answer is rounded in the backward pass as it was here.
        device = logits.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        values = [
            _kl(live.log_softmax(-1), reference.log_softmax(-1))
            for live, reference, _ in _pairs(logits, index, states, answer, size)
        ]
        return torch.cat(values) if values else _widened(logits.new_zeros(0))

    @staticmethod
    def backward(ctx: Any, weight: Float[Tensor, " pos"]) -> tuple[Tensor, None, None, None, None]:
        logits, index, states = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=ctx.autocast[0], dtype=ctx.autocast[1]):
            for live, reference, part in _pairs(logits, index, states, ctx.answer, ctx.size):
                difference = live.softmax(-1).sub_(reference.softmax(-1)).mul_(weight[part, None])
                gradient[index[part]] = difference.to(gradient.dtype)
        return gradient, None, None, None, None


def _pairs(
    logits: Float[Tensor, "token vocab"],
    index: Int[Tensor, " pos"],
    states: Float[Tensor, "pos dim"],
    answer: Callable[[Tensor], Tensor],
    size: int,
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """The live logits and the reference's, at a few positions at a time."""
    for start in range(0, len(index), size):
        part = slice(start, start + size)
        yield _widened(logits[index[part]]), _widened(answer(states[part])), part


def _kl(live: Float[Tensor, "pos vocab"], reference: Float[Tensor, "pos vocab"]) -> Float[Tensor, " pos"]:
    """sum_v q_v (log q_v - log p_v), from log-probabilities."""
    return (reference.exp() * (reference - live)).sum(-1)


def _widened(logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return logits if logits.dtype == torch.float64 else logits.float()


def _formed(logits: Float[Tensor, "*any"], form: tuple[float, float | None]) -> Float[Tensor, "*any"]:
    scale, cap = form
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _counted(batch: Mapping[str, Any] | Tensor, rows: int, width: int) -> Bool[Tensor, "row width"]:
    """At which positions of a batch the loss asks for the next token."""
    given: Mapping[str, Any] = {} if isinstance(batch, Tensor) else batch
    counted = torch.ones(rows, width, dtype=torch.bool)
    mask, labels, shifted = (given.get(name) for name in ("attention_mask", "labels", "shift_labels"))
    if isinstance(mask, Tensor) and mask.shape == counted.shape:
        counted = mask != 0
    if isinstance(shifted, Tensor):
        return counted.to(shifted.device) & (shifted != _NOT_COUNTED)
    if isinstance(labels, Tensor):
        if labels.shape != counted.shape:
            raise ConfigError(
                f"The batch has labels of shape {list(labels.shape)} for {[rows, width]} tokens. Expected one for each "
                "token, -100 where none counts, as for next-token prediction."
            )
        return counted.to(labels.device) & F.pad(labels[:, 1:] != _NOT_COUNTED, (0, 1))
    return counted


def _require_adapter(root: nn.Module) -> None:
    """Raise unless switching an adapter off gives the reference."""
    if not has_adapter(root):
        raise ConfigError(
            f"The penalty has no reference: {type(root).__name__} has no adapter that could be switched off, and no "
            "reference was given. Make a copy before the first update, KLPenalty.frozen_copy(model), which holds one "
            "more set of weights; or give the reference model: KLPenalty(reference)."
        )
    refuse_changed_base(root, "KLPenalty.frozen_copy(model)")
    for name, config in getattr(root, "peft_config", {}).items():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ReferenceMismatchError(
                f"The adapter {name!r} has bias={bias!r}, which trains biases of the base model: with the adapter off "
                "this is not the model that training began with. Use bias='none', or KLPenalty.frozen_copy(model)."
            )


def _require_same_vocabulary(live: int, reference: int) -> None:
    if live != reference:
        raise ReferenceMismatchError(
            f"The reference has {reference} output tokens, the live model {live}. Tokens cannot be compared across "
            "vocabularies: give a reference with the live model's vocabulary, resized in the same way."
        )
