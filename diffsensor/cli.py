"""The command line, `diffsensor <command>`: what a command ends with."""

import sys
from collections.abc import Sequence

from diffsensor.errors import DiffSensorError

REFUSED = 2
INTERRUPTED = 130  # as shells say for a program that was stopped with Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error that the user can mend is shown as its sentence, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from diffsensor import commands
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print("The command line needs typer, which is not installed: pip install 'diffsensor[cli]'", file=sys.stderr)
        sys.exit(REFUSED)
    try:
        commands.application(arguments)(args=list(arguments), prog_name="diffsensor")
    except DiffSensorError as error:
        commands.show_error(str(error))
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
