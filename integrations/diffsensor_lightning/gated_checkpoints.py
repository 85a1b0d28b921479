"""A verdict in each checkpoint and beside it, and none that did not pass among ModelCheckpoint's best."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from diffsensor import DiffSensorError, Verdict, read_verdict, write_verdict

_log = logging.getLogger(__name__)
_warn = rank_zero_only(_log.warning)


class GatedCheckpoints:
    """Saves as the trainer and its strategy do, and sees to the verdicts.

    A checkpoint that does not pass is never among the best of a ModelCheckpoint. One that keeps the k best does not
    save it at all, since it would push one that passed from the disk. The others save it as they would have:
    `best_model_path` then stays at the one that passed last, which is not removed; of those that did not pass, only
    the latest is kept, unless all are.

    In a run of several processes all of them come here, and all keep the same account of what is the best: at a
    ModelCheckpoint whose account is another one, some processes would wait for the others. The first one has the files.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._judges: dict[str, tuple[pl.Callback, Callable[[], Verdict]]] = {}
        self._best: dict[ModelCheckpoint, str] = {}
        #: The latest checkpoint that did not pass, of those that keep one.
        self._held: dict[ModelCheckpoint, str] = {}
        self._vetoed: list[ModelCheckpoint] = []
        #: Where the checkpoints are that passed and were not removed since, the newest one last.
        self.passed: list[str] = []
        # Lightning has no hooks in these places, which all processes come by. A CheckpointIO is told by the first
        # process alone, and of a distributed checkpoint not at all.
        self._save, self._write = trainer.save_checkpoint, trainer.strategy.save_checkpoint
        self._remove = trainer.strategy.remove_checkpoint
        trainer.save_checkpoint = self._read_and_save  # type: ignore[method-assign]
        trainer.strategy.save_checkpoint = self._write_checkpoint  # type: ignore[method-assign]
        trainer.strategy.remove_checkpoint = self._remove_checkpoint  # type: ignore[method-assign]

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "GatedCheckpoints":
        """The one of this trainer, put in place where there is none yet."""
        there = getattr(trainer.strategy.save_checkpoint, "__self__", None)
        return there if isinstance(there, cls) else cls(trainer)

    def begin(self, suffix: str, callback: pl.Callback, judge: Callable[[], Verdict], passed: Sequence[str]) -> None:
        """Training starts: `judge` is asked at each save, and `passed` are the checkpoints known to have passed."""
        self._judges[suffix] = (callback, judge)
        known = dict.fromkeys([*self.passed, *passed])
        proven = [path for path in known if self._trainer.is_global_zero and self._is_proven(path)]
        self.passed = self._trainer.strategy.broadcast(proven)
        self._held.clear()
        for saver in self._savers():
            if saver not in self._vetoed:
                self._veto(saver)
            best = {path for path in (*saver.best_k_models, saver.best_model_path) if path}
            for path in sorted(best - set(self.passed)):
                _warn("%s has no verdict, or did not pass the gate. It is not among the best any more.", path)
                self._leave_out(saver, path)
            self._best[saver] = saver.best_model_path

    def end(self) -> None:
        """Training is over: the ModelCheckpoints are as they were, and may be used elsewhere."""
        for saver in self._vetoed:
            del saver.check_monitor_top_k
        self._vetoed.clear()

    def verdicts(self) -> dict[str, Verdict]:
        return {suffix: judge() for suffix, (_, judge) in self._judges.items()}

    def _read_and_save(self, *args: Any, **kwargs: Any) -> None:
        """What a verdict's reading calls for may change the run, so it comes before anything is put into a dict."""
        self.verdicts()
        self._save(*args, **kwargs)

    def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path, verdicts = str(filepath), self.verdicts()
        has_passed = all(verdict.outcome == "pass" for verdict in verdicts.values())
        self.passed = [other for other in self.passed if other != path] + [path] * has_passed
        superseded = [old for saver in self._savers() for old in self._rank(saver, path, has_passed)]
        for suffix, verdict in verdicts.items():
            checkpoint[f"diffsensor_verdict{suffix}"] = asdict(verdict)
        if "callbacks" in checkpoint:
            # They were put there before it was known whether this one passes.
            for callback in (*self._savers(), *(callback for callback, _ in self._judges.values())):
                checkpoint["callbacks"][callback.state_key] = callback.state_dict()
        # What has new content never has the verdict on the old one.
        self._forget_verdicts(path)
        for link in (saver.last_model_path for saver in self._savers() if saver.save_last == "link"):
            self._forget_verdicts(link, is_link=True)
        self._write(checkpoint, filepath, storage_options=storage_options)
        if self._has_files(path):
            for suffix, verdict in verdicts.items():
                try:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)  # the checkpoint itself may come later
                    write_verdict(_place(path, suffix), verdict)
                except OSError as error:  # a verdict that is missing is unknown, and no reason to end a run
                    _log.error("The verdict on %s could not be written beside it. %s", path, error)
        for old in superseded:
            self._remove_checkpoint(old)

    def _remove_checkpoint(self, filepath: Any) -> None:
        path = str(filepath)
        if any(path == saver.best_model_path or path in saver.best_k_models for saver in self._savers()):
            return  # ModelCheckpoint takes it for superseded, by one that did not pass
        self._remove(filepath)
        self._forget_verdicts(path)
        self.passed = [other for other in self.passed if other != path]

    def _savers(self) -> list[ModelCheckpoint]:
        return [saver for saver in self._trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]

    def _veto(self, saver: ModelCheckpoint) -> None:
        """Let the k best be chosen from those alone that pass."""
        chosen = saver.check_monitor_top_k

        def check_monitor_top_k(trainer: pl.Trainer, current: Any = None) -> bool:
            if not chosen(trainer, current):
                return False
            if saver.save_top_k == -1:
                return True
            failed = [verdict for verdict in self.verdicts().values() if verdict.outcome != "pass"]
            for verdict in failed:
                _warn("No checkpoint is saved among the best at step %d. %s", verdict.step, verdict.reason)
            return not failed

        saver.check_monitor_top_k = check_monitor_top_k  # type: ignore[method-assign]
        self._vetoed.append(saver)

    def _rank(self, saver: ModelCheckpoint, path: str, has_passed: bool) -> list[str]:
        """Put right what `saver` says of its best, just before `path` is saved. Returns what is then to be removed."""
        if path != saver.best_model_path and path not in saver.best_k_models:
            return []  # not saved as one of its best
        if not has_passed:
            self._leave_out(saver, path)
        self._best[saver] = saver.best_model_path
        superseded = self._held.pop(saver, path)
        if not has_passed and saver.save_top_k == 1:
            self._held[saver] = path
        return [superseded] if superseded != path else []

    def _leave_out(self, saver: ModelCheckpoint, path: str) -> None:
        scores = saver.best_k_models
        scores.pop(path, None)
        if saver.monitor is None:
            before = self._best.get(saver, "")
            saver.best_model_path = before if before in self.passed else ""
        else:
            best = min if saver.mode == "min" else max
            saver.best_model_path = best(scores, key=lambda each: float(scores[each])) if scores else ""
            saver.best_model_score = scores.get(saver.best_model_path)

    def _is_proven(self, path: str) -> bool:
        """Whether what is there now passed. Elsewhere than on disks of its own that is believed of `passed`."""
        if not _is_local(path):
            return True
        try:
            return all(read_verdict(_place(path, suffix)).outcome == "pass" for suffix in self._judges)
        except DiffSensorError as error:
            _log.warning("The verdict on %s cannot be read, so it is unknown. %s", path, error)
            return False

    def _forget_verdicts(self, path: str, *, is_link: bool = False) -> None:
        """What a link to a directory leads to keeps its own."""
        if self._has_files(path):
            for suffix in self._judges:
                _beside(path, suffix).unlink(missing_ok=True)
                if Path(path).is_dir() and not is_link:
                    _place(path, suffix).unlink(missing_ok=True)

    def _has_files(self, path: str) -> bool:
        return self._trainer.is_global_zero and _is_local(path)


def _place(path: str, suffix: str) -> Path:
    """Where the verdict is kept: in a checkpoint that is a directory, else beside it."""
    return Path(path, f"diffsensor-verdict{suffix}.json") if Path(path).is_dir() else _beside(path, suffix)


def _beside(path: str, suffix: str) -> Path:
    return Path(f"{path}{suffix}.verdict.json")


def _is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")
