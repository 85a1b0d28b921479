"""The fixed inputs that a model is asked again and again: tokenised once, never changed."""

import difflib
import hashlib
import json
import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffsensor.errors import ConfigError, CorruptFileError, ProbeError, StorageError, listed
from diffsensor.probes.chats import encode_chat
from diffsensor.probes.lines import ProbeLine, parse_lines, parse_rows, quoted, require_text
from diffsensor.probes.plan import plan_dense, plan_tokens
from diffsensor.probes.tokenizing import (
    Encoded,
    Tokenizer,
    encode_completion,
    encode_text,
    fingerprint_of,
    private_copy,
    require_same_tokenizer,
)
from diffsensor.storage.atomic import stage
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import ALL_PROBES, Batch, Plan, require_group_name

log = logging.getLogger(__name__)

TENSORS_FILE = "probes.safetensors"
RECORD_FILE = "probes.json"
_FORMAT = "diffsensor probes 1"
_DEFAULT_FILE = "default.jsonl"

#: A tokenizer, or the directory or name from which transformers loads it.
AnyTokenizer = Tokenizer | str | os.PathLike[str]


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class ProbeSet:
    """Fixed inputs for a model, with the positions that count.

    Built by `default`, `from_texts`, `from_jsonl`, `from_dataset`, `from_tensors` or `load`, of which each takes a
    tokenizer itself, or the directory or name from which transformers loads it. Probes are either text
    (`is_text`), kept as token ids, or dense: tensors that the model is called with. A counted position of a text
    is one whose next token is a counted token of the probe. Equal contents have equal fingerprints, in every
    process.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    #: How many probes were cut to `max_length` tokens.
    num_truncated: int = 0
    tokenizer_fingerprint: str = ""
    _weights: Float[Tensor, " probe"]
    _tokens: tuple[Int[Tensor, " _"], ...] = ()
    _counted: tuple[Bool[Tensor, " _"], ...] = ()
    _args: tuple[Tensor, ...] = ()
    _inputs: Mapping[str, Tensor]
    _mask: Bool[Tensor, "probe pos"] | None = None
    _tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ProbeError("The probe set is empty. Give at least one probe.")
        for group in self.groups:
            require_group_name(group)
        seen: dict[str, int] = {}
        for probe, name in enumerate(self.names):
            if name in seen:
                raise ProbeError(
                    f"Probes {seen[name]} and {probe} are both named {name!r}. Give each probe a name of its own."
                )
            seen[name] = probe
        for name, weight in zip(self.names, self._weights.tolist(), strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise ProbeError(f"Probe {name!r} has the weight {weight}. A weight is a finite number, 0 or more.")
        if not self._weights.any():
            raise ProbeError("All weights are 0, so that no mean is defined. Give at least one probe a weight.")
        masks = self._counted if self.is_text else () if self._mask is None else self._mask
        for name, counted in zip(self.names, masks, strict=False):
            if not counted.any():
                raise ProbeError(
                    f"Probe {name!r} has no counted position: none of its {len(counted)} tokens is both counted and "
                    "preceded by another one. Give a longer text, count more of it, or leave the probe out."
                    if self.is_text
                    else f"Probe {name!r} has no counted position: its row of the mask is empty. Leave the probe out."
                )

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: AnyTokenizer,
        groups: Sequence[str | None] | None = None,
        max_length: int = 128,
        *,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> "ProbeSet":
        """One probe for each text; all tokens but the first are counted.

        The tokenizer is copied and the copy used, so that a call here changes nothing for anybody else.

        **Arguments:**
            tokenizer: one of Hugging Face, or anything that is called and decodes as they do.
            groups: a name for each text, "" or None where it has none.
            max_length: a longer text is cut at its end to so many tokens, and `num_truncated` counts it.
            names: by default "0", "1", ...
            weights: how much each probe counts, by default 1 each.
        """
        if isinstance(texts, str):
            raise ProbeError(f"texts is one string, {quoted(texts)}. Give a list of texts: [text].")
        tokenizer_copy = _copied(tokenizer, max_length)
        names = _names(names, len(texts))
        encoded: list[Encoded] = []
        for name, text in zip(names, texts, strict=True):
            where = f"Probe {name!r}: "
            require_text(text, "text", where)
            encoded.append(_not_bare(encode_text(tokenizer_copy, text, max_length), where))
        return cls._from_encoded(encoded, tokenizer_copy, names, groups, weights, max_length)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], tokenizer: AnyTokenizer, max_length: int = 128) -> "ProbeSet":
        """One probe for each line: {"text"}, {"prompt", "completion"} or {"messages"}; "id", "group", "weight" may be.

        Of a text all tokens but the first are counted, of a prompt with its completion only the completion's.
        Both are tokenised as one text, as TRL does: one BOS, no EOS in the middle, no word broken at the border.
        Where the tokenizer merges characters across the border, the token that holds the completion's first
        character is the first one counted. What is too long loses the beginning of its prompt (not its BOS), and
        if that is not enough the end of its completion. Blank lines are skipped. The name of a probe is its id,
        or its number from 0 on.

        "messages" is a chat: [{"role", "content"}, ...], written by the tokenizer's chat template. What the
        assistant says is counted, in every turn, with the mark that ends the turn. A template that writes today's
        date into its text is warned about.
        """
        source = os.fspath(path)
        return cls._from_lines(parse_lines(_read(Path(path), ProbeError), source), tokenizer, max_length, source)

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[Any],
        tokenizer: AnyTokenizer,
        max_length: int = 128,
        *,
        limit: int | None = None,
        seed: int = 0,
    ) -> "ProbeSet":
        """One probe for each row of a Hugging Face dataset, or for each of any other records, as for `from_jsonl`.

        **Arguments:**
            limit: at most so many rows, drawn with the seed where the number of rows is known. Of a stream, which
                may have no end, the first ones.

        The name of a probe is its id, or the number of its row in the dataset.
        """
        source = f"The {type(dataset).__name__}"
        rows = _chosen(dataset, limit, seed, source)
        return cls._from_lines(parse_rows(rows, source), tokenizer, max_length, source)

    @classmethod
    def read(cls, path: str | os.PathLike[str], tokenizer: AnyTokenizer | None = None) -> "ProbeSet":
        """The probes of a .jsonl file, of a saved probe set's directory, or "default".

        Raises `ProbeError` where nothing is there, or where a text is to be tokenised and no tokenizer is given.
        """
        given = Path(path)
        if given.is_dir():
            return cls.load(given, tokenizer)
        if path != "default" and not given.exists():
            near = sorted(found.name for found in given.parent.glob("*")) if given.parent.is_dir() else []
            close = difflib.get_close_matches(given.name, near, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ProbeError(
                f"No probes are at {str(path)!r}. {hint}Give a .jsonl file, the directory of a saved probe set, or "
                "'default'."
            )
        if tokenizer is None:
            raise ProbeError(
                f"The probes {str(path)!r} are text, and no tokenizer was given. Name the directory or the name of the "
                "model's tokenizer."
            )
        return cls.default(tokenizer) if path == "default" else cls.from_jsonl(given, tokenizer)

    @classmethod
    def default(cls, tokenizer: AnyTokenizer, max_length: int = 128) -> "ProbeSet":
        """The probes that come with diffsensor: 128 short English ones in 8 groups of 16, for any tokenizer.

        The groups: knowledge, arithmetic, reasoning, code, instructions, refusal (of harmful requests), opinions,
        free_text. Two of each group are long, the others of about a sentence or two.
        """
        contents = resources.files("diffsensor.probes").joinpath(_DEFAULT_FILE).read_bytes()
        source = f"diffsensor's probes/{_DEFAULT_FILE}"
        probes = cls._from_lines(parse_lines(contents, source), tokenizer, max_length, source)
        unknown = getattr(probes._tokenizer, "unk_token_id", None)
        if unknown is not None and (num_unknown := sum(int((ids == unknown).sum()) for ids in probes._tokens)):
            total = sum(map(len, probes._tokens))
            log.warning(
                "The tokenizer has no token for parts of the default probes: %d of %d tokens are unknown ones. "
                "Readings are exact, but of a text with holes; probes of your own may fit this model better.",
                num_unknown,
                total,
            )
        return probes

    @classmethod
    def from_tensors(
        cls,
        inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
        mask: Tensor | None = None,
        groups: Sequence[str | None] | None = None,
        *,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | Tensor | None = None,
        tokenizer: AnyTokenizer | None = None,
        text: bool = True,
    ) -> "ProbeSet":
        """One probe for each row of the tensors; they are copied.

        A 2-D tensor of integers, or a mapping with "input_ids", is text for a causal language model, unless
        `text=False`: `mask` [probe, pos] marks the counted tokens, by default all. A token without a predecessor
        (pos 0) gives no position even where it is marked. Rows of different length are padded at the right, and
        "attention_mask" says so.

        Anything else is dense: the model is called with the tensor, with the tuple's tensors by place or the
        mapping's by name. (A table of integers that is no text: give it in a tuple.) So are texts for an encoder or
        a classifier, with `text=False`: whatever its tokenizer returned, padding too. For outputs [batch, classes],
        `mask` is [probe] or None; probes that it does not mark are left out. For outputs [batch, pos, classes],
        `mask` [probe, pos] is needed, because the number of positions is not known before the model runs.

        Outputs are read as logits of one softmax over classes: drift is in nats per position, there is no
        `nll_change` (nothing is the right answer), and the "tokens" of the token table are classes, by number. That
        means nothing for a regressor, nor where each label has a sigmoid of its own: read activations alone there,
        `Monitor(..., sensors=["activations"])`, which at the last layer say how far the answers moved. A model of
        one output value is refused otherwise; one of several looks like a classifier, and only you can tell.
        """
        if text and isinstance(inputs, Tensor) and _is_integer(inputs) and inputs.ndim == 2:
            inputs = {"input_ids": inputs}
        tokenizer_copy = None if tokenizer is None else own_tokenizer(tokenizer)
        fingerprint = fingerprint_of(tokenizer_copy)
        if text and isinstance(inputs, Mapping) and "input_ids" in inputs:
            ids = _rows({str(key): value for key, value in inputs.items()})["input_ids"]
            names = _names(names, len(ids))
            tokens = _unpadded(dict(inputs), names)
            counted = _counted_tokens(mask, ids, tokens, names)
            return cls(
                names=tuple(names),
                groups=_groups(groups, len(names)),
                _weights=_weights(weights, len(names)),
                _tokens=tokens,
                _counted=counted,
                _inputs={},
                tokenizer_fingerprint=fingerprint,
                _tokenizer=tokenizer_copy,
            )
        args = (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, tuple) else ()
        named = inputs if isinstance(inputs, Mapping) else {}
        rows = _rows({**{f"tensor {place}": value for place, value in enumerate(args)}, **named})
        if "labels" in rows:
            raise ProbeError(
                "The inputs have 'labels', which are no input: a probe is what the model is asked, not the answer. "
                "Leave them out."
            )
        num_probes = len(next(iter(rows.values())))
        names = _names(names, num_probes)
        all_groups = _groups(groups, num_probes)
        all_weights = _weights(weights, num_probes)
        kept = torch.arange(num_probes)
        marks = None if mask is None else _marks(mask)
        if marks is not None:
            if marks.ndim not in (1, 2) or len(marks) != num_probes:
                raise ProbeError(
                    f"The mask has the shape {list(marks.shape)}; expected [{num_probes}] or [{num_probes}, pos], one "
                    "row for each probe."
                )
            if marks.ndim == 1:
                kept, marks = marks.nonzero()[:, 0], None
        return cls(
            names=tuple(names[probe] for probe in kept.tolist()),
            groups=tuple(all_groups[probe] for probe in kept.tolist()),
            _weights=all_weights[kept],
            _args=tuple(_owned(value)[kept] for value in args),
            _inputs={str(name): _owned(value)[kept] for name, value in named.items()},
            _mask=marks,
            tokenizer_fingerprint=fingerprint,
            _tokenizer=tokenizer_copy,
        )

    @classmethod
    def _from_lines(
        cls, parsed: Iterable[ProbeLine], tokenizer: AnyTokenizer, max_length: int, source: str
    ) -> "ProbeSet":
        tokenizer_copy = _copied(tokenizer, max_length)
        lines: list[ProbeLine] = []
        encoded: list[Encoded] = []
        for line in parsed:
            lines.append(line)
            encoded.append(encode_line(tokenizer_copy, line, max_length))
        if not lines:
            raise ProbeError(f'{source} holds no record. Give at least one such as {{"text": "..."}}.')
        if date := next((one.date for one in encoded if one.date), ""):
            warnings.warn(told_of_date(date), stacklevel=3)
        return cls._from_encoded(
            encoded,
            tokenizer_copy,
            [line.name for line in lines],
            [line.group for line in lines],
            [line.weight for line in lines],
            max_length,
        )

    @classmethod
    def _from_encoded(
        cls,
        encoded: Sequence[Encoded],
        tokenizer: Tokenizer,
        names: Sequence[str],
        groups: Sequence[str | None] | None,
        weights: Sequence[float] | Tensor | None,
        max_length: int,
    ) -> "ProbeSet":
        num_truncated = sum(one.num_cut > 0 for one in encoded)
        if num_truncated:
            log.info("%d of %d probes were cut to %d tokens.", num_truncated, len(encoded), max_length)
        return cls(
            names=tuple(names),
            groups=_groups(groups, len(encoded)),
            num_truncated=num_truncated,
            tokenizer_fingerprint=fingerprint_of(tokenizer),
            _weights=_weights(weights, len(encoded)),
            _tokens=tuple(torch.tensor(one.ids, dtype=torch.int64) for one in encoded),
            _counted=tuple(_with_predecessor(torch.tensor(one.counted, dtype=torch.bool)) for one in encoded),
            _inputs={},
            _tokenizer=tokenizer,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        kind = f"{sum(map(len, self._tokens))} tokens" if self.is_text else "dense"
        groups = f", groups {listed(self.group_names)}" if self.group_names else ""
        cut = f", {self.num_truncated} truncated" if self.num_truncated else ""
        return (
            f"ProbeSet({len(self)} probes, {kind}, {self.num_positions} counted positions{groups}{cut}, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    @property
    def is_text(self) -> bool:
        return bool(self._tokens)

    @property
    def weights(self) -> Float[Tensor, " probe"]:
        return self._weights.clone()

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups that there are, in order of first appearance."""
        return tuple(dict.fromkeys(group for group in self.groups if group != ALL_PROBES))

    @property
    def group_sizes(self) -> dict[str, int]:
        """How many probes each group has, in order of first appearance."""
        return {group: self.groups.count(group) for group in self.group_names}

    @property
    def num_positions(self) -> int:
        if self.is_text:
            return sum(int(counted.sum()) for counted in self._counted)
        return len(self) if self._mask is None else int(self._mask.sum())

    def tokens_of(self, probe: int) -> Int[Tensor, " token"]:
        return self._tokens[probe].clone() if self.is_text else torch.empty(0, dtype=torch.int64)

    def decode(self, ids: Sequence[int]) -> str:
        numbers = [int(number) for number in ids]
        if self._tokenizer is None:
            return "".join(f"⟨{number}⟩" for number in numbers)
        text = str(self._tokenizer.decode(numbers))
        if len(numbers) == 1:
            # Some tokenizers drop the space that a text begins with, and with it what tells ' the' from 'the':
            # where the token stands a second time, it is whole.
            twice = str(self._tokenizer.decode(numbers * 2))
            return twice.removeprefix(text) if twice.startswith(text) and twice != text else text
        return text

    def first(self) -> Batch:
        """The first probe alone, a text cut to 32 tokens: enough to try a model out."""
        if self.is_text:
            ids = self._tokens[0][:32].clone()
            return Batch(inputs={"input_ids": ids[None]}, leading=(1, len(ids)), index=torch.arange(len(ids)), start=0)
        marks = None if self._mask is None else self._mask[:1]
        return plan_dense(
            [value[:1] for value in self._args], {name: value[:1] for name, value in self._inputs.items()}, marks, 1
        ).batches[0]

    def plan(
        self, packed: bool, *, row_tokens: int = 256, batch_tokens: int | None = None, causal: bool = True
    ) -> Plan:
        """What is run together; for dense probes the arguments change nothing. See `diffsensor.probes.plan`."""
        if not self.is_text:
            return plan_dense(self._args, self._inputs, self._mask, len(self))
        return plan_tokens(
            self._tokens,
            self._counted,
            packed=packed,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
            causal=causal,
        )

    def thin(self, every: int) -> "ProbeSet":
        """These probes with only every `every`-th counted position of each, beginning with its first."""
        if every < 1:
            raise ConfigError(f"thin(every={every}) was asked for; every must be at least 1.")
        return replace(
            self,
            _counted=tuple(_thinned(counted, every) for counted in self._counted),
            _mask=None if self._mask is None else torch.stack([_thinned(counted, every) for counted in self._mask]),
        )

    def check_length(self, max_positions: int) -> None:
        """Refuse probes that are longer than the model's context."""
        longest = max(range(len(self)), key=lambda probe: len(self.tokens_of(probe)))
        length = len(self.tokens_of(longest))
        if length > max_positions:
            raise ProbeError(
                f"Probe {self.names[longest]!r} has {length} tokens, but the model reads {max_positions} at most. "
                f"Build the probe set with max_length={max_positions}."
            )

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have."""
        for name, tokens in zip(self.names, self._tokens, strict=False):
            largest = int(tokens.max())
            if largest >= vocab_size:
                raise ProbeError(
                    f"Probe {name!r} has the token id {largest}, but the model has {vocab_size} tokens, numbered from "
                    "0 on. Build the probe set with the tokenizer of this model."
                )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer that gives the ids another meaning. Nothing is known, nor refused, where one side has
        no fingerprint."""
        require_same_tokenizer(tokenizer, self.tokenizer_fingerprint)

    @property
    def fingerprint(self) -> str:
        """A sha256 over all that a model and a sensor see of the probes, and over the tokenizer's fingerprint."""
        digest = hashlib.sha256()
        tensors = self._tensors()
        shape = {name: [str(value.dtype), list(value.shape)] for name, value in sorted(tensors.items())}
        described = [_FORMAT, self.names, self.groups, self.tokenizer_fingerprint, len(self._args), shape]
        digest.update(json.dumps(described).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `probes.safetensors` and `probes.json` into a directory, which is made where it is missing.

        Token ids are stored, the text itself is not. An interrupted save over other probes leaves files that do
        not belong together, which `load` refuses.
        """
        tensors = safetensors.torch.save(self._tensors())
        content = {
            "fingerprint": self.fingerprint,
            "names": self.names,
            "groups": self.groups,
            "num_truncated": self.num_truncated,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "num_args": len(self._args),
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        }
        _write(Path(path), {TENSORS_FILE: tensors, RECORD_FILE: json_bytes("probes", content)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokenizer: AnyTokenizer | None = None) -> "ProbeSet":
        """The probes that `save` wrote there, every byte checked; with a tokenizer, that it is the same one."""
        tokenizer_copy = None if tokenizer is None else own_tokenizer(tokenizer)
        folder = Path(path)
        record = read_json(folder / RECORD_FILE)
        stored = _read(folder / TENSORS_FILE, CorruptFileError)
        if hashlib.sha256(stored).hexdigest() != record["tensors_sha256"]:
            raise _corrupt(folder / TENSORS_FILE, "its checksum is not the one in probes.json")
        tensors = safetensors.torch.load(stored)
        lengths = tensors["lengths"].tolist() if "lengths" in tensors else []
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
        probes = cls(
            names=tuple(record["names"]),
            groups=tuple(record["groups"]),
            num_truncated=record["num_truncated"],
            tokenizer_fingerprint=record["tokenizer_fingerprint"],
            _weights=tensors["weights"],
            _tokens=torch.split(tensors["tokens"], lengths) if lengths else (),
            _counted=torch.split(tensors["counted"], lengths) if lengths else (),
            _args=tuple(tensors[f"args.{place}"] for place in range(record["num_args"])),
            _inputs=inputs,
            _mask=tensors.get("mask"),
            _tokenizer=tokenizer_copy,
        )
        if probes.fingerprint != record["fingerprint"]:
            raise _corrupt(folder, "the contents do not have the fingerprint that is stored with them")
        if tokenizer_copy is not None:
            probes.check_tokenizer(tokenizer_copy)
        return probes

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"weights": self._weights}
        if self.is_text:
            tensors["lengths"] = torch.tensor([len(ids) for ids in self._tokens])
            tensors["tokens"] = torch.cat(self._tokens)
            tensors["counted"] = torch.cat(self._counted)
        for place, value in enumerate(self._args):
            tensors[f"args.{place}"] = value
        for name, value in self._inputs.items():
            tensors[f"inputs.{name}"] = value
        if self._mask is not None:
            tensors["mask"] = self._mask
        return tensors


def encode_line(tokenizer: Tokenizer, line: ProbeLine, max_length: int) -> Encoded:
    """One record as token ids, of which at least one is counted and has a predecessor."""
    try:
        if line.messages:
            encoded = encode_chat(tokenizer, line.messages, max_length)
        elif line.prompt is None:
            encoded = encode_text(tokenizer, line.text, max_length)
        else:
            encoded = encode_completion(tokenizer, line.prompt, line.text, max_length)
    except ProbeError as error:
        raise ProbeError(f"{line.where}{error}") from error.__cause__
    return _not_bare(encoded, line.where)


def told_of_date(date: str) -> str:
    return (
        f"The tokenizer's chat template writes today's date ({date}) into the probes, so that the same records give "
        "other tokens on another day, which do not fit a reference of today. Tokenise them once: save this probe set "
        "with probes.save(directory), and give ProbeSet.load(directory) to later and resumed runs."
    )


def _copied(tokenizer: AnyTokenizer, max_length: int) -> Tokenizer:
    if max_length < 2:
        raise ConfigError(f"max_length={max_length} was given; a probe needs at least 2 tokens to have a next one.")
    return own_tokenizer(tokenizer)


def own_tokenizer(tokenizer: AnyTokenizer) -> Tokenizer:
    """A tokenizer that nobody else has: a copy of the one given, or newly loaded from where it was said to be."""
    if isinstance(tokenizer, str | os.PathLike):
        from diffsensor.loading import load_tokenizer

        return private_copy(load_tokenizer(tokenizer))
    if not callable(tokenizer):
        raise ProbeError(
            f"The tokenizer is {quoted(tokenizer)}; expected one of Hugging Face, or the directory or name of one."
        )
    return private_copy(tokenizer)


def _chosen(dataset: Any, limit: int | None, seed: int, source: str) -> Iterator[tuple[int, object]]:
    """Rows of a dataset with their numbers, in their order."""
    if isinstance(dataset, str | bytes | os.PathLike):
        raise ProbeError(
            f"The dataset is {quoted(dataset)}. Give the records themselves, such as datasets.load_dataset(...), or "
            "read a file of them with ProbeSet.from_jsonl."
        )
    if isinstance(dataset, Mapping):
        raise ProbeError(
            f"{source} is a mapping of {listed(map(repr, dataset))}, not a sequence of records. Give one split of it, "
            "such as dataset['train'], or a list of records."
        )
    if limit is None:
        return enumerate(dataset)
    if limit < 1:
        raise ConfigError(f"limit={limit} was given; expected at least 1, or None for all rows.")
    if not isinstance(dataset, Sized) or getattr(dataset, "__getitem__", None) is None:
        log.info("A stream was given as the dataset: its first %d rows are taken, and the seed plays no part.", limit)
        return islice(enumerate(dataset), limit)
    numbers = random.Random(seed).sample(range(len(dataset)), min(limit, len(dataset)))
    rows: Any = dataset
    return ((number, rows[number]) for number in sorted(numbers))


def _not_bare(encoded: Encoded, where: str) -> Encoded:
    if not any(encoded.counted[1:]):
        raise ProbeError(
            f"{where}no counted position: of its {len(encoded.ids)} tokens none is both counted and preceded by "
            "another one. Give a longer text or leave the probe out."
        )
    return encoded


def _same_number(what: str, given: int, num_probes: int) -> None:
    if given != num_probes:
        raise ProbeError(f"{given} {what} were given for {num_probes} probes. Give one for each probe, or none at all.")


def _names(names: Sequence[str] | None, num_probes: int) -> list[str]:
    if names is None:
        return [str(probe) for probe in range(num_probes)]
    _same_number("names", len(names), num_probes)
    return [str(name) for name in names]


def _groups(groups: Sequence[str | None] | None, num_probes: int) -> tuple[str, ...]:
    if groups is None:
        return (ALL_PROBES,) * num_probes
    if isinstance(groups, str):
        raise ProbeError(f"groups is one string, {quoted(groups)}. Give a list with one name for each probe.")
    _same_number("groups", len(groups), num_probes)
    return tuple(ALL_PROBES if group is None else str(group) for group in groups)


def _weights(weights: Sequence[float] | Tensor | None, num_probes: int) -> Float[Tensor, " probe"]:
    if weights is None:
        return torch.ones(num_probes, dtype=torch.float64)
    _same_number("weights", len(weights), num_probes)
    return torch.as_tensor(weights, dtype=torch.float64).detach().cpu().clone().reshape(num_probes)


def _with_predecessor(counted: Bool[Tensor, " token"]) -> Bool[Tensor, " token"]:
    counted = counted.clone()
    counted[:1] = False
    return counted


def _thinned(counted: Bool[Tensor, " token"], every: int) -> Bool[Tensor, " token"]:
    kept = torch.zeros_like(counted)
    kept[counted.nonzero()[::every, 0]] = True
    return kept


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _owned(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _marks(mask: Tensor) -> Tensor:
    marks = mask.detach().cpu() != 0
    if not torch.equal(marks.to(mask.dtype), mask.detach().cpu()):
        raise ProbeError(f"The mask holds other values than 0 and 1, such as {mask.max().item()}. Give a boolean mask.")
    return marks


def _rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, if they all have the same number of rows."""
    if not tensors:
        raise ProbeError("The probe set is empty. Give at least one tensor, with one row for each probe.")
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise ProbeError(f"{name} is {quoted(value)}; expected a tensor whose first dimension is the probe.")
    sizes = {name: len(value) for name, value in tensors.items()}
    if len(set(sizes.values())) > 1:
        told = listed(f"{name}: {size}" for name, size in sizes.items())
        raise ProbeError(f"The tensors have different numbers of rows ({told}). Give one row for each probe.")
    return tensors


def _unpadded(inputs: dict[str, Tensor], names: Sequence[str]) -> tuple[Int[Tensor, " _"], ...]:
    """The token ids of each probe without its padding."""
    others = [key for key in inputs if key not in ("input_ids", "attention_mask")]
    if others:
        raise ProbeError(
            f"The inputs have {listed(map(repr, others))} beside 'input_ids'; of text only 'input_ids' and "
            "'attention_mask' are taken, because rows are packed anew. Leave the others out."
        )
    ids = inputs["input_ids"]
    if ids.ndim != 2 or not _is_integer(ids):
        raise ProbeError(
            f"input_ids is {ids.dtype} of shape {list(ids.shape)}; expected integers of shape [probe, pos]."
        )
    real = _marks(inputs.get("attention_mask", torch.ones_like(ids)))
    if real.shape != ids.shape:
        raise ProbeError(
            f"attention_mask has the shape {list(real.shape)}, but input_ids {list(ids.shape)}. Make them equal."
        )
    tokens: list[Tensor] = []
    for name, row, marks in zip(names, _owned(ids).to(torch.int64), real, strict=True):
        length = int(marks.sum())
        if not marks[:length].all():
            side = "on the left" if marks[len(marks) - length :].all() else "between tokens"
            raise ProbeError(
                f"Probe {name!r} is padded {side}; expected its tokens first and all padding on the right. Tokenise "
                "with padding_side='right'."
            )
        if length and int(row[:length].min()) < 0:
            raise ProbeError(
                f"Probe {name!r} has the token id {int(row[:length].min())}; ids are 0 or more (labels have -100)."
            )
        tokens.append(row[:length].clone())
    return tuple(tokens)


def _counted_tokens(
    mask: Tensor | None, ids: Tensor, tokens: Sequence[Tensor], names: Sequence[str]
) -> tuple[Bool[Tensor, " _"], ...]:
    if mask is None:
        return tuple(_with_predecessor(torch.ones(len(row), dtype=torch.bool)) for row in tokens)
    marks = _marks(mask)
    if marks.shape != ids.shape:
        raise ProbeError(
            f"The mask has the shape {list(mask.shape)}; expected {list(ids.shape)}, one mark for each token."
        )
    for name, row, line in zip(names, tokens, marks, strict=True):
        if line[len(row) :].any():
            raise ProbeError(
                f"The mask counts padding of probe {name!r}, which has {len(row)} tokens. Mark tokens only."
            )
    return tuple(_with_predecessor(line[: len(row)]) for row, line in zip(tokens, marks, strict=True))


def _read(path: Path, error: Callable[[str], Exception]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}. Give the path of probes that exist.") from reason


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, each as a whole, and only when there was room for all of them."""
    staged: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            staged[stage(folder / name, data)] = folder / name
        for temporary, file in staged.items():
            temporary.replace(file)
    except OSError as reason:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"The probes cannot be written to {folder}: {reason.strerror}. Give a directory that can be written to and "
            "has room."
        ) from reason


def _corrupt(path: Path, why: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path} was truncated or changed after it was written: {why}. Restore it from a copy, or build the probe set "
        "anew."
    )
