"""How alike several runs are: the directions in which their activations moved, their groups, their tokens.

Two runs can be equally far from the reference and have gone elsewhere; which way a run takes can hang on its seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffsensor.errors import DiffSensorError
from diffsensor.record import RecordContents
from diffsensor.report.contents import Loaded, spread
from diffsensor.report.texts import number, visible
from diffsensor.report.types import Run
from diffsensor.types import ALL_PROBES, FIXED_BANK, WORST_GROUP, TokenShift, log_key

#: How much weight rank-biased overlap gives to the next place of a list: the first ten places have 86 % of it.
PERSISTENCE = 0.9
#: At so many steps, evenly spaced, directions are compared; at fewer where the vectors are large.
STEPS, LARGE = 24, 4_000_000
#: Below so many groups a correlation says nothing.
LEAST_GROUPS = 3
#: Two runs are told to be equally far and elsewhere: one at most so many times as far as the other, cosine below.
EQUALLY_FAR, ELSEWHERE = 1.25, 0.5

FORMULAS = {
    "directions": "cos(d_A, d_B) = d_A·d_B / (|d_A| |d_B|), d = mean over counted positions of all probes of "
    "h_live - h_reference at a hookpoint. 1: the same way, 0: at right angles. Unrelated directions that are spread "
    "evenly in w dimensions give 0 ± 1/sqrt(w); activations are not spread evenly, so unrelated runs can give more.",
    "groups": "Pearson's r over groups g of (x_A,g , x_B,g), x = the metric's reading of the group. 1: the same groups "
    "moved. With few groups r is uncertain: by about (1 - r^2)/sqrt(n - 1).",
    "overlap": "|A ∩ B| / k of the k tokens that gained most probability over all probes.",
    "rank_biased_overlap": "Extrapolated rank-biased overlap of the same lists (Webber, Moffat and Zobel 2010): "
    "(X_k/k) p^k + (1-p)/p Σ_{d=1..k} (X_d/d) p^d, X_d = how many tokens the first d of both lists share, p = 0.9. "
    "0: nothing shared, 1: the same list in the same order.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Directions:
    """The cosines of two runs' drift directions at one step, by hookpoint, and their mean over hookpoints by step."""

    step: int
    cosines: Mapping[str, float]
    widths: Mapping[str, int]
    steps: tuple[int, ...]
    means: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two of the records (by their place in the report) and how alike they are; None where that cannot be told."""

    one: int
    other: int
    step: int
    directions: Directions | None
    metric: str
    num_groups: int
    group_correlation: float
    token_step: int
    num_tokens: int
    token_overlap: float
    token_rank_biased_overlap: float
    not_compared: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedToken:
    """A token among those that gained most probability in at least one run, with its place (from 0) in each."""

    token_id: int
    token: str
    ranks: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several records beside each other."""

    sentences: tuple[str, ...]
    differences: Mapping[str, tuple[Any, ...]]
    pairs: tuple[Pair, ...]
    tokens: tuple[SharedToken, ...]
    formulas: Mapping[str, str]


def compare(loaded: Sequence[Loaded], runs: Sequence[Run]) -> Comparison:
    """How alike the records are, two by two."""
    vectors = [_Vectors(each.contents) for each in loaded]
    pairs = [_pair(loaded, runs, vectors, one, other) for one, other in combinations(range(len(loaded)), 2)]
    return Comparison(
        sentences=tuple(_sentences(runs, pairs)),
        differences=_differences([run.provenance for run in runs]),
        pairs=tuple(pairs),
        tokens=_shared_tokens([_gained(each.contents, None) for each in loaded]),
        formulas=FORMULAS,
    )


def letter(place: int) -> str:
    """What a record is called in tables and plots: A, B, ... and from the 27th on its number."""
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def _sentences(runs: Sequence[Run], pairs: Sequence[Pair]) -> list[str]:
    """What the comparison says, in short."""
    first = next((run.figures[0] for run in runs if run.figures), None)
    if first is None:
        return []
    last = [next((each for each in run.figures if each.metric == first.metric), None) for run in runs]
    values = [each.value if each is not None else math.nan for each in last]
    told = [value for value in values if math.isfinite(value)]
    said = []
    if told:
        said.append(
            f"At their last looks, {visible(first.metric)} is {number(min(told))} to {number(max(told))} "
            f"{visible(first.unit)} over all probes."
        )
    compared = [(pair.directions.means[-1], pair) for pair in pairs if pair.directions and pair.directions.means]
    if not compared:
        return said
    lowest, pair = min(compared, key=lambda each: each[0])
    highest = max(cosine for cosine, _ in compared)
    of = f"{number(lowest)} to {number(highest)}" if len(compared) > 1 else number(lowest)
    said.append(f"Their activations moved in directions with a cosine of {of} (mean over hookpoints).")
    near, far = sorted((abs(values[pair.one]), abs(values[pair.other])))
    if lowest < ELSEWHERE and 0 < far <= EQUALLY_FAR * near:
        said.append(
            f"{letter(pair.one)} and {letter(pair.other)} are about equally far from the reference and went different "
            f"ways: {number(values[pair.one])} and {number(values[pair.other])}, cosine {number(lowest)}."
        )
    return said


def _pair(loaded: Sequence[Loaded], runs: Sequence[Run], vectors: "Sequence[_Vectors]", one: int, other: int) -> Pair:
    left, right = loaded[one].contents, loaded[other].contents
    not_compared = []
    rolling = bool(left.bank_probes or right.bank_probes)
    same_probes = left.manifest["probes"] == right.manifest["probes"] and not rolling
    same_reference = left.manifest["reference"] == right.manifest["reference"]
    if rolling:
        not_compared.append("A rolling bank holds other texts in each run: no reading of one is like one of the other.")
    elif not same_probes:
        not_compared.append("Their probes differ (or the tokenizer): no reading of one is like one of the other.")
    elif not same_reference:
        not_compared.append("Their references differ, so directions in one model mean nothing in the other.")
    step, metric, profiles = _profiles(left, right, runs[one], runs[other]) if same_probes else (-1, "", ([], []))
    directions = None
    if same_probes and same_reference:
        try:
            directions = vectors[one].beside(vectors[other])
        except (DiffSensorError, OSError) as error:
            not_compared.append(f"The directions cannot be read. {error}")
        else:
            if directions is None:
                not_compared.append("They keep no mean differences of activations at a common step.")
    token_step, first, second = _lists(left, right) if same_probes else (-1, [], [])
    depth = min(len(first), len(second))
    return Pair(
        one=one,
        other=other,
        step=step,
        directions=directions,
        metric=metric,
        num_groups=len(profiles[0]),
        group_correlation=correlation(*profiles),
        token_step=token_step,
        num_tokens=depth,
        token_overlap=len({*first[:depth]} & {*second[:depth]}) / depth if depth else math.nan,
        token_rank_biased_overlap=rank_biased_overlap(first[:depth], second[:depth]),
        not_compared=tuple(not_compared),
    )


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's r; NaN for fewer than 3 values, or where one side is all the same."""
    if len(one) < LEAST_GROUPS:
        return math.nan
    left, right = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    left, right = left - left.mean(), right - right.mean()
    size = float(left.norm() * right.norm())
    return float(left @ right) / size if size > 0 else math.nan


def rank_biased_overlap(one: Sequence[int], other: Sequence[int], persistence: float = PERSISTENCE) -> float:
    """Of two lists of the same length, best first; NaN for empty ones. See `FORMULAS`."""
    depth = len(one)
    if not depth:
        return math.nan
    shared = [len({*one[:place]} & {*other[:place]}) / place for place in range(1, depth + 1)]
    summed = sum(share * persistence**place for place, share in enumerate(shared, start=1))
    return shared[-1] * persistence**depth + (1 - persistence) / persistence * summed


def _profiles(
    left: RecordContents, right: RecordContents, one: Run, other: Run
) -> tuple[int, str, tuple[list[float], list[float]]]:
    """The readings of each group that both have, at the last step that both read, of the first metric of both."""
    known = {figure.metric for figure in other.figures}
    metric = next((each.metric for each in one.figures if each.metric in known), "")
    found = [_of_groups(contents, metric) for contents in (left, right)]
    steps = found[0].keys() & found[1].keys()
    if not steps:
        return -1, metric, ([], [])
    step = max(steps)
    first, second = found[0][step], found[1][step]
    groups = [name for name in first if name in second and math.isfinite(first[name]) and math.isfinite(second[name])]
    return step, metric, ([first[name] for name in groups], [second[name] for name in groups])


def _of_groups(contents: RecordContents, metric: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    bank = bank_of(contents)
    for reading in contents.readings:
        if reading.metric == metric and reading.bank == bank and not reading.hookpoint:
            of_step = found.setdefault(reading.step, {})
            if reading.group not in (ALL_PROBES, WORST_GROUP):
                of_step[reading.group] = reading.value
    return found


def _gained(contents: RecordContents, step: int | None) -> list[TokenShift]:
    """The tokens that gained most probability over all probes, best first; at the last step where none is given."""
    bank = bank_of(contents)
    shifts = [
        shift
        for shift in contents.token_shifts
        if not shift.group and shift.bank == bank and (shift.ranked_by, shift.prefers) == ("mass_moved", "live")
    ]
    wanted = step if step is not None else max((shift.step for shift in shifts), default=-1)
    return sorted((shift for shift in shifts if shift.step == wanted), key=lambda shift: shift.rank)


def bank_of(contents: RecordContents) -> str:
    """What the probes of a record are called in it. A monitor has one bank, and a record one monitor."""
    return contents.readings[0].bank if contents.readings else FIXED_BANK


def _lists(left: RecordContents, right: RecordContents) -> tuple[int, list[int], list[int]]:
    steps = {shift.step for shift in left.token_shifts} & {shift.step for shift in right.token_shifts}
    if not steps:
        return -1, [], []
    step = max(steps)
    one, other = ([shift.token_id for shift in _gained(contents, step)] for contents in (left, right))
    return step, one, other


def _shared_tokens(lists: Sequence[Sequence[TokenShift]]) -> tuple[SharedToken, ...]:
    names = {shift.token_id: shift.token for each in lists for shift in each}
    ranks = [{shift.token_id: shift.rank for shift in each} for each in lists]
    tokens = [
        SharedToken(token_id=token, token=name, ranks=tuple(each.get(token) for each in ranks))
        for token, name in names.items()
    ]
    return tuple(sorted(tokens, key=_by_sharing))


def _by_sharing(token: SharedToken) -> tuple[int, int]:
    """Those that most runs share come first, then by their places."""
    held = [rank for rank in token.ranks if rank is not None]
    return -len(held), sum(held)


class _Vectors:
    """The mean differences that one record keeps, of all probes, read when they are wanted."""

    def __init__(self, contents: RecordContents) -> None:
        self._contents = contents
        self._read: dict[int, dict[str, Float[Tensor, " width"]]] = {}
        hookpoints = contents.manifest.get("hookpoints", [])
        self._keys = {
            str(name): log_key("mean_difference", hookpoint=str(name))
            for name in (hookpoints if isinstance(hookpoints, list) else [])
        }

    def at(self, step: int) -> dict[str, Float[Tensor, " width"]]:
        if step not in self._read:
            tensors = self._contents.tensors(step)
            self._read[step] = {name: tensors[key].double() for name, key in self._keys.items() if key in tensors}
        return self._read[step]

    def beside(self, other: "_Vectors") -> Directions | None:
        common = sorted({*self._contents.tensor_steps} & {*other._contents.tensor_steps})
        if not common:
            return None
        sizes = [file.stat().st_size for file in (self._contents.path / "tensors").glob("*.safetensors")]
        few = max(2, int(STEPS * LARGE / max(sizes))) if max(sizes, default=0) > LARGE else STEPS
        steps, means = [], []
        for step in (common[place] for place in spread(len(common), few)):
            cosines = _cosines(self.at(step), other.at(step))
            told = [value for value in cosines.values() if math.isfinite(value)]
            if told:
                steps.append(step)
                means.append(sum(told) / len(told))
        last = common[-1]
        return Directions(
            step=last,
            cosines=_cosines(self.at(last), other.at(last)),
            widths={name: len(vector) for name, vector in self.at(last).items()},
            steps=tuple(steps),
            means=tuple(means),
        )


def _cosines(
    one: Mapping[str, Float[Tensor, " width"]], other: Mapping[str, Float[Tensor, " width"]]
) -> dict[str, float]:
    """At each hookpoint of both; NaN where one of them has not moved."""
    found = {}
    for name, left in one.items():
        if name in other and len(other[name]) == len(left):
            size = float(left.norm() * other[name].norm())
            found[name] = float(left @ other[name]) / size if size > 0 else math.nan
    return found


def _differences(provenances: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What the records' configurations differ in, by dotted name; None where one has no such entry."""
    flat = [_flattened(provenance) for provenance in provenances]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = {name: tuple(each.get(name) for each in flat) for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _flattened(members: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in members.items():
        if isinstance(value, Mapping) and value:
            flat |= _flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            flat |= _flattened({str(place): part for place, part in enumerate(value)}, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
