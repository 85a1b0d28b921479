"""Probes as lines of JSON: {"text"} or {"prompt", "completion"}, with optional "id", "group" and "weight"."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffsensor.errors import ConfigError, ProbeError, listed, unknown
from diffsensor.types import ALL_PROBES, require_group_name

_KEYS = ("text", "prompt", "completion", "id", "group", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLine:
    """One record. `prompt` is None for a plain text, which is then in `text`; otherwise `text` is the completion."""

    where: str
    name: str
    text: str
    prompt: str | None
    group: str
    weight: float


def parse_lines(contents: bytes, source: str) -> Iterator[ProbeLine]:
    """The records of a JSONL file, each checked as it comes; blank lines are skipped."""
    lines: dict[str, int] = {}
    for number, line in enumerate(contents.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}: "
        record = _record(line, where)
        name = str(len(lines)) if record.get("id") is None else str(record["id"])
        if name in lines:
            raise ProbeError(
                f"{where}the id {name!r} is taken by line {lines[name]} (a record without an id is named by its number "
                "from 0 on). Give each record an id of its own."
            )
        lines[name] = number
        yield ProbeLine(
            where=where,
            name=name,
            text=record["text"] if "text" in record else record["completion"],
            prompt=record.get("prompt"),
            group=record.get("group") or ALL_PROBES,
            weight=1.0 if record.get("weight") is None else float(record["weight"]),
        )


def quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_text(value: object, key: str, where: str, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ProbeError(f"{where}{key} is {quoted(value)}; expected a string.")
    if not value and not may_be_empty:
        raise ProbeError(f"{where}{key} is {value!r}, an empty string. Give some text or leave the probe out.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProbeError(f"{where}{key} is {quoted(value)}, which has half a surrogate pair and is no text.") from None


def _record(line: bytes, where: str) -> dict[str, Any]:
    """One line of a JSONL file, checked."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProbeError(
            f"{where}{quoted(line.decode(errors='replace'))} is not JSON ({error}). "
            'Expected one object such as {"text": "..."}.'
        ) from None
    if not isinstance(record, dict):
        raise ProbeError(f'{where}{quoted(record)} is not an object. Expected one such as {{"text": "..."}}.')
    if "messages" in record:
        raise ProbeError(
            f'{where}"messages" is {quoted(record["messages"])}; chats are not read yet. Apply the chat template '
            'yourself and write {"prompt": "...", "completion": "..."}.'
        )
    for key in record:
        if key not in _KEYS:
            raise ProbeError(f"{where}{unknown('key', key, _KEYS)}")
    given = [key for key in ("text", "prompt", "completion") if key in record]
    if given not in (["text"], ["prompt", "completion"]):
        raise ProbeError(
            f'{where}the record has {listed(map(repr, given))} of the keys "text", "prompt" and "completion". '
            'Expected either "text" alone, or "prompt" and "completion".'
        )
    for key in given:
        # A completion may stand alone: it then follows the BOS.
        require_text(record[key], key, where, may_be_empty=key == "prompt")
    name, group, weight = record.get("id"), record.get("group"), record.get("weight")
    if not isinstance(name, str | int | None) or isinstance(name, bool) or name == "":
        raise ProbeError(f"{where}id is {quoted(name)}; expected a string or a whole number.")
    if not isinstance(group, str | None):
        raise ProbeError(f"{where}group is {quoted(group)}; expected a string.")
    try:
        require_group_name(group or ALL_PROBES)
    except ConfigError as error:
        raise ProbeError(f"{where}{error}") from None
    if weight is not None and not (
        isinstance(weight, int | float) and not isinstance(weight, bool) and weight >= 0 and math.isfinite(weight)
    ):
        raise ProbeError(f"{where}weight is {quoted(weight)}; expected a finite number, 0 or more.")
    return record
