import errno
import json
import logging
import math
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsensor import record as record_module
from diffsensor.errors import ConfigError, CorruptFileError, ReferenceMismatchError, StorageError
from diffsensor.protocols import Sink
from diffsensor.record import Record, RecordContents, read_manifest, read_record
from diffsensor.storage import lines as lines_module
from diffsensor.storage.lines import READINGS, _decode_line, _encode_line, read_lines
from diffsensor.types import ActionTaken, Alert, Findings, Reading, TokenShift, Verdict

MANIFEST = {"reference": "ref-1", "probes": "probes-1", "torch": "2.13.0"}
FILES = ("manifest.json", "checksums.json", "readings.jsonl", "tokens.jsonl", "state.json")


class Killed(BaseException):
    """Stands for a kill where a real one cannot be timed."""


def reading(step: int, metric: str = "kl_ref_live", value: float = 0.25) -> Reading:
    return Reading(step=step, sensor="outputs", metric=metric, value=value, unit="nat", stderr=0.01, num_probes=8)


def shift(step: int, rank: int = 0, context: str = "the secret context") -> TokenShift:
    return TokenShift(
        step=step,
        ranked_by="mass_moved",
        prefers="live",
        rank=rank,
        token_id=17,
        token=" caf\u00e9\u2028\ud800",  # a lone surrogate, as half a character decodes to
        mass_moved=0.5,
        mass_moved_stderr=math.nan,
        logit_difference=-1.5,
        probe="3",
        position=4,
        context=context,
    )


def findings(step: int, value: float = 0.25, tensors: bool = False) -> Findings:
    return Findings(
        step=step,
        readings=(reading(step, value=value), reading(step, "js", value / 2)),
        token_shifts=(shift(step, 0), shift(step, 1)),
        tensors={"mean_shift/layers.0": torch.full((3,), value)} if tensors else {},
    )


def written(path: Path, *all_findings: Findings, resume: bool = False) -> Path:
    with Record(path, manifest=MANIFEST, resume=resume) as record:
        for each in all_findings:
            record.write(each)
    return path


def numbers(contents: RecordContents) -> str:
    """Everything in a record but its tensors, such that NaN equals NaN."""
    return repr((contents.manifest, [astuple(item) for item in (*contents.readings, *contents.token_shifts)]))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(script)
    root = str(Path(record_module.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# What goes in comes out


def test_a_record_gives_back_what_was_written(tmp_path: Path) -> None:
    first, second = findings(0, 0.1, tensors=True), findings(5, 0.2)
    contents = read_record(written(tmp_path / "runs" / "1", first, second))
    assert contents.readings == first.readings + second.readings
    assert repr(contents.token_shifts) == repr(first.token_shifts + second.token_shifts)
    assert contents.manifest == MANIFEST == read_manifest(tmp_path / "runs" / "1")
    assert contents.tensor_steps == (0,)
    assert torch.equal(contents.tensors(0)["mean_shift/layers.0"], torch.full((3,), 0.1))


def test_a_record_is_a_sink(tmp_path: Path) -> None:
    with Record(tmp_path, manifest=MANIFEST) as record:
        assert isinstance(record, Sink)


@given(st.floats(), st.floats(), st.floats())
def test_floats_come_back_to_the_last_bit(value: float, stderr: float, bound: float) -> None:
    item = Reading(step=1, sensor="outputs", metric="kl", value=value, unit="", stderr=stderr, bound=bound)
    line = _encode_line(item, 1, 1)
    json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    back = _decode_line(line[:-1], READINGS, len(line)).item
    assert isinstance(back, Reading)
    for before, after in ((value, back.value), (stderr, back.stderr), (bound, back.bound)):
        assert struct.pack("d", before) == struct.pack("d", after) or (math.isnan(before) and math.isnan(after))


def test_no_number_is_null_and_an_infinite_one_is_text(tmp_path: Path) -> None:
    item = Reading(step=1, sensor="s", metric="m", unit="", value=math.nan, stderr=math.inf, bound=-math.inf)
    path = written(tmp_path, Findings(step=1, readings=(item,)))
    line = json.loads((path / "readings.jsonl").read_text())
    assert (line["value"], line["stderr"], line["bound"]) == (None, "inf", "-inf")
    back = read_record(path).readings[0]
    assert (math.isnan(back.value), back.stderr, back.bound) == (True, math.inf, -math.inf)


def test_tensors_of_every_kind_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    given = {
        "t": whole.T,
        "all": whole,
        "row": whole[0],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
    }
    contents = read_record(written(tmp_path, Findings(step=7, tensors=given)))
    kept = contents.tensors(7)
    assert kept.keys() == given.keys()
    assert all(torch.equal(kept[key], given[key]) and kept[key].dtype == given[key].dtype for key in given)
    with pytest.raises(ConfigError, match=r"keeps no tensors of step 8. It has them for the steps 7\."):
        contents.tensors(8)


def test_the_state_comes_back_and_the_last_one_counts(tmp_path: Path) -> None:
    state = {"due": 100, "cost": math.inf, "seen": [1.5, math.nan, None, True, "x"], "rules": {"kl": {"sum": -0.0}}}
    with Record(tmp_path, manifest=MANIFEST) as record:
        assert record.read_state() is None
        record.write_state({"due": 50})
        record.write_state(state)
    with Record(tmp_path, manifest=MANIFEST, resume=True) as record:
        assert repr(record.read_state()) == repr(state)


@pytest.mark.parametrize("state", [{"x": {1: 2}}, {"x": torch.ones(1)}, {"x": {"__float__": "nan"}}, {"x": {1}}])
def test_a_state_that_would_not_come_back_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with Record(tmp_path, manifest=MANIFEST) as record:
        record.write_state({"due": 50})
        with pytest.raises(ConfigError, match=r"state\['x'\] is .*which JSON does not give back"):
            record.write_state(state)
        assert record.read_state() == {"due": 50}


def test_without_text_no_text_reaches_the_files(tmp_path: Path) -> None:
    written(tmp_path, findings(1).without_text())
    assert not any(b"secret" in data or b"caf" in data for data in files(tmp_path).values())
    back = read_record(tmp_path).token_shifts[0]
    assert (back.context, back.token, back.token_id) == ("", "", 17)


# Resuming


def test_what_is_read_again_after_a_resume_replaces_the_step_as_a_whole(tmp_path: Path) -> None:
    written(tmp_path, findings(0, 0.1), findings(5, 0.2, tensors=True), findings(10, 0.3))
    again = Findings(step=5, readings=(reading(5, value=0.9),), tensors={"v": torch.ones(1)})
    contents = read_record(written(tmp_path, again, resume=True))
    assert [(item.step, item.metric, item.value) for item in contents.readings] == [
        (0, "kl_ref_live", 0.1),
        (0, "js", 0.05),
        (5, "kl_ref_live", 0.9),
        (10, "kl_ref_live", 0.3),
        (10, "js", 0.15),
    ]
    assert [item.step for item in contents.token_shifts] == [0, 0, 10, 10]
    assert contents.tensors(5).keys() == {"v"}


def test_a_resumed_run_leaves_the_record_of_the_uninterrupted_one(tmp_path: Path) -> None:
    steps = [findings(step, 0.1 * step, tensors=True) for step in range(8)]
    whole = read_record(written(tmp_path / "whole", *steps))
    written(tmp_path / "parts", *steps[:6])
    parts = read_record(written(tmp_path / "parts", *steps[4:], resume=True))
    assert numbers(parts) == numbers(whole)
    assert parts.tensor_steps == whole.tensor_steps
    assert all(torch.equal(*(c.tensors(s)["mean_shift/layers.0"] for c in (parts, whole))) for s in range(8))


@pytest.mark.parametrize("key", ["reference", "probes"])
def test_a_resume_with_another_reference_or_other_probes_is_refused(tmp_path: Path, key: str) -> None:
    before = files(written(tmp_path, findings(0)))
    other = MANIFEST | {key: "another"}
    with pytest.raises(ReferenceMismatchError, match=rf"with the {key} '{MANIFEST[key]}'; this run has 'another'"):
        Record(tmp_path, manifest=other, resume=True)
    assert files(tmp_path) == before
    written(tmp_path, resume=True)  # and nobody holds the lock


def test_a_resume_with_another_configuration_keeps_the_manifest_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path)
    Record(tmp_path, manifest=MANIFEST | {"torch": "3.0"}, resume=True).close()
    assert "resumed with other settings than it was begun with: torch was '2.13.0' and is" in caplog.text
    assert read_manifest(tmp_path) == MANIFEST


def test_a_fresh_run_does_not_take_over_a_record(tmp_path: Path) -> None:
    before = files(written(tmp_path, findings(0)))
    with pytest.raises(StorageError, match=r"holds a record already. Give this run another directory. To go on"):
        Record(tmp_path, manifest=MANIFEST)
    assert files(tmp_path) == before


def test_there_must_be_a_record_to_resume_or_to_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="There is no record at"):
        Record(tmp_path / "none", manifest=MANIFEST, resume=True)
    with pytest.raises(StorageError, match="There is no record at"):
        read_record(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match=r"it holds thesis.tex but no manifest.json"):
        Record(tmp_path, manifest=MANIFEST)


def test_readings_without_their_manifest_are_not_overwritten(tmp_path: Path) -> None:
    written(tmp_path, findings(0))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"it holds readings.jsonl, tokens.jsonl but no"):
        Record(tmp_path, manifest=MANIFEST)


def test_a_manifest_must_name_its_reference(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the fingerprint of its probes as text under 'probes'; got None"):
        Record(tmp_path / "x", manifest={"reference": "ref-1"})
    assert not (tmp_path / "x").exists()


# One writer at a time


def test_two_monitors_in_one_process_do_not_share_a_record(tmp_path: Path) -> None:
    with Record(tmp_path, manifest=MANIFEST) as record:
        with pytest.raises(StorageError, match=rf"Another monitor \(process {os.getpid()}\) is writing to"):
            Record(tmp_path, manifest=MANIFEST, resume=True)
        record.write(findings(0))
    written(tmp_path, findings(1), resume=True)
    assert {item.step for item in read_record(tmp_path).readings} == {0, 1}


def test_a_second_process_is_refused_and_a_killed_one_lets_go_although_its_child_lives(tmp_path: Path) -> None:
    with Record(tmp_path, manifest=MANIFEST):
        second = run(
            """
            import os, signal, sys, time
            from diffsensor.record import Record
            from diffsensor.errors import StorageError
            manifest = {"reference": "ref-1", "probes": "probes-1", "torch": "2.13.0"}
            try:
                Record(sys.argv[1], manifest=manifest, resume=True)
            except StorageError as error:
                print(error)
            (ready, tell), (started, begin) = os.pipe(), os.pipe()
            parent = os.fork()
            if parent == 0:
                record = Record(sys.argv[2], manifest=manifest)
                worker = os.fork()  # as a data loader does
                if worker == 0:
                    os.write(begin, b".")  # by now it has let go of what it inherited
                    time.sleep(30)
                os.read(started, 1)
                os.write(tell, str(worker).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            worker = int(os.read(ready, 20))
            os.waitpid(parent, 0)
            Record(sys.argv[2], manifest=manifest, resume=True).close()
            print("opened")
            os.kill(worker, signal.SIGKILL)
            """,
            tmp_path,
            tmp_path / "other",
        )
    assert second.returncode == 0, second.stderr
    assert f"Another monitor (process {os.getpid()}) is writing to {tmp_path}" in second.stdout
    assert second.stdout.endswith("opened\n")


def test_a_closed_record_takes_no_more(tmp_path: Path) -> None:
    record = Record(tmp_path, manifest=MANIFEST)
    record.close()
    record.close()
    with pytest.raises(StorageError, match=r"was closed. Open it again with resume=True"):
        record.write(findings(0))


# kill -9


def test_no_kill_loses_an_acknowledged_reading(tmp_path: Path) -> None:
    # One warm process forks a writer, kills it at a random moment, reads, and lets the next one resume.
    result = run(
        """
        import logging, os, random, signal, sys, time
        from diffsensor.record import Record, read_record
        from diffsensor.types import ActionTaken, Alert, Findings, Reading, TokenShift, Verdict
        logging.disable(logging.WARNING)
        path, manifest = sys.argv[1], {"reference": "r", "probes": "p"}

        def findings(step, value):
            return Findings(
                step=step,
                readings=tuple(Reading(step=step, sensor="s", metric=f"m{i}", value=value, unit="") for i in range(60)),
                token_shifts=tuple(
                    TokenShift(step=step, ranked_by="mass_moved", prefers="live", rank=i, token_id=i, token="t",
                               mass_moved=value, mass_moved_stderr=0.0, logit_difference=0.0, probe="", position=0,
                               context="c" * 200) for i in range(step % 40)),
                tensors={"v": torch.full((500,), value)} if step % 9 == 0 else {},
            )

        chance, values, unsure = random.Random(0), {}, set()
        for round in range(10):
            first = chance.randint(0, max(values, default=0))
            acknowledged, tell = os.pipe()
            writer = os.fork()
            if writer == 0:
                record = Record(path, manifest=manifest, resume=round > 0)
                for step in range(first, 10**6):
                    record.write(findings(step, float(round)))
                    os.write(tell, b"%d\\n" % step)
                    if step % 9 == 5:
                        record.write_state({"step": step, "long": [0.5] * 2000})
            head = b""
            for _ in range(chance.randint(1, 12)):
                head += os.read(acknowledged, 1000)
            time.sleep(chance.uniform(0, 0.01))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            os.close(tell)
            with open(acknowledged, "rb") as pipe:
                steps = [int(line) for line in (head + pipe.read()).split()]
            values.update(dict.fromkeys(steps, float(round)))
            contents = read_record(path)
            got = {}
            for item in contents.readings:
                got.setdefault(item.step, []).append(item.value)
            extra = steps[-1] + 1  # may be there too: written, but killed before it could say so
            unsure = unsure - set(steps) | {extra}  # their tensors may be those of the write before
            for step, value in values.items():
                expected = {value} if step != extra else {value, float(round)}
                assert len(got[step]) == 60 and len(set(got[step])) == 1 and got[step][0] in expected, (round, step)
            assert set(got) - set(values) <= {extra}
            values.update({extra: got[extra][0]} if extra in got else {})
            shifts = [(item.step, item.mass_moved) for item in contents.token_shifts]
            assert shifts == [(step, values[step]) for step in sorted(values) for _ in range(step % 40)], round
            for step in contents.tensor_steps:
                kept = set(contents.tensors(step)["v"].tolist())
                assert len(kept) == 1 and (kept == {values.get(step)} or step in unsure), (round, step)
            assert {step for step in values if step % 9 == 0 and step not in unsure} <= set(contents.tensor_steps)
        last = Record(path, manifest=manifest, resume=True)
        assert last.read_state() is None or len(last.read_state()["long"]) == 2000
        assert not [name for _, _, names in os.walk(path) for name in names if name.endswith(".tmp")]
        last.close()
        """,
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr


def test_a_record_killed_at_any_byte_of_a_write_reads_as_before_it_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / "run"
    record = Record(path, manifest=MANIFEST)
    record.write(findings(0, 0.1))
    before, sizes = numbers(read_record(path)), {name: len(data) for name, data in files(path).items()}
    record.write(findings(0, 0.9))
    after = files(path)
    record._opened.close()  # type: ignore[union-attr]  # as a kill does: no lengths are stored
    tokens, readings = (after[name][sizes[name] :] for name in ("tokens.jsonl", "readings.jsonl"))
    for cut in range(0, len(tokens) + len(readings), 23):
        kept = {"tokens.jsonl": tokens[:cut], "readings.jsonl": readings[: max(cut - len(tokens), 0)]}
        for name, added in kept.items():
            (path / name).write_bytes(after[name][: sizes[name]] + added)
        assert numbers(read_record(path)) == before, cut
        if cut % 10 == 0:
            again = Record(path, manifest=MANIFEST, resume=True)
            again.write(findings(0, 0.9))
            again._opened.close()  # type: ignore[union-attr]
            assert {name: (path / name).read_bytes() for name in kept} == {name: after[name] for name in kept}, cut


def test_a_torn_last_line_is_skipped_with_a_warning_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, findings(0))
    whole = (tmp_path / "readings.jsonl").read_bytes()
    (tmp_path / "readings.jsonl").write_bytes(whole + b'{"step": 1, "sen')
    before = numbers(read_record(tmp_path))
    assert "readings.jsonl, line 3 is torn and left out" in caplog.text
    written(tmp_path, resume=True)
    assert (tmp_path / "readings.jsonl").read_bytes() == whole
    assert (tmp_path / "readings.jsonl.torn").read_bytes() == b'{"step": 1, "sen\n'
    assert numbers(read_record(tmp_path)) == before


def test_what_a_killed_writer_left_over_is_removed(tmp_path: Path) -> None:
    written(tmp_path, findings(0, tensors=True))
    left = [
        tmp_path / name for name in ("state.json.tmp", "checksums.json.tmp", "tensors/step-00000009.safetensors.tmp")
    ]
    for file in left:
        file.write_bytes(b"half")
    written(tmp_path, resume=True)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("num_files", range(4))
def test_a_run_killed_while_it_began_can_begin_again(
    tmp_path: Path, num_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def killed_after(original: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            if len(done) == num_files:
                raise Killed
            done.append(arguments)
            return original(*arguments, **named)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", killed_after(Path.touch))
        patch.setattr(Path, "replace", killed_after(Path.replace))
        with pytest.raises(Killed):
            Record(tmp_path, manifest=MANIFEST)
    written(tmp_path, findings(0))
    assert len(read_record(tmp_path).readings) == 2


@pytest.mark.parametrize("survives", ["neither", "first"])
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_between_the_renames_leaves_tensors_that_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: str, again: bool
) -> None:
    written(tmp_path, *[findings(3, 0.1, tensors=True)] * again)
    record = Record(tmp_path, manifest=MANIFEST, resume=True)
    renamed = []

    def rename(self: Path, target: Path) -> Path:
        if survives == "neither" or renamed:
            raise Killed
        renamed.append(self)
        return self.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        with pytest.raises(Killed):
            record.write(findings(3, 0.9, tensors=True))
    record._opened.close()  # type: ignore[union-attr]
    contents = read_record(tmp_path)
    assert contents.tensor_steps == ((3,) if again else ())
    assert not again or contents.tensors(3)["mean_shift/layers.0"][0] == torch.tensor(0.1)
    with Record(tmp_path, manifest=MANIFEST, resume=True) as resumed:
        resumed.write(findings(3, 0.9, tensors=True))
    assert read_record(tmp_path).tensors(3)["mean_shift/layers.0"][0] == torch.tensor(0.9)


# Changed files


def flips(file: Path, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Flips one bit of a file after the other, each while the caller looks."""
    with file.open("r+b", buffering=0) as out:
        for position in positions:
            whole = os.pread(out.fileno(), 1, position)[0]
            for bit in range(8):
                os.pwrite(out.fileno(), bytes([whole ^ 1 << bit]), position)
                yield position, bit
            os.pwrite(out.fileno(), bytes([whole]), position)


def test_every_flipped_bit_of_the_readings_is_detected(tmp_path: Path) -> None:
    with Record(tmp_path, manifest=MANIFEST) as record:
        record.write(Findings(step=0, readings=(reading(0),)))
        record.write(Findings(step=1, readings=(reading(1),)))
    file = tmp_path / "readings.jsonl"
    for position, _ in flips(file, range(file.stat().st_size)):
        with pytest.raises(CorruptFileError, match=r"readings.jsonl, line [12] was changed"):
            read_lines(tmp_path, {})
        if position % 50 == 0:
            with pytest.raises(CorruptFileError, match=r"readings.jsonl, line [12] was changed"):
                read_record(tmp_path)
            with pytest.raises(CorruptFileError, match=r"readings.jsonl, line [12] was changed"):
                Record(tmp_path, manifest=MANIFEST, resume=True)


@pytest.mark.parametrize("name", [*FILES, "tensors/step-00000000.safetensors"])
def test_a_flipped_bit_of_any_file_is_detected(tmp_path: Path, name: str) -> None:
    with Record(tmp_path, manifest=MANIFEST) as record:
        record.write(findings(0, tensors=True))
        record.write_state({"due": 50, "mean": 0.125})
        size = (tmp_path / name).stat().st_size
        for _ in flips(tmp_path / name, [*range(0, size, 17), size - 1]):
            with pytest.raises(CorruptFileError, match=name):
                read_record(tmp_path).tensors(0), record.read_state()


def test_a_changed_line_is_named(tmp_path: Path) -> None:
    written(tmp_path, findings(0), findings(1))
    file = tmp_path / "tokens.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"step": 1, ', b'"step": 2, ', 1))
    with pytest.raises(CorruptFileError, match=r"tokens.jsonl, line 3 was changed: its checksum.*Restore it"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["readings.jsonl", "tokens.jsonl"])
@pytest.mark.parametrize("line", [0, 2])
def test_a_line_that_is_gone_is_missed(tmp_path: Path, name: str, line: int) -> None:
    written(tmp_path, findings(0), findings(1), findings(2))
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    del lines[line]
    (tmp_path / "checksums.json").write_bytes(
        record_module.json_bytes("checksums", record_module.read_json(tmp_path / "checksums.json") | {"closed_at": {}})
    )
    (tmp_path / name).write_bytes(b"".join(lines))
    with pytest.raises(CorruptFileError, match=rf"have lost lines: write {1 + line // 2} has 3 of 4"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["readings.jsonl", "tokens.jsonl"])
def test_a_closed_record_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, findings(0), findings(1))
    lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
    (tmp_path / name).write_bytes(b"".join(lines[:2]))
    with pytest.raises(CorruptFileError, match=rf"{name} was truncated"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["checksums.json", "readings.jsonl", "tensors/step-00000000.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    written(tmp_path, findings(0, tensors=True))
    (tmp_path / name).unlink()
    with pytest.raises(CorruptFileError, match=rf"{name} is missing"):
        read_record(tmp_path).tensors(0)


def test_a_manifest_of_another_record_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a")
    Record(tmp_path / "b", manifest=MANIFEST | {"reference": "other"}).close()
    (tmp_path / "b" / "manifest.json").replace(tmp_path / "a" / "manifest.json")
    with pytest.raises(CorruptFileError, match=r"manifest.json is not the one that checksums.json lists"):
        read_record(tmp_path / "a")


# Places that cannot be written to


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path, manifest=MANIFEST)
    record.write(findings(0, tensors=True))
    record.write_state({"due": 1})
    before = files(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_then_full(file: object, length: int, data: bytes) -> None:
        file.seek(length)  # type: ignore[attr-defined]
        file.write(data[: len(data) // 2])  # type: ignore[attr-defined]
        if file is record._files["readings.jsonl"]:
            full()
        file.write(data[len(data) // 2 :])  # type: ignore[attr-defined]

    message = "cannot be written: No space left on device. Free some space on that disk"
    with monkeypatch.context() as patch:
        patch.setattr(record_module, "append", half_then_full)
        for step in (0, 1):
            with pytest.raises(StorageError, match=message):
                record.write(findings(step, 0.9, tensors=True))
            assert files(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in (0, 1):
            with pytest.raises(StorageError, match=message):
                record.write(findings(step, 0.9, tensors=True))
        with pytest.raises(StorageError, match=message):
            record.write_state({"due": 2})
        assert files(tmp_path) == before
    record.write(findings(0, 0.9, tensors=True))
    record.close()
    contents = read_record(tmp_path)
    assert [item.value for item in contents.readings] == [0.9, 0.45]
    assert contents.tensors(0)["mean_shift/layers.0"][0] == torch.tensor(0.9)


def test_a_write_that_the_system_stops_half_way_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on the size of files are Unix's")
    with Record(tmp_path, manifest=MANIFEST) as record:
        record.write(findings(0))
        before = files(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["tokens.jsonl"]) + 100, hard))
            with pytest.raises(StorageError, match="cannot be written: File too large"):
                record.write(findings(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(tmp_path) == before
        record.write(findings(1))
    assert [item.step for item in read_record(tmp_path).readings] == [0, 0, 1, 1]


def test_a_write_after_an_interrupted_one_starts_where_that_one_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: object, length: int, data: bytes) -> None:
        file.write(data[:100])  # type: ignore[attr-defined]
        raise Killed

    with Record(tmp_path, manifest=MANIFEST) as record:
        with monkeypatch.context() as patch:
            patch.setattr(record_module, "append", interrupted)
            with pytest.raises(Killed):
                record.write(findings(0))
        record.write(Findings(step=1, readings=(reading(1),)))
    assert read_record(tmp_path).readings == (reading(1),)
    assert (tmp_path / "tokens.jsonl").read_bytes() == b""


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_path_that_is_a_file_or_below_one_is_refused_with_a_sentence(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        StorageError, match=r"cannot be written: .*Move the file that stands where a directory is needed"
    ):
        Record(tmp_path / "file" / below, manifest=MANIFEST)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_read_only_directory_is_refused_with_a_sentence(tmp_path: Path) -> None:
    if os.access("/", os.W_OK):
        pytest.skip("root writes to read-only directories too")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"cannot be written: Permission denied. Ask for the right to write there"):
        Record(tmp_path / "run", manifest=MANIFEST)


def test_a_disk_that_is_read_only_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **named: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(record_module, "store", read_only)
        with pytest.raises(StorageError, match=r"Read-only file system\. Make that disk writable"):
            Record(tmp_path, manifest=MANIFEST)
    written(tmp_path, findings(0))  # neither the lock nor the empty files are in the way


def test_a_reader_beside_a_writer_sees_whole_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_file = lines_module._read_file

    def read_while_writing(*arguments: object) -> object:
        lines = read_file(*arguments)  # type: ignore[arg-type]
        for step in (1, 2, 3):
            record.write(findings(step, 0.9))
        return lines

    with Record(tmp_path, manifest=MANIFEST) as record:
        record.write(findings(0, 0.1))
        record.write(findings(1, 0.2))
        before = numbers(read_record(tmp_path))
        monkeypatch.setattr(lines_module, "_read_file", read_while_writing)
        assert numbers(read_record(tmp_path)) == before


# Alerts, actions and verdicts


def alert(step: int, message: str = "too far") -> Alert:
    return Alert(step=step, rule="limit", severity="warning", subject="kl", message=message, first_step=step)


def action(step: int, detail: str = "learning rate 1 -> 0.5") -> ActionTaken:
    return ActionTaken(step=step, rule="limit", action="scale_learning_rate(0.5)", outcome="done", detail=detail)


def test_alerts_actions_and_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    verdict = Verdict(step=3, outcome="unknown", reason="nothing was read", value=math.nan, threshold=0.3)
    told = Findings(step=3, readings=(reading(3),), alerts=(alert(3), alert(3, "again")))
    written(tmp_path, told, Findings(step=3, actions=(action(3),)), Findings(step=3, verdicts=(verdict,)))
    found = read_record(tmp_path)
    assert found.alerts == told.alerts
    assert found.actions == (action(3),)
    assert repr(found.verdicts) == repr((verdict,))
    assert found.readings == told.readings


def test_alerts_are_replaced_with_their_look_while_what_was_done_stays_done(tmp_path: Path) -> None:
    written(tmp_path, Findings(step=3, readings=(reading(3),), alerts=(alert(3, "first"),)))
    written(tmp_path, Findings(step=3, actions=(action(3, "once"),)), resume=True)
    assert [each.message for each in read_record(tmp_path).alerts] == ["first"]
    again = Findings(step=3, readings=(reading(3, value=9.0),), alerts=(alert(3, "second"),))
    written(tmp_path, again, Findings(step=3, actions=(action(3, "twice"),)), resume=True)
    found = read_record(tmp_path)
    assert [each.message for each in found.alerts] == ["second"]
    assert [each.value for each in found.readings] == [9.0]
    assert [each.detail for each in found.actions] == ["once", "twice"]


def test_a_look_that_is_read_again_without_an_alert_has_none(tmp_path: Path) -> None:
    written(tmp_path, Findings(step=3, readings=(reading(3),), alerts=(alert(3),)))
    written(tmp_path, Findings(step=3, readings=(reading(3),)), resume=True)
    assert read_record(tmp_path).alerts == ()


def test_what_people_and_runs_act_on_is_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []
    sync = os.fsync

    def noted(number: int) -> None:
        forced.append(Path(f"/proc/self/fd/{number}").readlink().name)
        sync(number)

    with Record(tmp_path, manifest=MANIFEST) as record:
        monkeypatch.setattr(os, "fsync", noted)
        record.write(findings(0))
        assert forced == []
        record.write(Findings(step=1, readings=(reading(1),), alerts=(alert(1),)))
        record.write(Findings(step=1, actions=(action(1),)))
        record.write(Findings(step=1, verdicts=(Verdict(step=1, outcome="fail", reason="By hand."),)))
        assert forced == ["alerts.jsonl", "actions.jsonl", "verdicts.jsonl"]


@pytest.mark.parametrize("name", ["alerts.jsonl", "actions.jsonl"])
def test_a_flipped_bit_in_an_alert_or_an_action_is_found(name: str, tmp_path: Path) -> None:
    written(tmp_path, Findings(step=1, alerts=(alert(1),)), Findings(step=1, actions=(action(1),)))
    whole = (tmp_path / name).read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(CorruptFileError, match=name):
            read_record(tmp_path)
