"""Saved checkpoints read against a reference, one in memory at a time, with a record like that of a run."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from diffsensor.checkpoints import Checkpoint, identity_of, load_checkpoint, require_complete
from diffsensor.errors import CaptureError, ConfigError, CorruptFileError
from diffsensor.gate import Gate
from diffsensor.monitor import Monitor
from diffsensor.record import MANIFEST, Record, read_record
from diffsensor.reference import Reference
from diffsensor.storage.atomic import store
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import Findings, Reading, Verdict

logger = logging.getLogger(__name__)

#: Beside the record's own files: which checkpoint was read as which step.
SCANNED = "scanned.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """What was read of one checkpoint. `verdict` is None where no gate was given."""

    checkpoint: Checkpoint
    readings: tuple[Reading, ...]
    verdict: Verdict | None
    is_new: bool


class _Recorded(NamedTuple):
    readings: tuple[Reading, ...]
    verdict: Verdict | None


@final
class Scan:
    """Reads checkpoints against a reference, which is asked once and then let go of.

    The record is that of a run whose steps are those of the checkpoints, with one file more that says which checkpoint
    each step was. A checkpoint that is in it is not read again: a scan that was killed goes on where it was.

    Arguments:
        reference: the directory or the name of the reference model.
        arguments: those of `Monitor`, such as `probes`, `sensors`, `rules` and `gate`.
        record: the directory of the record; None keeps none.
        device: where models are put.
        dtype: in what they are loaded; that in which the reference is saved where none is given.
        module_path: what names in a mere state dict begin with; see `load_checkpoint`.

    Raises `CaptureError` where a model cannot be loaded or read.
    """

    def __init__(
        self,
        reference: str | Path,
        arguments: Mapping[str, Any],
        *,
        record: str | Path | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        module_path: str | None = None,
    ) -> None:
        from diffsensor.loading import load_causal_lm, options_of

        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} was given, expected one of {', '.join(_DTYPES)}.")
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device={device!r} was given, and nothing can be put there ({error}).") from error
        self._name, self._module_path = str(reference), module_path
        self._gate: Gate | None = arguments.get("gate")
        model = load_causal_lm(reference, options={"dtype": _DTYPES[dtype]} if dtype else {})
        self._options = options_of(model)
        built = {name: arguments[name] for name in ("cache_dir", "hookpoints", "temperature") if name in arguments}
        answers = Reference.build(
            # Frozen: where a checkpoint has this very head, one pass over it is enough.
            model.to(self._device).requires_grad_(False),
            arguments["probes"],
            keep_head=True,
            **built,
        )
        del model
        self._record = None if record is None else Path(record)
        resume = self._record is not None and (self._record / MANIFEST).exists()
        given = {name: value for name, value in arguments.items() if name != "hookpoints"}
        self._monitor = Monitor(**given, reference=answers, record=record, resume=resume)
        self._scanned: dict[str, dict[str, Any]] = {}
        if resume and self._record is not None and (self._record / SCANNED).exists():
            self._scanned = read_json(self._record / SCANNED)["checkpoints"]
            self._judge_what_was_read(self._record)

    def _judge_what_was_read(self, record: Path) -> None:
        """Put the verdict on record where a scan was killed after it had read and before it had judged."""
        contents = read_record(record)
        judged = {each.step for each in contents.verdicts}
        found = [self._recorded(step) for step in map(int, self._scanned) if step not in judged]
        if missing := [each.verdict for each in found if each is not None and each.verdict is not None]:
            with Record(record, manifest=contents.manifest, resume=True) as written:
                for verdict in missing:
                    written.write(Findings(step=verdict.step, verdicts=(verdict,)))

    def read(self, checkpoint: Checkpoint) -> Scanned:
        """What the checkpoint reads, and whether it passes; from the record where it was read before.

        Raises `CorruptFileError` where it is not complete, or changes while it is loaded.
        """
        require_complete(checkpoint)
        identity = identity_of(checkpoint)
        known = self._scanned.get(str(checkpoint.step))
        if known is not None and known["files"] != identity:
            raise ConfigError(
                f"Step {checkpoint.step} of the record {self._record} is {known['path']}, and {checkpoint.path} is "
                "another one, or has changed since. Give another --out for another run."
            )
        if known is not None and (found := self._recorded(checkpoint.step)) is not None:
            return Scanned(checkpoint=checkpoint, readings=found.readings, verdict=found.verdict, is_new=False)
        model = load_checkpoint(checkpoint, self._name, like=self._options, module_path=self._module_path)
        if identity_of(checkpoint) != identity:
            raise CorruptFileError(f"{checkpoint.path} was changed while it was loaded. Wait until it is complete.")
        try:
            model = model.to(self._device)
            self._monitor.attach(model)
            # Before it is read: what stands in the record of this step is then known to be of this checkpoint.
            self._note(checkpoint, identity)
            readings = self._monitor.read(model, checkpoint.step)
            if not readings:
                raise CaptureError(f"Nothing could be read of {checkpoint.path}; see the log above for what failed.")
            with _untold():
                verdict = self._monitor.verdict(model, checkpoint.step) if self._gate is not None else None
        finally:
            self._monitor.let_go()
        return Scanned(checkpoint=checkpoint, readings=tuple(readings), verdict=verdict, is_new=True)

    def _note(self, checkpoint: Checkpoint, identity: Mapping[str, object]) -> None:
        if self._record is not None:
            self._scanned[str(checkpoint.step)] = {"path": str(checkpoint.path), "files": dict(identity)}
            content = {"reference": self._name, "checkpoints": self._scanned}
            store(self._record / SCANNED, json_bytes("scanned", content))

    def _recorded(self, step: int) -> "_Recorded | None":
        """What stands in the record, and what the gate says of it: its limits may be others than they were.

        None where nothing stands there: a scan was killed before.
        """
        assert self._record is not None
        readings = tuple(each for each in read_record(self._record).readings if each.step == step)
        if not readings:
            return None
        verdict = None if self._gate is None else self._gate.verdict(Findings(step=step, readings=readings))
        return _Recorded(readings, verdict)

    def close(self) -> None:
        self._monitor.close()


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """Without the monitor's word in the log: the verdict is what a scan gives back."""
    theirs = logging.getLogger("diffsensor.monitor")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def as_plain(scanned: Scanned) -> dict[str, Any]:
    """For machines: the readings of all probes and of the worst group, and the verdict."""
    shown = [each for each in scanned.readings if each.group in ("", "worst") and each.sensor != "progress"]
    return {
        "path": str(scanned.checkpoint.path),
        "kind": scanned.checkpoint.kind,
        "step": scanned.checkpoint.step,
        "is_new": scanned.is_new,
        "readings": {each.key: json.loads(json.dumps(asdict(each))) for each in shown},
        "verdict": None if scanned.verdict is None else asdict(scanned.verdict),
    }
