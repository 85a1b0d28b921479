"""Probes that are drawn from the run itself: a sample of what it trains on, or of what it says, that rolls with it."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffsensor.errors import ConfigError, ProbeError, ReferenceMismatchError, unknown
from diffsensor.probes.probe_set import AnyTokenizer, ProbeSet, own_tokenizer
from diffsensor.probes.tokenizing import (
    Tokenizer,
    encode_completion,
    encode_text,
    fingerprint_of,
    fit,
    require_same_tokenizer,
)
from diffsensor.types import ALL_PROBES, require_group_name

#: Where no half-life is given: so many items, for each one that is held.
_HALF_LIFE = 8
#: What a loss does not count.
_NOT_COUNTED = -100
_NO_LIMIT = 2**60

#: Token ids: rows of a tensor, or of a batch as a model gets it, or lists.
Rows = Tensor | Mapping[str, Any] | Sequence[Sequence[int]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An item that is held: its name, its group, how many items were offered after it, and its tokens."""

    name: str
    group: str
    age: int
    tokens: tuple[int, ...]
    counted: tuple[bool, ...]


@final
class RollingProbes:
    """Probes drawn from a stream of texts, in which newer ones take the place of older ones.

        probes = RollingProbes(size=32)
        probes.offer(batch)  # what is trained on next, or was just sampled from the model
        probes.draw()        # a ProbeSet of what is held now

    For a contextual bank of a causal language model. A change that shows only where a trigger is hides from fixed,
    neutral probes; this bank holds the trigger as soon as the data do. Readings of two looks are of different texts:
    how far they differ by that alone is what their standard errors say.

    The law: the first `size` items are all taken. Each later one is taken with probability p = size (1 - 2^(-1/h)), h
    the half-life in items, and takes the place of one that is drawn at random. So an item is held a offers later with
    probability p 2^(-a/h), whatever came before and after it; one of the first `size`, a offers after these, with
    2^(-a/h). An offer costs the same however long the run is. What is drawn depends on the seed and the number of an
    item alone, so a run that goes on with `state_dict` draws as the uninterrupted one would have. (Random replacement
    as in Aggarwal, On biased reservoir sampling in the presence of stream evolution, VLDB 2006.)

    Blind to what is rare: of texts that are a share s of the stream, all are missing with probability (1 - s)^size.
    Texts that are alike, such as answers to one prompt, count as independent ones in standard errors, which are then
    too small: offer one of each kind.

    Arguments:
        tokenizer: for texts, and to show them; or the directory or name from which transformers loads it. A model's own
            batches need none.
        size: how many items are held, of each group where there are groups.
        half_life: after so many offers (to the same group) an item is gone with probability 1/2. 8 times `size` where
            none is given; at least 0.69 times `size`, with which every item is taken.
        max_tokens: a longer item is cut. One with a prompt loses the prompt's beginning (not its BOS, where the
            tokenizer is known), and if that is not enough its own end. Of any other, a part drawn at random is kept.
        groups: the names of groups, where items come with one. Each has a sample of its own.
        seed: of all draws.
    """

    is_text = True

    def __init__(
        self,
        tokenizer: AnyTokenizer | None = None,
        *,
        size: int = 32,
        half_life: float | None = None,
        max_tokens: int = 128,
        groups: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        _require_whole("size", size, at_least=1)
        _require_whole("max_tokens", max_tokens, at_least=2)
        _require_whole("seed", seed, at_least=0)
        self.half_life = float(_HALF_LIFE * size if half_life is None else half_life)
        least = 0.0 if size == 1 else -1 / math.log2(1 - 1 / size)
        if not max(least, 1e-9) <= self.half_life < math.inf:
            raise ConfigError(
                f"half_life={half_life!r} was given for size={size}. Taking every item offered, the half-life is "
                f"{least:.3g} items: give at least that, or a smaller size."
            )
        if isinstance(groups, str) or len(set(groups)) != len(groups) or ALL_PROBES in groups:
            raise ConfigError(f"groups={groups!r} was given, expected different names: groups=['code', 'prose'].")
        self.size, self.max_tokens, self.seed = size, max_tokens, seed
        self.groups = tuple(require_group_name(group) for group in groups)
        self._tokenizer = None if tokenizer is None else own_tokenizer(tokenizer)
        self.tokenizer_fingerprint = fingerprint_of(self._tokenizer)
        self._bos = getattr(self._tokenizer, "bos_token_id", None)
        self._share = min(1.0, -size * math.expm1(-math.log(2) / self.half_life))
        self._samples = {group: _Sample() for group in self.groups or (ALL_PROBES,)}

    def offer(
        self, rows: Rows, *, counted: Tensor | Sequence[Sequence[bool]] | None = None, groups: Sequence[str] = ()
    ) -> None:
        """Offer token ids, one item a row. Waits for no device: what is taken is copied there, and read at a draw.

        Padding is left out, on either side. Of a row that holds several sequences, one is drawn at random.

        Arguments:
            rows: a tensor [row, pos], or lists; or a batch as a model gets it, with "input_ids" and, where it has them,
                "attention_mask", "labels" and "position_ids" (a sequence begins where these are 0).
            counted: which tokens count, in the shape of the rows. By default those that have a label other than -100;
                without labels all of them. An item none of whose tokens counts is taken, and never drawn.
            groups: the group of each row, where there are groups.
        """
        batch = rows if isinstance(rows, Mapping) else {"input_ids": rows}
        if "input_ids" not in batch:
            raise ProbeError(f"The batch has {', '.join(map(repr, batch)) or 'nothing'}, and no 'input_ids'.")
        ids = batch["input_ids"]
        if isinstance(ids, Tensor) and (ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool):
            raise ProbeError(f"The tokens are {ids.dtype} of shape {list(ids.shape)}, expected integers [row, pos].")
        beside: dict[str, Any] = {
            "real": batch.get("attention_mask"),
            "labels": batch.get("labels"),
            "at": batch.get("position_ids"),
        }
        beside |= {"counted": counted}
        for name, other in beside.items():
            _require_same_shape(name, other, ids)
        for number, sample, place in self._places(len(ids), groups):
            marks: dict[str, Any] = {
                name: None if other is None else _kept(other[number]) for name, other in beside.items()
            }
            sample.put(place, _Row(tokens=_kept(ids[number]), **marks))

    def offer_texts(
        self, texts: Sequence[str], *, prompts: Sequence[str] | None = None, groups: Sequence[str] = ()
    ) -> None:
        """Offer texts: of each all tokens but the first count; with a prompt for each, those of the text alone.

        Prompt and text are tokenised as one, as for `ProbeSet.from_jsonl`.
        """
        if isinstance(texts, str) or isinstance(prompts, str):
            raise ProbeError("A single string was offered. Give a list of texts: [text].")
        if self._tokenizer is None:
            raise ConfigError("Texts were offered, and there is no tokenizer: RollingProbes(tokenizer, ...).")
        if prompts is not None and len(prompts) != len(texts):
            raise ProbeError(f"{len(prompts)} prompts were given for {len(texts)} texts. Give one for each.")
        for number, sample, place in self._places(len(texts), groups):
            if prompts is None:
                encoded = encode_text(self._tokenizer, texts[number], _NO_LIMIT)
            else:
                encoded = encode_completion(self._tokenizer, prompts[number], texts[number], _NO_LIMIT)
            sample.put(place, _Row(tokens=_kept(encoded.ids), counted=_kept(encoded.counted)))

    def _places(self, num_rows: int, groups: Sequence[str]) -> Iterator[tuple[int, "_Sample", int]]:
        """The rows that are taken, each with the sample it goes to and the place it gets there."""
        if len(groups) != (num_rows if self.groups else 0):
            raise ProbeError(
                f"{len(groups)} groups were given for {num_rows} rows, expected "
                + ("one for each." if self.groups else "none: RollingProbes(..., groups=[...]) names them first.")
            )
        for group in groups:
            if group not in self._samples:
                raise ProbeError(unknown("group", group, self.groups))
        for number in range(num_rows):
            group = groups[number] if groups else ALL_PROBES
            sample = self._samples[group]
            sample.offered += 1
            if len(sample.rows) < self.size:
                yield number, sample, len(sample.rows)
            else:
                taken, place = self._chances(group, sample.offered, "place")
                if taken < self._share:
                    yield number, sample, int(place * self.size)

    def _chances(self, group: str, item: int, purpose: str) -> tuple[float, float]:
        """Two numbers in [0, 1) for an item, by hashing: there is no state of a generator to be kept."""
        drawn = hashlib.blake2b(json.dumps([self.seed, group, item, purpose]).encode(), digest_size=16).digest()
        first, second = (int.from_bytes(half, "big") >> 11 for half in (drawn[:8], drawn[8:]))
        return first * 2.0**-53, second * 2.0**-53

    @property
    def num_offered(self) -> int:
        return sum(sample.offered for sample in self._samples.values())

    def held(self) -> tuple[Held, ...]:
        """What is held now, but for items none of whose tokens counts. In plain types, for other processes."""
        return tuple(
            Held(
                name=f"{group} {item}".strip(),
                group=group,
                age=sample.offered - item,
                tokens=tuple(tokens.tolist()),
                counted=tuple(counted.tolist()),
            )
            for group, sample in self._samples.items()
            for item, (tokens, counted) in sorted(self._settled(group, sample))
            if bool(counted.any())
        )

    def _settled(
        self, group: str, sample: "_Sample"
    ) -> Iterator[tuple[int, tuple[Int[Tensor, " token"], Bool[Tensor, " token"]]]]:
        for place, (item, row) in enumerate(zip(sample.items, sample.rows, strict=True)):
            if not row.is_settled:
                chances = self._chances(group, item, "cut")
                sample.rows[place] = row = row.settled(self.max_tokens, self._bos, chances)
            assert row.counted is not None
            yield item, (row.tokens, row.counted)

    def probes_of(self, held: Sequence[Held]) -> ProbeSet | None:
        """The probes that these are; None where there is none."""
        if not held:
            return None
        return ProbeSet(
            names=tuple(one.name for one in held),
            groups=tuple(one.group for one in held),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            _weights=torch.ones(len(held), dtype=torch.float64),
            _tokens=tuple(torch.tensor(one.tokens) for one in held),
            _counted=tuple(torch.tensor(one.counted) for one in held),
            _inputs={},
            _tokenizer=self._tokenizer,
        )

    def draw(self) -> ProbeSet | None:
        """A probe set of what is held now, named by the numbers of the items; None where nothing is."""
        return self.probes_of(self.held())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, or their numbers where there is no tokenizer."""
        if self._tokenizer is None:
            return "".join(f"⟨{number}⟩" for number in tokens)
        return str(self._tokenizer.decode(list(tokens)))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """As of a probe set: refuse one that is known to give the ids another meaning."""
        require_same_tokenizer(tokenizer, self.tokenizer_fingerprint)

    @property
    def group_sizes(self) -> dict[str, int]:
        """How many items are held of each group, once so many were offered."""
        return dict.fromkeys(self.groups, self.size)

    @property
    def described(self) -> dict[str, object]:
        """The arguments, seed apart, in plain types."""
        numbers = {"size": self.size, "half_life": self.half_life, "max_tokens": self.max_tokens}
        return {**numbers, "groups": list(self.groups)}

    @property
    def fingerprint(self) -> str:
        """A sha256 over what decides which texts may be held: over the arguments but the seed, not over the texts."""
        described = ["diffsensor rolling probes 1", self.described, self.tokenizer_fingerprint]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        return (
            f"RollingProbes(size={self.size}, half_life={self.half_life:g}, max_tokens={self.max_tokens}, "
            f"groups={list(self.groups)}, seed={self.seed})"
        )

    def forget(self) -> None:
        """Let go of all that is held, for a run that begins anew."""
        self._samples = {group: _Sample() for group in self._samples}

    def state_dict(self) -> dict[str, Any]:
        """What is held, in plain types. It holds token ids, and so the texts for whoever has the tokenizer."""
        samples = {
            group: {
                "offered": sample.offered,
                "items": list(sample.items),
                # One line each, and not one for each token.
                "rows": [
                    [" ".join(map(str, tokens.tolist())), "".join("01"[mark] for mark in counted.tolist())]
                    for _, (tokens, counted) in self._settled(group, sample)
                ],
            }
            for group, sample in self._samples.items()
        }
        return {"fingerprint": self.fingerprint, "seed": self.seed, "samples": samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that state was taken."""
        if state["fingerprint"] != self.fingerprint or state["seed"] != self.seed:
            raise ReferenceMismatchError(
                f"The run that goes on has rolling probes with other arguments (or another tokenizer) than {self!r}. "
                "Give those that the run began with, or begin a new run."
            )
        for group, stored in state["samples"].items():
            rows = [
                _Row(
                    tokens=torch.tensor([int(number) for number in tokens.split()], dtype=torch.int64),
                    counted=torch.tensor([mark == "1" for mark in counted], dtype=torch.bool),
                    is_settled=True,
                )
                for tokens, counted in stored["rows"]
            ]
            self._samples[group] = _Sample(offered=stored["offered"], items=list(stored["items"]), rows=rows)


@dataclass(slots=True)
class _Sample:
    """What is held of one group; `items` are the numbers of these rows among all that were offered, from 1 on."""

    offered: int = 0
    items: list[int] = field(default_factory=list)
    rows: list["_Row"] = field(default_factory=list)

    def put(self, place: int, row: "_Row") -> None:
        """Hold the item that was offered last."""
        self.items[place : place + 1], self.rows[place : place + 1] = [self.offered], [row]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """An item as it was offered, or, once it is settled, as it is drawn: its own tokens alone, and not too many."""

    tokens: Tensor
    counted: Tensor | None = None
    real: Tensor | None = None
    labels: Tensor | None = None
    at: Tensor | None = None
    is_settled: bool = False

    def settled(self, max_tokens: int, bos: int | None, chances: tuple[float, float]) -> "_Row":
        tokens = self.tokens.cpu().to(torch.int64)
        counted = torch.ones_like(tokens, dtype=torch.bool)
        if self.counted is not None:
            counted = self.counted.cpu() != 0
        elif self.labels is not None:
            counted = self.labels.cpu() != _NOT_COUNTED
        real = torch.ones_like(counted) if self.real is None else self.real.cpu() != 0
        tokens, counted = tokens[real], counted[real]
        if self.at is not None:
            begin = (self.at.cpu()[real] == 0).nonzero()[:, 0].tolist() or [0]
            sequence = int(chances[0] * len(begin))
            part = slice(begin[sequence], [*begin, len(tokens)][sequence + 1])
            tokens, counted = tokens[part], counted[part]
        tokens, counted = _cut(tokens, counted, max_tokens, bos, chances[1])
        return _Row(tokens=tokens.clone(), counted=counted, is_settled=True)


def _cut(
    tokens: Int[Tensor, " token"], counted: Bool[Tensor, " token"], max_tokens: int, bos: int | None, chance: float
) -> tuple[Int[Tensor, " kept"], Bool[Tensor, " kept"]]:
    """At most `max_tokens` of the tokens, of which the first does not count: it has no predecessor."""
    counted = counted.clone()
    counted[:1] = False
    places = counted.nonzero()[:, 0]
    if not len(places):
        return tokens[:0], counted[:0]
    # What follows the last counted token changes no answer before it.
    tokens, counted = tokens[: int(places[-1]) + 1], counted[: int(places[-1]) + 1]
    if len(tokens) <= max_tokens:
        return tokens, counted
    if int(places[0]) > 1:
        lead = int(int(tokens[0]) == bos)
        kept = fit(tokens.tolist(), counted.tolist(), lead, max_tokens)
        return torch.tensor(kept.ids), torch.tensor(kept.counted)
    start = int(chance * (len(tokens) - max_tokens + 1))
    tokens, counted = tokens[start : start + max_tokens], counted[start : start + max_tokens].clone()
    counted[0] = False
    return tokens, counted


def _kept(row: Tensor | Sequence[Any]) -> Tensor:
    """A copy on the row's own device: the loop may write into its buffers."""
    return row.detach().clone() if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.int64)


def _require_same_shape(name: str, other: Any, ids: Any) -> None:
    if other is None:
        return
    here, there = (
        list(rows.shape) if isinstance(rows, Tensor) else [len(rows), [len(row) for row in rows]]
        for rows in (other, ids)
    )
    if here != there:
        told = {"real": "attention_mask", "at": "position_ids"}.get(name, name)
        raise ProbeError(f"{told} has the shape {here}, but the tokens {there}. Give one entry for each token.")


def _require_whole(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}={value!r} was given, expected a whole number of at least {at_least}.")
