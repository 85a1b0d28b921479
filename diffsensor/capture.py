"""Looking at a model, and leaving no trace: the same losses, weights, random numbers, modes and hooks as without."""

import contextlib
import fnmatch
import inspect
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsensor.errors import (
    CaptureError,
    ConfigError,
    HookpointError,
    NonFiniteError,
    ReferenceMismatchError,
    listed,
    unknown,
)
from diffsensor.head import GivenLogits, LinearHead, full_precision, linear_map
from diffsensor.types import Batch, Context, Piece, Plan

AUTO_HOOKPOINTS = 8

#: What models raise when they are given what they cannot read.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
_NO_NEXT_TOKEN = (
    "Read an encoder or a classifier with probes that are inputs and no text: "
    "ProbeSet.from_tensors({'input_ids': ..., 'attention_mask': ...}, text=False)."
)

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
        stack.enter_context(random_states_kept())
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
def random_states_kept() -> Iterator[None]:
    """The generators of Python, NumPy, torch and every CUDA device in use are afterwards as they were before."""
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
            to the language model ("model.layers.3", "model.layers.*.mlp"); an empty sequence for none. Whatever an
            output has beyond its positions (channels, height and width of an image) counts as one long vector.
        path: where in `model` the language model is, needed only where there are several.

    Raises `CaptureError` where the model cannot be looked at, `HookpointError` for a name it does not have.
    """

    def __init__(self, model: nn.Module, hookpoints: str | Sequence[str] = "auto", path: str | None = None) -> None:
        self.root = find_model(model, path)
        _require_one_device(self.root)
        _refuse_virtual_tokens(self.root)
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
        config = _text_config(self.root)
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
                    f"{_described(args, inputs)} ({type(error).__name__}: {_first_line(error)}). Its forward takes "
                    f"{_parameters_of(self.root)}. Give the inputs that it needs, and no labels: a mapping of "
                    "ProbeSet.from_tensors goes by name, a tuple by place."
                ) from error
            self._piece(batch, hidden, shown)
        if self._head_module is not None:
            self._verify_head(self._head_module, hidden, _logits_of(output))
        if is_text:
            self._require_next_token(inputs["input_ids"], hidden)

    def _require_next_token(self, ids: Int[Tensor, "row width"], hidden: Tensor) -> None:
        """Raise unless a token's answer is about the token that follows, for all that can be seen."""
        name, largest = type(self.root).__name__, int(ids.max())
        if self._head_module is None and largest >= hidden.shape[-1]:
            raise CaptureError(
                f"{name} gives {hidden.shape[-1]} logits for each token, but token ids go up to {largest} or further, "
                f"so these are no next-token logits. {_NO_NEXT_TOKEN}"
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
                f"so there is no distribution of next tokens. {_NO_NEXT_TOKEN}"
            )

    def _verify_head(self, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Raise unless one of the known forms of the head gives the model's own logits."""
        own = logits.float().flatten(0, -2)
        states = hidden.flatten(0, -2)
        config = _text_config(self.root)
        if not torch.isfinite(own).all():
            raise NonFiniteError(
                f"The model's logits for its first probe have {int((~torch.isfinite(own)).sum())} values that are not "
                "numbers (NaN or infinite). Expected finite logits: look at the weights and the dtype of the model."
            )
        dtypes = {states.dtype, logits.dtype, *(p.dtype for p in module.parameters())}
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
            f"The output head {type(module).__name__} does not give this model's own logits: they differ by "
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
        if self._head_module is None:
            _require_logits(self.root, hidden, batch)
            self._num_logits = hidden.shape[-1] if hidden.ndim > len(batch.leading) else 1
        rows = _by_position(hidden, batch)
        if rows is None or (self._head_module is not None and rows.shape[1] != hidden.shape[-1]):
            raise CaptureError(
                f"The output head got a tensor of shape {list(hidden.shape)} for the positions {list(batch.leading)}, "
                "expected one row for each position. For outputs [probe, pos, classes] of inputs that are no text, "
                "ProbeSet.from_tensors needs a mask [probe, pos]."
            )
        activations: dict[str, Tensor] = {}
        for name, outputs in shown.items():
            shown_rows = _by_position(outputs.pop(), batch)
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
            self._autocast = _autocast_now(self.device)

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
                self._autocast = _autocast_now(self.device)
                shown[name].append(_first_tensor(output))

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
        if inputs.keys() == {"input_ids"} and (self._head_module is None or not _accepts(self.root, "input_ids")):
            # Modules that are not from transformers give this argument names of their own.
            inputs, args = {}, (inputs["input_ids"],)
        if self._head_module is None:
            output = self.root(*args, **inputs)
            return _logits_of(output), output
        got: list[Tensor] = []

        def take(_module: nn.Module, head_args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            got.append(head_args[0])
            self._width, self._autocast = head_args[0].shape[-1], _autocast_now(self.device)
            return (head_args[0][..., :0, :], *head_args[1:]) if cut else None

        handle = self._head_module.register_forward_pre_hook(take)
        # Packed rows and constant memory need it, but not every module that has a head knows the word.
        options = {"use_cache": False} if _accepts(self.root, "use_cache") else {}
        try:
            output = self.root(*args, **inputs, **options)
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


def _require_one_device(root: nn.Module) -> None:
    places = sorted({str(parameter.device) for parameter in root.parameters()})
    if len(places) > 1:
        raise CaptureError(
            f"{type(root).__name__} is spread over the devices {', '.join(places)}, as device_map='auto' does. "
            "Readings need the whole model on one device: load it without device_map, or with device_map={'': 0}."
        )


def _refuse_virtual_tokens(root: nn.Module) -> None:
    for name, config in getattr(root, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise CaptureError(
                f"The adapter {name!r} ({type(config).__name__}) puts virtual tokens before every text, and readings "
                "would be of other positions than the probes'. Expected adapters on weights, such as LoRA."
            )


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
        return _evenly_spaced_blocks(root, head)
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


def _evenly_spaced_blocks(root: nn.Module, head: nn.Module | None) -> dict[str, nn.Module]:
    named = list(_named_modules(root))
    # The stack of blocks is the list that holds most of the weights; lists inside a block come later and hold fewer.
    # Where there is no list, it is the longest way through a chain of modules, or what the module has at its top.
    stack: nn.Module
    for kind in (nn.ModuleList, nn.Sequential):
        stacks = [(name, module) for name, module in named if isinstance(module, kind) and len(module)]
        if stacks:
            name, stack = max(stacks, key=lambda item: _num_weights(item[1]))
            break
    else:
        name, stack = "", root
    blocks = [(f"{name}.{part}".lstrip("."), block) for part, block in stack.named_children()]
    if not isinstance(stack, nn.ModuleList):
        blocks = [
            (part, block)
            for part, block in blocks
            # Embeddings of places, which are the same for all probes, have no output for each of them.
            if _num_weights(block)
            and not isinstance(block, nn.Embedding)
            and all(module is not head for module in block.modules())
        ]
    count = min(AUTO_HOOKPOINTS, len(blocks))
    places = sorted({round(i * (len(blocks) - 1) / max(count - 1, 1)) for i in range(count)})
    return dict(blocks[place] for place in places)


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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

    def given(*names: str) -> list[float]:
        return [float(value) for name in names if (value := getattr(config, name, None))]

    scales = given("logit_scale", "lm_head_multiplier", "output_multiplier")
    for factor in given("logits_scaling"):
        # Granite divides by it, HyperCLOVA X multiplies.
        scales += [1.0 / factor, factor]
    caps = given("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return [(scale, cap) for scale in (*scales, 1.0) for cap in (*caps, None)]


def _logits_of(output: object) -> Tensor:
    """The logits among what a module returns: the tensor itself, `.logits`, or the first of a tuple."""
    if isinstance(output, Mapping):
        named = output.get("logits")
        if isinstance(named, Tensor):
            return named
        raise CaptureError(
            f"The model returned a {type(output).__name__} with {listed(map(repr, output))} and no 'logits': it "
            "has no output head. Expected a model that has one, such as a causal language model or a classifier, or a "
            "module that returns a tensor, a tuple that begins with its logits, or a mapping with 'logits'."
        )
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else _first_tensor(output)


def _require_logits(root: nn.Module, logits: Tensor, batch: Batch) -> None:
    """Raise unless these are logits, one row for each position that the probes have."""
    name, leading = type(root).__name__, batch.leading
    one_value = tuple(logits.shape) == leading
    if not logits.is_floating_point() or (logits.ndim == 0):
        raise CaptureError(
            f"{name} returned a tensor of shape {list(logits.shape)} and {logits.dtype}, expected logits "
            "[batch, classes] or [batch, position, classes]. A loss, or the predicted class, is no logits: return them "
            "first, and give the probes no labels."
        )
    if tuple(logits.shape[:-1]) != leading and not one_value:
        remedy = (
            "A model that says one thing about a whole text, or about its last token only, has no next-token "
            f"distribution at each of its tokens. {_NO_NEXT_TOKEN}"
            if "input_ids" in batch.inputs and len(leading) == 2
            else "Give no mask, or one [probe], for outputs [batch, classes], and a mask [probe, pos] for outputs "
            "[batch, pos, classes]."
        )
        raise CaptureError(
            f"{name} returned logits of shape {list(logits.shape)}, expected "
            f"[{', '.join(map(str, leading))}, classes]. {remedy}"
        )
    # Of its own base class: a model that returns what its head would have got.
    prefix = getattr(root, "base_model_prefix", "")
    width = getattr(getattr(root, "config", None), "hidden_size", None)
    if prefix and getattr(root, "base_model", None) is root and logits.shape[-1] == width:
        raise CaptureError(
            f"{name} returned hidden states and no logits: it has no output head. Expected a model that has one, such "
            "as a causal language model or a classifier."
        )


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


def _by_position(output: Tensor, batch: Batch) -> Float[Tensor, "row width"] | None:
    """One row for each position, whatever follows as one vector; None where the output does not begin with them."""
    leading, positions = batch.leading, math.prod(batch.leading)
    if tuple(output.shape[: len(leading)]) != leading:
        return output.reshape(positions, -1) if output.ndim and len(output) == positions else None
    mask = batch.inputs.get("attention_mask")
    if len(leading) == 1 and mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape:
        # A text that is one position as a whole: what stands at its padding is not part of it.
        output = output * mask.to(output.device, output.dtype)[..., None]
    return output.reshape(positions, -1)


def _accepts(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _parameters_of(module: nn.Module) -> str:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        str(p.replace(annotation=p.empty, default=p.empty)) + "=..." * (p.default is not p.empty) for p in parameters
    ]
    return f"({', '.join(names)})"


def _described(args: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> str:
    named = [(f"argument {place}", tensor) for place, tensor in enumerate(args)] + list(inputs.items())
    return listed(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in named)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
