"""Loading a Hugging Face model from a directory or by its name: the one module of the core that needs transformers."""

import os
from typing import Any

import torch
from torch import nn

from diffsensor.errors import CaptureError, ConfigError

try:
    from transformers import AutoModelForCausalLM
except ImportError as error:
    raise ConfigError(
        "A model was given by its directory, and loading it needs transformers: pip install 'diffsensor[transformers]'"
    ) from error


def load_causal_lm(where: str | os.PathLike[str], like: nn.Module | None = None) -> nn.Module:
    """A causal LM in evaluation mode; with `like`, in that model's dtype, attention kernel and place.

    Raises `CaptureError` where there is none.
    """
    options: dict[str, Any] = {}
    if like is not None:
        options["dtype"] = next((p.dtype for p in like.parameters() if p.is_floating_point()), torch.float32)
        if attention := getattr(getattr(like, "config", None), "_attn_implementation", None):
            options["attn_implementation"] = attention
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CaptureError(
            f"No causal LM could be loaded from {os.fspath(where)!r} ({_first_line(error)}). "
            "Expected a directory that save_pretrained wrote, or the name of a model on a hub that can be reached."
        ) from error
    if like is not None:
        model.to(next(like.parameters()).device)
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
