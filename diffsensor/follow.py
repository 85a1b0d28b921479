"""Verdicts that another process writes beside a run's checkpoints: a run that obeys them reads nothing itself."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from diffsensor.actions import Stop
from diffsensor.errors import ConfigError, DiffSensorError, RanksError, RefusedError
from diffsensor.gate import VERDICT_BESIDE, VERDICT_IN, read_verdict
from diffsensor.protocols import Action, Controller
from diffsensor.ranks import Ranks
from diffsensor.types import ActionTaken, Alert, Verdict

logger = logging.getLogger(__name__)

#: What actions are told in place of a rule's name.
GATE = "gate of the watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A verdict that was not there at the last look, and what was done for it."""

    checkpoint: Path
    verdict: Verdict
    actions: tuple[ActionTaken, ...] = ()


@final
class FollowedVerdicts:
    """The verdicts that `diffsensor watch` writes beside the checkpoints of this run, obeyed as they appear.

    A verdict is late by as long as the watch takes to read a checkpoint: the run goes on meanwhile. A "fail" asks for
    the actions; an "unknown" is told in the log, and asks for them only where `unknown_is_fail`. Those that were there
    before the run began, or went on, are history; one that is written anew is not.

    Arguments:
        directory: where the checkpoints are.
        actions: what a failed checkpoint asks of the run; `Stop()` where none are given.
        every: optimizer steps from one look at the directory to the next.
        unknown_is_fail: whether a verdict that could not be told asks for the actions too.

    In a run of several processes all of them look at the same steps; the first one reads the directory.
    """

    def __init__(
        self,
        directory: str | Path,
        actions: Sequence[Action] | None = None,
        *,
        every: int = 10,
        unknown_is_fail: bool = False,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"every={every!r} was given, expected a number of steps, at least 1.")
        for action in (Stop(),) if actions is None else actions:
            if not isinstance(action, Action) or isinstance(action, type):
                raise ConfigError(f"actions holds {action!r}, expected actions such as Stop().")
        self.directory = Path(directory)
        self.actions: tuple[Action, ...] = (Stop(),) if actions is None else tuple(actions)
        self._every, self._unknown_is_fail = every, unknown_is_fail
        self._known: set[tuple[str, int]] = set()  # names, and when they were written

    def begin(self, controller: Controller) -> None:
        """Before the first step: take what is there as history, and raise where the run cannot do what is asked."""
        for action in self.actions:
            if action.needs is not None and (reason := controller.cannot(action.needs)):
                raise ConfigError(f"Failed verdicts ask for {action.name}, which this run cannot do. {reason}")
        self._known = set(Ranks.now().told("verdicts there", lambda: [each[:2] for each in self._there()]))

    def look(self, step: int, controller: Controller) -> list[Followed]:
        """The verdicts that are new, and what was done for them, where a look is due."""
        if step % self._every:
            return []
        ranks = Ranks.now()
        try:
            new = ranks.told("new verdicts", lambda: [each for each in self._there() if each[:2] not in self._known])
        except RanksError as error:
            logger.error("%s Verdicts are not followed any more.", error)
            return []
        found = []
        for name, written, verdict in sorted(new, key=lambda each: each[2].step):
            self._known.add((name, written))
            obeys = verdict.outcome == "fail" or (verdict.outcome == "unknown" and self._unknown_is_fail)
            if ranks.is_first and verdict.outcome != "pass":
                logger.warning("The checkpoint %s does not pass (%s). %s", name, verdict.outcome, verdict.reason)
            asked = self.actions if obeys else ()
            taken = tuple(self._done(action, step, name, verdict, controller) for action in asked)
            found.append(Followed(checkpoint=self.directory / name, verdict=verdict, actions=taken))
        return found

    def _there(self) -> list[tuple[str, int, Verdict]]:
        """The verdicts in the directory, and when they were written. A changed one is left out, with a word."""
        files = [*self.directory.glob(f"*/{VERDICT_IN}"), *self.directory.glob(f"*{VERDICT_BESIDE}")]
        found = []
        for file in sorted(files):
            name = file.parent.name if file.name == VERDICT_IN else file.name.removesuffix(VERDICT_BESIDE)
            try:
                found.append((name, file.stat().st_mtime_ns, read_verdict(file)))
            except (OSError, DiffSensorError) as error:
                logger.warning("The verdict in %s cannot be read. %s", file, error)
        return found

    def _done(self, action: Action, step: int, name: str, verdict: Verdict, controller: Controller) -> ActionTaken:
        alert = Alert(
            step=step,
            rule=GATE,
            severity="critical",
            subject=name,
            message=f"The checkpoint {name} of step {verdict.step} does not pass: {verdict.reason}",
            value=verdict.value,
            stderr=verdict.stderr,
            threshold=verdict.threshold,
            unit=verdict.unit,
            first_step=verdict.step,
        )
        taken = ActionTaken(step=step, rule=GATE, action=action.name, outcome="done", detail="")
        return _outcome(taken, lambda: action(alert, controller))


def _outcome(taken: ActionTaken, act: Callable[[], str]) -> ActionTaken:
    try:
        detail = act()
        logger.warning("step %d, %s, as a failed checkpoint asks for: %s", taken.step, taken.action, detail)
        return replace(taken, detail=detail)
    except RefusedError as error:
        logger.warning("%s, asked for by a failed checkpoint, was refused. %s", taken.action, error)
        return replace(taken, outcome="refused", detail=str(error))
    except Exception as error:
        logger.error("%s, asked for by a failed checkpoint, failed.", taken.action, exc_info=error)
        return replace(taken, outcome="failed", detail=f"{type(error).__name__}: {error}")
