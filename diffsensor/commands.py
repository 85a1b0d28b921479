"""The commands of the command line: our own, and those found through the entry points "diffsensor.commands".

A command is a function for typer, or a group of them (a `typer.Typer`). Where a package that it needs is missing,
the extra named like the command brings it: `pip install 'diffsensor[demo]'`.
"""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version

import typer

GROUP = "diffsensor.commands"
BUILT_IN = (
    EntryPoint("probes", "diffsensor.probes_command:app", GROUP),
    EntryPoint("report", "diffsensor.report_command:report", GROUP),
    EntryPoint("calibrate", "diffsensor.calibrate_command:calibrate", GROUP),
    EntryPoint("scan", "diffsensor.scan_command:scan", GROUP),
    EntryPoint("gate", "diffsensor.scan_command:gate", GROUP),
    EntryPoint("watch", "diffsensor.scan_command:watch", GROUP),
    EntryPoint("ask", "diffsensor.ask_command:ask", GROUP),
    EntryPoint("compare", "diffsensor.compare_command:compare", GROUP),
    EntryPoint("cache", "diffsensor.cache_command:app", GROUP),
)


def application(arguments: Sequence[str]) -> typer.Typer:
    """The application with the command that is asked for, or with all of them where none is (for --help)."""
    # Errors of ours are shown by the caller; all others are bugs, and their plain traceback is what helps.
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    def show_version(asked: bool) -> bool:
        if asked:
            print(f"diffsensor {version('diffsensor')}")
            raise typer.Exit
        return asked

    @app.callback(epilog="Example: diffsensor demo --help")
    def diffsensor(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=show_version, help="Say which version this is."
        ),
    ) -> None:
        """See, while a language model is fine-tuned, how far and in which way it has moved from its reference."""

    found = {entry.name: entry for entry in (*entry_points(group=GROUP), *BUILT_IN)}
    first = next((word for word in arguments if not word.startswith("-")), "")
    # A command may take seconds to load, so the others are left alone.
    for name in [first] if first in found else sorted(found):
        _add(app, found[name])
    return app


def show_error(sentence: str) -> None:
    typer.secho(sentence, fg="red", err=True)


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        command = entry.load()
    except ModuleNotFoundError as error:
        if _is_ours(error, entry):
            raise
        sentence = _how_to_get(entry, error)

        def missing() -> None:
            show_error(sentence)
            raise typer.Exit(2)

        app.command(
            entry.name,
            help=sentence.replace("[", r"\["),  # else it is taken for markup
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(missing)
    else:
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)


def _is_ours(error: ModuleNotFoundError, entry: EntryPoint) -> bool:
    """Whether the command itself is missing or broken, and not a package that it needs."""
    root = (error.name or "").partition(".")[0]
    return root in {"", "diffsensor", entry.module.partition(".")[0]}


def _how_to_get(entry: EntryPoint, error: ModuleNotFoundError) -> str:
    package = entry.dist.name if entry.dist else "diffsensor"
    return (
        f"`diffsensor {entry.name}` needs {error.name}, which is not installed: pip install '{package}[{entry.name}]'"
    )
