"""The verbs: what a part must do to take part. Each method is documented here, once."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsensor.types import Findings, MetricInfo, Piece, Plan, ReferenceRows


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
        """Take in what the live model showed in one batch. Pieces come in the order of the plan."""
        ...

    def finish(self, step: int) -> Findings:
        """Say what was found once all pieces were taken in."""
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
class Sink(Protocol):
    """Takes findings somewhere: a record, a logger."""

    def write(self, findings: Findings) -> None: ...

    def close(self) -> None: ...
