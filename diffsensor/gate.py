"""The gate: a verdict on a checkpoint, and where it is kept beside it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import final

from diffsensor.errors import ConfigError
from diffsensor.protocols import Criterion, Rule
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import Findings, Scope, Verdict

#: Fail over unknown over pass: one criterion that is not met is enough.
_ORDER = ("fail", "unknown", "pass")
_LEDGER = "verdicts"
#: The verdict's file in a checkpoint that is a directory, and what its name ends with beside one that is a file.
VERDICT_IN, VERDICT_BESIDE = "diffsensor-verdict.json", ".verdict.json"


@final
class Gate:
    """Judges a checkpoint by what was read of it: pass only if every criterion passes.

        Gate(Limit("kl_ref_live", above=0.3), Limit("kl_ref_live", above=0.5, group="*"))

    A limit passes where the reading is below it with confidence, fails where it is above it with confidence, and is
    unknown in between. What could not be read is unknown, and unknown is not a pass.

    Arguments:
        criteria: rules that can judge one look by itself: `Limit`, `Invariant`, `Envelope`.
    """

    def __init__(self, *criteria: Criterion) -> None:
        if not criteria:
            raise ConfigError(
                "A gate was given no criterion, so it would pass everything. Give it one, such as a Limit."
            )
        for criterion in criteria:
            if not isinstance(criterion, Criterion):
                named = criterion.name if isinstance(criterion, Rule) else repr(criterion)
                hint = " without the list" if isinstance(criterion, list) else ""
                raise ConfigError(
                    f"The gate was given {named}, which cannot judge one checkpoint by itself. "
                    f"Give it a Limit, an Invariant or an Envelope{hint}."
                )
        self.criteria = criteria

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset[str]().union(*(criterion.metrics for criterion in self.criteria))

    def check(self, scope: Scope) -> None:
        for criterion in self.criteria:
            criterion.check(scope)

    def verdict(self, findings: Findings) -> Verdict:
        """The verdict on the model as it was read."""
        verdicts = sorted((one.verdict(findings) for one in self.criteria), key=lambda one: _ORDER.index(one.outcome))
        worst = verdicts[0]
        others = [one.rule for one in verdicts[1:] if one.outcome == worst.outcome != "pass"]
        if others:
            worst = replace(worst, reason=f"{worst.reason} So with {', '.join(others)}.")
        return worst

    def unread(self, step: int) -> Verdict:
        """The verdict on a model of which nothing could be read."""
        return Verdict(step=step, outcome="unknown", reason=f"Nothing could be read at step {step}; see the log.")


def write_verdict(path: str | os.PathLike[str], verdict: Verdict) -> None:
    """Write a verdict into a file of its own, as a whole or not at all."""
    store(Path(path), json_bytes("verdict", asdict(verdict)))


def read_verdict(path: str | os.PathLike[str]) -> Verdict:
    """The verdict on a checkpoint, a file or a directory, or in a file that `write_verdict` wrote.

    Unknown where there is none. Raises `CorruptFileError` where it has changed.
    """
    given = Path(path)
    if given.is_dir():
        file = given / VERDICT_IN
    else:
        file = given if given.suffix == ".json" else given.with_name(given.name + VERDICT_BESIDE)
    if not file.exists():
        return Verdict(step=-1, outcome="unknown", reason=f"There is no verdict at {file}, and unknown is not a pass.")
    return Verdict(**read_json(file, "verdict"))


@final
class VerdictLedger:
    """One file with the verdict on each checkpoint of a run, and the place of the one that passed last.

    Written at each change, as a whole or not at all. What is not in it has no verdict, which is unknown. Raises
    `CorruptFileError` where the file that is there was changed.

    Arguments:
        path: the file. Where there is one already it is gone on with.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._verdicts: dict[str, Verdict] = {}
        self._last_passed = ""
        if self.path.exists():
            content = read_json(self.path, _LEDGER)
            self._verdicts = {name: Verdict(**verdict) for name, verdict in content["verdicts"].items()}
            self._last_passed = content["last_passed"]

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """By the name of the checkpoint, in the order in which they were first given."""
        return dict(self._verdicts)

    @property
    def last_passed(self) -> str:
        """Where the checkpoint is that passed last, as it was told; "" where there is none."""
        return self._last_passed

    def add(self, name: str, verdict: Verdict) -> None:
        """Set the verdict on a checkpoint; another one of that name is replaced."""
        self._verdicts[name] = verdict
        self._store()

    def set_last_passed(self, place: str) -> None:
        """Say where the checkpoint is that passed last, once it is there."""
        self._last_passed = place
        self._store()

    def _store(self) -> None:
        verdicts = {name: asdict(verdict) for name, verdict in self._verdicts.items()}
        store(self.path, json_bytes(_LEDGER, {"last_passed": self._last_passed, "verdicts": verdicts}))
