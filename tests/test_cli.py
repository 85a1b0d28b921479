import importlib.metadata
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import diffsensor
from diffsensor import cli, commands
from diffsensor.errors import CorruptFileError, ProbeError

ROOT = Path(__file__).parent.parent


def greet(name: str = "you", loud: bool = False) -> None:
    """Say hello. Example: diffsensor greet --name me"""
    print(f"Hello {name}{'!' if loud else '.'}")


def refuse() -> None:
    """Refuse. Example: diffsensor refuse"""
    raise ProbeError("The probe set is [empty]. Give at least one probe.")


def refuse_a_file() -> None:
    """Refuse a file. Example: diffsensor refuse-a-file"""
    raise CorruptFileError("x.safetensors is truncated. Delete it.")


def hang() -> None:
    """Be stopped by hand. Example: diffsensor hang"""
    raise KeyboardInterrupt


def fall_over() -> None:
    """Have a bug. Example: diffsensor fall-over"""
    raise ZeroDivisionError("a bug of ours")


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Commands of this file in place of the installed ones."""
    module = types.ModuleType("commands_of_the_test")
    found = []
    for command in (greet, refuse, refuse_a_file, hang, fall_over):
        setattr(module, command.__name__, command)
        name = command.__name__.replace("_", "-")
        found.append(EntryPoint(name, f"commands_of_the_test:{command.__name__}", commands.GROUP))
    monkeypatch.setitem(sys.modules, "commands_of_the_test", module)
    monkeypatch.setattr(commands, "entry_points", lambda group: found if group == commands.GROUP else [])
    monkeypatch.setenv("COLUMNS", "120")
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_command_is_found_through_its_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "greet", "--name", "probe", "--loud") == (0, "Hello probe!\n", "")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("refuse", "The probe set is [empty]. Give at least one probe."),
        ("refuse-a-file", "x.safetensors is truncated. Delete it."),
    ],
)
def test_our_errors_are_one_sentence_on_stderr_and_code_2(
    capsys: pytest.CaptureFixture[str], command: str, sentence: str
) -> None:
    assert run(capsys, command) == (2, "", sentence + "\n")


def test_an_interrupted_command_ends_with_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "hang")
    assert code == 130
    assert "Traceback" not in err


def test_an_interrupt_while_a_command_loads_ends_with_code_130_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "application", interrupted)
    assert run(capsys, "greet")[0] == 130


def test_a_bug_keeps_its_plain_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    with pytest.raises(ZeroDivisionError, match="a bug of ours") as caught:
        cli.main(["fall-over"])
    sys.excepthook(caught.type, caught.value, caught.tb)
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("ZeroDivisionError: a bug of ours\n")


def test_a_misspelt_option_or_command_is_refused_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "greet", "--nam", "x")[0] == 2
    code, _, err = run(capsys, "gret")
    assert code == 2
    assert "greet" in err


def a_command_that_needs(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EntryPoint:
    (tmp_path / "needy_command.py").write_text(f"import {module}\n\ndef needy() -> None: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "needy_command", raising=False)
    return EntryPoint("needy", "needy_command:needy", commands.GROUP)


@pytest.mark.parametrize("arguments", [("needy",), ("needy", "--steps", "3"), ("needy", "--help"), ("--help",)])
def test_a_command_whose_package_is_missing_says_which_extra_brings_it(
    arguments: tuple[str, ...],
    entries: list[EntryPoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries.append(a_command_that_needs("no_such_framework", tmp_path, monkeypatch))
    code, out, err = run(capsys, *arguments)
    assert code == (0 if "--help" in arguments else 2)
    text = " ".join((out + err).replace("│", " ").split())
    assert "needs no_such_framework, which is not installed: pip install 'diffsensor[needy]'" in text
    if code == 2:
        assert err.count("\n") == 1


def test_a_command_that_cannot_load_does_not_get_in_the_way_of_others(
    entries: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries.insert(0, a_command_that_needs("no_such_framework", tmp_path, monkeypatch))
    assert run(capsys, "greet") == (0, "Hello you.\n", "")


def test_only_the_command_that_is_asked_for_is_loaded(
    entries: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries.append(a_command_that_needs("math", tmp_path, monkeypatch))
    assert run(capsys, "greet")[0] == 0
    assert "needy_command" not in sys.modules
    assert run(capsys, "--help")[0] == 0
    assert "needy_command" in sys.modules


def test_an_import_of_ours_that_fails_is_a_bug_and_not_a_missing_extra(
    entries: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries.append(a_command_that_needs("diffsensor.no_such_module", tmp_path, monkeypatch))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["needy"])


def test_without_typer_the_command_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "diffsensor.commands")
    monkeypatch.delattr(diffsensor, "commands")
    code, out, err = run(capsys, "greet")
    assert (code, out) == (2, "")
    assert err.endswith("pip install 'diffsensor[cli]'\n")


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "version", {"diffsensor": "1.2.3"}.__getitem__)
    assert run(capsys, "--version") == (0, "diffsensor 1.2.3\n", "")


def test_help_names_all_commands_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "Example: diffsensor" in out
    assert all(name in out for name in ("greet", "refuse", "hang"))


def our_commands() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(project["entry-points"][commands.GROUP])


@pytest.mark.parametrize("name", sorted(our_commands()))
def test_the_help_of_each_command_of_ours_has_an_example(
    name: str, entries: list[EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    entries[:] = [EntryPoint(name, our_commands()[name], commands.GROUP)]
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "Example" in out
    assert f"diffsensor {name}" in out.partition("Example")[2]


def test_each_command_of_ours_is_installed_under_an_extra_of_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(our_commands()) <= set(project["optional-dependencies"])
    try:
        installed = importlib.metadata.distribution("diffsensor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("diffsensor is not installed here")
    assert {entry.name for entry in installed.entry_points.select(group=commands.GROUP)} == set(our_commands())
