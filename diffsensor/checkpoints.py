"""Saved checkpoints: what kind one is, of which step, whether it is complete, and how it becomes a model."""

import itertools
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from diffsensor.errors import CaptureError, ConfigError, CorruptFileError, listed

Kind = Literal["model", "adapter", "weights"]

_CONFIG, _ADAPTER, _TRAINER = "config.json", "adapter_config.json", "trainer_state.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
#: Where names of checkpoints have their step: checkpoint-500, step=500, epoch=1-step=500.ckpt, global_step500.
_STEP = re.compile(r"(?:checkpoint-|step[=_-]?|global_step[=_-]?)(\d+)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Saved weights: a model's directory, an adapter's directory, or a file with a state dict.

    `step` is -1 where neither its files nor its name tell it.
    """

    path: Path
    kind: Kind
    step: int


def checkpoint_at(path: str | Path) -> Checkpoint:
    """What lies there. Raises `ConfigError` where it is no checkpoint."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"No checkpoint is at {str(path)!r}: there is no such file or directory.")
    if path.is_file():
        if path.suffix not in _FILES:
            raise ConfigError(f"{str(path)!r} is no checkpoint: expected a directory, or a file {listed(_FILES)}.")
        return Checkpoint(path=path, kind="weights", step=_step_of(path))
    if (path / _ADAPTER).exists():
        return Checkpoint(path=path, kind="adapter", step=_step_of(path))
    if (path / _CONFIG).exists():
        return Checkpoint(path=path, kind="model", step=_step_of(path))
    hint = " It is a distributed checkpoint: convert it by torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
    raise ConfigError(
        f"{str(path)!r} is no checkpoint: expected a directory with {_CONFIG} (save_pretrained) or {_ADAPTER} (PEFT), "
        f"or a file with a state dict.{hint if (path / '.metadata').exists() else ''}"
    )


def checkpoints_at(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """All that are named, or lie in a directory that is named, in the order of their steps.

    Those of which no step is known are numbered in the order in which they were given, from 1; if there is only one, it
    has step 0. Raises `ConfigError` where two have the same step, or only some have one.
    """
    found: list[Checkpoint] = []
    for path in map(Path, paths):
        inside = [] if not path.is_dir() or _is_checkpoint(path) else sorted(filter(_is_checkpoint, path.iterdir()))
        found += [checkpoint_at(each) for each in inside] or [checkpoint_at(path)]
    without = [each for each in found if each.step < 0]
    if without and len(without) < len(found):
        raise ConfigError(
            f"The step of {str(without[0].path)!r} is not known, while others have one. Give it a name such as "
            "checkpoint-500, or scan it on its own."
        )
    if without:
        first = 0 if len(found) == 1 else 1
        found = [Checkpoint(path=each.path, kind=each.kind, step=first + place) for place, each in enumerate(found)]
    found.sort(key=lambda each: each.step)
    for one, other in itertools.pairwise(found):
        if one.step == other.step:
            raise ConfigError(
                f"{str(one.path)!r} and {str(other.path)!r} both are of step {one.step}, and would overwrite each "
                "other's readings. Scan the checkpoints of one run at a time."
            )
    return found


def require_complete(checkpoint: Checkpoint) -> None:
    """Raise `CorruptFileError` unless all of its weights are there, to their last byte. Reads no weights."""
    for file in _weight_files(checkpoint):
        if not file.exists():
            raise CorruptFileError(f"{file} is missing, and {checkpoint.path} is not complete without it.")
        told = _told_size(file) if file.suffix == ".safetensors" else None
        is_whole = zipfile.is_zipfile(file) if told is None else file.stat().st_size == told
        if not is_whole and not _is_old_pickle(file):
            raise CorruptFileError(f"{file} ends before its time: it is still being written, or was cut off.")
    if checkpoint.kind != "weights":
        for name in (_CONFIG, _ADAPTER, _TRAINER):
            _json(checkpoint.path / name)


def identity_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """By what a checkpoint is known again: sizes and times of its weights and of what describes them."""
    files = _weight_files(checkpoint)
    if checkpoint.kind != "weights":
        files += [each for name in (_CONFIG, _ADAPTER) if (each := checkpoint.path / name).exists()]
    return {each.name: [each.stat().st_size, each.stat().st_mtime_ns] for each in files}


def load_checkpoint(
    checkpoint: Checkpoint,
    reference: str | Path,
    *,
    like: Mapping[str, Any],
    module_path: str | None = None,
) -> nn.Module:
    """The model of a checkpoint, in evaluation mode.

    Arguments:
        reference: the directory or name of the model that an adapter is put on, and that gives a mere state dict its
            architecture.
        like: the dtype and attention kernel to load in, as `options_of` gives them.
        module_path: what the names in a state dict begin with, such as "model"; found by itself where it is one of few.

    Raises `CaptureError` where it cannot be loaded. Nothing in it is ever run: pickles are read for weights only.
    """
    from diffsensor.loading import load_adapter, load_causal_lm

    if checkpoint.kind == "model":
        return load_causal_lm(checkpoint.path, options=like)
    model = load_causal_lm(reference, options=like)
    if checkpoint.kind == "adapter":
        return load_adapter(model, checkpoint.path)
    weights = _own_names(_state_dict(checkpoint.path), model, checkpoint.path, module_path)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    shared = _tied(model)
    if lost := [name for name in missing if name not in shared]:
        raise CaptureError(
            f"{checkpoint.path} lacks {len(lost)} of the model's parameters, first {lost[0]!r}. Expected the whole "
            f"state dict of {type(model).__name__}, the reference's architecture."
        )
    if unexpected:
        raise CaptureError(
            f"{checkpoint.path} has {len(unexpected)} parameters that {type(model).__name__} does not know, first "
            f"{unexpected[0]!r}. Expected the reference's architecture."
        )
    return model.eval()


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).exists() for name in (_CONFIG, _ADAPTER)) if path.is_dir() else path.suffix in _FILES


def _step_of(path: Path) -> int:
    if (path / _TRAINER).exists():
        step = _json(path / _TRAINER).get("global_step")
        if isinstance(step, int):
            return step
    found = _STEP.findall(path.name)
    return int(found[-1]) if found else -1


def _json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{file} is no JSON ({error}): it is still being written, or was cut off.") from error
    return content if isinstance(content, dict) else {}


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    path = checkpoint.path
    if checkpoint.kind == "weights":
        return [path]
    for name in _INDICES:
        if (path / name).exists():
            return [path / shard for shard in sorted(set(_json(path / name).get("weight_map", {}).values()))]
    there = [path / name for name in _WEIGHTS if (path / name).exists()]
    if not there:
        raise CorruptFileError(f"{path} has no weights: expected one of {listed(_WEIGHTS)}.")
    return there


def _told_size(file: Path) -> int:
    """How long a safetensors file should be, from what stands at its beginning; -1 where that is not whole."""
    with file.open("rb") as opened:
        head = opened.read(8)
        if len(head) < 8:
            return -1
        (length,) = struct.unpack("<Q", head)
        header = opened.read(length) if length < 2**28 else b""
    try:
        entries = json.loads(header)
        ends: list[int] = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return -1
    return int(8 + length + max(ends, default=0))


def _is_old_pickle(file: Path) -> bool:
    """torch.save before 1.6 wrote no archive, whose end could be seen."""
    with file.open("rb") as opened:
        return file.suffix != ".safetensors" and opened.read(2) == b"\x80\x02"


def _state_dict(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        told = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CaptureError(
            f"{file} cannot be read as weights only ({told}). It may hold objects, such as hyperparameters, which are "
            "not loaded because loading runs their code: save the state dict by itself."
        ) from error
    nested = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else content
    if not isinstance(nested, dict) or not all(isinstance(each, Tensor) for each in nested.values()) or not nested:
        raise CaptureError(f"{file} holds no state dict: expected tensors by name, or those under 'state_dict'.")
    return nested


def _own_names(
    weights: Mapping[str, Tensor], model: nn.Module, file: Path, module_path: str | None
) -> dict[str, Tensor]:
    """The weights under the names that the model itself gives them."""
    wanted = model.state_dict().keys()
    first = next(name for name in wanted if name not in _tied(model))
    if module_path is not None:
        prefixes: Sequence[str] = [f"{module_path}." if module_path else ""]
    else:
        prefixes = sorted({name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")})
    if len(prefixes) != 1:
        found = f"{len(prefixes)} of them" if prefixes else "none"
        example = (prefixes or ["model."])[0].rstrip(".")
        raise CaptureError(
            f"In {file} the model was looked for by its parameter {first!r}, and {found} found. Say what its names "
            f"begin with: module_path, such as {example!r}. Names there: {listed(weights, 4)}."
        )
    (prefix,) = prefixes
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if not own:
        raise CaptureError(
            f"No name in {file} begins with {prefix!r}. Names there: {listed(weights, 4)}. Give another module_path."
        )
    return own


def _tied(model: nn.Module) -> set[str]:
    """Names of a parameter that has another name too: one of them is enough."""
    seen: dict[int, str] = {}
    tied: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (first := seen.setdefault(id(tensor), name)) != name:
            tied |= {first, name}
    return tied
