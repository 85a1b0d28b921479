"""What models return and take: logits in their several forms, and sentences for what is none."""

import inspect
import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from diffsensor.errors import (
    CaptureError,
    listed,
)
from diffsensor.types import Batch

NO_NEXT_TOKEN = (
    "Read an encoder or a classifier with probes that are inputs and no text: "
    "ProbeSet.from_tensors({'input_ids': ..., 'attention_mask': ...}, text=False)."
)


def text_config(root: nn.Module) -> object:
    config = getattr(root, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def known_forms(config: object) -> list[tuple[float, float | None]]:
    """How models are known to go on after the head: (scale, soft cap), as their configuration says."""

    def given(*names: str) -> list[float]:
        return [float(value) for name in names if (value := getattr(config, name, None))]

    scales = given("logit_scale", "lm_head_multiplier", "output_multiplier")
    for factor in given("logits_scaling"):
        # Granite divides by it, HyperCLOVA X multiplies.
        scales += [1.0 / factor, factor]
    caps = given("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return [(scale, cap) for scale in (*scales, 1.0) for cap in (*caps, None)]


def logits_of(output: object) -> Tensor:
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
    return logits if isinstance(logits, Tensor) else first_tensor(output)


def require_logits(root: nn.Module, logits: Tensor, batch: Batch) -> None:
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
            f"distribution at each of its tokens. {NO_NEXT_TOKEN}"
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


def first_tensor(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return first_tensor(next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0])
    raise CaptureError(
        f"A module returned a {type(output).__name__}, expected a tensor or a tuple that begins with one."
    )


def by_position(output: Tensor, batch: Batch) -> Float[Tensor, "row width"] | None:
    """One row for each position, whatever follows as one vector; None where the output does not begin with them."""
    leading, positions = batch.leading, math.prod(batch.leading)
    if tuple(output.shape[: len(leading)]) != leading:
        return output.reshape(positions, -1) if output.ndim and len(output) == positions else None
    mask = batch.inputs.get("attention_mask")
    if len(leading) == 1 and mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape:
        # A text that is one position as a whole: what stands at its padding is not part of it.
        output = output * mask.to(output.device, output.dtype)[..., None]
    return output.reshape(positions, -1)


def accepts(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def parameters_of(module: nn.Module) -> str:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        str(p.replace(annotation=p.empty, default=p.empty)) + "=..." * (p.default is not p.empty) for p in parameters
    ]
    return f"({', '.join(names)})"


def described(args: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> str:
    named = [(f"argument {place}", tensor) for place, tensor in enumerate(args)] + list(inputs.items())
    return listed(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in named)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
