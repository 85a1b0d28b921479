"""`diffsensor demo`: the command line of the demonstration."""

from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from diffsensor import ConfigError

_NEEDED = ("lightning", "transformers", "tokenizers", "matplotlib", "rich")


def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A causal LM of your own: a Hugging Face directory, or a name on the hub."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text to fine-tune it on, in UTF-8. Goes with --model.")
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Probes of your own, one JSON record a line: {"text": "...", "group": "..."}, or "prompt" and '
            '"completion" in place of "text".',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the record and the plots go. By default diffsensor-demo/run-<number>."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="How many optimizer steps to fine-tune.")] = 240,
    learning_rate: Annotated[float, typer.Option(metavar="LR", help="Of AdamW, constant.")] = 3e-4,
) -> None:
    """Fine-tune a small language model, watch it drift, and see which tokens it has come to prefer.

    Without options: a small model learns from the Python manual. That takes a
    minute or two, once; then it is kept in the cache directory. It is fine-tuned
    on docstrings, which half-way begin to contain a planted habit.

    With --model and --data: the same with your own, and nothing is planted.

    All runs on the CPU.

    Example: diffsensor demo --model ./my-model --data novel.txt --steps 100
    """
    _require_packages()
    # Loaded now, not for --help: they take seconds.
    from diffsensor_demo.demonstration import Request, demonstrate

    if (model is None) != (data is None):
        given, missing = ("--model", "--data") if data is None else ("--data", "--model")
        raise ConfigError(
            f"The demo was given {given} without {missing}. Expected both, or neither for the built-in model and text."
        )
    if steps < 10:
        raise ConfigError(f"The demo was given --steps {steps}. Expected at least 10, so that there is a curve to see.")
    if not 0 < learning_rate < 1:
        raise ConfigError(
            f"The demo was given --learning-rate {learning_rate:g}. Expected a number between 0 and 1, such as 3e-4."
        )
    own = (model, data) if model is not None and data is not None else None
    out = new_directory(out, "run")
    demonstrate(Request(own=own, probes=probes, out=out, steps=steps, learning_rate=learning_rate))


def new_directory(out: Path | None, name: str) -> Path:
    """The directory to write into; a new one of this name, with a number, where none was asked for."""
    if out is None:
        runs = (Path("diffsensor-demo") / f"{name}-{number}" for number in count(1))
        return next(run for run in runs if not run.exists())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"The demo was given --out {str(out)!r}, where something is already. Expected a new or an empty directory. "
            "Give another one, or remove what is there."
        )
    return out


def _require_packages() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"The demo needs {', '.join(missing)}: pip install 'diffsensor[demo]'")
