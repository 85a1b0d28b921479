"""What tells of the loop beside the readings: on record, in front of the rules, and no part of the model's drift."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffsensor import Alert, ConfigError, Findings, MetricInfo, Monitor, Reading, every, read_record
from diffsensor.rules import Invariant, Limit
from tiny import llama, probe_set

INFO = MetricInfo(
    name="rollout_length",
    unit="tokens",
    low=0.0,
    high=math.inf,
    direction="not a difference",
    estimator="mean",
    by_group=False,
)


class Length:
    """Tells 10, 11, 12, ... and what it saw."""

    name = "rollouts"

    def __init__(self, *, sealed: bool = False, fails: bool = False, metric: str = "rollout_length") -> None:
        self.metrics = {metric: INFO if not sealed else MetricInfo(**_fields(INFO) | {"sealed": True})}
        self.value, self.fails, self.seen = 9.0, fails, list[set[str]]()

    def tell(self, findings: Findings) -> Sequence[Reading]:
        if self.fails:
            raise ValueError("no length")
        self.seen.append({reading.metric for reading in findings.readings})
        self.value += 1
        return [
            Reading(step=findings.step, sensor="rollouts", metric=m, value=self.value, unit="tokens")
            for m in self.metrics
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def _fields(info: MetricInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


def monitor(path: Path, *tellers: Any, **options: Any) -> Monitor:
    options = {"schedule": every(1), "noise_floor": False, "cache_dir": path / "cache"} | options
    return Monitor(probe_set(), tellers=tellers, **options)


def lengths(readings: Sequence[Reading]) -> list[float]:
    return [each.value for each in readings if each.metric == "rollout_length"]


def test_what_is_told_stands_beside_the_readings_and_says_what_it_is(tmp_path: Path) -> None:
    teller = Length()
    with monitor(tmp_path, teller, record=tmp_path / "record", bank="held-out") as watching:
        found = watching.read(llama(), 0, loss=1.0)
    (told,) = [each for each in found if each.sensor == "rollouts"]
    assert (told.value, told.unit, told.key) == (10.0, "tokens", "diffsensor/rollout_length/bank=held-out")
    record = read_record(tmp_path / "record")
    assert told in record.readings
    assert record.manifest["metrics"]["rollout_length"]["direction"] == "not a difference"
    assert {"kl_ref_live", "loss"} <= teller.seen[0]  # it sees what was read at the same look


def test_rules_look_at_what_is_told(tmp_path: Path) -> None:
    # Below 0 would be refused for a drift, of which 0 means unmoved; here it is a number like any other.
    watching = monitor(tmp_path, Length(), rules=[Limit("rollout_length", below=12.5, for_=1)])
    model = llama()
    alerts: list[Alert] = []
    for step in range(2):
        watching.read(model, step)
        alerts += watching.alerts
    assert [(alert.step, alert.value, alert.unit) for alert in alerts] == [(0, 10.0, "tokens")]
    assert alerts[0].message.startswith("rollout_length is 10 tokens, below the limit 12.5")


def test_a_teller_that_fails_is_left_out_and_counted(tmp_path: Path) -> None:
    watching = monitor(tmp_path, Length(fails=True), Length(metric="other"))
    found = watching.read(llama(), 0)
    assert {"kl_ref_live", "other"} <= {each.metric for each in found}
    assert watching.failures == {"rollouts": 1}


def test_a_run_that_goes_on_tells_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    model, record, state = llama(), tmp_path / "record", tmp_path / "state.json"
    with monitor(tmp_path, Length(), record=record) as watching:
        watching.read(model, 0)
        watching.save(state)
    for step, tellers, told in ((1, [Length()], [11.0]), (2, [], [])):  # the last without one
        with monitor(tmp_path, *tellers, record=record) as again:
            again.load(state)
            assert lengths(again.read(model, step)) == told


def test_what_is_told_of_sealed_readings_is_sealed(tmp_path: Path) -> None:
    watching = monitor(tmp_path, Length(sealed=True))
    found = watching.read(llama(), 0)
    assert [each.metric for each in found if watching.is_sealed(each)] == ["rollout_length"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_told_number_that_is_none_is_a_fault(value: float, tmp_path: Path) -> None:
    teller = Length()
    teller.value = value
    watching = monitor(tmp_path, teller)
    watching.read(llama(), 0)
    (alert,) = watching.alerts
    assert alert.subject == "nonfinite"
    assert "diffsensor/rollout_length" in alert.message


def test_a_look_with_nothing_but_what_is_told_has_read_nothing() -> None:
    told = Reading(step=0, sensor="rollouts", metric="rollout_length", value=1.0, unit="tokens")
    assert Invariant().verdict(Findings(step=0, readings=(told,))).outcome == "unknown"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("teller", "sentence"),
    [
        (print, r"tellers holds .*print.*has no tell\(findings\)"),
        (Length, r"tellers holds .*Length.*has no tell\(findings\)"),
        (Length(metric="kl_ref_live"), "A teller tells 'kl_ref_live', which a sensor reads. Give it another name."),
    ],
)
def test_what_cannot_tell_is_refused(teller: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        monitor(tmp_path, teller)


def test_progress_of_a_name_that_is_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rollout_length', which is a metric's name"):
        monitor(tmp_path, Length()).read(llama(), 0, rollout_length=1.0)
