"""The verbs: what a part must do to take part. Each method is documented here, once."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.types import (
    Ability,
    Alert,
    Findings,
    Judgement,
    MetricInfo,
    Piece,
    Plan,
    Reading,
    ReferenceRows,
    Scope,
    Severity,
    Verdict,
)


@runtime_checkable
class Schedule(Protocol):
    """Says at which steps to look."""

    def __call__(self, step: int) -> bool: ...


@runtime_checkable
class Probes(Protocol):
    """The fixed inputs, as far as a sensor needs to know them."""

    @property
    def names(self) -> Sequence[str]:
        """One name for each probe."""
        ...

    @property
    def groups(self) -> Sequence[str]:
        """The group of each probe, "" where it has none."""
        ...

    @property
    def group_names(self) -> Sequence[str]:
        """The groups that there are, in order of first appearance, without ""."""
        ...

    @property
    def weights(self) -> Float[Tensor, " probe"]:
        """How much each probe counts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, or their numbers where no tokenizer is at hand."""
        ...

    def tokens_of(self, probe: int) -> Int[Tensor, " token"]:
        """The token ids of one probe; empty for probes that are no text."""
        ...


@runtime_checkable
class OutputHead(Protocol):
    """The last map of a model, from hidden state to logits, in float32 and a few tokens at a time."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def is_linear(self) -> bool:
        """Whether logits are W h + b, with nothing after."""
        ...

    def logits(
        self, hidden: Float[Tensor, "pos dim"], start: int, stop: int, out: Float[Tensor, "pos tile"] | None = None
    ) -> Float[Tensor, "pos tile"]:
        """The float32 logits of the tokens start <= v < stop; written into `out` where one is given."""
        ...

    def rows(self, tokens: Int[Tensor, " token"]) -> "OutputHead":
        """The head for these tokens alone."""
        ...


@runtime_checkable
class ReferenceAnswers(Protocol):
    """What the reference model answered, computed once."""

    @property
    def probes(self) -> Probes: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def hookpoints(self) -> Sequence[str]: ...

    def activation(self, hookpoint: str, positions: slice, device: torch.device) -> Float[Tensor, "pos width"]: ...

    def sinks(self, hookpoint: str) -> Int[Tensor, " sink"]:
        """The counted positions whose norm dwarfs all others there; no activation metric counts them."""
        ...

    def rows(self, positions: slice, device: torch.device) -> ReferenceRows:
        """What the reference answered at some counted positions, on `device`."""
        ...

    def strata(self, positions: slice, device: torch.device) -> Float[Tensor, "stratum pos"]:
        """The weight of each position: row 0 in all probes, then in each of `probes.group_names`."""
        ...

    def token_mass(self) -> Float[Tensor, "stratum vocab"]:
        """Weighted sums of the reference's probabilities over the positions of each stratum."""
        ...

    def shares_head(self, live_head: OutputHead) -> bool:
        """Whether the live head is bit for bit the reference's, so that one head does for both."""
        ...

    def head_beside(self, live_head: OutputHead) -> OutputHead:
        """The reference's own head: stored, or the live one where that is the same."""
        ...


@runtime_checkable
class Fold(Protocol):
    """One reading of one sensor while it is being taken."""

    def update(self, piece: Piece) -> None:
        """Take in what the live model showed in one batch. Pieces come in the order of the plan.

        Where several processes share a look, each fold sees some of the batches, and maybe none.
        """
        ...

    def sums(self) -> Mapping[str, Tensor]:
        """All that was taken in, as tensors that can be added up.

        Tensors of the same names, shapes and dtypes from folds that saw other pieces come, added up, to what one fold
        would hold that saw all of them: sums, or rows that only the fold which saw their position fills in.
        """
        ...

    def finish(self, step: int, sums: Mapping[str, Tensor]) -> Findings:
        """Say what was found, from the sums over all pieces. In one process those are its own."""
        ...


@runtime_checkable
class Sensor(Protocol):
    """Reads the live model against the reference. Never changes the model."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        """What it reads, by metric name."""
        ...

    def open(self, reference: ReferenceAnswers, live_head: OutputHead) -> Fold:
        """Begin a reading."""
        ...


@runtime_checkable
class Teller(Protocol):
    """Tells what the loop knows of itself, beside what was read at the same look. Never looks at the model.

    Its state is of plain types and complete: one that is loaded with it goes on as if nothing had happened.
    """

    @property
    def name(self) -> str:
        """The sensor under whose name its readings stand."""
        ...

    @property
    def metrics(self) -> Mapping[str, MetricInfo]:
        """What it tells, by metric name."""
        ...

    def tell(self, findings: Findings) -> Sequence[Reading]:
        """What belongs beside these readings; what is not known now is left out.

        Called once for each look; of several processes, in the first one.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Takes findings somewhere: a record, a logger."""

    def write(self, findings: Findings) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Rule(Protocol):
    """Turns what was read, look by look, into signals. What happens next is not its business.

    Its state is of plain types and complete: a rule that is loaded with it goes on as if nothing had happened.
    """

    @property
    def name(self) -> str:
        """Tells the rules of one monitor apart, in alerts and in stored state."""
        ...

    @property
    def severity(self) -> Severity: ...

    @property
    def cooldown(self) -> int:
        """After an alert on a subject, further ones within so many looks are counted, not sent."""
        ...

    @property
    def metrics(self) -> frozenset[str]:
        """The metrics it looks at; empty for one that looks at everything."""
        ...

    @property
    def may_stop(self) -> bool:
        """Whether it may, by itself, end or turn back a run. False for one that only ever warns."""
        ...

    def check(self, scope: Scope) -> None:
        """Raise `ConfigError`, with the closest valid choice, unless this rule can work on what will be read.

        Called before the first look, and again when a run goes on.
        """
        ...

    def update(self, findings: Findings) -> Judgement:
        """Take in one look. Looks come in order of step; alerts are not yet in the findings."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Criterion(Protocol):
    """A rule that can also judge one look by itself, without what came before: what a gate is made of."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> frozenset[str]: ...

    def check(self, scope: Scope) -> None: ...

    def verdict(self, findings: Findings) -> Verdict:
        """Pass, fail, or unknown where what it needs was not read, or does not tell."""
        ...


@runtime_checkable
class Controller(Protocol):
    """What a run lets an action ask for. Each request is carried out between two steps.

    Each returns a clause on what it did ("learning rate 1e-4 -> 5e-5 in 2 groups") and raises `RefusedError`, with a
    sentence, where it cannot be done now.
    """

    def cannot(self, ability: Ability) -> str:
        """Why this run can never do that, as a sentence with the remedy; "" where it can."""
        ...

    def stop(self, reason: str) -> str:
        """End the run after this step, as if it were over: with its last checkpoint and its closing hooks."""
        ...

    def save_checkpoint(self, reason: str) -> str: ...

    def scale_learning_rate(self, factor: float) -> str:
        """Multiply every learning rate, and those from which a scheduler makes them, by `factor`."""
        ...

    def kl_coefficient(self) -> float:
        """The coefficient of the KL penalty as it is now."""
        ...

    def set_kl_coefficient(self, value: float) -> str: ...

    def keep(self, step: int) -> None:
        """The model as it is now has passed: this is where `rollback` goes. Called only if something may roll back."""
        ...

    def rollback(self, reason: str) -> str:
        """Put weights, optimizer and random states back to those last kept. Data and step go on."""
        ...

    def pause(self, reason: str) -> str:
        """Wait until a person lets the run go on."""
        ...


@runtime_checkable
class Action(Protocol):
    """One thing to be asked of a run when a rule is breached."""

    @property
    def name(self) -> str:
        """As it is shown in the record: scale_learning_rate(0.5)."""
        ...

    @property
    def needs(self) -> Ability | None:
        """What the run must be able to do for it; None where nothing is asked of the run."""
        ...

    @property
    def at_most(self) -> int | None:
        """How often in a run; None for any number of times."""
        ...

    def __call__(self, alert: Alert, controller: Controller) -> str:
        """Ask for it. Returns a clause on what was done; raises `RefusedError` where it was not."""
        ...


@runtime_checkable
class Budget(Protocol):
    """Keeps the drift near a limit, by a KL penalty whose coefficient it moves after each look."""

    @property
    def metrics(self) -> frozenset[str]: ...

    @property
    def coefficient(self) -> float:
        """The coefficient of the KL penalty as it should be now."""
        ...

    def check(self, scope: Scope) -> None:
        """As of a rule."""
        ...

    def update(self, findings: Findings) -> float | None:
        """Take in one look. Returns the new coefficient; None to leave it, where there is nothing to go by."""
        ...

    def evidence(self, step: int) -> Reading:
        """The coefficient as a reading."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
