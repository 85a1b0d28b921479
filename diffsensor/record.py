"""The record: a run's directory, which holds all that was read and survives a kill at any moment.

    manifest.json    what the run was begun with; written once
    readings.jsonl   the readings; storage/lines.py says what a line is
    tokens.jsonl     the token table
    bank.jsonl       what a rolling bank held at each look
    alerts.jsonl     what rules told
    actions.jsonl    what was asked of the run, and what became of it
    verdicts.jsonl   what the gate said of checkpoints
    tensors/         step-XXXXXXXX.safetensors, the vectors of one step
    state.json       what a resumed run needs
    checksums.json   SHA-256 of the manifest and of the files in tensors/; how long the lines were when last closed
    *.torn           what a killed writer left unfinished, set aside when the record was next opened

Every line and every JSON file ends with the CRC-32 of the text before it, so a flipped bit is found.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, final

from safetensors.torch import load, save
from torch import Tensor

from diffsensor.errors import (
    ConfigError,
    CorruptFileError,
    DiffSensorError,
    ReferenceMismatchError,
    StorageError,
    listed,
)
from diffsensor.storage.atomic import TEMPORARY, stage, store
from diffsensor.storage.checked_json import RESTORE, json_bytes, parse_json, plain, read_json
from diffsensor.storage.lines import LINE_FILES, append, encode, read_lines, set_aside
from diffsensor.storage.lock import LOCK, release_lock, take_lock
from diffsensor.types import ActionTaken, Alert, BankProbe, Findings, Reading, TokenShift, Verdict

logger = logging.getLogger(__name__)

MANIFEST, STATE, CHECKSUMS, TENSORS = "manifest.json", "state.json", "checksums.json", "tensors"
MUST_AGREE = ("reference", "probes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordContents:
    """What a record holds, ordered by step. Of a step that was read more than once, the last look as a whole.

    Actions and verdicts are all there, in the order in which they came about: what was done was done.
    """

    path: Path
    manifest: Mapping[str, object]
    readings: tuple[Reading, ...]
    token_shifts: tuple[TokenShift, ...]
    bank_probes: tuple[BankProbe, ...]
    alerts: tuple[Alert, ...]
    actions: tuple[ActionTaken, ...]
    verdicts: tuple[Verdict, ...]
    tensor_steps: tuple[int, ...]

    def tensors(self, step: int) -> dict[str, Tensor]:
        """The vectors kept at one step, read from disk and verified now."""
        name = _tensors_name(step)
        file = self.path / name
        # The file before its checksum: a writer at work lists the new checksum beside the old ones first.
        data = file.read_bytes() if file.exists() else None
        known = _read_checksums(self.path).sha256.get(name)
        if known is None:
            raise ConfigError(
                f"The record at {self.path} keeps no tensors of step {step}. It has them for the steps "
                f"{listed(map(str, self.tensor_steps))}."
            )
        if data is None:
            raise CorruptFileError(f"{file} is missing, though {CHECKSUMS} lists it. {RESTORE}")
        if hashlib.sha256(data).hexdigest() not in known:
            raise CorruptFileError(f"{file} was changed: its SHA-256 is not the one in {CHECKSUMS}. {RESTORE}")
        return load(data)


@final
class Record:
    """Writes findings into a run's directory. A sink: one `write` is one look at the model, all of it or nothing.

    Once `write` has returned, no kill of the process loses what it was given. A loss of power can lose readings, which
    are not forced to the disk one by one; alerts, actions and verdicts are. A write that was killed before it returned
    is there as a whole or not at all; only its tensors may still be those of an earlier write of that step, until the
    resumed run reads the step again.
    One monitor at a time may have a record open.

    **Arguments:**

    - `path`: the run's directory; missing or empty for a new run.
    - `manifest`: what the run is, in plain types; `reference` and `probes` must be their fingerprints. A resumed
        record keeps the manifest that it was begun with.
    - `resume`: go on with the record that is there. Its reference and probes must be these.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        manifest: Mapping[str, object],
        resume: bool = False,
    ) -> None:
        for key in MUST_AGREE:
            if not isinstance(manifest.get(key), str):
                raise ConfigError(
                    f"A manifest needs the fingerprint of its {key} as text under {key!r}; got {manifest.get(key)!r}."
                )
        self.path = Path(path)
        with _told(self.path), ExitStack() as on_failure:
            if resume:
                read_manifest(self.path)  # or there is nothing to resume, and nothing to leave a lock in
            else:
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path)
            on_failure.callback(release_lock, self._lock)
            self._num_writes = _go_on(self.path, manifest) if resume else _begin(self.path, manifest)
            self._checksums = _read_checksums(self.path)
            self._files: dict[str, BinaryIO] = {
                kind.name: on_failure.enter_context((self.path / kind.name).open("r+b", buffering=0))
                for kind in LINE_FILES
            }
            self._lengths = {name: file.seek(0, os.SEEK_END) for name, file in self._files.items()}
            self._opened: ExitStack[bool | None] | None = on_failure.pop_all()

    def write(self, findings: Findings) -> None:
        self._require_open()
        found = {kind.name: kind.found(findings) for kind in LINE_FILES}
        count = sum(map(len, found.values()))
        data = {name: encode(items, self._num_writes + 1, count) for name, items in found.items()}
        checksums, staged = self._checksums, dict[Path, Path]()
        with _told(self.path):
            try:
                if findings.tensors:
                    checksums = self._stage_tensors(findings, staged)
                for kind in LINE_FILES:
                    append(self._files[kind.name], self._lengths[kind.name], data[kind.name])
                    if kind.forced and data[kind.name]:
                        os.fsync(self._files[kind.name].fileno())
                for temporary, file in staged.items():
                    temporary.replace(file)
            except OSError:
                for temporary in staged:
                    temporary.unlink(missing_ok=True)
                for name, length in self._lengths.items():
                    self._files[name].truncate(length)
                raise
        self._lengths = {name: length + len(data[name]) for name, length in self._lengths.items()}
        self._checksums = checksums
        self._num_writes += bool(count)

    def _stage_tensors(self, findings: Findings, staged: dict[Path, Path]) -> "_Checksums":
        """Put all that takes space into temporary files, so that a full disk shows before anything is changed."""
        name = _tensors_name(findings.step)
        (self.path / TENSORS).mkdir(exist_ok=True)
        # Copies, because safetensors takes no tensors that share memory.
        data = save({key: value.detach().cpu().contiguous().clone() for key, value in findings.tensors.items()})
        known = self._checksums.sha256.get(name, [])
        checksums = replace(self._checksums, sha256={**self._checksums.sha256, name: [_sha256(data), *known]})
        new = [(self.path / name, data), (self.path / CHECKSUMS, checksums.as_bytes())]
        # A kill may fall between the two renames. A file that is not listed yet is not looked at; one that is listed
        # may be the old or the new one.
        for file, content in reversed(new) if known else new:
            staged[stage(file, content)] = file
        return checksums

    def write_state(self, state: Mapping[str, object]) -> None:
        """Replace the stored state: plain types only (None, bool, int, float, str, list, dict with text as keys)."""
        self._require_open()
        with _told(self.path):
            store(self.path / STATE, json_bytes("state", state))

    def read_state(self) -> dict[str, Any] | None:
        """The state stored last, None where there is none. Tuples come back as lists."""
        return read_json(self.path / STATE) if (self.path / STATE).exists() else None

    def close(self) -> None:
        """Let go of the directory. Closing twice is harmless."""
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        with opened:
            try:
                for file in self._files.values():
                    os.fsync(file.fileno())
                store(self.path / CHECKSUMS, replace(self._checksums, closed_at=self._lengths).as_bytes())
            except OSError as error:
                # All readings are in place; only a later truncation of their file would go unseen.
                logger.warning("The lengths of the files in %s could not be stored: %s", self.path, error)

    def _require_open(self) -> None:
        if self._opened is None:
            raise StorageError(f"The record at {self.path} was closed. Open it again with resume=True to go on.")

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_record(path: str | os.PathLike[str]) -> RecordContents:
    """What the record at `path` holds. Takes no lock: a monitor may be writing to it."""
    path = Path(path)
    manifest = read_manifest(path)
    checksums = _read_checksums(path)
    lines, _ = read_lines(path, checksums.closed_at)
    newest: dict[int, int] = {}
    for line in (line for kind in LINE_FILES if kind.of_a_look for line in lines[kind]):
        newest[line.item.step] = max(line.write, newest.get(line.item.step, 0))
    standing = [
        line.item
        for kind in LINE_FILES
        for line in (sorted(lines[kind], key=lambda line: line.item.step) if kind.of_a_look else lines[kind])
        if not kind.of_a_look or line.write == newest[line.item.step]
    ]
    return RecordContents(
        path=path,
        manifest=manifest,
        readings=tuple(item for item in standing if isinstance(item, Reading)),
        token_shifts=tuple(item for item in standing if isinstance(item, TokenShift)),
        bank_probes=tuple(item for item in standing if isinstance(item, BankProbe)),
        alerts=tuple(item for item in standing if isinstance(item, Alert)),
        actions=tuple(item for item in standing if isinstance(item, ActionTaken)),
        verdicts=tuple(item for item in standing if isinstance(item, Verdict)),
        tensor_steps=tuple(sorted(int(Path(name).stem[5:]) for name in checksums.sha256 if name != MANIFEST)),
    )


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the run at `path` was begun with; `reference` and `probes` are their fingerprints."""
    file = Path(path) / MANIFEST
    if not file.exists():
        inside = sorted(str(each.parent) for each in file.parent.glob(f"*/{MANIFEST}"))
        hint = f"Did you mean {listed(inside, 3)}?" if inside else "Give the directory that a monitor's record= named."
        raise StorageError(f"There is no record at {path}: it has no {MANIFEST}. {hint}")
    data = file.read_bytes()
    manifest = parse_json(file, data)
    if _sha256(data) not in _read_checksums(file.parent).sha256.get(MANIFEST, []):
        raise CorruptFileError(f"{file} is not the one that {CHECKSUMS} lists. {RESTORE}")
    return manifest


def _begin(path: Path, manifest: Mapping[str, object]) -> int:
    """Make a new record in `path`; returns how many writes it has: 0."""
    if (path / MANIFEST).exists():
        raise StorageError(
            f"{path} holds a record already. Give this run another directory. To go on with that "
            "record, resume the run from its checkpoint, or in a loop of your own give resume=True."
        )
    lines = {kind.name for kind in LINE_FILES}
    left = {LOCK, CHECKSUMS, CHECKSUMS + TEMPORARY, MANIFEST + TEMPORARY}  # by a run that was killed just here
    strangers = [
        entry.name
        for entry in sorted(path.iterdir())
        if entry.name not in left and not (entry.name in lines and entry.stat().st_size == 0)
    ]
    if strangers:
        raise StorageError(
            f"{path} is not empty and is no record: it holds {listed(strangers)} but no {MANIFEST}. "
            "Give an empty or a new directory."
        )
    data = json_bytes("manifest", manifest)
    for name in lines:
        (path / name).touch()
    store(path / CHECKSUMS, _Checksums(sha256={MANIFEST: [_sha256(data)]}, closed_at={}).as_bytes())
    store(path / MANIFEST, data)  # last, so that a directory with a manifest is a whole record
    return 0


def _go_on(path: Path, manifest: Mapping[str, object]) -> int:
    """Make an existing record ready for more; returns how many writes it has."""
    begun = read_manifest(path)
    for key in MUST_AGREE:
        if begun[key] != manifest[key]:
            raise ReferenceMismatchError(
                f"The record at {path} was begun with the {key} {begun[key]!r}; this run has {manifest[key]!r}. "
                f"Readings compare only within one {key}: resume with that one, or give this run another directory."
            )
    given = {key: plain(value, key) for key, value in manifest.items()}
    stored = {key: plain(value, key) for key, value in begun.items()}
    if changed := [key for key in sorted(given.keys() | stored.keys()) if given.get(key) != stored.get(key)]:
        told = [difference for key in changed for difference in _differences(key, stored.get(key), given.get(key))]
        logger.warning("%s is resumed with other settings than it was begun with: %s.", path, listed(told))
    lines, last = read_lines(path, _read_checksums(path).closed_at)
    for kind in LINE_FILES:
        set_aside(path / kind.name, lines[kind])
    for file in (*(path / (name + TEMPORARY) for name in (STATE, CHECKSUMS)), *path.glob(f"{TENSORS}/*{TEMPORARY}")):
        file.unlink(missing_ok=True)
    return last


def _differences(name: str, then: object, now: object) -> list[str]:
    """In what a member of two manifests differs; in words, of mappings each of their members."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return [difference for key in keys for difference in _differences(f"{name}.{key}", then.get(key), now.get(key))]
    return [f"{name} was {then!r} and is {now!r}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checksums:
    """Which SHA-256 each file may have, and how long the files of lines were when they were last closed."""

    sha256: Mapping[str, list[str]]
    closed_at: Mapping[str, int]

    def as_bytes(self) -> bytes:
        return json_bytes("checksums", {"sha256": self.sha256, "closed_at": self.closed_at})


def _read_checksums(path: Path) -> _Checksums:
    content = read_json(path / CHECKSUMS)
    return _Checksums(sha256=content["sha256"], closed_at=content["closed_at"])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensors_name(step: int) -> str:
    return f"{TENSORS}/step-{step:08d}.safetensors"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns the system's errors into sentences."""
    try:
        yield
    except DiffSensorError:
        raise
    except OSError as error:
        remedy = {
            errno.ENOSPC: "Free some space on that disk",
            errno.EDQUOT: "Free some of the quota",
            errno.EACCES: "Ask for the right to write there",
            errno.EROFS: "Make that disk writable",
            errno.EEXIST: "Move the file that stands where a directory is needed",
            errno.ENOTDIR: "Move the file that stands where a directory is needed",
        }.get(error.errno or 0, "Mend that")
        raise StorageError(
            f"The record at {path} cannot be written: {error.strerror or error}. "
            f"{remedy}, or give the run another directory. What was stored before is as it was."
        ) from error
