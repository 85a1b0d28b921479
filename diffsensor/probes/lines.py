"""Probes as records: {"text"}, {"prompt", "completion"} or {"messages"}, with optional "id", "group", "weight"."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffsensor.errors import ConfigError, ProbeError, listed, unknown
from diffsensor.types import ALL_PROBES, require_group_name

_CONTENTS = ("text", "prompt", "completion", "messages")
_KEYS = (*_CONTENTS, "id", "group", "weight")
_EXAMPLE = '{"text": "..."}'


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLine:
    """One record. `prompt` is None for a plain text, which is then in `text`; otherwise `text` is the completion.

    Of a chat there are only `messages`, each with "role" and "content".
    """

    where: str
    name: str
    text: str
    prompt: str | None
    messages: tuple[dict[str, str], ...] = ()
    group: str
    weight: float


def parse_lines(contents: bytes, source: str) -> Iterator[ProbeLine]:
    """The records of a JSONL file, each checked as it comes; blank lines are skipped."""
    lines = ((number, line) for number, line in enumerate(contents.split(b"\n"), start=1) if line.strip())
    named = (
        (f"line {number}", str(place), _object(line, f"{source}, line {number}: "))
        for place, (number, line) in enumerate(lines)
    )
    return _parse(named, f"{source}, ")


def parse_rows(rows: Iterable[tuple[int, object]], source: str) -> Iterator[ProbeLine]:
    """Records that are in memory, with their numbers. What is None is taken as not given: tables cannot leave out."""
    named = ((f"row {number}", str(number), _row(row, f"{source}, row {number}: ")) for number, row in rows)
    return _parse(
        named, f"{source}, ", hint=" Keep only columns of these names: dataset.select_columns([...]) or .rename_column."
    )


def _parse(records: Iterable[tuple[str, str, dict[str, Any]]], source: str, hint: str = "") -> Iterator[ProbeLine]:
    """Each record comes with its place in words, and with the name that it has where it gives no id."""
    taken: dict[str, str] = {}
    for place, number, record in records:
        where = f"{source}{place}: "
        _check(record, where, hint)
        name = number if record.get("id") is None else str(record["id"])
        if name in taken:
            raise ProbeError(
                f"{where}the id {name!r} is taken by {taken[name]} (a record without an id is named by its number "
                "from 0 on). Give each record an id of its own."
            )
        taken[name] = place
        yield ProbeLine(
            where=where,
            name=name,
            text=record.get("text", record.get("completion", "")),
            prompt=record.get("prompt"),
            messages=_messages(record["messages"], where) if "messages" in record else (),
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


def _object(line: bytes, where: str) -> dict[str, Any]:
    """One line of a JSONL file as an object."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProbeError(
            f"{where}{quoted(line.decode(errors='replace'))} is not JSON ({error}). "
            f"Expected one object such as {_EXAMPLE}."
        ) from None
    if not isinstance(record, dict):
        raise ProbeError(f"{where}{quoted(record)} is not an object. Expected one such as {_EXAMPLE}.")
    return record


def _row(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ProbeError(f"{where}{quoted(row)} is not a record. Expected a mapping such as {_EXAMPLE}.")
    return {str(key): value for key, value in row.items() if value is not None}


def _check(record: dict[str, Any], where: str, hint: str) -> None:
    for key in record:
        if key not in _KEYS:
            raise ProbeError(f"{where}{unknown('key', key, _KEYS)}{hint}")
    given = [key for key in _CONTENTS if key in record]
    if given not in (["text"], ["prompt", "completion"], ["messages"]):
        raise ProbeError(
            f'{where}the record has {listed(map(repr, given))} of the keys "text", "prompt", "completion" and '
            '"messages". Expected "text" alone, "messages" alone, or "prompt" and "completion".'
        )
    if given == ["messages"]:
        given = []
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


def _messages(given: object, where: str) -> tuple[dict[str, str], ...]:
    example = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(given, list | tuple) or not given:
        raise ProbeError(f"{where}messages is {quoted(given)}; expected a list such as {example}.")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(given):
        place = f"{where}message {number}: "
        if not isinstance(message, Mapping):
            raise ProbeError(
                f'{place}{quoted(message)} is not an object. Expected {{"role": "...", "content": "..."}}.'
            )
        # Tables give every message every column.
        said = {str(key): value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            require_text(said.get(key), key, place, may_be_empty=key == "content" and said.get("role") != "assistant")
        for key in said:
            if key not in ("role", "content"):
                raise ProbeError(f"{place}{unknown('key', key, ('role', 'content'))} Leave the others out.")
        messages.append(said)
    if not any(message["role"] == "assistant" for message in messages):
        raise ProbeError(
            f"{where}no message is the assistant's (roles: {listed(message['role'] for message in messages)}), so that "
            'nothing would be counted. Add {"role": "assistant", "content": "..."}, what the model is to say.'
        )
    return tuple(messages)
