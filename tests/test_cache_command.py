"""`diffsensor cache`: what is kept, whether it is whole, and how to be rid of it."""

import json
import os
from pathlib import Path

import pytest

from diffsensor import Reference, cli
from tiny import llama, probe_set, texts


def cache(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["cache", *map(str, arguments)])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A cache with two references: one that was used today, and one a hundred days ago."""
    for number, age in ((11, 0), (12, 100)):
        reference = Reference.build(llama(), probe_set(texts(num=number)), tmp_path)
        for file in reference.directory.iterdir():
            stat = file.stat()
            os.utime(file, (stat.st_atime - age * 86400, stat.st_mtime - age * 86400))
    (tmp_path / ".unfinished-1").mkdir()
    return tmp_path


def test_references_are_listed_the_newest_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cache(capsys, "ls", "--cache-dir", place, "--json")
    found = json.loads(out)["references"]
    assert code == 0
    assert [round(each["age_days"]) for each in found] == [0, 100]
    for each in found:
        assert each["model"] == "LlamaForCausalLM"
        assert each["num_bytes"] == sum(file.stat().st_size for file in Path(each["path"]).iterdir())
        assert Path(each["path"]).name == each["fingerprint"][:24]
    assert found[0]["fingerprint"][:12] in cache(capsys, "ls", "--cache-dir", place)[1]


def test_a_flipped_bit_is_found_and_pruned_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(capsys, "verify", "--cache-dir", place)[0] == 0
    broken = Path(json.loads(cache(capsys, "ls", "--cache-dir", place, "--json")[1])["references"][0]["path"])
    file = broken / "answers.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, _ = cache(capsys, "verify", "--cache-dir", place, "--json")
    assert code == 1
    assert [bool(each["problem"]) for each in json.loads(out)["references"]] == [True, False]
    cache(capsys, "prune", "--broken", "--cache-dir", place, "--dry-run")
    assert broken.exists()
    cache(capsys, "prune", "--broken", "--cache-dir", place)
    assert not broken.exists()
    assert len(json.loads(cache(capsys, "ls", "--cache-dir", place, "--json")[1])["references"]) == 1


def test_what_is_old_is_pruned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = cache(capsys, "prune", "--older-than", 30, "--cache-dir", place)
    assert out.startswith("1 reference removed")
    (left,) = json.loads(cache(capsys, "ls", "--cache-dir", place, "--json")[1])["references"]
    assert left["age_days"] < 1


def test_nothing_is_pruned_that_was_not_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = cache(capsys, "prune", "--cache-dir", place)
    assert code == 2
    assert "--older-than DAYS" in err
    assert "No references are in" in cache(capsys, "ls", "--cache-dir", place / "nowhere")[1]
