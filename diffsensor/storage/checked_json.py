"""JSON that shows when it was changed: the last member of an object is the CRC-32 of the text before it."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsensor.errors import ConfigError, CorruptFileError

FORMAT = 1
RESTORE = "Restore it from a copy, or begin anew in another directory."


def with_crc(text: str) -> bytes:
    """The text of a JSON object with its CRC-32 as the last member."""
    body = text.encode().removesuffix(b"}").rstrip()
    return body + _crc_member(body)


def has_valid_crc(raw: bytes) -> bool:
    # Compared as text, so that no other spelling of the same number passes.
    split = max(len(raw) - len(_crc_member(b"")), 0)
    return raw[split:] == _crc_member(raw[:split])


def without_crc(raw: bytes) -> dict[str, Any]:
    """The members of an object; ValueError if its text was changed."""
    if not has_valid_crc(raw):
        raise ValueError("its checksum does not match its content")
    members: dict[str, Any] = json.loads(raw, object_hook=_restored)
    del members["crc"]
    return members


def json_bytes(name: str, content: Mapping[str, object]) -> bytes:
    """A JSON file that keeps `content` under its own name; see `plain` for what it may be."""
    members = {"format": FORMAT, name: plain(content, name)}
    return with_crc(json.dumps(members, indent=1, allow_nan=False)) + b"\n"


def parse_json(file: Path, data: bytes, name: str | None = None) -> dict[str, Any]:
    """What `json_bytes` made a file of, under the name of the file where no other is given."""
    name = file.stem if name is None else name
    try:
        if not data.endswith(b"\n"):
            raise ValueError("it does not end in a newline")
        members = without_crc(data[:-1])
    except ValueError as error:
        raise CorruptFileError(f"{file} was changed: {error}. {RESTORE}") from error
    if members.get("format") != FORMAT:
        raise CorruptFileError(
            f"{file} has format {members.get('format')}, this diffsensor reads {FORMAT}. Use the version that wrote it."
        )
    if name not in members:
        held = ", ".join(repr(member) for member in members if member != "format")
        raise CorruptFileError(f"{file} holds {held}, expected {name!r}: it has been renamed. Name it as it was.")
    content: dict[str, Any] = members[name]
    return content


def read_json(file: Path, name: str | None = None) -> dict[str, Any]:
    if not file.exists():
        raise CorruptFileError(f"{file} is missing. {RESTORE}")
    return parse_json(file, file.read_bytes(), name)


def plain(value: object, where: str) -> object:
    """`value` as JSON gives it back, or a sentence on the part that it does not. Tuples become lists.

    A float that is no number becomes {"__float__": "nan"}, because null means None.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(part, f"{where}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != "__float__" for key in value):
        return {key: plain(part, f"{where}[{key!r}]") for key, part in value.items()}
    raise ConfigError(
        f"{where} is {value!r} ({type(value).__name__}), which JSON does not give back as it was. "
        "Use None, bool, int, float, str, lists of these and dicts of these with text as keys."
    )


def _restored(members: dict[str, Any]) -> Any:
    return float(members["__float__"]) if members.keys() == {"__float__"} else members


def _crc_member(body: bytes) -> bytes:
    return b', "crc": "%08x"}' % zlib.crc32(body)
