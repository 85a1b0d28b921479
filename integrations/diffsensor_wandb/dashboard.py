"""The dashboard: a W&B workspace for what WandbSink logs."""

import os
from importlib.metadata import version
from pathlib import Path

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.interface import PanelTypes

from diffsensor import ConfigError, MetricInfo, log_key
from diffsensor.sensors import Activations, Outputs
from diffsensor_wandb.sink import HEADLINE, STEP

#: The name of a group, hookpoint or bank; one with a slash could not be told from a name with `/stderr` behind it.
_NAME = "[^/]+"
_BANK = f"(/bank={_NAME})?"
#: What is drawn with a reading.
_BESIDE = "(/noise_floor|/limit)?"
#: What rules and the budget say of themselves.
_EVIDENCE = "[a-z0-9_]+_(change_point_evidence|deviation|group_shift_p)"
_READ_ME = """**How far the model has moved from its reference**, on a fixed set of probes.

- The axis is the optimizer step that was read. An unchanged model reads 0.
- `/stderr` is the standard error over probes, `/noise_floor` what the same weights read in another batch split,
  `/limit` what a rule or the gate compares with.
- The columns of the table of runs hold the last verdict, and the worst reading of the run.
- Probes show what they bring up. What no probe brings up is in no number here.
"""


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """The workspace, not stored anywhere yet: overview, groups, layers, tokens, alerts and actions.

    Its panels select what they draw by patterns, so it fits every bank, group and hookpoint whose name has no slash.
    What no run logs stays an empty panel.
    """
    outputs, layers = Outputs().metrics, Activations().metrics
    headline = outputs[HEADLINE]
    dear = [name for name in Outputs("full").metrics if name not in outputs]
    overview: list[PanelTypes] = [
        wr.MarkdownPanel(markdown=_READ_ME),
        _lines(headline, f"{_BANK}{_BESIDE}", "with noise floor and limit"),
        _lines(headline, f"{_BANK}/group=worst(/stderr|/limit)?", "of the worst group"),
        _lines(headline, f"{_BANK}/stderr", "standard error"),
        *(_lines(info, f"{_BANK}{_BESIDE}") for info in outputs.values() if info is not headline),
        _matching("With sensors='full'", f"({'|'.join(dear)}){_BANK}{_BESIDE}"),
        _matching("loss", f"loss{_BANK}"),
    ]
    groups: list[PanelTypes] = [
        *(_lines(info, f"{_BANK}/group={_NAME}(/limit)?", "in each group") for info in outputs.values()),
        _lines(headline, f"{_BANK}/group={_NAME}/stderr", "in each group, standard error"),
    ]
    by_layer: list[PanelTypes] = [
        panel
        for info in layers.values()
        for panel in (
            wr.LinePlot(title=f"{info.name}: a bin for each hookpoint", x=STEP, y=[log_key(f"layers/{info.name}")]),
            _lines(info, f"{_BANK}/at={_NAME}(/limit)?", "at each hookpoint"),
        )
    ]
    steered: list[PanelTypes] = [
        _table("alerts"),
        _table("actions"),
        _matching("What rules go by", f"{_EVIDENCE}{_BANK}(/group={_NAME})?(/at={_NAME})?(/limit)?"),
        _matching("Coefficient of the KL penalty", f"kl_coefficient{_BANK}"),
    ]
    sections = [
        ws.Section(name="Overview", is_open=True, panels=overview),
        ws.Section(name="Groups", panels=groups),
        ws.Section(name="Layers", panels=by_layer),
        ws.Section(name="Tokens", panels=[_table("tokens")]),
        ws.Section(name="Alerts and actions", panels=steered),
    ]
    try:
        return _assembled(entity, project, name, sections)
    except ValueError as error:
        raise ConfigError(
            f"--name was given {name!r}, which W&B takes for no dashboard's name. Give one of letters and digits."
        ) from error


def _assembled(entity: str, project: str, name: str, sections: list[ws.Section]) -> ws.Workspace:
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            pinned_columns=["summary:diffsensor/gate/verdict", "summary:diffsensor/worst/reading"]
        ),
    )


def specification(made: ws.Workspace) -> str:
    """What W&B would be sent, as JSON. Raises `ConfigError` where this wandb-workspaces cannot tell."""
    try:
        text: str = made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    except AttributeError as error:  # both are private there
        raise ConfigError(
            f"wandb-workspaces {version('wandb-workspaces')} does not show what it would send ({error}), so there is "
            "no dry run with it. Install the one that this was made with: pip install 'diffsensor[dashboard]'."
        ) from error
    return text


def write(made: ws.Workspace, path: Path) -> None:
    """Write the specification to a file."""
    text = specification(made)
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(
            f"The dashboard cannot be written to {path}: {error.strerror or error}. Give --dry-run a file in a "
            "directory that is there and can be written to."
        ) from error


def save(made: ws.Workspace) -> str:
    """Store the workspace on the W&B server as a new view. Gives its address."""
    try:
        made.save()
        return str(made.url)
    except Exception as error:
        host = os.environ.get("WANDB_BASE_URL", "api.wandb.ai")
        raise ConfigError(
            f"W&B ({host}) did not take the dashboard for {made.entity}/{made.project}: {type(error).__name__}: "
            f"{error} Log in with `wandb login`, check the names of the entity and the project, or give --dry-run "
            "FILE, which needs no server."
        ) from error


def _lines(info: MetricInfo, tail: str, what: str = "") -> wr.LinePlot:
    return _matching(f"{info.name} {what}".rstrip(), info.name + tail, info.unit)


def _matching(title: str, pattern: str, unit: str = "") -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, metric_regex=f"^diffsensor/{pattern}$", title_y=unit or None)


def _table(name: str) -> wr.WeavePanelSummaryTable:
    return wr.WeavePanelSummaryTable(table_name=log_key(f"tables/{name}"))
