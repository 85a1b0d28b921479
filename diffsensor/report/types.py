"""The nouns of a report: what it says of one record. Foreign text in them is as it was given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffsensor.types import ActionTaken, Alert, BankProbe, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How much is drawn: points of a curve, columns of a heatmap, characters of a context."""

    points: int = 160
    columns: int = 120
    context: int = 360


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the run stands: what the gate said last, or what the rules say in its place; and why, in sentences."""

    outcome: Literal["pass", "fail", "unknown", "not judged"]
    sentence: str
    because: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric over all probes at the last look, with its 95 % interval, and the group that was worst there."""

    key: str
    metric: str
    bank: str
    step: int
    value: float
    stderr: float
    low: float
    high: float
    unit: str
    num_probes: int
    noise_floor: float
    is_measurable: bool
    worst_group: str
    worst_value: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One reading over the steps, with its 95 % interval.

    Of a long one only some points are here: the first and the last, and of each stretch between them the lowest and
    the highest. `num_looks` is how many it has in the record.
    """

    key: str
    metric: str
    bank: str
    group: str
    hookpoint: str
    unit: str
    noise_floor: float
    num_probes: int
    num_looks: int
    num_broken: int
    steps: tuple[int, ...]
    values: tuple[float, ...]
    stderrs: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """A metric at each hookpoint (`rows`, in the order of the model) over looks, or over groups at the last look."""

    metric: str
    bank: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    over: Literal["step", "group"]
    step: int
    num_columns: int
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A limit that the record knows, because an alert or a verdict named it: of the curve with this key."""

    key: str
    threshold: float
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A line of the token table; `since` is the first look of those, up to the last one, that all had it."""

    rank: int
    token_id: int
    token: str
    mass_moved: float
    mass_moved_stderr: float
    logit_difference: float
    since: int
    probe: str
    position: int
    context: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """The tokens that one of the two models prefers, in one group, at the last look that has a table."""

    step: int
    bank: str
    group: str
    ranked_by: str
    prefers: str
    rows: tuple[TokenRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What looking has cost, as far as the record knows, and what it does not know."""

    num_looks: int
    num_floor_looks: int
    positions_per_look: int | None
    positions_read: int | None
    steps_between_looks: float
    num_readings: int
    bytes_on_disk: int
    not_known: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """Something that these probes cannot see, or see badly."""

    about: str
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One record, as the report tells of it. Foreign text is as it was given: whoever shows it makes it harmless."""

    name: str
    path: str
    standing: Standing
    warnings: tuple[str, ...]
    first_step: int
    last_step: int
    num_looks: int
    metrics: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, int]
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    told: tuple[Curve, ...]
    heatmaps: tuple[Heatmap, ...]
    thresholds: tuple[Threshold, ...]
    tokens: tuple[TokenTable, ...]
    has_token_text: bool
    bank_probes: tuple[BankProbe, ...]
    num_bank_probes: int
    num_alerts: int
    num_actions: int
    num_verdicts: int
    alerts: tuple[Alert, ...]
    actions: tuple[ActionTaken, ...]
    verdicts: tuple[Verdict, ...]
    cost: Cost
    cautions: tuple[Caution, ...]
    provenance: Mapping[str, Any]
