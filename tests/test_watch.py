"""`diffsensor watch`: each checkpoint once and whole, whatever kills the watch, and whenever."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from diffsensor import Gate, ProbeSet, Verdict, cli, read_record, read_verdict, write_verdict
from diffsensor.gate import VERDICT_IN
from diffsensor.rules import Limit
from diffsensor.scan import Scan
from diffsensor.watch import Watch
from tiny import Letters, drifted, llama

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "reference")
    (tmp_path / "run").mkdir()
    return tmp_path


def saved(place: Path, step: int) -> Path:
    path = place / "run" / f"checkpoint-{step}"
    drifted(llama(), 0.001 * step, seed=step).save_pretrained(path)
    return path


_open: list[Scan] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _open:
        _open.pop().close()


def watch(place: Path, **options: Any) -> Watch:
    probes = ProbeSet.from_texts(["one text", "another one", "and a third"], Letters())
    gate = Gate(Limit("kl_ref_live", above=0.1))
    arguments = {"probes": probes, "gate": gate, "cache_dir": place / "cache", "sensors": "light"}
    _open.append(Scan(place / "reference", arguments, record=place / "record"))
    return Watch(place / "run", _open[-1], **options)


def verdicts(place: Path) -> dict[str, str]:
    return {path.name: read_verdict(path).outcome for path in sorted((place / "run").iterdir())}


def test_what_is_complete_is_read_once_in_order_and_gets_its_verdict(place: Path) -> None:
    for step in (200, 5):
        saved(place, step)
    watching = watch(place)
    assert [each.checkpoint.step for each in watching.round()] == [5, 200]
    assert list(watching.round()) == []
    saved(place, 300)
    assert [each.checkpoint.step for each in watching.round()] == [300]
    assert verdicts(place) == {"checkpoint-200": "fail", "checkpoint-300": "fail", "checkpoint-5": "pass"}
    record = read_record(place / "record")
    assert sorted({reading.step for reading in record.readings}) == [5, 200, 300]
    assert [verdict.step for verdict in record.verdicts] == [5, 200, 300]


def test_new_weights_in_an_old_place_have_no_verdict_until_they_are_read(place: Path) -> None:
    path = saved(place, 5)
    assert [each.verdict.outcome for each in watch(place).round() if each.verdict] == ["pass"]
    _open.pop().close()
    drifted(llama(), 0.5, seed=1).save_pretrained(path)  # another run, which leaves the old verdict where it is
    watching = watch(place)
    for _ in range(3):
        assert list(watching.round()) == []
    assert watching.outcomes == {path: "unknown"}
    verdict = read_verdict(path)
    assert verdict.outcome == "unknown"
    assert "another one, or has changed since" in verdict.reason


def test_what_was_judged_before_counts_too(place: Path) -> None:
    saved(place, 200)
    list(watch(place).round())
    _open.pop().close()
    watching = watch(place)
    assert list(watching.round()) == []
    assert list(watching.outcomes.values()) == ["fail"]


def test_a_verdict_of_someone_else_does_not_stand_for_the_watch(place: Path) -> None:
    path = saved(place, 200)
    write_verdict(path / VERDICT_IN, Verdict(step=200, outcome="pass", reason="By hand."))
    assert [each.checkpoint.step for each in watch(place).round()] == [200]
    assert read_verdict(path).outcome == "fail"


def test_a_half_written_checkpoint_is_waited_for(place: Path) -> None:
    path = saved(place, 5)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    watching = watch(place)
    for part in (whole[:0], whole[: len(whole) // 2], whole[:-1]):
        weights.write_bytes(part)
        assert list(watching.round()) == []
        assert not (path / VERDICT_IN).exists()
    (path / "config.json").write_text('{"model_type": "lla')
    weights.write_bytes(whole)
    assert list(watching.round()) == []
    llama().config.save_pretrained(path)
    assert [each.checkpoint.step for each in watching.round()] == [5]


def test_a_checkpoint_that_changes_while_it_is_loaded_is_waited_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsensor import scan

    path = saved(place, 5)
    load = scan.load_checkpoint

    def changing(*arguments: Any, **options: Any) -> nn.Module:
        model = load(*arguments, **options)
        os.utime(path / "model.safetensors", ns=(1, 1))
        return model

    watching = watch(place)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "load_checkpoint", changing)
        assert list(watching.round()) == []
    assert [each.checkpoint.step for each in watching.round()] == [5]
    assert len(read_record(place / "record").verdicts) == 1


def test_a_checkpoint_that_the_run_removes_is_let_be(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(place, 5)
    watching = watch(place)

    def gone(*_: Any, **__: Any) -> nn.Module:
        raise FileNotFoundError(path)

    monkeypatch.setattr("diffsensor.scan.load_checkpoint", gone)
    assert list(watching.round()) == []


def test_what_cannot_be_read_is_unknown_after_three_attempts(place: Path) -> None:
    path = saved(place, 5)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "nothing", "architectures": ["Nothing"]}))
    saved(place, 6)
    watching = watch(place)
    assert [each.checkpoint.step for each in watching.round()] == [6]
    for _ in range(2):
        assert read_verdict(path).step == -1
        assert list(watching.round()) == []
    verdict = read_verdict(path)
    assert (verdict.step, verdict.outcome) == (5, "unknown")
    assert "could not be read" in verdict.reason


def in_a_process_of_its_own(act: Callable[[], None]) -> int:
    """By which signal it ended; 0 where it ended well."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


#: What changes files, as Python itself reports it; a write is seen by the file that was opened for it.
_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "shutil.rmtree"}


def killed_at(place: Path, number: int) -> Callable[[], None]:
    """A watch that is killed without warning right before its change number `number` below `place`."""

    def act() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in _CHANGES or not str(arguments[0]).startswith(str(place)):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        watching = watch(place)
        sys.addaudithook(hook)
        list(watching.round())

    return act


@pytest.mark.skipif(sys.platform == "win32", reason="os.fork is not there")
def test_killed_at_any_change_of_a_file_it_goes_on_loses_nothing_and_judges_nothing_twice(place: Path) -> None:
    for step in (5, 200):
        saved(place, step)
    number, kills = 1, 0
    while True:
        # One watch after the other, each killed a little later than the one before it.
        ended = in_a_process_of_its_own(killed_at(place, number))
        if not ended:
            break
        assert ended == signal.SIGKILL
        kills += 1
        number += 1 if kills % 2 else 3
        assert kills < 60
    assert kills >= 5
    in_a_process_of_its_own(lambda: list(watch(place).round()) and None)
    assert verdicts(place) == {"checkpoint-200": "fail", "checkpoint-5": "pass"}
    record = read_record(place / "record")
    assert sorted({reading.step for reading in record.readings}) == [5, 200]
    assert len({(verdict.step, verdict.outcome) for verdict in record.verdicts}) == 2
    assert list(watch(place).round()) == []


def test_the_command_reads_what_comes_while_it_waits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_tokenizers import bpe

    tokenizer = bpe()
    llama(vocab=len(tokenizer)).save_pretrained(place / "reference")
    tokenizer.save_pretrained(place / "reference")
    (place / "probes.jsonl").write_text('{"text": "the cat"}\n{"text": "a dog and a cat"}\n')

    def later() -> None:
        time.sleep(0.5)
        drifted(llama(vocab=len(tokenizer)), 0.1).save_pretrained(place / "run" / "checkpoint-7")

    saving = threading.Thread(target=later)
    saving.start()
    given = ["--reference", place / "reference", "--probes", place / "probes.jsonl", "-o", place / "record"]
    given += ["--limit", "kl_ref_live=1e-9", "--every", 0.2, "--idle", 3, "--cache-dir", place / "cache", "--json"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["watch", str(place / "run"), *map(str, given)])
    saving.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["step"] == 7
    assert caught.value.code == 1
    assert read_verdict(place / "run" / "checkpoint-7").outcome == "fail"


def test_a_directory_that_is_not_there_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--reference", str(place / "reference"), "--probes", "default", "-o", str(place / "record")]
    with pytest.raises(SystemExit) as caught:
        cli.main(["watch", str(place / "nowhere"), *given])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
