"""Readings at the temperature at which a policy samples."""

import math
from pathlib import Path
from typing import Any

import pytest

import naive
from diffsensor import Findings, Monitor, ProbeSet, Reference
from diffsensor.errors import ConfigError, ReferenceMismatchError
from diffsensor.types import TokenShift
from tiny import HEADS, drifted, llama, probe_set, texts

TEMPERATURE = 0.7


@pytest.mark.parametrize("sensors", ["light", "full"])
@pytest.mark.parametrize("kind", HEADS)
def test_readings_at_a_temperature_are_those_of_divided_logits(
    kind: str, sensors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = naive.logits
    monkeypatch.setattr(naive, "logits", lambda model, made: [each / TEMPERATURE for each in plain(model, made)])
    made = texts()
    model = HEADS[kind]()
    live = drifted(model)
    expected = naive.output_readings(model, live, made)
    reference = Reference.build(model, probe_set(made), tmp_path, temperature=TEMPERATURE)
    monitor = Monitor(probe_set(made), reference, sensors=sensors, temperature=TEMPERATURE)
    found = [reading for reading in monitor.read(live, 0) if not reading.hookpoint and reading.group != "worst"]
    assert monitor.failures == {}
    assert len(found) > 10
    for reading in found:
        value, stderr = expected[reading.metric, reading.group]
        if reading.metric == "max_token_gain":
            assert reading.value - 1e-5 <= value <= reading.value + reading.bound + 1e-5
        else:
            assert reading.value == pytest.approx(value, rel=1e-3, abs=2e-6), reading.key
        if not math.isnan(stderr):
            assert reading.stderr == pytest.approx(stderr, rel=1e-3, abs=2e-6), reading.key


@pytest.mark.parametrize("kind", ["frozen", "trained, tied and capped", "given logits"])
def test_the_same_weights_read_exactly_0_at_a_temperature(kind: str, tmp_path: Path) -> None:
    model = HEADS[kind]()
    monitor = Monitor(probe_set(), cache_dir=tmp_path, sensors="full", temperature=TEMPERATURE)
    assert {reading.value for reading in monitor.read(model, 0)} == {0.0}


def test_logit_differences_of_the_token_table_are_at_the_temperature(tmp_path: Path) -> None:
    model = llama()
    tables = []
    for temperature in (1.0, 0.5):
        reference = Reference.build(model, probe_set(), tmp_path, temperature=temperature)
        monitor = Monitor(probe_set(), reference, temperature=temperature, sinks=[sink := _Shifts()])
        monitor.read(drifted(model), 0)
        tables.append({shift.token_id: shift.logit_difference for shift in sink.shifts if not shift.group})
    shared = tables[0].keys() & tables[1].keys()
    assert len(shared) > 5
    for token in shared:
        assert tables[1][token] == pytest.approx(2 * tables[0][token], rel=1e-3, abs=1e-6)


class _Shifts:
    """A sink that keeps the token table."""

    def __init__(self) -> None:
        self.shifts: list[TokenShift] = []

    def write(self, findings: Findings) -> None:
        self.shifts += findings.token_shifts

    def close(self) -> None:
        pass


def test_a_reference_of_another_temperature_is_refused(tmp_path: Path) -> None:
    reference = Reference.build(llama(), probe_set(), tmp_path)
    with pytest.raises(ReferenceMismatchError, match=r"built at temperature 1, and is to be read at 0\.7"):
        Monitor(probe_set(), reference, temperature=TEMPERATURE).attach(llama())
    assert Reference.build(llama(), probe_set(), tmp_path, temperature=TEMPERATURE).fingerprint != reference.fingerprint


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, "hot", True])
def test_a_temperature_that_means_nothing_is_refused(
    temperature: Any, probes: ProbeSet, tmp_path: Path, unchecked: None
) -> None:
    with pytest.raises(ConfigError, match="temperature="):
        Monitor(probes, cache_dir=tmp_path, temperature=temperature)


@pytest.fixture
def probes() -> ProbeSet:
    return probe_set()
