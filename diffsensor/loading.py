"""Loading a Hugging Face model or tokenizer by directory or name: the only module that needs transformers."""

import os
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
