"""A monitor with rules: its noise floor, its faults, alerts on record before actions, verdicts, sealed readings."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsensor import DriftBudget, Monitor, Reading, every, read_record
from diffsensor.actions import Log, Response, SaveCheckpoint, ScaleLearningRate, Stop
from diffsensor.control import LoopController
from diffsensor.errors import ConfigError
from diffsensor.gate import Gate
from diffsensor.rules import ChangePoint, Invariant, Limit
from diffsensor.sensors import Outputs, Sealed
from diffsensor.sinks import LogAlerts
from diffsensor.storage.checked_json import read_json
from diffsensor.types import Findings
from tiny import HEADS, Kept, frozen_head, llama, probe_set, texts
from tiny_rules import Scripted


def drift(model: nn.Module, size: float = 0.02, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


class Shaky(nn.Module):
    """A language model that answers a little differently each time, or for another number of rows."""

    def __init__(self, *, each_time: float = 0.0, each_row: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.num_calls = nn.Embedding(61, 16), nn.Linear(16, 61), 0
        self.each_time, self.each_row = each_time, each_row

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_calls += 1
        factor = 1 + self.each_time * self.num_calls + self.each_row * len(tokens)
        return self.out(self.embed(tokens)) * factor


# The noise floor


def test_the_noise_floor_is_what_another_batch_split_changes(tmp_path: Path) -> None:
    probes, model = probe_set(texts(num=30, longest=25)), Shaky(each_row=1e-6)
    monitor = Monitor(probes, cache_dir=tmp_path, sensors="full")
    first = monitor.read(model, 0)
    assert all(reading.value == 0 and not reading.is_measurable for reading in first)
    assert all("no measurable drift" in reading.note for reading in first)
    floors = {reading.key: reading.noise_floor for reading in first}
    # By hand: what the same weights read when every batch has half as many rows.
    again = Shaky(each_row=1e-6)
    again.load_state_dict(model.state_dict())
    assert monitor.reference is not None
    with torch.no_grad():
        changes = []
        for batch in monitor.reference.plan.batches:
            rows = batch.inputs["input_ids"]
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [rows.repeat(2, 1)]
            here, there = again(rows), torch.cat([again(half) for half in halves])[: len(rows)]
            changes.append((there.log_softmax(-1) - here.log_softmax(-1)).flatten(0, 1)[batch.index])
    target, plan = monitor.reference.plan.target, monitor.reference.plan
    change = -torch.cat(changes).gather(1, target[:, None])[:, 0].double()
    weight = probes.weights[plan.probe].double()
    expected = abs(float((change * weight).sum() / weight.sum()))
    assert floors["diffsensor/nll_change"] == pytest.approx(expected, rel=0.05)
    drift(model)
    later = {reading.key: reading for reading in monitor.read(model, 1)}
    assert {key: reading.noise_floor for key, reading in later.items()} == pytest.approx(floors, nan_ok=True)
    assert later["diffsensor/kl_ref_live"].is_measurable
    assert "no measurable" not in later["diffsensor/kl_ref_live"].note


@pytest.mark.parametrize("head", HEADS)
def test_of_a_usual_model_the_noise_floor_is_next_to_nothing(head: str, tmp_path: Path) -> None:
    readings = Monitor(probe_set(texts(num=30, longest=25)), cache_dir=tmp_path).read(HEADS[head](), 0)
    for reading in readings:
        if reading.num_probes:
            assert reading.noise_floor < 1e-5
            assert not reading.is_measurable


def test_a_reading_is_measurable_from_three_floors_on() -> None:
    reading = Reading(step=0, sensor="", metric="", value=3.1e-8, unit="", noise_floor=1e-8)
    assert reading.is_measurable
    assert replace(reading, value=-3.1e-8).is_measurable
    assert not replace(reading, value=2.9e-8).is_measurable
    assert not replace(reading, value=0.0, noise_floor=0.0).is_measurable
    assert replace(reading, value=1e-30, noise_floor=math.nan).is_measurable


def test_a_model_that_is_not_deterministic_is_told_of_and_raises_the_floor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(probe_set(), cache_dir=tmp_path, sensors=["outputs"])
    readings = monitor.read(Shaky(each_time=5e-6), 0)
    assert "The same weights, read twice in the same layout, differ in" in caplog.text
    assert "not deterministic in evaluation mode" in caplog.text
    floors = {reading.key: reading.noise_floor for reading in readings}
    assert floors["diffsensor/nll_change"] > 1e-7
    caplog.clear()
    Monitor(probe_set(), cache_dir=tmp_path, sensors=["outputs"]).read(llama(), 0)
    assert "differ" not in caplog.text


def test_the_floor_can_be_left_out_and_is_kept_over_a_resume(tmp_path: Path) -> None:
    model, probes = Shaky(each_row=1e-4), probe_set()
    with Monitor(probes, cache_dir=tmp_path, noise_floor=False) as monitor:
        assert all(math.isnan(reading.noise_floor) for reading in monitor.read(model, 0))
    with Monitor(probes, cache_dir=tmp_path) as monitor:
        before = {reading.key: reading.noise_floor for reading in monitor.read(model, 0)}
        state = monitor.state_dict()
    assert before["diffsensor/nll_change"] > 1e-6
    drift(model, 1.0)  # measured now, it would be another one
    monitor = Monitor(probes, cache_dir=tmp_path)
    monitor.load_state_dict(state)
    assert {reading.key: reading.noise_floor for reading in monitor.read(model, 1)} == before


# Faults


def told(monitor: Monitor) -> list[str]:
    return [alert.message for alert in monitor.alerts]


def test_a_frozen_parameter_that_moves_is_alerted_at_once_by_default(tmp_path: Path) -> None:
    model = frozen_head()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0)
    assert told(monitor) == []
    drift(model)
    monitor.read(model, 1)
    assert told(monitor) == []
    model.get_output_embeddings().weight.data[3, 3] += 1e-3
    monitor.read(model, 2)
    (message,) = told(monitor)
    assert "lm_head.weight" in message
    assert monitor.alerts[0].severity == "critical"


def test_a_frozen_parameter_that_moved_while_the_monitor_was_closed_is_alerted(tmp_path: Path) -> None:
    model = frozen_head()
    monitor = Monitor(probe_set(), cache_dir=tmp_path / "cache", record=tmp_path / "record")
    monitor.read(model, 0)
    monitor.close()
    model.get_output_embeddings().weight.data[3, 3] += 1e-3
    with monitor:
        monitor.read(model, 1)
    (message,) = told(monitor)
    assert "lm_head.weight" in message
    monitor = Monitor(probe_set(), cache_dir=tmp_path / "cache", rules=[])
    monitor.attach(model)
    assert monitor._frozen is None  # nothing would notice, so its price is not paid


def test_frozen_weights_that_cannot_be_read_are_alerted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen_head()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0)
    monkeypatch.setattr(monitor._frozen, "moved", lambda model: 1 / 0)
    assert monitor.read(model, 1)
    (message,) = told(monitor)
    assert "the frozen weights could not be read (ZeroDivisionError: division by zero)" in message
    assert monitor.failures == {"frozen weights": 1}


def test_a_reading_that_is_no_number_is_alerted(tmp_path: Path) -> None:
    model = llama()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0, loss=1.0)
    monitor.read(model, 1, loss=math.nan)
    assert any("loss" in message for message in told(monitor))
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = math.nan
    monitor.read(model, 2, loss=1.0)
    assert monitor.read(model, 3, loss=1.0)
    assert not told(monitor)  # the breach lasts, and was told of


def test_a_sensor_that_fails_is_alerted(tmp_path: Path) -> None:
    class Failing:
        name, metrics = "failing", {}

        def open(self, reference: object, live_head: object) -> None:
            raise ZeroDivisionError("by hand")

    monitor = Monitor(probe_set(), cache_dir=tmp_path, sensors=[Outputs(), Failing()])
    monitor.read(llama(), 0)
    (message,) = told(monitor)
    assert "failing failed (ZeroDivisionError: by hand)" in message
    assert monitor.failures == {"failing": 1}


def test_changed_circumstances_and_changed_probes_are_alerted(tmp_path: Path) -> None:
    model = llama()
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monitor.read(model, 1)
    (message,) = told(monitor)
    assert "autocast: off there, torch.bfloat16 here" in message
    monitor = Monitor(probe_set(), cache_dir=tmp_path)
    monitor.read(model, 0)
    assert monitor.reference is not None
    monitor.reference.plan.batches[0].inputs["input_ids"][0, 0] += 1
    monitor.read(model, 1)
    (message,) = told(monitor)
    assert "the probes in memory have changed" in message


# Alerts and actions


class Watched:
    """A run that drifts a little at each step, with a limit that it meets on its way."""

    def __init__(self, tmp_path: Path, *, limit: float = 0.02) -> None:
        self.model = frozen_head()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.controller = LoopController(self.model, self.optimizer)
        self.tmp_path, self.limit = tmp_path, limit

    def monitor(self, *, record: bool = True, resume: bool = False) -> Monitor:
        rules = [
            Response(Limit("kl_ref_live", above=self.limit, for_=1), ScaleLearningRate(0.5), Log()),
            Invariant(),
        ]
        return Monitor(
            probe_set(),
            cache_dir=self.tmp_path / "cache",
            record=self.tmp_path / "record" if record else None,
            rules=rules,
            controller=self.controller,
            schedule=every(1),
            resume=resume,
        )


def test_an_alert_is_on_record_before_its_action_and_the_action_with_its_outcome(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    seen: list[tuple[int, float]] = []

    class Looks:
        def write(self, findings: Findings) -> None:
            seen.extend(
                (len(read_record(tmp_path / "record").alerts), run.optimizer.param_groups[0]["lr"]) for _ in [0]
            )

        def close(self) -> None: ...

    with run.monitor() as monitor:
        monitor._sinks = (*monitor._sinks, Looks())
        monitor.read(run.model, 0)
        drift(run.model, 0.1)
        monitor.read(run.model, 1)
        assert run.optimizer.param_groups[0]["lr"] == 0.5
    assert seen[:2] == [(0, 1.0), (1, 1.0)]  # the second look: its alert is written, nothing is done yet
    found = read_record(tmp_path / "record")
    assert found.manifest["rules"] == ["kl_ref_live above 0.02, for_=1", "invariant"]
    assert [(alert.step, alert.subject) for alert in found.alerts] == [(1, "diffsensor/kl_ref_live")]
    assert [(taken.action, taken.outcome) for taken in found.actions] == [
        ("scale_learning_rate(0.5)", "done"),
        ("log(warning)", "done"),
    ]


def test_a_run_killed_between_its_alert_and_its_action_acts_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Watched(tmp_path)

    class Killed(BaseException): ...

    def die(factor: float) -> str:
        raise Killed

    monitor = run.monitor()
    monitor.read(run.model, 0)
    drift(run.model, 0.1)
    monkeypatch.setattr(run.controller, "scale_learning_rate", die)
    with pytest.raises(Killed):
        monitor.read(run.model, 1)
    monitor._record.close()  # what the system does for a dead process
    monkeypatch.undo()
    with run.monitor(resume=True) as monitor:
        assert monitor.observe(run.model, 1) == []
        assert run.optimizer.param_groups[0]["lr"] == 0.5
    found = read_record(tmp_path / "record")
    assert [alert.step for alert in found.alerts] == [taken.step for taken in found.actions[:1]] == [1]


def test_alerts_of_a_step_that_is_read_again_are_marked_as_repeats(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    with run.monitor() as monitor:
        monitor.read(run.model, 0)
        state = monitor.state_dict()
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        drift(run.model, 0.1)
        monitor.read(run.model, 1)
        assert [alert.is_repeat for alert in monitor.alerts] == [False]
    run.model.load_state_dict(before)
    monitor = run.monitor()
    monitor.load_state_dict(state)
    with monitor:
        drift(run.model, 0.1)
        monitor.read(run.model, 1)
        assert [alert.is_repeat for alert in monitor.alerts] == [True]


def test_a_record_says_that_nothing_is_left_to_be_done(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    with run.monitor() as monitor:
        for step in range(2):
            monitor.read(run.model, step)
            assert read_json(tmp_path / "record" / "state.json")["oversight"]["pending"] is None
            drift(run.model, 0.1)


def test_the_penalty_begins_with_the_coefficient_of_the_budget(tmp_path: Path) -> None:
    class Penalty:
        coefficient = 0.5

    controller = LoopController(penalty=Penalty())
    Monitor(probe_set(), cache_dir=tmp_path, budget=DriftBudget(0.2, start=2.0), controller=controller).attach(llama())
    assert controller.kl_coefficient() == 2.0


def test_an_alert_stays_on_record_when_its_step_is_read_again(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    with run.monitor() as monitor:
        monitor.read(run.model, 0)
        drift(run.model, 0.1)
        monitor.read(run.model, 1)
        monitor.read(run.model, 1)
        assert run.optimizer.param_groups[0]["lr"] == 0.5
    found = read_record(tmp_path / "record")
    assert [(alert.step, alert.is_repeat) for alert in found.alerts] == [(1, True)]
    assert len(found.actions) == 2


def test_what_an_action_reads_meanwhile_neither_repeats_nor_loses_an_action(tmp_path: Path) -> None:
    run = Watched(tmp_path)

    def save(reason: str) -> None:
        monitor.read(run.model, 1)
        monitor.read(run.model, 2)

    rules = [Response(Limit("kl_ref_live", above=0.02, for_=1), ScaleLearningRate(0.5), SaveCheckpoint(), Stop())]
    controller = LoopController(run.model, run.optimizer, save=save)
    monitor = Monitor(
        probe_set(), cache_dir=tmp_path / "cache", record=tmp_path / "record", rules=rules, controller=controller
    )
    with monitor:
        monitor.read(run.model, 0)
        drift(run.model, 0.1)
        monitor.read(run.model, 1)
    assert [taken.action for taken in read_record(tmp_path / "record").actions] == [
        "scale_learning_rate(0.5)",
        "stop",  # of the look at step 2, where the breach lasts
        "save_checkpoint",
        "stop",
    ]
    assert monitor.failures == {}


def test_rules_may_look_at_what_the_loop_tells(tmp_path: Path) -> None:
    rules = [Limit("loss", above=2.0, for_=1)]
    monitor = Monitor(probe_set(), cache_dir=tmp_path, rules=rules, progress=["loss"])
    model = llama()
    monitor.read(model, 0, loss=torch.tensor(1.0))
    assert told(monitor) == []
    monitor.read(model, 1, loss=torch.tensor(3.0))
    assert "loss is 3" in told(monitor)[0]
    with pytest.raises(ConfigError, match=r"progress=\['loss'\]"):
        Monitor(probe_set(), cache_dir=tmp_path, rules=rules).read(model, 0, loss=1.0)


def test_a_rule_on_what_is_not_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    monitor = Monitor(probe_set(), cache_dir=tmp_path, record=tmp_path / "record", rules=[Limit("js", above=0.1)])
    with pytest.raises(ConfigError, match="'js'"):
        monitor.attach(llama())
    assert not (tmp_path / "record").exists()


def test_what_is_no_list_of_rules_no_sink_and_no_controller_is_refused_when_the_monitor_is_made(
    unchecked: None,
) -> None:
    limit = Limit("kl_ref_live", above=0.3)
    for given, sentence in (
        ({"rules": limit}, r"expected a list of rules and responses: rules=\[Limit"),
        ({"sinks": LogAlerts()}, r"expected a list of sinks"),
        ({"sinks": [print]}, r"no write\(findings\) and close\(\). Did you mean Calls\(function\)\?"),
        ({"controller": llama()}, r"controller is a LlamaForCausalLM, expected.*LoopController\(model, optimizer\)"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Monitor(probe_set(), **given)
    with pytest.raises(ConfigError, match="expected a rule first"):
        Response("kl_ref_live", Stop())
    with pytest.raises(ConfigError, match="Give the model first"):
        LoopController(torch.optim.SGD(llama().parameters(), lr=1.0))


def test_alerts_are_those_of_the_last_look_only(tmp_path: Path) -> None:
    model = llama()
    monitor = Monitor(probe_set(), cache_dir=tmp_path, schedule=every(2))
    monitor.observe(model, 0, loss=math.nan)
    assert monitor.alerts
    monitor.observe(model, 1)
    assert not monitor.alerts


# Verdicts


def gated(tmp_path: Path, **arguments: object) -> Monitor:
    return Monitor(probe_set(), cache_dir=tmp_path / "cache", gate=Gate(Limit("kl_ref_live", above=0.05)), **arguments)


def test_a_verdict_reads_the_model_where_its_step_was_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    with gated(tmp_path, record=tmp_path / "record") as monitor:
        assert monitor.verdict(model, 0).outcome == "pass"
        drift(model, 0.3)
        monitor.read(model, 5)
        verdict = monitor.verdict(model, 5)
        assert (verdict.outcome, verdict.step, verdict.threshold) == ("fail", 5, 0.05)
        assert monitor.verdict(model, 5) == verdict
        monitor.verdict(model, 6)
    told = [record.getMessage() for record in caplog.records if "gate" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 5: the model does not pass the gate (fail). kl_ref_live is ")
    found = read_record(tmp_path / "record")
    assert [(each.step, each.outcome) for each in found.verdicts] == [(0, "pass"), (5, "fail"), (6, "fail")]
    assert {reading.step for reading in found.readings} == {0, 5, 6}


def test_a_model_that_cannot_be_read_is_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monitor = gated(tmp_path)
    assert monitor.verdict(model, 0).outcome == "pass"
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    assert monitor.verdict(model, 1).outcome == "unknown"
    assert monitor.failures == {"forward pass": 1}


def test_without_a_gate_there_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no gate: Monitor\(\.\.\., gate=Gate"):
        Monitor(probe_set(), cache_dir=tmp_path).verdict(llama(), 0)


def test_a_verdict_is_kept_over_a_resume(tmp_path: Path) -> None:
    model = llama()
    monitor = gated(tmp_path)
    verdict = monitor.verdict(model, 3)
    again = gated(tmp_path)
    again.load_state_dict(monitor.state_dict())
    kept = Kept()
    again._sinks = (*again._sinks, kept)
    assert repr(again.verdict(model, 3)) == repr(verdict)
    assert kept.findings == []


def test_a_step_that_is_read_again_has_another_verdict(tmp_path: Path) -> None:
    model = llama()
    monitor = gated(tmp_path, schedule=every(1))
    monitor.observe(model, 4)
    monitor.observe(model, 5)
    assert monitor.verdict(model, 5).outcome == "pass"
    drift(model, 0.3)
    monitor.observe(model, 4)  # the run has gone back
    monitor.observe(model, 5)
    assert monitor.verdict(model, 5).outcome == "fail"
    monitor = gated(tmp_path, schedule=every(5))
    monitor.observe(reference := llama(), 5)
    assert monitor.verdict(reference, 5).outcome == "pass"
    monitor.observe(model, 4)  # gone back, and not read
    assert monitor.verdict(model, 5).outcome == "fail"


def test_a_verdict_on_what_was_read_last_reads_nothing(tmp_path: Path) -> None:
    kept, model = Kept(), llama()
    monitor = gated(tmp_path, sinks=[kept])
    monitor.read(model, 5)
    verdict = monitor.verdict(model, 5)
    assert [findings.verdicts for findings in kept.findings[1:]] == [(verdict,)]


def test_the_verdict_of_another_gate_is_not_gone_on_with(tmp_path: Path) -> None:
    model = llama()
    first, second = (
        Monitor(probe_set(), cache_dir=tmp_path, gate=Gate(Limit("kl_ref_live", above=above))) for above in (50, 0.01)
    )
    first.read(model, 0)
    drift(model, 0.3)
    assert first.verdict(model, 1).outcome == "pass"
    second.load_state_dict(first.state_dict())
    assert second.verdict(model, 1).outcome == "fail"


# What is sealed


def test_a_sealed_bank_or_sensor_alerts_but_is_refused_to_drive_anything(tmp_path: Path) -> None:
    limit = Limit("kl_ref_live", above=1e-9, for_=1)
    for sealed in ({"sealed": True}, {"sensors": [Sealed(Outputs())]}):
        for wanted in (
            {"rules": [Response(limit, Stop())]},
            {"gate": Gate(limit)},
            {"budget": DriftBudget(0.2)},
        ):
            with pytest.raises(ConfigError, match="never drive an action"):
                Monitor(probe_set(), cache_dir=tmp_path, **sealed, **wanted)
        model = llama()
        monitor = Monitor(probe_set(), cache_dir=tmp_path, **sealed, rules=[Limit("kl_ref_live", above=1e-9, for_=1)])
        monitor.read(model, 0)
        drift(model)
        readings = monitor.read(model, 1)
        assert len(monitor.alerts) == 1
        assert all(monitor.is_sealed(reading) for reading in readings if reading.sensor != "progress")
    assert not any(map(Monitor(probe_set(), cache_dir=tmp_path).is_sealed, readings))


def test_rules_are_told_whether_their_bank_is_sealed(tmp_path: Path) -> None:
    for sealed in (True, False):
        monitor = Monitor(probe_set(), cache_dir=tmp_path, rules=[Scripted()], sealed=sealed)
        monitor.attach(llama())
        (rule,) = monitor._oversight.rules
        assert [scope.sealed for scope in rule.checked] == [sealed]


def test_the_evidence_of_a_rule_on_a_sealed_sensor_is_sealed(tmp_path: Path) -> None:
    rules = [ChangePoint("kl_ref_live")]
    monitor = Monitor(probe_set(), cache_dir=tmp_path, sensors=[Sealed(Outputs()), "activations"], rules=rules)
    readings = monitor.read(llama(), 0)
    sealed = {reading.metric for reading in readings if monitor.is_sealed(reading)}
    assert "kl_ref_live_change_point_evidence" in sealed
    assert "relative_l2" not in sealed


def test_a_sealed_sensor_reads_what_the_open_one_does(tmp_path: Path) -> None:
    model = llama()
    monitors = [Monitor(probe_set(), cache_dir=tmp_path, sensors=[each]) for each in (Outputs(), Sealed(Outputs()))]
    for monitor in monitors:
        monitor.read(model, 0)
    drift(model)
    one, other = (monitor.read(model, 1) for monitor in monitors)
    assert [(reading.key, reading.value) for reading in one] == [(reading.key, reading.value) for reading in other]
