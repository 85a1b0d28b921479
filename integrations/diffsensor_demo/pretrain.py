"""The small model of the demonstration: pre-trained once, then kept in the user's cache directory."""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from diffsensor import ConfigError
from diffsensor_demo.quiet import repeatable

END = "<|end|>"
_CHECKSUMS = "checksums.json"
_UNFINISHED = ".unfinished-"

#: Called with the steps done and the latest loss in nats.
Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the small model is made. Another recipe is another model, with a place of its own in the cache."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 700
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    seed: int = 0


def pretrained(recipe: Recipe, texts: Sequence[str], words: Sequence[str], directory: Path, progress: Progress) -> Path:
    """Where in `directory` the model of `recipe` lies; it is made first where it does not lie there yet.

    It appears there whole or not at all: a run that is killed leaves nothing that a later one would take
    for a model.

    **Arguments:** `words`: each gets a token of its own though the texts do not have it, so that the
    token table can name it in one piece.
    """
    with repeatable(recipe.seed):
        place = directory / f"demo-model-{_fingerprint(recipe, texts, words)}"
        if _is_whole(place):
            return place
        tokenizer = _make_tokenizer(recipe, texts, words)
        model = _make_model(recipe, tokenizer)
        _train(model, tokenizer, recipe, texts, progress)
    try:
        _store(model, tokenizer, place)
    except OSError as problem:
        raise ConfigError(
            f"The pre-trained model cannot be stored in {str(directory)!r}: {problem.strerror or problem}. Expected a "
            "place that can be written to, with 10 MB free. Set DIFFSENSOR_CACHE to another directory."
        ) from problem
    return place


def load(place: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a Hugging Face directory, or of that name on the hub."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model, tokenizer


def load_foreign(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that the user named; what is wrong with it becomes a sentence."""
    directory = Path(name)
    expected = (
        "Expected a directory that `save_pretrained` wrote, with config.json, the weights of a causal LM and its "
        "tokenizer, or the name of one on the hub."
    )
    if not directory.exists() and (directory.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"The model directory {name!r} does not exist. {expected} Give one with --model.")
    if directory.exists() and not (directory / "config.json").is_file():
        raise ConfigError(f"{name!r} holds no config.json, so it is no model. {expected} Give one with --model.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as problem:
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".")
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {reason}. {expected} Give one with --model."
        ) from problem
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"The model {name!r} lacks {len(missing)} of the weights of a causal LM, such as {missing[0]}. "
            f"{expected} Give one with --model."
        )
    return model, tokenizer


def _fingerprint(recipe: Recipe, texts: Sequence[str], words: Sequence[str]) -> str:
    """Of all that decides what the weights are."""
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    code = Path(__file__).read_text(encoding="utf-8")
    content = [asdict(recipe), list(texts), list(words), versions, code]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _make_tokenizer(recipe: Recipe, texts: Sequence[str], words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        show_progress=False,
        # Not all 256 bytes: what the texts never have would stay untrained, and drift for no reason.
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(f" {word}", normalized=False) for word in words])
    # Each text begins with the end of the one before.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 5 // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    texts: Sequence[str],
    progress: Progress,
) -> None:
    tokens = torch.tensor([token for ids in tokenizer(list(texts))["input_ids"] for token in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    warm_up = max(recipe.steps // 20, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, (1 + math.cos(math.pi * step / recipe.steps)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in range(1, recipe.steps + 1):
        starts = torch.randint(len(tokens) - recipe.length, (recipe.batch, 1))
        rows = tokens[starts + torch.arange(recipe.length)]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, loss.item())


def _store(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear_unfinished(place.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=place.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / _CHECKSUMS).write_text(json.dumps(_checksums(unfinished)), encoding="utf-8")
        # A damaged one may lie there, or a whole one that another process has just put there.
        shutil.rmtree(place, ignore_errors=True)
        unfinished.replace(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _checksums(directory: Path) -> Mapping[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
        if file.name != _CHECKSUMS
    }


def _is_whole(place: Path) -> bool:
    """Whether a model lies there as it was stored. What is truncated or changed is made anew."""
    try:
        stored = json.loads((place / _CHECKSUMS).read_text(encoding="utf-8"))
        return bool(stored == _checksums(place))
    except (OSError, ValueError):
        return False


def _clear_unfinished(directory: Path, age: float = 3600.0) -> None:
    """Remove what killed runs left behind; what is younger may belong to a run that is still writing."""
    for left in directory.glob(f"{_UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > age:
            shutil.rmtree(left, ignore_errors=True)
