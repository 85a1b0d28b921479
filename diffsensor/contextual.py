"""The contextual bank: probes of the run itself, drawn anew at each look, and the reference that answers them then."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, nan
from typing import Any, final

import torch
from torch import nn

from diffsensor.capture import (
    Capture,
    adapter_off,
    find_model,
    frozen_copy,
    has_adapter,
    leave_no_trace,
    random_states_kept,
    refuse_changed_base,
    trained_beside,
)
from diffsensor.errors import ConfigError, ProbeError, ReferenceMismatchError, listed
from diffsensor.head import LinearHead
from diffsensor.look import Failure, told_of
from diffsensor.probes import Held, ProbeSet, RollingProbes
from diffsensor.ranks import Ranks
from diffsensor.reference import Reference, identity_of, packing_pays, takes_packed_rows
from diffsensor.types import BankProbe, Findings, MetricInfo, Reading

#: How many texts, of how many tokens, a model is tried out on before anything was offered: more than fill a row.
_TRIAL = (10, 32)
#: Every vocabulary has these.
_TRIAL_TOKENS = 4
_INSTEAD = "give the reference model: Monitor(RollingProbes(...), reference=<model, or its directory>)"


def _info(name: str, unit: str, what: str) -> MetricInfo:
    return MetricInfo(
        name=name,
        unit=unit,
        low=0.0,
        high=inf,
        direction="of the bank, not a difference",
        estimator=what,
        positions="items of the bank",
        dtype="exact",
        blind_to="what the items say: see bank_probes in the record",
        by_group=False,
    )


_PROBES = _info("bank_probes", "probes", "how many probes the bank held at this look")
_AGE = _info("bank_age", "items offered", "mean, over its probes, of how many items were offered after each")
_OFFERED = _info("bank_offered", "items offered", "how many items were offered to it since the run began")


@final
class ContextualBank:
    """Probes that roll with the run, and a model that answers for the reference whatever they are now.

    That model is the one that trains with its adapter off; or, where it has none, a frozen copy of it as it was when it
    was first seen, at the price of one more set of weights; or one that is given. It is asked at each look, in memory
    alone and in the batch layout of the live model, so that a look costs two forward passes over the bank, and the same
    weights read as exactly 0. Of several processes each asks it for all of the bank; what the bank holds is what was
    offered in the first one.
    """

    name = "bank"
    metrics: Mapping[str, MetricInfo] = {info.name: info for info in (_PROBES, _AGE, _OFFERED)}

    def __init__(self, probes: RollingProbes, reference: nn.Module | str | os.PathLike[str] | None) -> None:
        self.probes = probes
        self._given = reference
        self._other: nn.Module | None = None
        self._live: Capture | None = None
        self._asked: Capture | None = None
        self._head: LinearHead | None = None
        self._identity: dict[str, Any] = {}
        self._packs = False
        self._held: tuple[Held, ...] = ()

    def begin(
        self, model: nn.Module, *, hookpoints: str | Sequence[str], model_path: str | None, temperature: float
    ) -> Reference:
        """Find the model that answers for the reference, and what it says to a trial, by which all else is checked.

        Raises `ReferenceMismatchError` where the adapter cannot give the reference, `ConfigError` where the model
        cannot be copied, `ProbeError` where the probes may become too long for it.
        """
        self._live = live = Capture(model, hookpoints, model_path, temperature=temperature)
        if (longest := live.max_positions()) is not None and longest < self.probes.max_tokens:
            raise ProbeError(
                f"The bank's probes may have {self.probes.max_tokens} tokens, but the model reads {longest} at most. "
                f"Give RollingProbes(max_tokens={longest})."
            )
        generator = torch.Generator().manual_seed(0)
        size = (_TRIAL[0], min(_TRIAL[1], longest or _TRIAL[1]))
        trial = ProbeSet.from_tensors(torch.randint(_TRIAL_TOKENS, size, generator=generator))
        with leave_no_trace(live.root):
            live.try_out(trial.first(), is_text=True)
        self._asked = asked = live
        if (other := self._other_than(live)) is not None:
            self._asked = asked = Capture(other, live.hookpoints, temperature=temperature)
            # Whether one head will do for both is decided by whether the live one trains.
            asked.trains_head = live.trains_head
        with self._answering():
            asked.try_out(trial.first(), is_text=True)
            self._packs = asked.is_causal_lm and takes_packed_rows(asked, trial)
            self._head = _kept_head(asked, is_live=other is None)
            self._identity = identity_of(asked, self.probes.fingerprint, packed=False, adapter=False)
            return Reference.in_memory(asked, trial, self._identity, packed=False, head=self._head)

    def _other_than(self, live: Capture) -> nn.Module | None:
        """The model that answers, where it is not the live one with its adapter off."""
        if self._other is None and self._given is not None:
            self._other = _loaded(self._given, live)
        elif self._other is None and not has_adapter(live.root):
            if live.holding.is_shared:
                raise ConfigError(
                    f"{type(live.root).__name__} is sharded and has no adapter that could be switched off, and a "
                    f"sharded model cannot be copied. Train an adapter, or {_INSTEAD}."
                )
            self._other = frozen_copy(live.root)
        if self._other is None:
            refuse_changed_base(live.root, _INSTEAD)
            if trained := trained_beside(live.root):
                raise ReferenceMismatchError(
                    f"Beside its adapter {type(live.root).__name__} trains {listed(trained, 3)}: with the adapter off "
                    f"it is not the model that training began with. Train the adapter alone, or {_INSTEAD}."
                )
        return self._other

    def answers(self, ranks: Ranks) -> tuple[Reference | None, list[Failure]]:
        """The reference's answers to what the bank holds now; None where it holds nothing, or where they failed."""
        self._held, told = ranks.told("what the bank holds", self._drawn)
        reference, error = None, None
        if self._held:
            try:
                reference = self._of_reference(self._held)
            except Exception as failure:  # noqa: BLE001 - contained like a sensor
                error = failure
        reports = ranks.each("the reference's answers", told if error is None else told_of(error))
        failed = next((report for report in reports if report), "")
        return (None, [Failure("the reference", failed, error)]) if failed else (reference, [])

    def _drawn(self) -> tuple[tuple[Held, ...], str]:
        try:
            return self.probes.held(), ""
        except Exception as error:  # noqa: BLE001 - contained like a sensor
            return (), told_of(error)

    def _of_reference(self, held: Sequence[Held]) -> Reference:
        assert self._asked is not None and self._live is not None
        asked, probes = self._asked, self.probes.probes_of(held)
        assert probes is not None
        with self._answering():
            # On a GPU a token that the model does not have would end the process.
            probes.check_vocab(self._live.vocab_size())
            packed = self._packs and packing_pays(probes)
            return Reference.in_memory(asked, probes, self._identity, packed=packed, head=self._head)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """The model that answers is the reference in here, under the circumstances of the live one."""
        assert self._asked is not None and self._live is not None
        is_live = self._asked is self._live
        with (
            contextlib.nullcontext() if is_live else self._live.autocast_seen(),
            leave_no_trace(self._asked.root),
            adapter_off(self._asked.root),
        ):
            yield

    def listed(self, findings: Findings, bank: str) -> tuple[BankProbe, ...]:
        """What the bank held at the last look, with the drift of each probe."""
        metric = next(iter(findings.by_probe), "")
        drift = findings.by_probe[metric].tolist() if metric else [nan] * len(self._held)
        return tuple(
            BankProbe(
                step=findings.step,
                bank=bank,
                probe=one.name,
                group=one.group,
                age=one.age,
                num_counted=sum(one.counted),
                metric=metric,
                drift=value,
                text=self.probes.decode(one.tokens),
            )
            for one, value in zip(self._held, drift, strict=True)
        )

    def tell(self, findings: Findings) -> Sequence[Reading]:
        ages = [one.age for one in self._held]
        values = {_PROBES: float(len(ages)), _OFFERED: float(self.probes.num_offered)}
        if ages:
            values[_AGE] = sum(ages) / len(ages)
        return [
            Reading(step=findings.step, sensor=self.name, metric=info.name, value=value, unit=info.unit)
            for info, value in values.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        return self.probes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.probes.load_state_dict(state)


def _loaded(given: nn.Module | str | os.PathLike[str], live: Capture) -> nn.Module:
    if isinstance(given, nn.Module):
        root = find_model(given)
        if root is live.root:
            raise ConfigError(
                "The reference given is the model that is trained, so that every reading would be 0. Leave reference "
                "out: a copy is made, or the adapter switched off."
            )
        return root
    from diffsensor.loading import load_causal_lm

    with random_states_kept():  # loading draws numbers for weights that the files may lack
        return load_causal_lm(given, like=live.root)


def _kept_head(asked: Capture, *, is_live: bool) -> LinearHead | None:
    """The reference's head, where the live one may become another."""
    head = asked.head()
    if not isinstance(head, LinearHead) or (is_live and not asked.trains_head):
        return None
    if not is_live:
        return head
    # Of a sharded model the head is whole until the end of a look only.
    bias = None if head.bias is None else head.bias.clone()
    return replace(head, weight=head.weight.clone(), bias=bias)
