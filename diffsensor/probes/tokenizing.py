"""From text to token ids, without a trace on the tokenizer."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diffsensor.errors import ProbeError

# A fast tokenizer complains about longer texts, and keeps in its state that it did.
_NO_LIMIT = int(1e30)


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """The token ids of one text, as "input_ids"."""
        ...

    def decode(self, ids: Any, /) -> str | list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The token ids of one probe, which of them are counted, and how many more there were.

    `date` is today's date as a chat template wrote it into the text, "" where none did.
    """

    ids: list[int]
    counted: list[bool]
    num_cut: int = 0
    date: str = ""


def private_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that we may call as we like: a call changes a fast tokenizer (truncation, padding, what it warned of)."""
    own: Any = copy.deepcopy(tokenizer)
    if getattr(own, "model_max_length", None) is not None:
        own.model_max_length = _NO_LIMIT
    return own  # type: ignore[no-any-return]


def fingerprint_of(tokenizer: Tokenizer | None) -> str:
    """A sha256 over what each token id means: the vocabulary with all added tokens, and the merges if it has any.

    "" where the tokenizer does not say. Settings that come and go while it is used (padding, truncation, chat
    template) are not part of it, so that it survives saving, loading and training.
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    if get_vocab is None:
        return ""
    merges: list[Any] = []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str()).get("model") or {}
        # Older versions write a merge as "a b", newer ones as ["a", "b"].
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    vocab = sorted((int(number), token) for token, number in get_vocab().items())
    return hashlib.sha256(json.dumps([vocab, merges]).encode()).hexdigest()


def require_same_tokenizer(tokenizer: Tokenizer, fingerprint: str) -> None:
    """Raise `ProbeError` for a tokenizer of which it is known that its fingerprint is another one."""
    given = fingerprint_of(tokenizer)
    if given and fingerprint and given != fingerprint:
        raise ProbeError(
            f"The tokenizer has the fingerprint {given[:12]}, but the probes were made by one with {fingerprint[:12]}: "
            "their vocabulary, merges or added tokens differ. Use that tokenizer, or build the probe set anew with "
            "this one."
        )


def encode_text(tokenizer: Tokenizer, text: str, max_length: int) -> Encoded:
    """All tokens but the first are counted; a longer text is cut at its end."""
    ids = _ids(tokenizer, text, special=True)
    kept = ids[:max_length]
    return Encoded(ids=kept, counted=[place > 0 for place in range(len(kept))], num_cut=len(ids) - len(kept))


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str, max_length: int) -> Encoded:
    """Only the completion's tokens are counted.

    Prompt and completion are tokenised as one text, as TRL does, so that the model sees the tokens that it
    would see in training: one BOS, no EOS in the middle, no space put before the completion, no word broken
    at the border. The completion begins after the tokens that the text shares with the prompt alone. Where the
    tokenizer merges characters across the border, the token that holds the completion's first character is the
    first one counted.

    A text that is too long loses the beginning of its prompt (special tokens before it stay), and if that is
    not enough the end of its completion.
    """
    ids = _ids(tokenizer, prompt + completion, special=True)
    plain = _ids(tokenizer, prompt + completion, special=False)
    lead = _place_of(plain, ids)
    if lead is None:
        raise ProbeError(
            "The tokenizer gives other tokens for a text once special tokens are added, so that the completion "
            "cannot be told from the prompt. Tokenise it yourself and use ProbeSet.from_tensors with a mask."
        )
    border = lead + _length_of_prompt(tokenizer, prompt, completion, plain)
    return fit(ids, [place >= border for place in range(len(ids))], lead, max_length)


def fit(ids: Sequence[int], counted: Sequence[bool], lead: int, max_length: int) -> Encoded:
    """Cut to `max_length`: first what comes before the first counted token, but not the first `lead`, then the end."""
    border = next((place for place, counts in enumerate(counted) if counts), len(counted))
    room = max_length - lead - (len(ids) - border)
    kept = list(range(lead, border))
    if room < len(kept):
        # One token before the first counted one stays whatever happens: it needs a predecessor.
        left = max(room, 0 if lead else 1)
        kept = kept[max(len(kept) - left, 0) :]
    kept = [*range(lead), *kept, *range(border, len(ids))][:max_length]
    return Encoded(
        ids=[ids[place] for place in kept], counted=[counted[place] for place in kept], num_cut=len(ids) - len(kept)
    )


def marks_of(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The token ids of a text, nothing added to it, and which of them hold a character of one of the spans."""
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = out["offset_mapping"]
        counted = [any(stop > first and start < last for first, last in spans) for start, stop in places]
        return [int(number) for number in out["input_ids"]], counted
    ids = _ids(tokenizer, text, special=False)
    counted = [False] * len(ids)
    for first, last in spans:
        start, _ = _shared(tokenizer, text[:first], ids)
        stop, is_whole = _shared(tokenizer, text[:last], ids)
        # A token that crosses the end holds characters of the span.
        stop = min(stop + (not is_whole), len(ids))
        counted[start:stop] = [True] * (stop - start)
    return ids, counted


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    return [int(number) for number in tokenizer(text, add_special_tokens=special)["input_ids"]]


def _place_of(part: Sequence[int], whole: Sequence[int]) -> int | None:
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), None)


def _length_of_prompt(tokenizer: Any, prompt: str, completion: str, plain: Sequence[int]) -> int:
    """How many tokens of the whole text come before the completion's first one."""
    shared, is_whole = _shared(tokenizer, prompt, plain)
    if not is_whole and getattr(tokenizer, "is_fast", False):
        # Merged across the border: only the tokens' places in the text tell which of them are still all prompt.
        places = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return next((token for token, (_, stop) in enumerate(places) if stop > len(prompt)), len(plain))
    return shared


def _shared(tokenizer: Any, beginning: str, plain: Sequence[int]) -> tuple[int, bool]:
    """How many tokens a text shares with its beginning alone, and whether these are all tokens of the beginning."""
    alone = _ids(tokenizer, beginning, special=False)
    shared = 0
    while shared < min(len(alone), len(plain)) and alone[shared] == plain[shared]:
        shared += 1
    return shared, shared == len(alone)
