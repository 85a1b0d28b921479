"""The nouns: what is passed between the floors. Frozen, with keyword arguments only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.errors import ConfigError

Scale = Literal["linear", "log"]
Cost = Literal["light", "full"]
Worst = Literal["largest", "furthest_from_zero"]
Severity = Literal["info", "warning", "critical"]
#: What a rule says of one subject: within its limit or null, beyond it, or that it could not tell.
State = Literal["quiet", "breach", "unknown"]
#: What an action may ask of a run.
Ability = Literal["stop", "save_checkpoint", "scale_learning_rate", "set_kl_coefficient", "rollback", "pause"]

FIXED_BANK = "fixed"
#: A reading nearer to 0 than so many noise floors is no measurable drift.
FLOORS_TO_SEE = 3.0
ALL_PROBES = ""
WORST_GROUP = "worst"
#: Words that mean something in place of a group's name, so no group may be called so.
RESERVED_GROUPS = frozenset({ALL_PROBES, WORST_GROUP, "*"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """What a drift metric's number means: read this before comparing it with another paper's.

    `direction` names the order of the two models, `estimator` how the number is got, `positions` which
    ones count, `dtype` what it is computed in. `scale` is the scale on which its error is symmetric.
    `worst` says which group is the worst one: of a distance the largest, of a signed change the one
    furthest from zero. `at` says whether it is read once, on the outputs, or at each hookpoint; `by_group` whether
    also for single groups. What is `sealed` may alert a person, but never drives an action.
    """

    name: str
    unit: str
    low: float
    high: float
    direction: str
    estimator: str
    positions: str = "counted"
    dtype: str = "float32, sums in float64"
    scale: Scale = "linear"
    worst: Worst = "largest"
    blind_to: str = ""
    at: Literal["outputs", "hookpoints"] = "outputs"
    by_group: bool = True
    sealed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One number that a sensor read at one step, with its error.

    `stderr` is the standard error over probes (tokens of one probe are not independent), NaN where none
    is defined. `bound` is by how much the true value may lie above `value`; 0 where the number is exact.
    `noise_floor` is by how much the same weights read differently in another batch split, NaN where that was
    not measured. `group` is "" for all probes, or "worst" for the worst group, which `note` then names. `note` is
    otherwise a caution that belongs to this value.
    """

    step: int
    sensor: str
    metric: str
    value: float
    unit: str
    stderr: float = math.nan
    num_probes: int = 0
    bank: str = FIXED_BANK
    group: str = ALL_PROBES
    hookpoint: str = ""
    bound: float = 0.0
    scale: Scale = "linear"
    noise_floor: float = math.nan
    note: str = ""

    @property
    def is_measurable(self) -> bool:
        """Whether it is at least 3 noise floors from 0. Below, it is reported as no measurable drift.

        True where no floor was measured: then nothing is known against it. True of a NaN, which is no zero.
        """
        return not abs(self.value) <= FLOORS_TO_SEE * self.noise_floor

    @property
    def key(self) -> str:
        """The name under which loggers show it: diffsensor/<metric>[/bank=...][/group=...][/at=...]."""
        return log_key(self.metric, bank=self.bank, group=self.group, hookpoint=self.hookpoint)

    @property
    def floor_key(self) -> str:
        """The name under which loggers show its noise floor."""
        return f"{self.key}/noise_floor"


def log_key(metric: str, *, bank: str = FIXED_BANK, group: str = ALL_PROBES, hookpoint: str = "") -> str:
    """The one place where a log key is put together; parts that are the default are left out."""
    parts = [f"diffsensor/{metric}"]
    if bank != FIXED_BANK:
        parts.append(f"bank={bank}")
    if group != ALL_PROBES:
        parts.append(f"group={group}")
    if hookpoint:
        parts.append(f"at={hookpoint}")
    return "/".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShift:
    """One line of the token table: a token that the live model prefers more, or less, than the reference.

    `mass_moved` is the mean of p_live - p_ref over the group's counted positions (in [-1, 1]), with its
    standard error over probes; `logit_difference` the mean of z_live - z_ref there. `ranked_by` says
    which of the two put the token into the table, `rank` at which place (0 is the strongest), `prefers`
    which model likes it better. `context` ends where the change in probability is largest.
    """

    step: int
    group: str = ALL_PROBES
    bank: str = FIXED_BANK
    ranked_by: Literal["mass_moved", "logit_difference"]
    prefers: Literal["live", "reference"]
    rank: int
    token_id: int
    token: str
    mass_moved: float
    mass_moved_stderr: float
    logit_difference: float
    probe: str
    position: int
    context: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BankProbe:
    """A probe that a rolling bank held at one look: other looks were of others.

    `probe` is its name: the number of the item among all that were offered (to its group, whose name comes first).
    `age` is how many were offered after it, `drift` its own mean of the output metric `metric`, NaN where that was not
    read.
    """

    step: int
    bank: str
    probe: str
    group: str = ALL_PROBES
    age: int
    num_counted: int
    metric: str = ""
    drift: float = math.nan
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that must not be, found while looking: its kind, what it befell, and what happened, as a clause.

    `nonfinite`: a reading is NaN or infinite. `sensor`: a sensor failed and gave no reading. `frozen`: a parameter
    that does not train has moved. `fingerprint`: probes, reference or circumstances are not those of the start.
    `replicas`: processes that should hold the same weights do not.
    """

    kind: Literal["nonfinite", "sensor", "frozen", "fingerprint", "replicas"]
    subject: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One sentence for a person: what moved, how far, against which limit or null, since when, what to do next.

    `subject` is what the rule judged, mostly a log key. `value`, `stderr`, `threshold` and `unit` are those of the
    reading that decided, NaN and "" where it was none. `first_step` is the first step of this breach; `suppressed`
    how many alerts of this rule on this subject were withheld since the last one. `is_repeat`: the run went on from
    an older checkpoint and this alert was on record before.
    """

    step: int
    rule: str
    severity: Severity
    subject: str
    message: str
    value: float = math.nan
    stderr: float = math.nan
    threshold: float = math.nan
    unit: str = ""
    first_step: int
    suppressed: int = 0
    is_repeat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a checkpoint may be released: with the reading that decided, its error and its limit.

    Unknown is not a pass, and neither is a verdict that is missing. `reason` is a sentence. `rule` and `subject` name
    what decided, "" where nothing speaks against the checkpoint.
    """

    step: int
    outcome: Literal["pass", "fail", "unknown"]
    reason: str
    rule: str = ""
    subject: str = ""
    value: float = math.nan
    stderr: float = math.nan
    threshold: float = math.nan
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTaken:
    """One request to the run, and what became of it."""

    step: int
    rule: str
    action: str
    outcome: Literal["done", "refused", "failed", "already done"]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one look at the model brought: readings, lines of the token table, vectors worth keeping.

    `by_probe` holds, for metrics on the outputs, the mean of each probe, NaN for a probe without a counted
    position; nothing where the probes are others at each look: those are named in `bank_probes` instead. `faults`
    are what went wrong meanwhile, `alerts` what rules made of it all. `actions` and `verdicts` come later, each in
    findings of its own, once they are there.
    """

    step: int
    readings: tuple[Reading, ...] = ()
    token_shifts: tuple[TokenShift, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    by_probe: Mapping[str, Float[Tensor, " probe"]] = field(default_factory=dict)
    bank_probes: tuple[BankProbe, ...] = ()
    faults: tuple[Fault, ...] = ()
    alerts: tuple[Alert, ...] = ()
    actions: tuple[ActionTaken, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def without_text(self) -> "Findings":
        """The same with no token and no context in words; token ids stay, for whoever has the tokenizer."""
        shifts = tuple(replace(shift, token="", context="") for shift in self.token_shifts)
        bank_probes = tuple(replace(probe, text="") for probe in self.bank_probes)
        return replace(self, token_shifts=shifts, bank_probes=bank_probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a monitor is going to read: what a rule is checked against before the first step.

    `groups` has the number of probes in each group, in order of first appearance, and `group_of` the group of each
    probe ("" where it has none). Where the bank is rolling, its probes are others at each look: `groups` then has
    how many each holds, and there is no `group_of`. `progress` names what the loop will tell of its own progress
    (loss, learning rate). `probes` and `reference` are fingerprints. `schedule` and `recipe` say how the run is
    read and trained, in plain types; pilots must agree with them.
    """

    metrics: Mapping[str, MetricInfo]
    groups: Mapping[str, int]
    group_of: tuple[str, ...] = ()
    hookpoints: tuple[str, ...] = ()
    progress: tuple[str, ...] = ()
    bank: str = FIXED_BANK
    sealed: bool = False
    is_rolling: bool = False
    probes: str = ""
    reference: str = ""
    schedule: str = ""
    recipe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What a rule says of one subject at one look.

    `what` is a clause without a full stop that says what moved, how far, and against which limit or null:
    "kl_ref_live of group 'code' is 0.34 nats/token (at least 0.31 with 95 % confidence), above the limit 0.3".
    `advice` is a sentence on what to do next. `reading` is the one that decided, None where none did. `since` is the
    first step of a breach that began before this look, -1 where it begins now.
    """

    subject: str
    state: State
    what: str = ""
    since: int = -1
    reading: Reading | None = None
    threshold: float = math.nan
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a rule makes of one look: a signal for each subject it judges, and its evidence as readings."""

    signals: tuple[Signal, ...] = ()
    evidence: tuple[Reading, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass of the fixed batch plan.

    `args` and `inputs` are what the model is called with. `leading` are the dimensions that an output has before
    its last one: (rows, width) for an output [rows, width, dim], (rows,) for [rows, classes]. `index` picks the
    counted positions out of them, flattened; they are the positions `start` to `start + len(index)` of the plan.
    """

    args: tuple[Tensor, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    leading: tuple[int, ...]
    index: Int[Tensor, " pos"]
    start: int

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + len(self.index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which probe tokens are run together, and what each counted position is; the same at every reading.

    Another layout gives numbers that differ in the last digits, so the plan is part of the reference.
    `probe` is the number of the probe that a position belongs to, `offset` its place in that probe,
    `target` the token that follows it there (-1 where there is none, as for classifiers).
    """

    batches: tuple[Batch, ...]
    probe: Int[Tensor, " pos"]
    offset: Int[Tensor, " pos"]
    target: Int[Tensor, " pos"]
    packed: bool

    @property
    def num_positions(self) -> int:
        return len(self.probe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a model showed in one batch of the plan, at the counted positions only.

    `hidden` is what the output head gets (for a module without a separate head: the logits themselves);
    `activations` are the outputs of the hookpoints.
    """

    positions: slice
    hidden: Float[Tensor, "pos dim"]
    activations: Mapping[str, Float[Tensor, "pos width"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRows:
    """The cached answers of the reference at some counted positions.

    `log_partition` is log sum_v exp z_v in float32, which shifts all exponents; `log_sum` what is left of it
    after the shift, in float64, as are `entropy` (nats) and `target_logprob`. `top` are its favourite tokens,
    the first one first, and `top_probability` their probabilities.
    `mean_unembedding` is sum_v q_v w_v, there only where the head is linear and does not train.
    """

    hidden: Float[Tensor, "pos dim"]
    target: Int[Tensor, " pos"]
    top: Int[Tensor, "pos top"]
    top_probability: Float[Tensor, "pos top"]
    log_partition: Float[Tensor, " pos"]
    log_sum: Float[Tensor, " pos"]
    entropy: Float[Tensor, " pos"]
    target_logprob: Float[Tensor, " pos"]
    mean_unembedding: Float[Tensor, "pos dim"] | None = None

    def __getitem__(self, part: slice) -> "ReferenceRows":
        kept = {name: rows for name in self.__slots__ if (rows := getattr(self, name)) is not None}
        return replace(self, **{name: rows[part] for name, rows in kept.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The circumstances that change a model's numbers without changing its weights.

    Two readings are comparable only where these agree: another dtype, attention kernel, thread count or
    torch version moves the outputs by more than an early fine-tune does.
    """

    dtype: str
    autocast: str
    attention: str
    device: str
    threads: int
    torch: str

    def differences(self, other: "Context") -> list[str]:
        """What differs, in words: `dtype: torch.float32 there, torch.bfloat16 here`."""
        return [
            f"{name}: {getattr(self, name)} there, {getattr(other, name)} here"
            for name in self.__slots__
            if getattr(self, name) != getattr(other, name)
        ]


def require_group_name(name: str) -> str:
    """`name`, unless it is reserved."""
    if name in RESERVED_GROUPS - {ALL_PROBES}:
        raise ConfigError(
            f"A group is named {name!r}, which has a meaning of its own here. Reserved: '*', 'worst'. "
            "Give the group another name."
        )
    return name
