"""`python -m diffsensor_demo.hack`: the command line."""

import sys
from importlib.util import find_spec

NEEDED = ("trl", "datasets", "transformers", "tokenizers", "matplotlib", "rich")

if __name__ == "__main__":
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"This demonstration needs {', '.join(missing)}: pip install 'diffsensor[demo]' trl")
    # Loaded now: it takes seconds.
    import typer

    from diffsensor import DiffSensorError
    from diffsensor_demo.hack.command import hack

    try:
        typer.run(hack)
    except DiffSensorError as error:
        sys.exit(str(error))
