"""Loading a Hugging Face model or tokenizer by directory or name: the only module that needs transformers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsensor.errors import CaptureError, ConfigError, ProbeError

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise ConfigError(
        "A model or tokenizer was given by its directory or name, and loading it needs transformers: "
        "pip install 'diffsensor[transformers]'"
    ) from error


def options_of(model: nn.Module) -> dict[str, Any]:
    """What to load another model with, so that both compute alike: dtype and attention kernel."""
    options: dict[str, Any] = {
        "dtype": next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    }
    if attention := getattr(getattr(model, "config", None), "_attn_implementation", None):
        options["attn_implementation"] = attention
    return options


def load_causal_lm(
    where: str | os.PathLike[str], like: nn.Module | None = None, *, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A causal LM in evaluation mode; with `like`, in that model's dtype, attention kernel and place.

    `options` are those of another model, from `options_of`, where that one is not at hand any more. Raises
    `CaptureError` where there is none. A model's own code is never run.
    """
    options = dict(options or {}) if like is None else options_of(like)
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


def load_adapter(model: nn.Module, where: str | os.PathLike[str]) -> nn.Module:
    """The model with an adapter that PEFT saved. Raises `CaptureError` where that is none for this model."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("An adapter was given, and loading it needs peft: pip install peft") from error
    try:
        adapted: nn.Module = PeftModel.from_pretrained(model, os.fspath(where))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CaptureError(
            f"The adapter in {os.fspath(where)!r} could not be put on {type(model).__name__} ({_first_line(error)}). "
            "Give the model that it was trained on as the reference."
        ) from error
    return adapted.eval()


def load_tokenizer(where: str | os.PathLike[str]) -> Any:
    """The tokenizer of a directory that `save_pretrained` wrote, or of a name on the hub. Its own code is never run.

    Raises `ProbeError` where there is none.
    """
    expected = (
        "Expected a directory with tokenizer files (tokenizer.json, tokenizer_config.json), as save_pretrained writes "
        "them, or the name of a model on a hub that can be reached."
    )
    if isinstance(where, os.PathLike) and not Path(where).is_dir():
        raise ProbeError(f"No directory is at {os.fspath(where)!r}, where a tokenizer was to be loaded. {expected}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:
        # Anything can be wrong with foreign files, and tokenizers itself says so with a plain Exception.
        raise ProbeError(
            f"No tokenizer could be loaded from {os.fspath(where)!r} ({_first_line(error)}). {expected}"
        ) from error
    # Of a directory that has the model alone, some classes make a tokenizer without a vocabulary and say nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.added_tokens_encoder):
        raise ProbeError(f"The tokenizer at {os.fspath(where)!r} has no vocabulary but special tokens. {expected}")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
