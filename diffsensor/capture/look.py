"""One model, looked at through its output head and some hookpoints."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from diffsensor.capture.answers import (
    NO_NEXT_TOKEN,
    accepts,
    by_position,
    described,
    first_line,
    first_tensor,
    known_forms,
    logits_of,
    parameters_of,
    require_logits,
    text_config,
)
from diffsensor.capture.find import (
    find_model,
    output_embeddings,
    refuse_virtual_tokens,
    require_one_device,
    resolve_hookpoints,
)
from diffsensor.capture.no_trace import autocast_now, device_of, dtype_named
from diffsensor.capture.sharded import holding_of
from diffsensor.errors import (
    CaptureError,
    ConfigError,
    HookpointError,
    NonFiniteError,
    ReferenceMismatchError,
)
from diffsensor.head import GivenLogits, LinearHead, full_precision, linear_map
from diffsensor.types import Batch, Context, Piece, Plan

#: What models raise when they are given what they cannot read.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


#: The head's product is compared with the model's own logits, relative to their largest value.
_HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Capture:
    """One model, looked at through its output head and some hookpoints.

    Arguments:
        model: a Hugging Face causal LM, or a module that holds one, or any module that returns logits.
        hookpoints: "auto" for at most 8 evenly spaced blocks, or names and globs of sub-modules, relative
            to the language model ("model.layers.3", "model.layers.*.mlp"); an empty sequence for none. Whatever an
            output has beyond its positions (channels, height and width of an image) counts as one long vector.
        path: where in `model` the language model is, needed only where there are several.
        temperature: what logits are divided by, as a policy's are when it samples.

    Raises `CaptureError` where the model cannot be looked at, `HookpointError` for a name it does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        hookpoints: str | Sequence[str] = "auto",
        path: str | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        require_temperature(temperature)
        self.root = find_model(model, path)
        require_one_device(self.root)
        refuse_virtual_tokens(self.root)
        self._head_module = output_embeddings(self.root)
        self.is_causal_lm = self._head_module is not None
        #: How the processes of the run hold the model.
        self.holding = holding_of(self.root, self._head_module)
        self.modules = resolve_hookpoints(self.root, hookpoints, self._head_module)
        self.device = self.holding.device or device_of(self.root)
        #: Whether the optimizer may move a parameter that the logits are made with.
        self.trains_head = self._head_module is None or any(p.requires_grad for p in self._head_module.parameters())
        self._width = 0
        self.temperature = float(temperature)
        self._computed_in: torch.dtype | None = None
        self._autocast = autocast_now(self.device)
        self._scale: float = 1.0
        self._softcap: float | None = None
        self._num_logits: int | None = None

    @property
    def hookpoints(self) -> tuple[str, ...]:
        return tuple(self.modules)

    def head(self) -> LinearHead | GivenLogits:
        """The model's head as it is now: a view of its weights, or their float32 sum where an adapter is on it.

        To be called once the model has been run.
        """
        if self._head_module is None:
            if self._num_logits is None:
                raise CaptureError("This module has not been run yet, so the number of its logits is not known.")
            return GivenLogits(vocab_size=self._num_logits, temperature=self.temperature)
        weight, bias = linear_map(self._head_module, self._width)
        return LinearHead(
            weight=weight, bias=bias, scale=self._scale, softcap=self._softcap, temperature=self.temperature
        )

    def context(self) -> Context:
        """The circumstances of the last look at the model.

        Autocast is what it was inside the forward pass, because libraries wrap the model's own `forward` in it.
        """
        device = self.device.type
        config = getattr(self.root, "config", None)
        parameter = next(self.root.parameters(), None)
        # What is sharded may be gathered in another dtype than it is kept in.
        gathered = self._computed_in if self.holding.is_shared else None
        return Context(
            dtype=str(gathered or (None if parameter is None else parameter.dtype)),
            autocast=self._autocast,
            attention=str(getattr(config, "_attn_implementation", "")),
            device=device,
            threads=torch.get_num_threads() if device == "cpu" else 0,
            torch=torch.__version__,
        )

    def autocast_seen(self) -> torch.autocast:
        """The autocast that the last look at the model ran under, for running another model likewise."""
        enabled = self._autocast != "off"
        dtype = dtype_named(self._autocast) if enabled else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def vocab_size(self) -> int:
        """How many tokens the model's input embedding knows, where it has one; else those of its output."""
        embedding = getattr(self.root, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Embedding):
            return embedding.num_embeddings
        return int(getattr(text_config(self.root), "vocab_size", 0)) or self.head().vocab_size

    def max_positions(self) -> int | None:
        """The longest context that the model takes, where its configuration says."""
        config = text_config(self.root)
        lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
        return next((length for length in lengths if isinstance(length, int) and length > 0), None)

    @property
    def gives_distribution(self) -> bool:
        """Whether a softmax of what the model returns means something, as far as can be told from outside.

        Not for one value at each position, nor where a configuration says that the model is a regressor or gives
        each label a probability of its own. To be called once the model has been run.
        """
        problem = getattr(getattr(self.root, "config", None), "problem_type", None)
        return self.head().vocab_size > 1 and problem not in ("regression", "multi_label_classification")

    def try_out(self, batch: Batch, *, is_text: bool) -> None:
        """Run the model once and refuse what cannot be read, so that no reading is of something else.

        Makes sure that what comes back are logits of the expected shape; that head(h) gives the model's own logits
        (finding out whether it scales or caps them); that hookpoints run once; and of a text that no token's answer
        depends on the tokens after it, or there would be no next-token distribution. To be called inside
        `leave_no_trace`.
        """
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        args = tuple(tensor.to(self.device) for tensor in batch.args)
        with self._hooked() as shown, self._autocast_noted():
            try:
                hidden, output = self._run(inputs, args, cut=False)
            except _REFUSALS as error:
                raise CaptureError(
                    f"{type(self.root).__name__} could not be run on the first probe, which gives it "
                    f"{described(args, inputs)} ({type(error).__name__}: {first_line(error)}). Its forward takes "
                    f"{parameters_of(self.root)}. Give the inputs that it needs, and no labels: a mapping of "
                    "ProbeSet.from_tensors goes by name, a tuple by place."
                ) from error
            self._piece(batch, hidden, shown)
        if self._head_module is not None:
            self._verify_head(self._head_module, hidden, logits_of(output))
        if is_text:
            self._require_next_token(inputs["input_ids"], hidden)

    def _require_next_token(self, ids: Int[Tensor, "row width"], hidden: Tensor) -> None:
        """Raise unless a token's answer is about the token that follows, for all that can be seen."""
        name, largest = type(self.root).__name__, int(ids.max())
        if self._head_module is None and largest >= hidden.shape[-1]:
            raise CaptureError(
                f"{name} gives {hidden.shape[-1]} logits for each token, but token ids go up to {largest} or further, "
                f"so these are no next-token logits. {NO_NEXT_TOKEN}"
            )
        if not bool(hidden.isfinite().all()):
            raise NonFiniteError(
                f"{name} gives {int((~hidden.isfinite()).sum())} values for its first probe that are not numbers (NaN "
                "or infinite). Expected finite ones: look at the weights and the dtype of the model."
            )
        changed = ids.clone()
        changed[:, -1] = 1 if largest == 0 else (ids[:, -1] + 1) % (largest + 1)
        other, _ = self._run({"input_ids": changed}, (), cut=False)
        before, after = (states.reshape(*ids.shape, -1)[:, :-1].float() for states in (hidden, other))
        tolerance = 1e-2 if hidden.dtype in (torch.bfloat16, torch.float16) or self._autocast != "off" else 1e-5
        if not float((before - after).norm()) <= tolerance * float(before.norm()):
            raise CaptureError(
                f"{name} reads texts in both directions: what it answers at a token changes with the tokens after it, "
                f"so there is no distribution of next tokens. {NO_NEXT_TOKEN}"
            )

    def _verify_head(self, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Raise unless one of the known forms of the head gives the model's own logits."""
        own = logits.float().flatten(0, -2)
        states = hidden.flatten(0, -2)
        config = text_config(self.root)
        if not torch.isfinite(own).all():
            raise NonFiniteError(
                f"The model's logits for its first probe have {int((~torch.isfinite(own)).sum())} values that are not "
                "numbers (NaN or infinite). Expected finite logits: look at the weights and the dtype of the model."
            )
        dtypes = {states.dtype, logits.dtype, *(p.dtype for p in module.parameters())}
        if self._autocast != "off":
            dtypes.add(dtype_named(self._autocast))
        tolerance = max(_HEAD_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)
        worst = []
        for scale, softcap in known_forms(config):
            self._scale, self._softcap = scale, softcap
            head = replace(self.head(), temperature=1.0)
            with full_precision(self.device):
                made = head.logits(states, 0, head.vocab_size)
            error = float((made - own).abs().max() / own.abs().max().clamp_min(1e-30))
            if error <= tolerance:
                return
            worst.append(error)
        raise CaptureError(
            f"The output head {type(module).__name__} does not give this model's own logits: they differ by "
            f"{min(worst):.1e} of their largest value, expected at most {tolerance:.0e}. Something scales, masks or "
            "changes the logits after the head, and readings made from the head would be wrong."
        )

    def pieces(self, plan: Plan, shares: Sequence[Sequence[int]] | None = None, rank: int = 0) -> Iterator[Piece]:
        """Run the plan, batch by batch, and hand out what the model shows at the counted positions.

        With `shares`, only the batches of process `rank`. Where the processes make each forward pass together, all
        make as many: whoever has fewer batches runs the smallest once more for nobody, and one that finds something
        wrong goes on to the end before it raises. To be used inside `leave_no_trace`.
        """
        mine = range(len(plan.batches)) if shares is None else shares[rank]
        failure: Exception | None = None
        with self._hooked() as shown:
            for place in mine:
                try:
                    piece = self._look(plan.batches[place], shown)
                except Exception as error:
                    if not self.holding.is_shared:
                        raise
                    failure = failure or error
                    continue
                if failure is None:
                    yield piece
            if self.holding.is_shared and shares is not None:
                smallest = min(plan.batches, key=lambda batch: torch.Size(batch.leading).numel())
                for _ in range(max(map(len, shares)) - len(mine)):
                    with contextlib.suppress(Exception):
                        self._look(smallest, shown)
        if failure is not None:
            raise failure

    def _look(self, batch: Batch, shown: dict[str, list[Tensor]]) -> Piece:
        for outputs in shown.values():
            outputs.clear()
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        args = tuple(tensor.to(self.device) for tensor in batch.args)
        hidden, _ = self._run(inputs, args, cut=True)
        return self._piece(batch, hidden, shown)

    def _piece(self, batch: Batch, hidden: Tensor, shown: dict[str, list[Tensor]]) -> Piece:
        index = batch.index.to(self.device)
        counts = {name: len(outputs) for name, outputs in shown.items() if len(outputs) != 1}
        if counts:
            name, count = next(iter(counts.items()))
            raise CaptureError(
                f"The hookpoint {name!r} ran {count} times in one forward pass, expected once. Name hookpoints that "
                "every token passes exactly once (a block that is shared between layers, or skipped, does not)."
            )
        if self._head_module is None:
            require_logits(self.root, hidden, batch)
            self._num_logits = hidden.shape[-1] if hidden.ndim > len(batch.leading) else 1
        rows = by_position(hidden, batch)
        if rows is None or (self._head_module is not None and rows.shape[1] != hidden.shape[-1]):
            raise CaptureError(
                f"The output head got a tensor of shape {list(hidden.shape)} for the positions {list(batch.leading)}, "
                "expected one row for each position. For outputs [probe, pos, classes] of inputs that are no text, "
                "ProbeSet.from_tensors needs a mask [probe, pos]."
            )
        activations: dict[str, Tensor] = {}
        for name, outputs in shown.items():
            shown_rows = by_position(outputs.pop(), batch)
            if shown_rows is None:
                raise HookpointError(
                    f"The hookpoint {name!r} gives no output for each of the probes' positions {list(batch.leading)}. "
                    "Name hookpoints whose output begins with these dimensions."
                )
            activations[name] = shown_rows[index]
        return Piece(positions=batch.positions, hidden=rows[index], activations=activations)

    @contextlib.contextmanager
    def _autocast_noted(self) -> Iterator[None]:
        """Notes the autocast inside the forward pass of a module without a head that could be hooked."""

        def note(_module: nn.Module, _args: object) -> None:
            self._autocast = autocast_now(self.device)

        with contextlib.ExitStack() as stack:
            if self._head_module is None:
                for module in self.root.modules():
                    if next(module.children(), None) is None:
                        stack.callback(module.register_forward_pre_hook(note).remove)
            yield

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[dict[str, list[Tensor]]]:
        """Hooks on the hookpoints that only store what they see; all that can fail comes after the forward pass."""
        shown: dict[str, list[Tensor]] = {name: [] for name in self.modules}

        def store(name: str) -> Callable[[nn.Module, object, object], None]:
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                self._autocast = autocast_now(self.device)
                shown[name].append(first_tensor(output))

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(store(name)).remove)
            yield shown

    def _run(self, inputs: Mapping[str, Tensor], args: tuple[Tensor, ...], *, cut: bool) -> tuple[Tensor, object]:
        """One forward pass; returns what the head got, and the model's output.

        With `cut`, the head is handed no position at all, so that the model itself never makes
        logits for the others: tokens x vocabulary numbers that nobody reads.
        """
        if inputs.keys() == {"input_ids"} and (self._head_module is None or not accepts(self.root, "input_ids")):
            # Modules that are not from transformers give this argument names of their own.
            inputs, args = {}, (inputs["input_ids"],)
        if self._head_module is None:
            output = self.root(*args, **inputs)
            self._computed_in = logits_of(output).dtype
            return logits_of(output), output
        got: list[Tensor] = []

        def take(_module: nn.Module, head_args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            got.append(head_args[0])
            self._width, self._autocast = head_args[0].shape[-1], autocast_now(self.device)
            self._computed_in = head_args[0].dtype
            return (head_args[0][..., :0, :], *head_args[1:]) if cut else None

        handle = self._head_module.register_forward_pre_hook(take)
        # Packed rows and constant memory need it, but not every module that has a head knows the word.
        options = {"use_cache": False} if accepts(self.root, "use_cache") else {}
        try:
            output = self.root(*args, **inputs, **options)
        finally:
            handle.remove()
        self.holding.show_head()
        if len(got) != 1:
            raise CaptureError(
                f"The output head ran {len(got)} times in one forward pass, expected once. "
                "Name the sub-module that is the language model: model_path='...'."
            )
        return got[0], output


def require_temperature(temperature: object) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature={temperature!r} was given, expected a number above 0: 1.0, or what the policy samples at."
        )


def require_same_context(there: Context, here: Context) -> None:
    """Raise `ReferenceMismatchError` unless numbers taken there and here can be compared."""
    if differences := there.differences(here):
        raise ReferenceMismatchError(
            f"The reference was computed under other circumstances ({'; '.join(differences)}), and such a change moves "
            "the outputs by itself. Run with the settings of the reference, or build a reference with these."
        )
