"""What the reference model answers on the probes: computed once, kept on disk, opened by mmap."""

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsensor.capture import Capture, adapter_names, adapter_off, class_name, leave_no_trace, refuse_changed_base
from diffsensor.checksums import checksum, digest
from diffsensor.errors import (
    ConfigError,
    CorruptFileError,
    DiffSensorError,
    NonFiniteError,
    ReferenceMismatchError,
    StorageError,
)
from diffsensor.head import GivenLogits, LinearHead, full_precision
from diffsensor.metrics.tiles import on_grid, reference_rows, tile_shape, tiles, token_mass
from diffsensor.probes import ProbeSet
from diffsensor.protocols import OutputHead
from diffsensor.ranks import Ranks
from diffsensor.statistics import strata_of
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import Context, Piece, Plan, ReferenceRows

logger = logging.getLogger(__name__)

_FORMAT = "diffsensor reference 2"
_ROWS = ("hidden", "top", "top_probability", "log_partition", "log_sum", "entropy", "target_logprob")
_TENSORS, _META = "answers.safetensors", "meta.json"
#: A head that is frozen is kept too, up to this size: should it ever change, both heads are compared.
_KEPT_HEAD_BYTES = 256 * 2**20
#: A position whose norm is this many times the median is an attention sink and would drown all others.
_SINK = 10.0
#: Rows are shared where that brings the tokens that are run below this share.
_PACKING_SAVES = 0.95
#: Parts of a configuration that change no answer, but from one run or version to the next.
_NOT_OF_ANSWERS = {
    "transformers_version", "use_cache", "dtype", "torch_dtype", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
#: Packed rows agree with single probes to rounding, or are wrong by half and more: nothing lies between.
_PACKING_TOLERANCE = 0.05
#: Two rows of the same shape round alike, in every dtype; a mixture of experts may add in another order.
_LEAK_TOLERANCE = 1e-6


def cache_directory() -> Path:
    """Where references are kept: $DIFFSENSOR_CACHE, else `diffsensor` in the user's cache directory."""
    if chosen := os.environ.get("DIFFSENSOR_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "diffsensor"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "diffsensor"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsensor"


@final
class Reference:
    """What the reference model answered on a probe set, with all that decides whether it may be compared.

    Made by `build` from a model, or by `open` from its fingerprint; satisfies `ReferenceAnswers`.
    """

    def __init__(
        self,
        directory: Path | None,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        probes: ProbeSet,
        head: LinearHead | None = None,
    ):
        self._directory = directory
        self.probes = probes
        self.fingerprint: str = meta["fingerprint"]
        self.context = Context(**meta["context"])
        self.hookpoints: tuple[str, ...] = tuple(meta["hookpoints"])
        self.head_trains: bool = meta["head"]["trains"]
        self.temperature: float = meta["temperature"]
        self.plan: Plan = probes.plan(meta["packed"])
        self._head = meta["head"]
        self._own_head = head
        self._tensors = tensors

    @classmethod
    def build(
        cls,
        model: nn.Module,
        probes: ProbeSet,
        cache_dir: str | os.PathLike[str] | None = None,
        hookpoints: str | Sequence[str] = "auto",
        *,
        model_path: str | None = None,
        adapter: bool = False,
        temperature: float = 1.0,
        keep_head: bool = False,
    ) -> "Reference":
        """Ask the model as it is now, or open what it answered before if nothing that matters has changed.

        Leaves no trace on the model. A model with adapters (LoRA and the like) is asked with them switched
        off, unless `adapter=True`. Whether the head trains is read off `requires_grad`.

        Arguments:
            cache_dir: where answers are kept, one directory for each fingerprint; `cache_directory()` by default.
            hookpoints: "auto" for at most 8 evenly spaced blocks, or names and globs of sub-modules.
            model_path: where in `model` the language model is, needed only where there are several.
            temperature: what logits are divided by, as a policy's are when it samples.
            keep_head: keep the head with the answers, also where it is large and does not train.

        In a run of several processes all of them call it. Raises `ProbeError` where the probes do not fit the model,
        `CaptureError` or `HookpointError` where the model cannot be looked at, `NonFiniteError` where it answers NaN,
        `StorageError` where the cache cannot be written, and `RanksError` where another process raises one of these.
        """
        options = (cache_dir, hookpoints, model_path, adapter, temperature, keep_head)
        return Ranks.now().together("the reference", lambda: cls._built(model, probes, *options))

    @classmethod
    def _built(
        cls,
        model: nn.Module,
        probes: ProbeSet,
        cache_dir: str | os.PathLike[str] | None,
        hookpoints: str | Sequence[str],
        model_path: str | None,
        adapter: bool,
        temperature: float,
        keep_head: bool,
    ) -> "Reference":
        ranks = Ranks.now()
        capture = Capture(model, hookpoints, model_path, temperature=temperature)
        if not adapter:
            refuse_changed_base(capture.root, "Reference.build(model, probes, adapter=True)")
        with leave_no_trace(capture.root), adapter_off(capture.root, leave_on=adapter):
            require_fitting(probes, capture)
            capture.try_out(probes.first(), is_text=probes.is_text)
            if probes.is_text and not capture.is_causal_lm:
                probes.check_vocab(capture.head().vocab_size)
            packed = capture.is_causal_lm and packing_pays(probes) and takes_packed_rows(capture, probes)
            identity = identity_of(capture, probes.fingerprint, packed=packed, adapter=adapter)
            identity |= {"keep_head": True} if keep_head else {}
            fingerprint = digest(json.dumps(identity, sort_keys=True))
            directory = Path(cache_dir or cache_directory() / "references") / fingerprint[:24]
            known = cls._reopened(directory, probes)
            # Either none asks the model, or all do: its forward pass may need all of them.
            if all(ranks.each("reference at hand", known is not None)):
                assert known is not None
                return known
            try:
                answers = _ask(capture, probes.plan(packed), probes, keeps_head=keep_head or None)
            except NonFiniteError:
                if packed:
                    # In a packed row a NaN spreads to the other probes: name the one that it comes from.
                    _ask(capture, probes.plan(False, batch_tokens=1), probes)
                raise
        meta = identity | {"fingerprint": fingerprint, "checksums": {name: checksum(t) for name, t in answers.items()}}
        if ranks.is_first:
            _keep(directory, meta, answers)
        ranks.each("reference kept", None)
        if not directory.exists():  # a process on another machine, with files of its own
            _keep(directory, meta, answers)
        return cls.open(directory, probes)

    @classmethod
    def in_memory(
        cls,
        capture: Capture,
        probes: ProbeSet,
        identity: Mapping[str, Any],
        *,
        packed: bool,
        head: LinearHead | None = None,
    ) -> "Reference":
        """What a model answers now, kept nowhere. To be called inside `leave_no_trace`, with adapters off.

        Arguments:
            identity: of the model, from `identity_of`.
            head: the model's head, where it may differ from the live one.
        """
        answers = _ask(capture, probes.plan(packed), probes, keeps_head=False)
        meta = {**identity, "packed": packed, "fingerprint": digest(json.dumps(identity, sort_keys=True))}
        return cls(None, meta, answers, probes, head)

    @classmethod
    def _reopened(cls, directory: Path, probes: ProbeSet) -> "Reference | None":
        """What is there already; None where nothing is, or nothing that can be read."""
        if not directory.exists():
            return None
        try:
            return cls.open(directory, probes)
        except CorruptFileError as error:
            logger.warning("%s It is computed anew, from the same weights.", error)
            shutil.rmtree(directory, ignore_errors=True)
            return None

    @classmethod
    def open(cls, directory: str | os.PathLike[str], probes: ProbeSet) -> "Reference":
        """A reference that was built before. Raises `CorruptFileError` where a single bit of it has changed."""
        directory = Path(directory)
        meta, tensors = _read(directory)
        if meta["probes"] != probes.fingerprint:
            raise ReferenceMismatchError(
                f"The reference in {directory} was computed for the probe set {meta['probes'][:12]}, given was "
                f"{probes.fingerprint[:12]}. Use the same probes (and tokenizer), or build a reference for these."
            )
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(directory / _META)  # by which `diffsensor cache` sees when it was last used
        return cls(directory, meta, tensors, probes)

    @classmethod
    def find(cls, fingerprint: str, probes: ProbeSet, cache_dir: str | os.PathLike[str] | None = None) -> "Reference":
        """The reference with this fingerprint, for a run that goes on; it is never computed again.

        Raises `ReferenceMismatchError` where it is not there: by now the model at hand is a trained one.
        """
        directory = Path(cache_dir or cache_directory() / "references") / fingerprint[:24]
        if not directory.exists():
            raise ReferenceMismatchError(
                f"This run is compared with the reference {fingerprint[:12]}, which is not in {directory.parent}. "
                "It is not built anew, because the model has been trained since. Give the cache_dir that the run began "
                "with, or the reference model itself, or begin a new run and record."
            )
        reference = cls.open(directory, probes)
        if reference.fingerprint != fingerprint:
            raise ReferenceMismatchError(
                f"{directory} holds the reference {reference.fingerprint}, expected {fingerprint}. "
                "Remove that directory."
            )
        return reference

    def __repr__(self) -> str:
        return (
            f"Reference({self.fingerprint[:12]}, {len(self.probes)} probes, {self.plan.num_positions} positions, "
            f"{len(self.hookpoints)} hookpoints, {'head trains' if self.head_trains else 'head frozen'})"
        )

    @property
    def directory(self) -> Path:
        """Where it is kept."""
        if self._directory is None:
            raise ConfigError("This reference is kept in memory alone, for probes that are others at the next look.")
        return self._directory

    def activation(self, hookpoint: str, positions: slice, device: torch.device) -> Float[Tensor, "pos width"]:
        return self._tensors[f"activation/{hookpoint}"][positions].to(device)

    def sinks(self, hookpoint: str) -> Int[Tensor, " sink"]:
        return self._tensors[f"sinks/{hookpoint}"]

    def rows(self, positions: slice, device: torch.device) -> ReferenceRows:
        def cut(name: str) -> Tensor:
            # A copy: products round by how memory is aligned, and a mapped file is aligned in other ways.
            return self._tensors[name][positions].clone().to(device)

        return ReferenceRows(
            hidden=cut("hidden"),
            target=self.plan.target[positions].to(device),
            top=cut("top"),
            top_probability=cut("top_probability"),
            log_partition=cut("log_partition"),
            log_sum=cut("log_sum"),
            entropy=cut("entropy"),
            target_logprob=cut("target_logprob"),
            mean_unembedding=cut("mean_unembedding") if "mean_unembedding" in self._tensors else None,
        )

    def strata(self, positions: slice, device: torch.device) -> Float[Tensor, "stratum pos"]:
        return self._strata[:, positions].to(device)

    def token_mass(self) -> Float[Tensor, "stratum vocab"]:
        return self._tensors["token_mass"]

    def shares_head(self, live_head: OutputHead) -> bool:
        return isinstance(live_head, LinearHead) and live_head.checksum() == self._head["checksum"]

    def head_beside(self, live_head: OutputHead) -> OutputHead:
        if isinstance(live_head, GivenLogits):
            return live_head
        if not self.head_trains and self.shares_head(live_head):
            return live_head
        if self._stored_head is not None:
            return self._stored_head
        raise ReferenceMismatchError(
            "The model's output head has changed, but it was frozen when the reference was built, so that the "
            f"reference's own head ({self._head['vocab_size']} tokens) was not kept. Build the reference "
            "while the head's parameters require gradients, or keep the head frozen."
        )

    @cached_property
    def _strata(self) -> Float[Tensor, "stratum pos"]:
        return strata_of(self.probes).weights[:, self.plan.probe]

    @cached_property
    def _stored_head(self) -> LinearHead | None:
        if "head.weight" not in self._tensors:
            return self._own_head
        bias = self._tensors.get("head.bias")
        return LinearHead(
            weight=self._tensors["head.weight"].clone().to(self.context.device),
            bias=None if bias is None else bias.clone().to(self.context.device),
            scale=self._head["scale"],
            softcap=self._head["softcap"],
            temperature=self.temperature,
        )


def require_fitting(probes: ProbeSet, capture: Capture) -> None:
    """Raise `ProbeError` unless the model can read these probes."""
    if not probes.is_text:
        return
    if (longest := capture.max_positions()) is not None:
        probes.check_length(longest)
    if capture.is_causal_lm:
        probes.check_vocab(capture.vocab_size())


def packing_pays(probes: ProbeSet) -> bool:
    """Whether rows shared by several probes save padding worth having; their attention costs a little more."""
    if not probes.is_text:
        return False
    packed, alone = (
        sum(batch.inputs["input_ids"].numel() for batch in probes.plan(packed).batches) for packed in (True, False)
    )
    return packed < _PACKING_SAVES * alone


def takes_packed_rows(capture: Capture, probes: ProbeSet) -> bool:
    """Whether several probes in one row give what each gives alone: tried out, because models differ.

    Models that number positions themselves are wrong by a tenth and more. A state that is carried along the row, as
    by convolutions and recurrences, may show next to nothing in a model that is not trained yet: so the first probe
    is also given other tokens, which must not change a bit of the second.
    """
    shortest = sorted(range(len(probes)), key=lambda probe: len(probes.tokens_of(probe)))[:2]
    texts = [probes.tokens_of(probe)[:32] for probe in (shortest[0], shortest[-1])]
    pair = ProbeSet.from_tensors(
        {
            "input_ids": nn.utils.rnn.pad_sequence(texts, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True),
        },
    )
    alone = {int(plan_probe): piece for plan_probe, piece in _one_by_one(capture, pair)}
    plan = pair.plan(packed=True)
    try:
        packed = torch.cat([piece.hidden for piece in capture.pieces(plan)]).float()
        leak = _leak(capture, plan, packed)
        # And once as wide as rows will be: some keep tables for one context and no more.
        next(capture.pieces(probes.plan(packed=True)))
    except (TypeError, ValueError, RuntimeError) as error:
        logger.info("This model takes no packed rows (%s); probes are run in buckets of like length.", error)
        return False
    expected = torch.cat([alone[probe] for probe in dict.fromkeys(plan.probe.tolist())]).float()
    difference = float((packed - expected).norm() / expected.norm())
    fits = difference < _PACKING_TOLERANCE and leak < _LEAK_TOLERANCE
    if not fits:
        logger.info("Packed rows are wrong by %.2g with this model; probes are run in buckets.", max(difference, leak))
    return fits


def _leak(capture: Capture, plan: Plan, packed: Float[Tensor, "pos dim"]) -> float:
    """How far the last probe of a packed row moves, relative to itself, when the tokens of the first are others."""
    (batch,) = plan.batches
    ids = batch.inputs["input_ids"].clone()
    first = slice(0, int((batch.inputs["position_ids"][0, 1:] == 0).nonzero()[0]) + 1)
    known = ids.unique()
    # Each token by the next one that occurs: none stays, and all are known to the model.
    ids[:, first] = known[(torch.searchsorted(known, ids[:, first]) + 1) % len(known)]
    changed = replace(plan, batches=(replace(batch, inputs={**batch.inputs, "input_ids": ids}),))
    (piece,) = capture.pieces(changed)
    last = plan.probe == plan.probe[-1]
    return float((piece.hidden.float() - packed)[last].norm() / packed[last].norm())


def _one_by_one(capture: Capture, probes: ProbeSet) -> Iterator[tuple[int, Float[Tensor, "pos dim"]]]:
    plan = probes.plan(packed=False, batch_tokens=1)
    for piece in capture.pieces(plan):
        yield int(plan.probe[piece.positions.start]), piece.hidden


def identity_of(capture: Capture, probes: str, *, packed: bool, adapter: bool) -> dict[str, Any]:
    """All that the answers depend on. A reference is the same one exactly where this is.

    To be called once the model has been run. `probes` is their fingerprint; `adapter` whether adapters are on.
    """
    state = {
        **dict(capture.root.named_parameters()),
        **dict(capture.root.named_buffers()),
    }
    if not adapter:
        # What is switched off has no part in the answers, and is different for every seed.
        off = adapter_names(capture.root)
        state = {name: tensor for name, tensor in state.items() if not off & set(name.split("."))}
    head: dict[str, Any] = {"trains": capture.trains_head}
    if capture.is_causal_lm:
        live = capture.head()
        assert isinstance(live, LinearHead)
        head |= {"checksum": live.checksum(), "scale": live.scale, "softcap": live.softcap}
        head["vocab_size"] = live.vocab_size
    return {
        "format_name": _FORMAT,
        "model": class_name(capture.root),
        "settings": _settings(capture.root),
        "weights": digest(*(f"{name} {checksum(tensor)}" for name, tensor in sorted(state.items()))),
        "probes": probes,
        "context": asdict(capture.context()),
        "hookpoints": list(capture.hookpoints),
        "packed": packed,
        "head": head,
        "temperature": capture.temperature,
    }


def _settings(root: nn.Module) -> str:
    """A hash of the model's configuration, where it has one: an epsilon or a scale of attention is in no weight."""
    to_dict = getattr(getattr(root, "config", None), "to_dict", None)
    settings = to_dict() if callable(to_dict) else {}
    kept = {name: value for name, value in settings.items() if name[:1] != "_" and name not in _NOT_OF_ANSWERS}
    return digest(json.dumps(kept, sort_keys=True, default=str))


def _ask(capture: Capture, plan: Plan, probes: ProbeSet, *, keeps_head: bool | None = None) -> dict[str, Tensor]:
    """The answers themselves, as tensors with one row for each counted position."""
    weighting = strata_of(probes)
    strata = weighting.weights[:, plan.probe].to(capture.device)
    columns: dict[str, list[Tensor]] = {}
    mass: Tensor | None = None
    head: LinearHead | GivenLogits | None = None
    for piece in capture.pieces(plan):
        head = head or capture.head()
        _require_numbers(piece, plan, probes)
        for name, activation in piece.activations.items():
            columns.setdefault(f"activation/{name}", []).append(activation.cpu())
        with full_precision(capture.device):
            for part in row_chunks(piece.positions, capture.device):
                hidden = piece.hidden[part.start - piece.positions.start : part.stop - piece.positions.start]
                rows, weights, scale = reference_rows(head, hidden, plan.target[part].to(capture.device))
                if mass is None:
                    mass = torch.zeros(len(strata), head.vocab_size, dtype=torch.float64, device=capture.device)
                mass += on_grid(token_mass(weights, scale, strata[:, part]), weighting.grid)
                if isinstance(head, LinearHead) and head.is_linear and not capture.trains_head:
                    mean = _mean_unembedding(head, weights, scale)
                    columns.setdefault("mean_unembedding", []).append(mean.cpu())
                for name in _ROWS:
                    columns.setdefault(name, []).append(getattr(rows, name).cpu())
    assert mass is not None and head is not None
    answers = {name: torch.cat(parts) for name, parts in columns.items()}
    answers["token_mass"] = mass.cpu()
    for name in capture.hookpoints:
        norms = answers[f"activation/{name}"].float().norm(dim=1)
        answers[f"sinks/{name}"] = (norms > _SINK * norms.median()).nonzero()[:, 0]
    if isinstance(head, LinearHead):
        size = head.weight.numel() * head.weight.element_size()
        if keeps_head is None:
            keeps_head = capture.trains_head or not head.is_linear or size <= _KEPT_HEAD_BYTES
        if keeps_head:
            answers["head.weight"] = head.weight.cpu().clone()
            if head.bias is not None:
                answers["head.bias"] = head.bias.cpu().clone()
    return answers


def row_chunks(positions: slice, device: torch.device) -> Iterator[slice]:
    """The positions of one batch in the portions that the head works on, the same at every reading."""
    rows = tile_shape(device).rows
    for start, stop in tiles(positions.stop - positions.start, rows):
        yield slice(positions.start + start, positions.start + stop)


def _mean_unembedding(
    head: LinearHead, weights: Float[Tensor, "pos vocab"], scale: Float[Tensor, " pos"]
) -> Float[Tensor, "pos dim"]:
    mean = weights.new_zeros(len(weights), head.weight.shape[1], dtype=torch.float64)
    for start, stop in tiles(head.vocab_size, tile_shape(weights.device).columns):
        mean += head.mean_row(weights[:, start:stop], start, stop)
    return (mean / scale[:, None]).float()


def _require_numbers(piece: Piece, plan: Plan, probes: ProbeSet) -> None:
    for name, values in {"output head's input": piece.hidden, **piece.activations}.items():
        wrong = (~values.isfinite().all(1)).nonzero()[:, 0]
        if len(wrong):
            position = piece.positions.start + int(wrong[0])
            raise NonFiniteError(
                f"The reference model's answers are not numbers (NaN or infinite) at {name}, first in probe "
                f"{probes.names[int(plan.probe[position])]!r} at token {int(plan.offset[position])}. "
                "A reference must be finite: look at the weights and the dtype of the model."
            )


def _keep(directory: Path, meta: Mapping[str, Any], answers: Mapping[str, Tensor]) -> None:
    """Write a reference as a whole: under another name first, which a killed run may leave behind harmlessly."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name[:8]}-", dir=directory.parent))
        try:
            safetensors.torch.save_file(dict(answers), work / _TENSORS)
            (work / _META).write_bytes(json_bytes("meta", meta))
            try:
                work.replace(directory)
            except OSError:
                # Another run has built the same reference in the meantime: its answers are these.
                if not (directory / _META).exists():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"The reference could not be written to {directory.parent} ({error}). Nothing was left there. "
            "Free some room or give another directory: cache_dir=..., or the environment variable DIFFSENSOR_CACHE."
        ) from error


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        meta = read_json(directory / _META)
        tensors = safetensors.torch.load_file(directory / _TENSORS)
    except (OSError, safetensors.SafetensorError, DiffSensorError) as error:
        raise CorruptFileError(
            f"The reference in {directory} cannot be read ({error}). Remove that directory; a new run builds it again."
        ) from error
    wrong = sorted(
        {
            name
            for name in meta["checksums"].keys() | tensors.keys()
            if name not in tensors
            or name not in meta["checksums"]
            or checksum(tensors[name]) != meta["checksums"][name]
        }
    )
    if wrong:
        raise CorruptFileError(
            f"The reference in {directory} has changed since it was written: {', '.join(wrong[:3])} "
            f"{'differs' if len(wrong) == 1 else 'differ'} from the recorded checksum. Remove that directory; "
            "a new run builds it again."
        )
    return meta, tensors


def directories(place: Path) -> list[Path]:
    """The references in a cache; what a killed run left unfinished is none."""
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def meta_of(directory: Path) -> tuple[dict[str, Any], str]:
    """What a reference says of itself, and what is wrong with that, as a sentence."""
    try:
        return read_json(directory / _META), ""
    except (OSError, DiffSensorError) as error:
        return {}, str(error)


def verified(directory: Path) -> str:
    """What is wrong with a reference, as a sentence, after every byte of it was read."""
    try:
        _read(directory)
    except CorruptFileError as error:
        return str(error)
    return ""
