"""The W&B dashboard: what it would be, without a server; and what is said where it cannot be stored."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import wandb

from diffsensor import Monitor, Reading, cli, commands, every
from diffsensor.rules import Limit
from diffsensor.sensors import Outputs
from diffsensor_wandb import WandbSink, command
from diffsensor_wandb.shown import key_of
from tiny import frozen_head, probe_set

# wandb-workspaces' own; so it is imported in tests, and not above.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

GIVEN = ("dashboard", "--entity", "team", "--project", "drift")


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As installed from this checkout's pyproject.toml, whatever is installed."""
    entry = EntryPoint("dashboard", "diffsensor_wandb.command:dashboard", commands.GROUP)
    monkeypatch.setattr(commands, "entry_points", lambda group: [entry])
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    wandb.teardown()  # or it would go on with the settings of another test
    yield
    wandb.teardown()


@pytest.fixture
def workspaces() -> Any:
    import wandb_workspaces.workspaces

    return wandb_workspaces.workspaces.Workspace


def panels() -> list[Any]:
    from diffsensor_wandb.dashboard import workspace

    return [panel for section in workspace("e", "p", "n").sections for panel in section.panels]


def patterns() -> list[str]:
    return [panel.metric_regex for panel in panels() if getattr(panel, "metric_regex", None)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def spec_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def sections_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {each["name"]: each["panels"] for each in spec["spec"]["section"]["panelBankConfig"]["sections"]}


def test_a_dry_run_writes_the_sections_and_asks_no_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workspaces: Any
) -> None:
    def unexpected(self: object) -> None:
        raise AssertionError("a server was asked")

    monkeypatch.setattr(workspaces, "save", unexpected)
    file = tmp_path / "dashboard.json"
    code, out, err = run(capsys, *GIVEN, "--dry-run", str(file))
    assert (code, out, err) == (0, f"What W&B would be sent for team/drift is in {file}.\n", "")
    spec = spec_of(file)
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "drift", "Drift")
    sections = sections_of(spec)
    assert list(sections) == ["Overview", "Groups", "Layers", "Tokens", "Alerts and actions"]
    assert all(sections.values())
    lines = [panel for panels in sections.values() for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["xAxis"] for panel in lines} == {"diffsensor/step"}
    assert '"summary:diffsensor/gate/verdict"' in file.read_text()


def test_each_key_that_the_sink_logs_is_drawn_by_a_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each panel with a pattern that a full run with a penalty can fill is filled."""
    logged: set[str] = set()
    monkeypatch.setattr(wandb.Run, "log", lambda self, row: logged.update(row))
    sink = WandbSink(mode="offline", dir=tmp_path)
    monitor = Monitor(
        probe_set(),
        cache_dir=tmp_path / "cache",
        sinks=[sink],
        sensors="full",
        schedule=every(1),
        rules=[Limit("kl_ref_live", above=1e-6, for_=1), Limit("kl_ref_live", above=1e-6, for_=1, group="worst")],
    )
    model = frozen_head()
    monitor.observe(model, 0, loss=1.0)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    monitor.observe(model, 1, loss=1.0)
    assert monitor.failures == {}

    monitor.close()
    named = {name for each in panels() for name in getattr(each, "y", None) or [getattr(each, "table_name", None)]}
    undrawn = {
        key for key in logged if key not in named and not any(re.fullmatch(pattern, key) for pattern in patterns())
    }
    # Nor are errors, but for those of the headline, and groups of what is read with "full" alone.
    rest = {key for key in undrawn if not key.endswith("/stderr")} - {"diffsensor/step"}
    dear = Outputs("full").metrics.keys() - Outputs().metrics.keys()
    assert {key.partition("/group=")[0].removeprefix("diffsensor/") for key in rest} == dear
    assert all("/group=" in key for key in rest)
    empty = {pattern for pattern in patterns() if not any(re.fullmatch(pattern, key) for key in logged)}
    assert {pattern.split("(")[0] for pattern in empty} == {
        "^diffsensor/[a-z0-9_]+_",
        "^diffsensor/kl_coefficient",
        "^diffsensor/cka_distance",  # these probes are too few for it
    }
    assert {f"diffsensor/layers/{name}" for name in ("relative_l2", "mean_shift")} <= named & logged
    assert "diffsensor/tables/tokens" in named & logged


@pytest.mark.parametrize(
    ("parts", "drawn"),
    [
        ({}, True),
        ({"group": "code"}, True),
        ({"bank": "mine", "group": "code and maths"}, True),
        ({"bank": "mine"}, True),
        ({"metric": "relative_l2", "hookpoint": "model.layers.11"}, True),
        ({"metric": "something_else"}, False),
    ],
)
def test_banks_groups_and_hookpoints_of_any_plain_name_are_drawn(parts: dict[str, str], drawn: bool) -> None:
    key = key_of(Reading(step=0, sensor="s", value=0.0, unit="u", **({"metric": "kl_ref_live"} | parts)).key)
    assert any(re.fullmatch(pattern, key) for pattern in patterns()) is drawn


def test_a_dashboard_that_was_stored_is_told_by_its_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workspaces: Any
) -> None:
    saved = []
    monkeypatch.setattr(workspaces, "save", lambda self: saved.append(self.name))
    monkeypatch.setattr(workspaces, "url", property(lambda self: f"https://wandb.ai/{self.entity}/{self.project}"))
    assert run(capsys, *GIVEN, "--name", "Mine") == (
        0,
        "The dashboard 'Mine' is at https://wandb.ai/team/drift\n",
        "",
    )
    code, out, _ = run(capsys, *GIVEN, "--json")
    assert (code, json.loads(out)) == (0, {"url": "https://wandb.ai/team/drift"})
    assert saved == ["Mine", "Drift"]


def test_without_a_login_the_sentence_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    code, out, err = run(capsys, *GIVEN)
    assert (code, out) == (2, "")
    assert "W&B (http://127.0.0.1:9) did not take the dashboard for team/drift: UsageError: No API key" in err
    assert "Log in with `wandb login`" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--entity", "", "--project", "p"), "--entity was given ''"),
        (("--entity", "e", "--project", "e/p"), "--project was given 'e/p', expected a name, and without a slash"),
        (("--entity", "e", "--project", "p", "--name", "\U0001f389"), "--name was given '\U0001f389', which W&B takes"),
        (("--entity", "e", "--project", "p", "--dry-run", "/no/such/x.json"), "cannot be written to /no/such/x.json"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "dashboard", *arguments)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_a_wandb_workspaces_that_does_not_show_its_spec_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workspaces: Any
) -> None:
    monkeypatch.delattr(workspaces, "_to_model")
    code, _, err = run(capsys, *GIVEN, "--dry-run", str(tmp_path / "x.json"))
    assert code == 2
    assert "wandb-workspaces 0." in err
    assert "so there is no dry run with it" in err
    assert not (tmp_path / "x.json").exists()


def test_without_wandb_workspaces_the_sentence_is_the_pip_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, err = run(capsys, *GIVEN)
    assert code == 2
    assert err.endswith("which is not installed: pip install 'diffsensor[dashboard]'\n")


def test_help_does_not_load_wandb_workspaces() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import diffsensor_wandb.command; "
    code += "print('wandb_workspaces' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "dashboard", "--help")
    assert code == 0
    assert "Example: diffsensor dashboard --entity" in out
