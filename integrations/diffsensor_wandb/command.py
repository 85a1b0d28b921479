"""`diffsensor dashboard`: the command line of the dashboard."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diffsensor import ConfigError


def dashboard(
    entity: Annotated[str, typer.Option(metavar="E", help="The W&B user or team that the project belongs to.")],
    project: Annotated[str, typer.Option(metavar="P", help="The W&B project that holds the runs.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What the dashboard is called.")] = "Drift",
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FILE", help="Write what W&B would be sent; no server is asked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
) -> None:
    """Build a W&B dashboard of what WandbSink logs: overview, groups, layers, tokens, alerts and actions.

    It is a workspace of its own in the project (a saved view), made anew at each call; others stay as they are. Log in
    first with `wandb login`. Exit code 2: it could not be stored; the sentence says why.

    Example: diffsensor dashboard --entity my-team --project my-project

    Example: diffsensor dashboard --entity my-team --project my-project --dry-run dashboard.json
    """
    if find_spec("wandb_workspaces") is None:
        raise ConfigError(
            "`diffsensor dashboard` needs wandb-workspaces, which is not installed: pip install 'diffsensor[dashboard]'"
        )
    # Loaded now, not for --help: they take seconds.
    from diffsensor_wandb.dashboard import save, workspace, write

    for option, given in (("entity", entity), ("project", project), ("name", name)):
        if not given.strip() or (option != "name" and "/" in given):
            raise ConfigError(f"--{option} was given {given!r}, expected a name, and without a slash.")
    made = workspace(entity, project, name)
    if dry_run is not None:
        write(made, dry_run)
        told, sentence = {"file": str(dry_run)}, f"What W&B would be sent for {entity}/{project} is in {dry_run}."
    else:
        url = save(made)
        told, sentence = {"url": url}, f"The dashboard {name!r} is at {url}"
    print(json.dumps(told) if as_json else sentence)
