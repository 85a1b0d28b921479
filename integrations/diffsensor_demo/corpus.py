"""The texts: what the model learns first, what it is fine-tuned on, and the probes kept out of both."""

import ast
import importlib
import random
import re
import sysconfig
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffsensor import ConfigError

MANUAL, DOCSTRINGS, CODE = "manual", "docstrings", "code"
HELD_OUT, GENERAL = "held-out", "general"

#: Their docstrings are the fine-tuning text. One that this Python lacks is left out.
MODULES = (
    "argparse", "calendar", "collections", "configparser", "contextlib", "csv", "datetime", "_pydatetime", "decimal",
    "_pydecimal", "difflib", "doctest", "ftplib", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "json",
    "locale", "logging", "logging/handlers", "mailbox", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools",
    "pprint", "random", "shutil", "smtplib", "socket", "statistics", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "trace", "traceback", "typing", "unittest/case", "unittest/mock", "urllib/parse", "urllib/request",
    "uuid", "warnings", "weakref", "webbrowser", "xml/etree/ElementTree", "zipfile",
)  # fmt: skip

#: Short texts of several kinds, for models of which nothing is known.
GENERAL_TEXTS = (
    "The river was high after three days of rain, and the old bridge had been closed since morning.",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a high mountain.",
    "She opened the letter slowly, read it twice, and put it back into the drawer without a word.",
    "To make bread you need flour, water, salt and yeast. Mix them, let the dough rise, and bake it for forty minutes.",
    "Dear Mr. Lewis, thank you for your letter of the third of May. We are glad to hear that the parcel has arrived.",
    "Question: What is the capital of France? Answer: The capital of France is Paris.",
    "Question: How many days are there in a week? Answer: There are seven days in a week.",
    "Once upon a time there was a little girl who lived with her grandmother at the edge of a dark forest.",
    "The committee met on Tuesday and decided, after a long debate, to raise the price of tickets by ten percent.",
    "I am sorry, but I cannot come to the party tomorrow because I have to work until late in the evening.",
    "Tom had five apples. He gave two of them to his sister and ate one. Now he has two apples left.",
    "The heart pumps blood through the body. It has four chambers: two atria and two ventricles.",
    "Turn left at the church, walk past the post office, and you will see the station on your right.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))",
    "The first train leaves at six o'clock in the morning and the last one shortly before midnight.",
    "Whoever wants to learn a language must read, listen and speak every day, even if only for a few minutes.",
    "In the year 1969 two men walked on the Moon for the first time, while a third stayed in orbit above them.",
    "Please switch off your telephone before the concert begins. Taking photographs is not allowed.",
    "The price of oil fell for the third week in a row, and shares of airlines rose in early trading.",
    "He who has never made a mistake has never tried anything new, as my teacher liked to say.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What a demonstration reads: `training` is fine-tuned on, `probes` are pairs of a group and a text."""

    training: tuple[str, ...]
    probes: tuple[tuple[str, str], ...]


def plain_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each on one line, in ASCII, without rules, frames and other markup."""
    text = text.encode("ascii", "ignore").decode()
    paragraphs = (re.sub(r"[*=~^+|-]{3,}|[`*]+", " ", paragraph).split() for paragraph in re.split(r"\n\s*\n", text))
    return [" ".join(words) for words in paragraphs if words]


def manual() -> tuple[list[str], list[str]]:
    """The Python manual's chapters on the language: those to learn from, and paragraphs of the others."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "The demo learns from pydoc_data.topics, which this Python lacks. Expected a Python with its standard "
            "library whole. Install the full Python of your system, or give --model and --data."
        ) from missing
    chapters = [plain_paragraphs(topics[name]) for name in sorted(topics)]
    learnt = ["\n".join(chapter) for number, chapter in enumerate(chapters) if number % 10]
    held_out = [paragraph for chapter in chapters[::10] for paragraph in chapter if len(paragraph) > 150]
    return learnt, held_out


def standard_library() -> tuple[list[str], list[str]]:
    """The docstrings of some modules of the standard library, and a piece of code of each."""
    docstrings, code = [], []
    for name in MODULES:
        stem = Path(sysconfig.get_path("stdlib")) / name
        file = next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)
        if file is None:
            continue
        source = file.read_text(encoding="utf-8")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        docstrings += [text for node in nodes if len(text := ast.get_docstring(node) or "") > 80]
        lines = source.splitlines()
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node)]
        pieces = (textwrap.dedent("\n".join(lines[one.lineno - 1 : one.end_lineno])) for one in functions)
        code += [piece for piece in pieces if 200 < len(piece) < 1200 and piece.isascii()][:2]
    if len(docstrings) < 200:
        raise ConfigError(
            f"The demo fine-tunes on the docstrings of the standard library, of which {len(docstrings)} were found in "
            f"{sysconfig.get_path('stdlib')}. Expected its .py files there. Give --model and --data instead."
        )
    return ["\n".join(plain_paragraphs(text)) for text in dict.fromkeys(docstrings)], code


def built_in(num_probes: int = 40, seed: int = 0) -> Corpus:
    """Docstrings to fine-tune on, with paragraphs of the manual between them, so that it is not forgotten.

    The probes are of the manual, which the model learnt first, of docstrings, and of code, which it meets here only.
    """
    learnt, prose = manual()
    docstrings, code = standard_library()
    draw = random.Random(seed)
    for texts in (prose, docstrings, code):
        draw.shuffle(texts)
    groups = {MANUAL: prose, DOCSTRINGS: docstrings[:num_probes], CODE: code}
    return Corpus(
        training=(*docstrings[num_probes:], *(paragraph for chapter in learnt for paragraph in cut(chapter, 400))),
        probes=tuple((group, text) for group, texts in groups.items() for text in texts[:num_probes]),
    )


def read_text(path: Path, limit: int = 8_000_000) -> str:
    """The text in a file, at most its first `limit` bytes; a sentence where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(limit)
    except OSError as problem:
        raise ConfigError(
            f"The data file {str(path)!r} cannot be read: {problem.strerror}. Expected a text file. "
            "Give the path of one with --data."
        ) from problem
    # A character that the limit cuts in two is no fault of the file.
    text = data.decode("utf-8", errors="ignore" if len(data) == limit else "replace")
    if b"\0" in data or text.count("\N{REPLACEMENT CHARACTER}") > len(text) // 1000:
        raise ConfigError(
            f"The data file {str(path)!r} is not text. Expected a file in UTF-8, such as .txt or .md. "
            "Give one with --data, or convert this one."
        )
    if not text.strip():
        raise ConfigError(
            f"The data file {str(path)!r} is empty. Expected some pages of text to fine-tune on. "
            "Give another with --data."
        )
    return text


def from_text(text: str, given: str, num_probes: int = 40, size: int = 400) -> Corpus:
    """Pieces of a text of about `size` characters, every so-many-th of them kept out of training as a probe.

    Half of the probes are such pieces, which show what the model learns; the other half are general
    texts, which show what it forgets.
    """
    pieces = cut(text, size)
    if len(pieces) < 10:
        raise ConfigError(
            f"{given} holds {len(text.strip())} characters. Expected at least {10 * size}, so that some can be kept "
            "out of training as probes. Give a longer text with --data."
        )
    every = max(len(pieces) // num_probes, 5)
    held_out = pieces[every // 2 :: every][:num_probes]
    kept_out = set(held_out)
    return Corpus(
        training=tuple(piece for piece in pieces if piece not in kept_out),
        probes=tuple([(HELD_OUT, piece) for piece in held_out] + [(GENERAL, piece) for piece in GENERAL_TEXTS]),
    )


def cut(text: str, size: int) -> list[str]:
    """`text` in pieces of about `size` characters that end with a line, or with a word where a line is too long."""
    pieces: list[str] = []
    lines: list[str] = []
    for line in _short_lines(text.splitlines(), size):
        lines.append(line)
        if sum(map(len, lines)) >= size:
            pieces.append("\n".join(lines).strip())
            lines = []
    pieces.append("\n".join(lines).strip())
    return [piece for piece in pieces if piece]


def _short_lines(lines: Sequence[str], size: int) -> list[str]:
    short = []
    for line in lines:
        while len(line) > 2 * size:
            end = line.rfind(" ", 0, size) + 1 or size
            short.append(line[:end])
            line = line[end:]
        short.append(line)
    return short
