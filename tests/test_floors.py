"""Who may import whom: read from the source, so that an import inside a function counts as well."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "diffsensor"
INTEGRATIONS = ROOT / "integrations"

# From the ground up. A floor has steps: a module sees the floors below it and the steps before its own, but not its
# neighbours on the same step. The members of a folder (metrics, sensors) see each other.
FLOORS: tuple[tuple[set[str], ...], ...] = (
    ({"errors"}, {"types"}),
    ({"protocols"},),
    (
        {"checksums", "ranks"},
        {"head", "loading", "schedules", "statistics", "storage"},
        {"capture", "metrics", "probes"},
    ),
    ({"actions", "control", "reference", "rules", "sinks"}, {"gate"}, {"follow"}),
    ({"sensors"},),
    (
        {"record"},
        {"checkpoints", "look", "noise_floor", "oversight", "policy", "requirements"},
        {"contextual"},
        {"monitor"},
    ),
    (
        {"report", "scan"},
        {"watch"},
        {
            "ask_command",
            "cache_command",
            "calibrate_command",
            "commands",
            "compare_command",
            "probes_command",
            "report_command",
            "scan_command",
        },
        {"cli"},
    ),
)
ORDER = [step for floor in FLOORS for step in floor]

# What the core needs everywhere, and what single modules may import because they exist for it.
DEPENDENCIES = {"jaxtyping", "numpy", "safetensors", "torch"}
EXTRAS = {
    "ask_command": {"typer"},
    "cache_command": {"rich", "typer"},
    "calibrate_command": {"typer"},
    "commands": {"typer"},
    "compare_command": {"rich", "typer"},
    "loading": {"peft", "transformers"},
    "policy": {"yaml"},
    "probes_command": {"rich", "typer"},
    "report": {"jinja2", "matplotlib"},
    "report_command": {"typer"},
    "scan_command": {"rich", "transformers", "typer"},
}

# diffsensor_x may import x. What needs more says so here; only the demo, a program, puts several things together.
FRAMEWORKS = {
    "diffsensor_demo": {
        *("diffsensor_lightning", "diffsensor_transformers", "lightning", "transformers", "tokenizers"),
        *("datasets", "trl"),
        *("matplotlib", "rich", "typer"),
    },
    "diffsensor_wandb": {"typer", "wandb", "wandb_workspaces"},
}


def imports(source: str) -> Iterator[tuple[str, list[str]]]:
    """Each module that is imported, with the names taken from it (none for a plain `import`)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def step_of(part: str) -> int:
    found = [place for place, step in enumerate(ORDER) if part in step]
    assert found, (
        f"diffsensor/{part} has no floor. Add its name to FLOORS in tests/test_floors.py: "
        "to the lowest step that is above everything it imports."
    )
    return found[0]


def wrong_in_core(part: str, source: str) -> list[str]:
    """What a module of the core imports and may not; `part` is the file's or folder's name in diffsensor/."""
    wrong = []
    for module, names in imports(source):
        root, _, below = module.partition(".")
        if root == "diffsensor":
            seen = [below.partition(".")[0]] if below else names or [""]
            wrong += [
                f"diffsensor/{part} may not import diffsensor.{other}: it is not on a lower floor."
                for other in seen
                if other != part and (not other or step_of(other) >= step_of(part))
            ]
        elif root not in sys.stdlib_module_names | DEPENDENCIES | EXTRAS.get(part, set()):
            wrong.append(f"diffsensor/{part} may not import {module}: the core needs {sorted(DEPENDENCIES)} alone.")
    return wrong


def public_names(package: Path) -> set[str]:
    """What `__init__.py` hands out: `from diffsensor.x import Name as Name`."""
    return {
        alias.name
        for node in ast.parse((package / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def wrong_in_integration(package: str, source: str) -> list[str]:
    """What a module of an integration imports and may not."""
    wrong = []
    allowed = FRAMEWORKS.get(package, {package.removeprefix("diffsensor_")})
    for module, names in imports(source):
        root = module.partition(".")[0]
        if root == package or root in sys.stdlib_module_names | DEPENDENCIES:
            continue
        if root == "diffsensor" or (root in allowed and root.startswith("diffsensor_")):
            home = (CORE if root == "diffsensor" else INTEGRATIONS / root).joinpath(*module.split(".")[1:])
            known = public_names(home) if (home / "__init__.py").exists() else set()
            hidden = sorted(set(names) - known) if names else [module]
            wrong += [f"{package} may not import {name} from {module}: it is not public there." for name in hidden]
        elif root not in allowed:
            wrong.append(f"{package} may not import {module}: an integration has one framework.")
    return wrong


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path != CORE / "__init__.py")


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", files(CORE), ids=place)
def test_a_module_imports_from_lower_floors_only(path: Path) -> None:
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    step_of(part)
    wrong = wrong_in_core(part, path.read_text())
    assert not wrong, "\n".join(wrong)


# Not of the examples: scripts to be copied, which import what a user's own would.
@pytest.mark.parametrize("path", [path for path in files(INTEGRATIONS) if "examples" not in path.parts], ids=place)
def test_an_integration_imports_public_names_and_its_framework_only(path: Path) -> None:
    wrong = wrong_in_integration(path.relative_to(INTEGRATIONS).parts[0], path.read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "line", "complaint"),
    [
        ("head", "from diffsensor.monitor import Monitor", "not on a lower floor"),
        ("head", "from diffsensor.capture import look", "not on a lower floor"),
        ("capture", "from diffsensor.probes import ProbeSet", "not on a lower floor"),
        ("errors", "def late():\n    from diffsensor.types import Reading", "not on a lower floor"),
        ("monitor", "from diffsensor import Reading", "no floor"),
        ("monitor", "import diffsensor", "not on a lower floor"),
        ("capture", "import transformers", "the core needs"),
        ("monitor", "from .record import Record", "the core needs"),
        ("monitor", "import typer", "the core needs"),
        ("brand_new", "from diffsensor.types import Reading", "brand_new has no floor. Add its name"),
    ],
)
def test_an_import_across_or_up_is_noticed(part: str, line: str, complaint: str) -> None:
    try:
        wrong = "\n".join(wrong_in_core(part, line))
    except AssertionError as error:
        wrong = str(error)
    assert complaint in wrong


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("capture", "from diffsensor.head import LinearHead"),
        ("metrics", "from diffsensor.metrics.tiles import fold"),
        ("cli", "from diffsensor import commands"),
        ("commands", "import typer"),
        ("monitor", "import json, torch.nn"),
    ],
)
def test_an_import_down_the_floors_is_allowed(part: str, line: str) -> None:
    assert wrong_in_core(part, line) == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("diffsensor_lightning", "import transformers"),
        ("diffsensor_lightning", "from diffsensor.monitor import Monitor"),
        ("diffsensor_lightning", "from diffsensor import no_such_name"),
        ("diffsensor_lightning", "import diffsensor"),
        ("diffsensor_lightning", "from diffsensor_demo import demo"),
        ("diffsensor_demo", "from diffsensor_lightning.drift_monitor import DriftMonitor"),
    ],
)
def test_an_integration_that_reaches_inside_or_elsewhere_is_noticed(package: str, line: str) -> None:
    assert wrong_in_integration(package, line)


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("diffsensor_lightning", "import lightning.pytorch as pl"),
        ("diffsensor_lightning", "from diffsensor import Monitor, ProbeSet, Reading, Reference"),
        ("diffsensor_demo", "from diffsensor_lightning import DriftMonitor"),
    ],
)
def test_an_integration_may_import_public_names_and_its_framework(package: str, line: str) -> None:
    assert wrong_in_integration(package, line) == []


def test_no_part_is_on_two_floors() -> None:
    assert sum(len(step) for step in ORDER) == len(set().union(*ORDER))


def test_importing_diffsensor_loads_no_framework_and_no_extra() -> None:
    unwanted = {"lightning", "pytorch_lightning", "transformers", "trl", "peft", "accelerate", "wandb", "typer", "rich"}
    unwanted |= {"matplotlib", "jinja2", "scipy", "sklearn", "pandas", "beartype", "tensorboard"}
    # torch itself loads some packages where they happen to be installed; that is not ours to change.
    by_torch, by_us = (loaded_by(module) for module in ("torch", "diffsensor"))
    assert "torch" in by_us
    assert not (by_us - by_torch) & unwanted


def loaded_by(module: str) -> set[str]:
    """The packages that are loaded in a fresh interpreter after importing one."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(run.stdout.split())
