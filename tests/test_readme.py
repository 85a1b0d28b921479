"""What the READMEs import is there, and the files they name are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("integrations/*/README.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_import_of_a_readme_works(readme: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in re.findall(r"^(?:from|import) .*(?<!\()$", block, flags=re.MULTILINE)]
    for line in lines:
        exec(line.partition("#")[0], {})


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_file_that_a_readme_links_is_there(readme: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", readme.read_text(encoding="utf-8"))
    assert [link for link in links if not (readme.parent / link).exists()] == []


def test_every_benchmark_has_its_place_in_their_readme() -> None:
    told = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
    assert [name for name in scripts if f"## {name}:" not in told] == []
    assert "(pending)" not in told
