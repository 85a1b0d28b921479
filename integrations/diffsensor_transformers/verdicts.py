"""The verdicts on a run's checkpoints: in one file, beside each, and a copy of the checkpoint that passed last."""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from diffsensor import Verdict, VerdictLedger, read_verdict, write_verdict

logger = logging.getLogger(__name__)

_MADE, _REPLACED = ".made", ".replaced"


class CheckpointVerdicts:
    """Keeps the verdicts on the checkpoints in a trainer's output directory.

        diffsensor-verdicts.json               all verdicts, and which checkpoint passed last; written before a save
        checkpoint-40/diffsensor-verdict.json  its own, once the checkpoint is there
        last-passed/checkpoint-40/             the one that passed last; the trainer never removes it

    The files of `last-passed` are hard links, copies where the file system has none: they take no room as long as the
    trainer keeps that checkpoint, and that of one checkpoint afterwards. Nothing here ends a run: what cannot be
    written is logged, and a verdict that is missing is unknown.

    Arguments:
        directory: the trainer's output directory.
        suffix: what is put behind the names above, before ".json".
        step: the step of the checkpoint that the run goes on from; 0 for a new run, which begins a new ledger. What
            passed last in an earlier run is then set aside, as `last-passed.1`.
    """

    def __init__(self, directory: Path, suffix: str, step: int) -> None:
        self._directory = directory
        self._file = f"diffsensor-verdict{suffix}.json"
        self._passed = directory / f"last-passed{suffix}"
        ledger = directory / f"diffsensor-verdicts{suffix}.json"
        directory.mkdir(parents=True, exist_ok=True)
        self._tidy(step)
        if step == 0:
            ledger.unlink(missing_ok=True)
            _set_aside(self._passed)
        self._ledger = VerdictLedger(ledger)
        if step > 0:
            self._go_on(step)

    @property
    def last_passed(self) -> Path | None:
        """The directory of the checkpoint that passed last."""
        place = self._directory / self._ledger.last_passed
        return place if self._ledger.last_passed and place.is_dir() else None

    def knows(self, step: int) -> bool:
        """Whether the checkpoint of that step was announced."""
        return _name(step) in self._ledger.verdicts

    def of(self, checkpoint: Path) -> Verdict:
        """The verdict on a checkpoint; raises `CorruptFileError` where it was changed."""
        if not (checkpoint / self._file).exists() and checkpoint.resolve().parent == self._directory.resolve():
            # Killed after it was saved, and before its verdict was put beside it.
            return self._ledger.verdicts.get(checkpoint.name) or read_verdict(checkpoint / self._file)
        return read_verdict(checkpoint / self._file)

    def announce(self, verdict: Verdict) -> None:
        """Before the checkpoint of that step is saved."""
        self._contained(verdict.step, lambda: self._announce(verdict))

    def settle(self, verdict: Verdict) -> None:
        """Once the checkpoint of that step is there."""
        self._contained(verdict.step, lambda: self._settle(verdict))

    def _announce(self, verdict: Verdict) -> None:
        name = _name(verdict.step)
        # That of an earlier checkpoint, which is about to be written over: in place, so that links would show it.
        (self._directory / name / self._file).unlink(missing_ok=True)
        _unshare(self._passed / name)
        self._ledger.add(name, verdict)

    def _settle(self, verdict: Verdict) -> None:
        write_verdict(self._directory / _name(verdict.step) / self._file, verdict)
        if verdict.outcome == "pass":
            self._keep(_name(verdict.step))

    def _keep(self, name: str) -> None:
        """Let `last-passed` hold this checkpoint instead. At any time there is a whole one in it."""
        place = self._passed / name
        made, replaced = place.with_name(name + _MADE), place.with_name(name + _REPLACED)
        shutil.rmtree(made, ignore_errors=True)
        self._passed.mkdir(exist_ok=True)
        shutil.copytree(self._directory / name, made, copy_function=_link)
        if place.exists():
            place.rename(replaced)
        made.rename(place)
        self._ledger.set_last_passed(f"{self._passed.name}/{name}")
        for other in self._passed.iterdir():
            if other != place:
                shutil.rmtree(other)

    def _tidy(self, step: int) -> None:
        """Finish what a kill broke off; part with what this run will write over."""
        for broken_off in self._passed.glob("checkpoint-*" + _MADE):
            shutil.rmtree(broken_off)
        for replaced in self._passed.glob("checkpoint-*" + _REPLACED):
            place = replaced.with_name(replaced.name.removesuffix(_REPLACED))
            if place.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(place)
        for passed in _checkpoints(self._passed):
            if _step_of(passed) > step:
                _unshare(passed)

    def _go_on(self, step: int) -> None:
        """Put right what a kill left undone, and let what passed last be what had passed by this step."""
        passed = []
        for checkpoint in _checkpoints(self._directory):
            verdict = self.of(checkpoint)
            if _step_of(checkpoint) <= step and verdict.step == _step_of(checkpoint):
                passed += [verdict] if verdict.outcome == "pass" else []
                if not (checkpoint / self._file).exists():
                    self.settle(verdict)
        last = -1 if self.last_passed is None else _step_of(self.last_passed)
        newest = max(passed, key=lambda verdict: verdict.step, default=None)
        if newest is not None and (last > step or last < newest.step):
            self.settle(newest)

    def _contained(self, step: int, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            logger.error(
                "The verdict on the checkpoint of step %d could not be kept, and one that is missing is unknown. %s",
                *(step, error),
            )


def _name(step: int) -> str:
    return f"checkpoint-{step}"


def _checkpoints(directory: Path) -> list[Path]:
    """Those that a trainer made; users may have put others beside them."""
    return [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _link(file: str, place: str) -> None:
    try:
        os.link(file, place)
    except OSError:  # not on every file system
        shutil.copy2(file, place)


def _unshare(directory: Path) -> None:
    """Give a directory files of its own where they are links to those of a checkpoint."""
    for file in directory.rglob("*"):
        if file.is_file() and file.stat().st_nlink > 1:
            own = file.with_name(file.name + _MADE)
            shutil.copy2(file, own)
            own.replace(file)


def _set_aside(directory: Path) -> None:
    """Where an earlier run left one, give it a number."""
    if directory.is_dir():
        number = 1
        while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(aside)
