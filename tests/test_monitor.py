"""The monitor: when it looks, what it does with what fails, and how a run goes on."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsensor import Findings, MetricInfo, Monitor, ProbeSet, Reading, Reference, every, log_spaced, read_record
from diffsensor.errors import ConfigError, CorruptFileError, ReferenceMismatchError, StorageError
from diffsensor.rules import Own
from diffsensor.sensors import Activations, Outputs
from diffsensor.types import Piece
from tiny import Kept, Letters, Text, frozen_head, llama, own_model, probe_set, texts
from tiny_rules import Scripted


class Counting:
    """A sensor that counts what it is shown, and fails where it is told to."""

    def __init__(self, name: str = "counting", fail_at: str = "", times: int = 10**9) -> None:
        self.name, self.fail_at, self.times = name, fail_at, times
        self.opened = 0

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        info = MetricInfo(name=f"{self.name}_positions", unit="", low=0, high=1, direction="", estimator="")
        return {info.name: info}

    def open(self, reference: object, live_head: object) -> "Counting":
        self.opened += 1
        self.seen = 0
        self._fail("open")
        return self

    def update(self, piece: Piece) -> None:
        self.seen += len(piece.hidden)
        self._fail("update")

    def sums(self) -> dict[str, Tensor]:
        self._fail("sums")
        return {"seen": torch.tensor(self.seen)}

    def finish(self, step: int, sums: Mapping[str, Tensor]) -> Findings:
        self._fail("finish")
        reading = Reading(
            step=step, sensor=self.name, metric=f"{self.name}_positions", value=float(sums["seen"]), unit="positions"
        )
        return Findings(step=step, readings=(reading,))

    def _fail(self, where: str) -> None:
        if self.fail_at == where and self.times > 0:
            self.times -= 1
            raise ZeroDivisionError(f"in {where}")


class Broken:
    """A sink that fails."""

    def write(self, findings: Findings) -> None:
        raise OSError("no more room")

    def close(self) -> None:
        raise OSError("no more room")


def train_a_little(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


# When it looks


def test_it_looks_when_the_schedule_says_so_and_once_at_each_step(tmp_path: Path) -> None:
    kept, model = Kept(), llama()
    monitor = Monitor(probe_set(), schedule=every(3), cache_dir=tmp_path, sinks=[kept])
    assert monitor.is_due(0)
    assert not monitor.is_due(1)
    looked = [step for step in range(8) for _ in range(2) if monitor.observe(model, step)]
    assert looked == [0, 3, 6]
    assert [findings.step for findings in kept.findings] == looked
    assert not monitor.is_due(6)
    assert monitor.observe(model, 7) == []
    assert {reading.step for reading in monitor.read(model, 7)} == {7}
    assert {reading.step for reading in monitor.readings} == {7}


def test_a_log_spaced_schedule_looks_early_and_often(tmp_path: Path) -> None:
    model = llama()
    monitor = Monitor(probe_set(), schedule=log_spaced(2), cache_dir=tmp_path, sensors=["activations"])
    assert [step for step in range(40) if monitor.observe(model, step)] == [0, 1, 3, 10, 32]


def test_every_reading_carries_what_it_needs(tmp_path: Path) -> None:
    monitor = Monitor(probe_set(), sensors="full", cache_dir=tmp_path)
    known = {name: info for sensor in monitor.sensors for name, info in sensor.metrics.items()}
    model = llama()
    monitor.read(model, 0)
    train_a_little(model, 1)
    found = monitor.read(model, 5)
    assert len({reading.key for reading in found}) == len(found)
    for reading in found:
        info = known[reading.metric]
        assert (reading.step, reading.bank, reading.unit, reading.scale) == (5, "fixed", info.unit, info.scale)
        assert info.low <= reading.value <= info.high
        assert reading.num_probes > 0
        assert info.direction
        assert info.estimator


def test_two_banks_can_be_told_apart(tmp_path: Path) -> None:
    model = llama()
    found = Monitor(probe_set(), bank="mine", cache_dir=tmp_path).read(model, 0)
    assert {reading.bank for reading in found} == {"mine"}
    assert all(reading.key.split("/")[2] == "bank=mine" for reading in found)


# What fails


@pytest.mark.parametrize("where", ["open", "update", "finish"])
def test_a_sensor_that_fails_is_left_out_logged_once_and_counted(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    monitor = Monitor(probe_set(), sensors=[Counting(fail_at=where), Outputs()], cache_dir=tmp_path, rules=[])
    for step in range(3):
        assert {reading.sensor for reading in monitor.read(model, step)} == {"outputs"}
    assert monitor.failures == {"counting": 3}
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == 1
    assert "counting failed and is left out of this reading; the run goes on" in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert logged[0].exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("where", ["open", "update"])
def test_a_sensor_that_fails_for_a_moment_gives_no_reading_of_the_rest(where: str, tmp_path: Path) -> None:
    """Opened again in the middle of the probes, it would read a part of them and call it all."""
    probes, model = probe_set(texts(num=60, longest=40)), llama()
    sensor = Counting(fail_at=where, times=1)
    monitor = Monitor(probes, sensors=[sensor], cache_dir=tmp_path, noise_floor=False)
    assert monitor.read(model, 0) == []
    assert monitor.reference is not None
    assert len(monitor.reference.plan.batches) > 1
    assert sensor.opened == 1
    assert [reading.value for reading in monitor.read(model, 1)] == [probes.num_positions]


def test_a_sink_that_fails_keeps_no_other_from_its_findings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, model = Kept(), llama()
    monitor = Monitor(probe_set(), sinks=[Broken(), kept], record=tmp_path / "record", cache_dir=tmp_path)
    monitor.read(model, 0)
    monitor.read(model, 1)
    monitor.close()
    assert monitor.failures == {"Broken": 3}
    assert len(kept.findings) == 2
    assert kept.closed
    assert {reading.step for reading in read_record(tmp_path / "record").readings} == {0, 1}
    assert caplog.text.count("no more room") >= 1
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("state", [ZeroDivisionError("by hand"), {"vector": torch.zeros(1)}], ids=["raises", "no JSON"])
def test_a_rule_whose_state_cannot_be_kept_does_not_end_the_run(
    state: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stateful(Scripted):
        def state_dict(self) -> dict[str, Any]:
            if isinstance(state, Exception):
                raise state
            return state

    model = llama()
    options = {"cache_dir": tmp_path / "cache", "record": tmp_path / "record"}
    with Monitor(probe_set(), **options, rules=[Stateful("quiet", "quiet")]) as monitor:
        monitor.read(model, 0)
        monitor.read(model, 1)
    assert monitor.failures == {"Record": 2}
    assert "Record failed" in caplog.text
    assert {reading.step for reading in read_record(tmp_path / "record").readings} == {0, 1}


def test_a_look_that_found_nothing_but_faults_is_handed_to_no_sink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, model = Kept(), llama()
    monitor = Monitor(probe_set(), cache_dir=tmp_path, sinks=[kept], rules=[])
    monitor.attach(model)
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    assert monitor.read(model, 0) == []
    assert monitor.failures == {"forward pass": 1}
    assert kept.findings == []


def test_a_forward_pass_that_fails_gives_no_readings_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    assert monitor.read(model, 0)
    layer = model.model.layers[1]
    forward, hooks = layer.forward, len(layer._forward_hooks)

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA out of memory")

    layer.forward = fail
    assert monitor.read(model, 1) == []
    layer.forward = forward
    assert "forward pass failed" in caplog.text
    assert monitor.failures == {"forward pass": 1}
    assert len(layer._forward_hooks) == hooks
    assert all(module.training for module in model.modules())
    assert len(monitor.read(model, 2)) > 10


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [llama, frozen_head, own_model], ids=["two heads", "one head", "given logits"])
def test_a_live_model_that_answers_nan_is_never_shown_as_a_number(
    make: Any, bad: float, sensors: str, tmp_path: Path
) -> None:
    kept, model = Kept(), make()
    monitor = Monitor(probe_set(texts(num=40)), sensors=sensors, cache_dir=tmp_path, sinks=[kept])
    before = monitor.read(model, 0)
    blocks = model.blocks if make is own_model else model.model.layers
    weight = next(blocks[0].parameters())
    kept_weight = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(bad)
    shown = {reading.key: reading.value for reading in monitor.read(model, 1) if math.isfinite(reading.value)}
    assert {key for key in shown if "/at=" not in key} == set()
    assert [key for key in shown if "blocks.1" in key or "layers.1" in key] == []
    assert kept.findings[-1].token_shifts == ()
    with torch.no_grad():
        weight.copy_(kept_weight)
    assert [(reading.key, reading.value) for reading in monitor.read(model, 2)] == [
        (reading.key, reading.value) for reading in before
    ]


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("make", [llama, frozen_head], ids=["two heads", "one head"])
def test_one_probe_that_answers_nan_does_not_make_the_other_groups_unknown(
    make: Any, sensors: str, tmp_path: Path
) -> None:
    """NaN in the group that has it and in the whole, numbers elsewhere, and NaN is the worst group."""
    made = [Text(ids=(5, 60, 7, 8, 4, 3), counted=(True,) * 6, group="hurt")]
    made += [Text(ids=tuple(range(9 + i, 45 + i)), counted=(True,) * 36, group="whole") for i in range(14)]
    model = make()
    monitor = Monitor(probe_set(made), sensors=sensors, cache_dir=tmp_path)
    monitor.read(model, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = math.nan
    for reading in monitor.read(model, 1):
        if reading.metric == "cka_distance":
            assert not math.isfinite(reading.value)
        elif reading.group in ("", "hurt", "worst"):
            assert math.isnan(reading.value), reading.key
            assert "worst" not in reading.group or reading.note == "group 'hurt'"


# Going on


def run(model: nn.Module, monitor: Monitor, steps: range) -> None:
    for step in steps:
        monitor.observe(model, step)
        train_a_little(model, step)


def lines(path: Path) -> dict[str, list[str]]:
    """What is stored, in plain text."""
    stored = read_record(path)
    return {
        "readings": [repr(reading) for reading in stored.readings],
        "shifts": [repr(shift) for shift in stored.token_shifts],
        "tensors": [
            repr([(key, vector.tolist()) for key, vector in sorted(stored.tensors(step).items())])
            for step in stored.tensor_steps
        ],
    }


@pytest.mark.parametrize("make", [llama, frozen_head], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("by", ["state", "record", "file"])
def test_a_run_that_goes_on_writes_the_record_of_the_uninterrupted_one(by: str, make: Any, tmp_path: Path) -> None:
    def monitor(name: str, **options: object) -> Monitor:
        return Monitor(
            probe_set(),
            schedule=every(2),
            record=tmp_path / name,
            cache_dir=tmp_path / "cache",
            sensors="full",
            **options,
        )

    model = make()
    whole = monitor("whole")
    run(model, whole, range(9))
    whole.close()

    model = make()
    first = monitor("halves")
    run(model, first, range(5))
    state = json.loads(json.dumps(first.state_dict()))
    assert state == first.state_dict()
    first.save(tmp_path / "monitor.json")
    first.observe(model, 6)  # read, but lost with the weights: the checkpoint is older
    first.close()

    if by == "record":
        second = monitor("halves", resume=True)
    else:
        second = monitor("halves")
        if by == "file":
            second.load(tmp_path / "monitor.json")
        else:
            second.load_state_dict(state)
    run(model, second, range(5, 9))
    second.close()
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")
    assert [shift for shift in read_record(tmp_path / "whole").token_shifts if shift.step == 8]


def test_a_state_without_a_record_goes_on_against_the_same_reference(tmp_path: Path) -> None:
    model = llama()
    first = Monitor(probe_set(), cache_dir=tmp_path)
    first.read(model, 0)
    train_a_little(model, 0)
    expected = [reading.value for reading in first.read(model, 1)]
    assert any(expected)
    second = Monitor(probe_set(), cache_dir=tmp_path)
    second.load_state_dict(first.state_dict())
    assert [reading.value for reading in second.read(model, 1)] == expected
    assert second.last_step == 1


def test_a_run_whose_reference_is_gone_is_refused_and_none_is_built_from_the_trained_model(tmp_path: Path) -> None:
    model = llama()
    first = Monitor(probe_set(), cache_dir=tmp_path / "cache", record=tmp_path / "record")
    first.read(model, 0)
    first.close()
    train_a_little(model, 0)
    state = first.state_dict()
    shutil.rmtree(tmp_path / "cache")
    for second in (
        Monitor(probe_set(), cache_dir=tmp_path / "cache", record=tmp_path / "record", resume=True),
        Monitor(probe_set(), cache_dir=tmp_path / "cache"),
    ):
        if not second._resume:
            second.load_state_dict(state)
        with pytest.raises(ReferenceMismatchError, match="It is not built anew, because the model has been trained"):
            second.read(model, 1)
    assert not (tmp_path / "cache").exists()


def test_a_run_that_goes_on_with_another_reference_or_other_probes_is_refused(tmp_path: Path) -> None:
    model = llama()
    first = Monitor(probe_set(), cache_dir=tmp_path)
    first.read(model, 0)
    train_a_little(model, 0)
    other = Monitor(probe_set(), Reference.build(model, probe_set(), tmp_path))
    other.load_state_dict(first.state_dict())
    assert first.reference is not None
    with pytest.raises(ReferenceMismatchError, match=f"compared with the reference {first.reference.fingerprint[:12]}"):
        other.read(model, 1)
    different = probe_set(texts(seed=9))
    with pytest.raises(ReferenceMismatchError) as caught:
        Monitor(different, cache_dir=tmp_path).load_state_dict(first.state_dict())
    assert different.fingerprint[:12] in str(caught.value)
    assert probe_set().fingerprint[:12] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "here", "there"),
    [
        (lambda model: model.to(torch.bfloat16), "torch.bfloat16", "torch.float32"),
        (lambda model: model.set_attn_implementation("eager"), "eager", "sdpa"),
    ],
    ids=["dtype", "attention"],
)
def test_other_circumstances_than_the_references_are_refused(
    change: Any, here: str, there: str, tmp_path: Path
) -> None:
    reference = Reference.build(llama(), probe_set(), tmp_path)
    model = llama()
    change(model)
    with pytest.raises(ReferenceMismatchError, match=f"{there} there, {here} here") as caught:
        Monitor(probe_set(), reference).read(model, 0)
    assert "or build a reference with these" in str(caught.value)


def test_another_autocast_or_number_of_threads_is_refused(tmp_path: Path) -> None:
    model = llama()
    reference = Reference.build(model, probe_set(), tmp_path)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ReferenceMismatchError, match=r"autocast: off there, torch.bfloat16 here"),
    ):
        Monitor(probe_set(), reference).read(model, 0)
    try:
        torch.set_num_threads(2)
        with pytest.raises(ReferenceMismatchError, match=r"threads: 1 there, 2 here"):
            Monitor(probe_set(), reference).read(model, 0)
    finally:
        torch.set_num_threads(1)
    assert {reading.value for reading in Monitor(probe_set(), reference).read(model, 0)} == {0.0}


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    reference = Reference.build(llama(vocab=61), probe_set(), tmp_path)
    with pytest.raises(ReferenceMismatchError, match="has 61 output tokens, the live model 64"):
        Monitor(probe_set(), reference).read(llama(vocab=64), 0)


# The record


def test_two_monitors_on_one_record_are_refused(tmp_path: Path) -> None:
    model = llama()
    options = {"cache_dir": tmp_path / "cache", "record": tmp_path / "record"}
    with Monitor(probe_set(), **options) as first:
        first.read(model, 0)
        for second in (Monitor(probe_set(), **options), Monitor(probe_set(), **options, resume=True)):
            with pytest.raises(StorageError, match="record"):
                second.read(model, 0)
        assert first.read(model, 1)
        assert first.failures == {}
    assert {reading.step for reading in read_record(tmp_path / "record").readings} == {0, 1}


def test_a_record_is_not_begun_where_one_is(tmp_path: Path) -> None:
    model = llama()
    options = {"cache_dir": tmp_path / "cache", "record": tmp_path / "record"}
    with Monitor(probe_set(), **options) as first:
        first.read(model, 0)
    with pytest.raises(StorageError, match="holds a record already"):
        Monitor(probe_set(), **options).read(model, 0)
    with pytest.raises(ConfigError, match="resume=True was given without a record"):
        Monitor(probe_set(), resume=True)


def test_nothing_of_the_texts_reaches_a_sink_that_is_not_to_see_them(tmp_path: Path) -> None:
    probes = ProbeSet.from_texts(["the secret text", "another of them"], Letters())
    for log_text in (True, False):
        kept, model, record = Kept(), llama(), tmp_path / f"record-{log_text}"
        monitor = Monitor(probes, cache_dir=tmp_path / "cache", record=record, sinks=[kept], log_text=log_text)
        with monitor:
            monitor.read(model, 0)
            train_a_little(model, 0)
            monitor.read(model, 1)
        assert len(kept.findings[-1].token_shifts) > 10
        stored = b"".join(path.read_bytes() for path in sorted(record.rglob("*")) if path.is_file())
        assert (b"SECRET" in stored) == log_text
        assert ("SECRET" in repr(kept.findings)) == log_text
        assert b"the secret text" not in stored
        assert b'"token_id"' in stored


def test_alerts_are_not_told_in_words_of_the_texts_either(tmp_path: Path) -> None:
    probes = ProbeSet.from_texts(["the secret text", "another of them"], Letters())
    kept, model = Kept(), llama()

    def says(findings: Findings) -> str | None:
        return f"it prefers {findings.token_shifts[0].token!r}" if findings.token_shifts else None

    monitor = Monitor(probes, cache_dir=tmp_path, sinks=[kept], log_text=False, rules=[Own(says)])
    monitor.read(model, 0)
    train_a_little(model, 0)
    monitor.read(model, 1)
    assert kept.findings[1].alerts
    assert "SECRET" not in repr(kept.findings)


def test_sensors_are_named_or_given(tmp_path: Path) -> None:
    model = llama()
    found = Monitor(probe_set(), sensors=[Counting(), "outputs", Activations()], cache_dir=tmp_path).read(model, 0)
    assert {reading.sensor for reading in found} == {"counting", "outputs", "activations"}


def test_a_state_under_another_name_is_refused_in_a_sentence(tmp_path: Path) -> None:
    monitor = Monitor(probe_set())
    monitor.save(tmp_path / "state.json")
    (tmp_path / "state.json").rename(tmp_path / "other.json")
    with pytest.raises(CorruptFileError, match="holds 'state', expected 'other': it has been renamed"):
        monitor.load(tmp_path / "other.json")
