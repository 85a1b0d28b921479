"""One wheel holds all packages. An editable install would hide one that was forgotten, so it is built and read."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [Path(package) for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def integrations() -> list[str]:
    """All folders there but that of the examples, which are scripts to be copied."""
    folders = (path.name for path in (ROOT / "integrations").iterdir() if path.is_dir() and path.name[0] not in "._")
    return sorted(set(folders) - {"examples"})


def requirements() -> list[str]:
    """All that pyproject.toml asks for, of other projects."""
    project = PROJECT["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    ]
    names = {canonicalize_name(Requirement(line).name) for lines in lists for line in lines}
    return sorted(names - {"diffsensor"})


def test_each_folder_of_integrations_is_in_the_list_of_packages() -> None:
    assert [package.as_posix() for package in PACKAGES] == [
        "diffsensor",
        *(f"integrations/{name}" for name in integrations()),
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_each_package_is_typed_and_has_an_init(package: Path) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert (ROOT / package / "__init__.py").exists()


@pytest.mark.parametrize("name", integrations())
def test_each_integration_is_called_after_an_extra(name: str) -> None:
    assert name.startswith("diffsensor_")
    assert name.removeprefix("diffsensor_") in PROJECT["project"]["optional-dependencies"]


def test_the_extra_all_brings_all_other_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.name == "diffsensor"
    assert everything.extras == set(extras) - {"all"}


@pytest.mark.parametrize("name", requirements())
def test_each_requirement_has_an_exact_version_in_the_constraints(name: str) -> None:
    pinned = [Requirement(line) for line in lines_of_constraints()]
    (version,) = (str(pin.specifier) for pin in pinned if canonicalize_name(pin.name) == name)
    assert re.fullmatch(r"==[0-9.]+", version)


def lines_of_constraints() -> list[str]:
    text = (ROOT / "constraints.txt").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def names_in_the_wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("diffsensor-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_each_package_whole_and_nothing_else(names_in_the_wheel: set[str]) -> None:
    expected = {
        path.relative_to((ROOT / package).parent).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names_in_the_wheel if ".dist-info/" not in name} == expected
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= names_in_the_wheel


def test_the_wheel_holds_the_licence_and_the_entry_points(names_in_the_wheel: set[str]) -> None:
    assert {name.partition(".dist-info/")[2] for name in names_in_the_wheel} >= {
        "METADATA",
        "entry_points.txt",
        "licenses/LICENSE",
    }
