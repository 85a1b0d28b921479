"""Looking at a model, and leaving no trace: the same losses, weights, random numbers, modes and hooks as without."""

import contextlib
import fnmatch
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsensor.errors import CaptureError, ConfigError, HookpointError, NonFiniteError, ReferenceMismatchError, unknown
from diffsensor.head import GivenLogits, LinearHead, full_precision, linear_map
from diffsensor.types import Batch, Context, Piece, Plan

AUTO_HOOKPOINTS = 8

#: The head's product is compared with the model's own logits, relative to their largest value.
_HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@contextlib.contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Everything in here runs in evaluation mode, without gradients, and changes nothing that training can notice.

    Kept and put back: the `training` flag of every single module (a user may hold some of them in eval),
    the random number generators of Python, NumPy, torch and every CUDA device in use. Autocast goes on as
    the caller has it, without its weight cache, whose entries would carry no gradient. Compiled models run
    eagerly, so that no graph is added and late hooks fire. Gradients are off by `no_grad`; tensors that
    `inference_mode` touches could not be saved for backward later, so it is switched off where it is on.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_states_kept())
        stack.callback(_set_modes, modes)
        if "torch._dynamo" in sys.modules:  # nothing is compiled where it was never imported, and it is slow to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(
            torch.autocast(
                device.type,
                dtype=torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            )
        )
        for module, _ in modes:
            # Not module.eval(): some models override train() and would do more than set the flag.
            module.training = False
        yield


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies, which is where its inputs go."""
    for parameter in model.parameters():
        return parameter.device
    return torch.device("cpu")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where `torch.compile` or data parallelism wrapped it."""
    wrappers = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
    while type(module).__name__ in wrappers:
        module = module.get_submodule(wrappers[type(module).__name__])
    return module


class Capture:
    """One model, looked at through its output head and some hookpoints.

    Arguments:
        model: a Hugging Face causal LM, or a module that holds one, or any module that returns logits.
        hookpoints: "auto" for at most 8 evenly spaced blocks, or names and globs of sub-modules, relative
            to the language model ("model.layers.3", "model.layers.*.mlp"); an empty sequence for none.
        path: where in `model` the language model is, needed only where there are several.

    Raises `CaptureError` where the model cannot be looked at, `HookpointError` for a name it does not have.
    """

    def __init__(self, model: nn.Module, hookpoints: str | Sequence[str] = "auto", path: str | None = None) -> None:
        self.root = find_model(model, path)
        self._head_module = _output_embeddings(self.root)
        self.is_causal_lm = self._head_module is not None
        self.modules = resolve_hookpoints(self.root, hookpoints, self._head_module)
        self.device = device_of(self.root)
        #: Whether the optimizer may move a parameter that the logits are made with.
        self.trains_head = self._head_module is None or any(p.requires_grad for p in self._head_module.parameters())
        self._width = 0
        self._autocast = _autocast_now(self.device)
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
            return GivenLogits(vocab_size=self._num_logits)
        weight, bias = linear_map(self._head_module, self._width)
        return LinearHead(weight=weight, bias=bias, scale=self._scale, softcap=self._softcap)

    def context(self) -> Context:
        """The circumstances of the last look at the model.

        Autocast is what it was inside the forward pass, because libraries wrap the model's own `forward` in it.
        """
        device = self.device.type
        config = getattr(self.root, "config", None)
        parameter = next(self.root.parameters(), None)
        return Context(
            dtype=str(None if parameter is None else parameter.dtype),
            autocast=self._autocast,
            attention=str(getattr(config, "_attn_implementation", "")),
            device=device,
            threads=torch.get_num_threads() if device == "cpu" else 0,
            torch=torch.__version__,
        )

    def autocast_seen(self) -> torch.autocast:
        """The autocast that the last look at the model ran under, for running another model likewise."""
        enabled = self._autocast != "off"
        dtype = _dtype_named(self._autocast) if enabled else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def vocab_size(self) -> int:
        """How many tokens the model's input embedding knows, where it has one; else those of its output."""
        embedding = getattr(self.root, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Embedding):
            return embedding.num_embeddings
        return int(getattr(_text_config(self.root), "vocab_size", 0)) or self.head().vocab_size

    def max_positions(self) -> int | None:
        """The longest context that the model takes, where its configuration says."""
        length = getattr(_text_config(self.root), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def verify_head(self, tokens: Int[Tensor, " token"]) -> None:
        """Make sure that head(h) gives the model's own logits, so that no reading is of something else.

        Finds out whether the model scales or caps its logits. Raises `CaptureError` where none of the
        known forms fits. To be called inside `leave_no_trace`.
        """
        if self._head_module is None:
            return
        batch = tokens[None].to(self.device)
        hidden, output = self._run({"input_ids": batch}, (), cut=False)
        own = _logits_of(output).float().flatten(0, -2)
        states = hidden.flatten(0, -2)
        config = _text_config(self.root)
        if not torch.isfinite(own).all():
            raise NonFiniteError(
                f"The model's logits for its first probe have {int((~torch.isfinite(own)).sum())} values that are not "
                "numbers (NaN or infinite). Expected finite logits: look at the weights and the dtype of the model."
            )
        dtypes = {states.dtype, _logits_of(output).dtype, *(p.dtype for p in self._head_module.parameters())}
        if self._autocast != "off":
            dtypes.add(_dtype_named(self._autocast))
        tolerance = max(_HEAD_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)
        worst = []
        for scale, softcap in _known_forms(config):
            self._scale, self._softcap = scale, softcap
            head = self.head()
            with full_precision(self.device):
                made = head.logits(states, 0, head.vocab_size)
            error = float((made - own).abs().max() / own.abs().max().clamp_min(1e-30))
            if error <= tolerance:
                return
            worst.append(error)
        raise CaptureError(
            f"The output head {type(self._head_module).__name__} does not give this model's own logits: they differ by "
            f"{min(worst):.1e} of their largest value, expected at most {tolerance:.0e}. Something scales, masks or "
            "changes the logits after the head, and readings made from the head would be wrong."
        )

    def pieces(self, plan: Plan) -> Iterator[Piece]:
        """Run the plan, batch by batch, and hand out what the model shows at the counted positions.

        To be used inside `leave_no_trace`.
        """
        with self._hooked() as shown:
            for batch in plan.batches:
                inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
                args = tuple(tensor.to(self.device) for tensor in batch.args)
                hidden, _ = self._run(inputs, args, cut=True)
                yield self._piece(batch, hidden, shown)

    def _piece(self, batch: Batch, hidden: Tensor, shown: dict[str, list[Tensor]]) -> Piece:
        index = batch.index.to(self.device)
        counts = {name: len(outputs) for name, outputs in shown.items() if len(outputs) != 1}
        if counts:
            name, count = next(iter(counts.items()))
            raise CaptureError(
                f"The hookpoint {name!r} ran {count} times in one forward pass, expected once. Name hookpoints that "
                "every token passes exactly once (a block that is shared between layers, or skipped, does not)."
            )
        activations = {name: _flat(outputs.pop())[index] for name, outputs in shown.items()}
        if self._head_module is None:
            self._num_logits = hidden.shape[-1]
        return Piece(positions=batch.positions, hidden=_flat(hidden)[index], activations=activations)

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[dict[str, list[Tensor]]]:
        """Hooks on the hookpoints that only store what they see; all that can fail comes after the forward pass."""
        shown: dict[str, list[Tensor]] = {name: [] for name in self.modules}

        def store(name: str) -> Callable[[nn.Module, object, object], None]:
            def hook(_module: nn.Module, _args: object, output: object) -> None:
                self._autocast = _autocast_now(self.device)
                shown[name].append(_first_tensor(output))

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(store(name)).remove)
            yield shown

    def _run(self, inputs: Mapping[str, Tensor], args: tuple[Tensor, ...], *, cut: bool) -> tuple[Tensor, object]:
        """One forward pass; returns what the head got, and the model's output.

        With `cut`, the head is handed one position instead of all, so that the model itself never makes
        logits for the others: tokens x vocabulary numbers that nobody reads.
        """
        if self._head_module is None:
            if inputs.keys() == {"input_ids"} and not args:
                # Modules that are not from transformers give this argument names of their own.
                inputs, args = {}, (inputs["input_ids"],)
            output = self.root(*args, **inputs)
            return _logits_of(output), output
        got: list[Tensor] = []

        def take(_module: nn.Module, head_args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            got.append(head_args[0])
            self._width, self._autocast = head_args[0].shape[-1], _autocast_now(self.device)
            return (head_args[0][..., :1, :], *head_args[1:]) if cut else None

        handle = self._head_module.register_forward_pre_hook(take)
        try:
            output = self.root(*args, **inputs, use_cache=False)
        finally:
            handle.remove()
        if len(got) != 1:
            raise CaptureError(
                f"The output head ran {len(got)} times in one forward pass, expected once. "
                "Name the sub-module that is the language model: model_path='...'."
            )
        return got[0], output


def find_model(model: nn.Module, path: str | None = None) -> nn.Module:
    """The language model inside `model`: at `path`, or the only one there is, or `model` itself where there is none."""
    if path is not None:
        names = [name for name, _ in model.named_modules() if name]
        if path and path not in names:
            raise CaptureError(unknown("sub-module", path, names))
        return unwrapped(model.get_submodule(path))
    model = unwrapped(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in found):
            continue
        if _output_embeddings(module) is not None:
            found[name] = unwrapped(module)
    if len(found) > 1:
        raise CaptureError(
            f"{type(model).__name__} holds {len(found)} language models: {', '.join(map(repr, found))}. "
            f"Say which one is trained: model_path={next(iter(found))!r}."
        )
    return next(iter(found.values()), model)


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    # By attribute and not by class: PEFT's models hand it on to the model that they wrap.
    get = getattr(module, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _autocast_now(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "off"


def resolve_hookpoints(
    root: nn.Module, wanted: str | Sequence[str], head: nn.Module | None = None
) -> dict[str, nn.Module]:
    """The sub-modules that `wanted` names, in the order of the model."""
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ConfigError(f"hookpoints={wanted!r} is a string, expected 'auto' or a sequence of names and globs.")
        return _evenly_spaced_blocks(root)
    modules = {name: module for name, module in _named_modules(root) if name and module is not head}
    names = list(modules)
    chosen: set[str] = set()
    for pattern in wanted:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise HookpointError(unknown("hookpoint", pattern, names))
        chosen.update(matches)
    return {name: module for name, module in modules.items() if name in chosen}


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The sub-modules, named alike whether or not PEFT wraps the model."""
    wrapped = "base_model.model." if getattr(root, "peft_config", None) else ""
    return ((name.removeprefix(wrapped), module) for name, module in root.named_modules())


def _evenly_spaced_blocks(root: nn.Module) -> dict[str, nn.Module]:
    lists = [
        (name, module) for name, module in _named_modules(root) if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return {}
    # The stack of blocks is the list that holds most of the weights; lists inside a block come later and hold fewer.
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    count = min(AUTO_HOOKPOINTS, len(blocks))
    places = sorted({round(i * (len(blocks) - 1) / max(count - 1, 1)) for i in range(count)})
    return {f"{name}.{i}": blocks[i] for i in places}


def require_same_context(there: Context, here: Context) -> None:
    """Raise `ReferenceMismatchError` unless numbers taken there and here can be compared."""
    if differences := there.differences(here):
        raise ReferenceMismatchError(
            f"The reference was computed under other circumstances ({'; '.join(differences)}), and such a change moves "
            "the outputs by itself. Run with the settings of the reference, or build a reference with these."
        )


def _text_config(root: nn.Module) -> object:
    config = getattr(root, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _known_forms(config: object) -> list[tuple[float, float | None]]:
    """How models are known to go on after the head: (scale, soft cap), as their configuration says."""
    forms: list[tuple[float, float | None]] = []
    softcap = getattr(config, "final_logit_softcapping", None)
    multiplier = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    divisor = getattr(config, "logits_scaling", None)
    if softcap:
        forms.append((1.0, float(softcap)))
    if multiplier:
        forms.append((float(multiplier), None))
    if divisor:
        forms.append((1.0 / float(divisor), None))
    return [*forms, (1.0, None)]


def _logits_of(output: object) -> Float[Tensor, "*batch vocab"]:
    """The logits among what a module returns: the tensor itself, `.logits`, or the first of a tuple."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return _first_tensor(output)


def _first_tensor(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return _first_tensor(next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        return _first_tensor(output[0])
    raise CaptureError(
        f"A module returned a {type(output).__name__}, expected a tensor or a tuple that begins with one."
    )


def _flat(output: Tensor) -> Float[Tensor, "row width"]:
    """[rows, width, dim] as [rows * width, dim]; [rows, dim] as it is."""
    return output.reshape(-1, output.shape[-1])
