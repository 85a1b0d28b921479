"""What is wrong with a file of probes, and how exact a reading with them will be, before any model is asked."""

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsensor.errors import ProbeError, listed
from diffsensor.probes.lines import ProbeLine, parse_lines
from diffsensor.probes.probe_set import encode_line, told_of_date
from diffsensor.probes.tokenizing import Encoded, Tokenizer, private_copy
from diffsensor.types import ALL_PROBES

# Relative standard error of a mean KL by number of probes, in per cent. Measured on one small model: a guide and
# no law. What lies between is drawn on log scales, what lies beyond goes as 1 / sqrt(probes).
_ERROR_OF_PROBES = {32: (5.0, 7.0), 64: (4.0, 5.0), 128: (3.0, 4.0), 256: (2.0, 3.0)}
# The variance of one probe's mean, relative to a probe with 128 counted positions: 1.25 with 32, 1.44 with 16.
_BETWEEN, _WITHIN = 0.94, 8.0

#: Below these, readings say little: of all probes, and of one group (a permutation test on 8 reaches 0.008 at best).
FEWEST_PROBES, FEWEST_IN_GROUP = 32, 8
#: As many counted positions as this are worth more as two probes.
LONG = 100
_OVERLAP = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The relative standard error to expect of a mean KL over so many probes, in per cent, as a range."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCheck:
    group: str
    num_probes: int
    num_positions: int
    expected: Expected


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeCheck:
    """What a look at the records found. `problems` are worth mending, `advice` is worth thinking about.

    `duplicates` are the names of probes with the same record, or the same tokens once cut to `max_length`;
    `overlaps` those that share most of their counted tokens. `truncated` says how many tokens each probe loses.
    """

    num_probes: int
    num_positions: int
    tokens: Mapping[str, float]
    max_length: int
    groups: tuple[GroupCheck, ...]
    expected: Expected
    same_record: tuple[tuple[str, ...], ...]
    same_tokens: tuple[tuple[str, ...], ...]
    overlaps: tuple[tuple[str, str], ...]
    truncated: Mapping[str, int]
    num_unknown: int
    problems: tuple[str, ...]
    advice: tuple[str, ...]


def check_file(path: str | os.PathLike[str], tokenizer: Tokenizer, max_length: int = 128) -> ProbeCheck:
    """Look at a JSONL file as `ProbeSet.from_jsonl` reads it. Raises `ProbeError` where that would."""
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise ProbeError(
            f"{os.fspath(path)} cannot be read: {error.strerror}. Give a .jsonl file that can be read."
        ) from error
    lines = list(parse_lines(contents, os.fspath(path)))
    if not lines:
        raise ProbeError(f'{os.fspath(path)} holds no record. Give at least one such as {{"text": "..."}}.')
    return check_lines(lines, tokenizer, max_length)


def check_lines(lines: Sequence[ProbeLine], tokenizer: Tokenizer, max_length: int) -> ProbeCheck:
    """Look at the records, of which there is at least one, as a model of this tokenizer would get them."""
    own = private_copy(tokenizer)
    probes = [(line, encode_line(own, line, max_length)) for line in lines]
    encoded = {line.name: one for line, one in probes}
    lengths = sorted(len(one.ids) for one in encoded.values())
    same_record = _alike({line.name: (line.text, line.prompt, str(line.messages)) for line, _ in probes})
    same_tokens = tuple(
        names
        for names in _alike({name: (*one.ids, -1, *one.counted) for name, one in encoded.items()})
        if names not in same_record
    )
    known = {name for names in (*same_record, *same_tokens) for name in names[1:]}
    once = {name: one for name, one in encoded.items() if name not in known}
    overlaps = _overlapping(once)
    weights = {line.name: line.weight for line, _ in probes}
    members = {group: [line.name for line, _ in probes if line.group == group] for group in _groups(probes)}
    groups = tuple(
        GroupCheck(
            group=group,
            num_probes=len(names),
            num_positions=sum(_num_positions(encoded[name]) for name in names),
            expected=expected_error([(_num_positions(once[name]), weights[name]) for name in names if name in once]),
        )
        for group, names in members.items()
    )
    expected = expected_error([(_num_positions(one), weights[name]) for name, one in once.items()])
    truncated = {name: one.num_cut for name, one in encoded.items() if one.num_cut}
    unknown = getattr(own, "unk_token_id", None)
    num_unknown = 0 if unknown is None else sum(one.ids.count(unknown) for one in encoded.values())
    date = next((one.date for one in encoded.values() if one.date), "")
    return ProbeCheck(
        num_probes=len(probes),
        num_positions=sum(map(_num_positions, encoded.values())),
        tokens={
            "min": lengths[0],
            "median": statistics.median(lengths),
            "max": lengths[-1],
            "sum": sum(lengths),
        },
        max_length=max_length,
        groups=groups,
        expected=expected,
        same_record=same_record,
        same_tokens=same_tokens,
        overlaps=overlaps,
        truncated=truncated,
        num_unknown=num_unknown,
        problems=tuple(_problems(same_record, same_tokens, groups, len(once), num_unknown, sum(lengths), date)),
        advice=tuple(_advice(overlaps, truncated, groups, encoded, max_length)),
    )


def expected_error(probes: Sequence[tuple[int, float]]) -> Expected:
    """What to expect of probes with so many counted positions and such weights.

    Of fewer than two probes no error is defined: NaN.
    """
    total = sum(weight for _, weight in probes)
    if len(probes) < 2 or not total:
        return Expected(low=math.nan, high=math.nan)
    effective = total**2 / sum(weight**2 for _, weight in probes)
    variance = sum(weight * (_BETWEEN + _WITHIN / positions) for positions, weight in probes) / total
    low, high = (_interpolated(effective, side) * math.sqrt(variance) for side in (0, 1))
    return Expected(low=low, high=high)


def _interpolated(num_probes: float, side: int) -> float:
    table = sorted((at, errors[side]) for at, errors in _ERROR_OF_PROBES.items())
    first, last = table[0], table[-1]
    if num_probes <= first[0] or num_probes >= last[0]:
        at, error = first if num_probes <= first[0] else last
        return error * math.sqrt(at / num_probes)
    (below, more), (above, less) = next(
        pair for pair in itertools.pairwise(table) if pair[0][0] <= num_probes <= pair[1][0]
    )
    share = math.log(num_probes / below) / math.log(above / below)
    return float(more * (less / more) ** share)


def in_words(check: ProbeCheck) -> str:
    """What precision to expect, as a sentence."""
    if math.isnan(check.expected.high):
        return "No standard error is defined for fewer than two different probes."
    told = f"Expect about {percent(check.expected)} (one standard error) on the mean KL"
    worst = max(
        (group for group in check.groups if not math.isnan(group.expected.high)),
        key=lambda group: group.expected.high,
        default=None,
    )
    if worst is not None and len(check.groups) > 1:
        name = f"the group {worst.group!r}" if worst.group else "the probes without a group"
        told += f", {percent(worst.expected)} within {name} of {worst.num_probes}"
    return f"{told}. This is a guide, measured on one small model; readings come with errors of their own."


def percent(expected: Expected) -> str:
    """±3-4 %, or "none" where no error is defined."""
    if math.isnan(expected.high):
        return "none"
    low, high = round(expected.low), round(expected.high)
    return f"±{low} %" if low == high else f"±{low}-{high} %"


def _num_positions(encoded: Encoded) -> int:
    return sum(encoded.counted[1:])


def _groups(probes: Sequence[tuple[ProbeLine, Encoded]]) -> list[str]:
    return list(dict.fromkeys(line.group for line, _ in probes))


def _alike(contents: Mapping[str, tuple[Any, ...]]) -> tuple[tuple[str, ...], ...]:
    """The names that have the same content, in order of first appearance."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, content in contents.items():
        names.setdefault(content, []).append(name)
    return tuple(tuple(alike) for alike in names.values() if len(alike) > 1)


def _overlapping(encoded: Mapping[str, Encoded]) -> tuple[tuple[str, str], ...]:
    """Neighbours in the order of their tokens that share most of their counted ones from the beginning on."""
    # A prompt counts nothing, so a text that begins like it is no neighbour of it.
    order = sorted(encoded, key=lambda name: (encoded[name].counted.index(True), encoded[name].ids))
    found = []
    for one, other in itertools.pairwise(order):
        a, b = encoded[one], encoded[other]
        pairs = enumerate(zip(a.ids, b.ids, strict=False))
        shared = next((at for at, (x, y) in pairs if x != y), min(len(a.ids), len(b.ids)))
        counted = min(sum(a.counted[1:shared]), sum(b.counted[1:shared]))
        if counted >= _OVERLAP * min(_num_positions(a), _num_positions(b)):
            found.append((one, other))
    return tuple(found)


def _problems(
    same_record: Sequence[tuple[str, ...]],
    same_tokens: Sequence[tuple[str, ...]],
    groups: Sequence[GroupCheck],
    num_different: int,
    num_unknown: int,
    num_tokens: int,
    date: str,
) -> Iterable[str]:
    if same_record:
        yield (
            f"Some probes are the same record: {_pairs(same_record)}. Each but the first costs time and makes standard "
            "errors look smaller than they are. Remove the others, or give the first one a weight."
        )
    if same_tokens:
        yield (
            f"Some probes have the same tokens once they are cut: {_pairs(same_tokens)}. Let them differ earlier, or "
            "give a larger --max-length."
        )
    if num_different < FEWEST_PROBES:
        kinds = "There is 1 probe" if num_different == 1 else f"There are {num_different} different probes"
        yield f"{kinds}. Give at least {FEWEST_PROBES}; 128 are a good number."
    few = [group for group in groups if group.group != ALL_PROBES and group.num_probes < FEWEST_IN_GROUP]
    if few:
        told = listed(f"{group.group!r} has {group.num_probes}" for group in few)
        yield (
            f"Some groups have too few probes to be judged on their own: {told}. Give each at least "
            f"{FEWEST_IN_GROUP}, better 16, or join groups."
        )
    if num_unknown:
        yield (
            f"{num_unknown} of {num_tokens} tokens are the unknown one: the tokenizer has none for parts of the text. "
            "Is it the tokenizer of your model? If so, leave those characters out."
        )
    if date:
        yield told_of_date(date)


def _advice(
    overlaps: Sequence[tuple[str, str]],
    truncated: Mapping[str, int],
    groups: Sequence[GroupCheck],
    encoded: Mapping[str, Encoded],
    max_length: int,
) -> Iterable[str]:
    if overlaps:
        yield (
            f"Some probes share most of their counted tokens: {_pairs(overlaps)}. Together they tell little more than "
            "one of them."
        )
    if truncated:
        yield (
            f"{len(truncated)} of {len(encoded)} probes are longer than {max_length} tokens and are cut: "
            f"{listed(truncated)}. Shorten them, or give a larger --max-length (and max_length in the code)."
        )
    long = [name for name, one in encoded.items() if _num_positions(one) >= LONG]
    if 4 * len(long) > len(encoded):
        yield (
            f"{len(long)} of {len(encoded)} probes have {LONG} counted positions or more. Tokens of one probe tell "
            "much the same: for the same cost, more probes of 16 to 64 tokens give smaller errors. Keep a minority of "
            "long ones."
        )
    short = [name for name, one in encoded.items() if _num_positions(one) < 4]
    if short:
        yield f"Some probes have fewer than 4 counted positions: {listed(short)}. Longer completions say more."
    if len(groups) == 1 and groups[0].group == ALL_PROBES:
        yield 'No probe has a group. With "group" in the records, readings also say where the model moved.'


def _pairs(names: Iterable[Sequence[str]]) -> str:
    return listed((" = ".join(map(repr, alike)) for alike in names), limit=6)
