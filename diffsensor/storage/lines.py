"""The files of a record that grow by lines: a reading, an alert, or another part of findings each.

A line is plain JSON. NaN is null (pandas reads it as NaN), infinities are "inf" and "-inf" (`pandas.to_numeric` reads
them), every other float is its shortest exact text. `write` numbers the writes from 1 on; `lines` is how many lines
that write has, over all files. A write of which lines are missing was never acknowledged and does not count.
"""

import json
import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

from diffsensor.errors import CorruptFileError
from diffsensor.storage.checked_json import RESTORE, has_valid_crc, with_crc, without_crc
from diffsensor.types import ActionTaken, Alert, BankProbe, Findings, Reading, TokenShift, Verdict

logger = logging.getLogger(__name__)


Item = Reading | TokenShift | BankProbe | Alert | ActionTaken | Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFile:
    """One of the files: its name, what a line is, where findings carry it.

    Of a file that is `of_a_look` only the newest look at a step stands; what was done or decided stands for ever.
    What is `forced` is on the disk, not only with the system, once it was written.
    """

    name: str
    noun: type[Item]
    found: Callable[[Findings], Sequence[Item]]
    of_a_look: bool = True
    forced: bool = False


#: In the order of writing. Readings come last: once they are there, all else of that write is.
ACTIONS = LineFile(
    name="actions.jsonl", noun=ActionTaken, found=lambda findings: findings.actions, of_a_look=False, forced=True
)
VERDICTS = LineFile(
    name="verdicts.jsonl", noun=Verdict, found=lambda findings: findings.verdicts, of_a_look=False, forced=True
)
BANK = LineFile(name="bank.jsonl", noun=BankProbe, found=lambda findings: findings.bank_probes)
TOKENS = LineFile(name="tokens.jsonl", noun=TokenShift, found=lambda findings: findings.token_shifts)
ALERTS = LineFile(name="alerts.jsonl", noun=Alert, found=lambda findings: findings.alerts, forced=True)
READINGS = LineFile(name="readings.jsonl", noun=Reading, found=lambda findings: findings.readings)
LINE_FILES = (ACTIONS, VERDICTS, BANK, TOKENS, ALERTS, READINGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line that was read: where it ends in its file, the number of its write and how many lines that has."""

    end: int
    write: int
    lines: int
    item: Item


def encode(items: Sequence[Item], write: int, lines: int) -> bytes:
    return b"".join(_encode_line(item, write, lines) for item in items)


def append(file: BinaryIO, length: int, data: bytes) -> None:
    """Write `data` at `length`, in one call of the system where it lets us."""
    file.seek(length)
    file.truncate()  # what an interrupted write left
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def read_lines(directory: Path, at_least: Mapping[str, int]) -> tuple[dict[LineFile, list[Line]], int]:
    """The lines of all whole writes, and how many writes those are.

    `at_least` is how long each file is known to have been. Another process may be writing meanwhile.
    """
    # Against the order of writing, so that whatever precedes the newest reading is found in the other files.
    found = {kind: _read_file(directory / kind.name, kind, at_least.get(kind.name, 0)) for kind in LINE_FILES[::-1]}
    seen = Counter(line.write for lines in found.values() for line in lines)
    expected = {line.write: line.lines for lines in found.values() for line in lines}
    last = 0
    while last + 1 in expected and seen[last + 1] == expected[last + 1]:
        last += 1
    if last + 1 < max((line.write for line in found[READINGS]), default=0):
        raise CorruptFileError(
            f"The files in {directory} have lost lines: write {last + 1} has {seen[last + 1]} of "
            f"{expected.get(last + 1, 'its')} lines, yet later writes are there. {RESTORE}"
        )
    if last < max(seen, default=0):
        logger.warning(
            "Lines after write %d in %s are left out: their writer was killed or is writing.", last, directory
        )
    return {kind: [line for line in lines if line.write <= last] for kind, lines in found.items()}, last


def set_aside(file: Path, lines: Sequence[Line]) -> None:
    """Move what follows these first lines of a file to a file beside it, `<name>.torn`."""
    with file.open("r+b") as whole:
        whole.seek(lines[-1].end if lines else 0)
        if rest := whole.read():
            with file.with_name(file.name + ".torn").open("ab") as torn:
                torn.write(rest if rest.endswith(b"\n") else rest + b"\n")
            whole.truncate(lines[-1].end if lines else 0)


def _read_file(file: Path, kind: LineFile, at_least: int) -> list[Line]:
    if not file.exists():
        raise CorruptFileError(f"{file} is missing. {RESTORE}")
    data = file.read_bytes()
    if len(data) < at_least:
        raise CorruptFileError(f"{file} was truncated: it has {len(data)} bytes and had {at_least}. {RESTORE}")
    lines, end = list[Line](), 0
    *whole, rest = data.split(b"\n")
    for number, raw in enumerate(whole, start=1):
        end += len(raw) + 1
        try:
            lines.append(_decode_line(raw, kind, end))
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptFileError(f"{file}, line {number} was changed: {error}. {RESTORE}") from error
    if has_valid_crc(rest[:-1]):  # a whole line, and then what was its newline once
        raise CorruptFileError(f"{file}, line {len(lines) + 1} was changed: it does not end in a newline. {RESTORE}")
    if rest:
        logger.warning("%s, line %d is torn and left out: its writer was killed or is at work.", file, len(lines) + 1)
    return lines


def _encode_line(item: Item, write: int, lines: int) -> bytes:
    members: dict[str, object] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        if field.type is float:
            value = float(value)
            value = value if math.isfinite(value) else None if math.isnan(value) else str(value)
        elif field.type is int:
            value = operator.index(value)
        members[field.name] = value
    return with_crc(json.dumps(members | {"write": write, "lines": lines}, allow_nan=False)) + b"\n"


def _decode_line(raw: bytes, kind: LineFile, end: int) -> Line:
    members = without_crc(raw)
    for field in fields(kind.noun):
        if field.type is float:
            members[field.name] = math.nan if members[field.name] is None else float(members[field.name])
    write, lines = members.pop("write"), members.pop("lines")
    return Line(end=end, write=write, lines=lines, item=kind.noun(**members))
