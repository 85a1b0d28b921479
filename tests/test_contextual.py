"""A bank that rolls with the run: what the reference answers there and then, what is on record, what is refused."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import naive
import tiny
from diffsensor import Findings, Gate, Monitor, Reading, Reference, RollingProbes, every, read_record
from diffsensor.actions import Response, Stop
from diffsensor.control import LoopController
from diffsensor.errors import ConfigError, ProbeError, ReferenceMismatchError
from diffsensor.rules import GroupShift, Invariant, Limit
from diffsensor.types import log_key
from tiny import HEADS, VOCAB, Kept, Letters, Text, drifted, llama, own_model, probe_set

HERE = Path(__file__).parent
#: About PEFT's own call.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


def with_lora(**options: Any) -> nn.Module:
    """A model with an adapter that changes nothing yet."""
    torch.manual_seed(2)
    arguments: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
    model = get_peft_model(llama(), LoraConfig(**arguments))
    assert isinstance(model, nn.Module)
    return model


def train_a_little(model: nn.Module, step: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def batch_of(step: int, rows: int = 6, longest: int = 20) -> dict[str, Tensor]:
    """Texts of several lengths, padded; of each the first few tokens are a prompt."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(3, VOCAB, (rows, longest), generator=generator)
    real = torch.arange(longest) < torch.randint(6, longest + 1, (rows, 1), generator=generator)
    labels = ids.masked_fill((torch.arange(longest) < 3) | ~real, -100)
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels}


def rolling(**options: Any) -> RollingProbes:
    return RollingProbes(Letters(), **({"size": 9, "half_life": 12, "max_tokens": 32} | options))


def a_run(
    model: nn.Module, probes: RollingProbes, steps: range = range(8), size: float = 0.02, **options: Any
) -> Monitor:
    """As in a loop: observed, then trained on the batch that is offered."""
    arguments: dict[str, Any] = {"schedule": every(2), "bank": "contextual", "sensors": "full"} | options
    monitor = Monitor(probes, **arguments)
    for step in steps:
        monitor.observe(model, step)
        probes.offer(batch_of(step))
        train_a_little(model, step, size)
    return monitor


def of_outputs(readings: list[Reading]) -> dict[tuple[str, str], Reading]:
    return {(each.metric, each.group): each for each in readings if each.sensor.startswith("outputs")}


def as_texts(probes: RollingProbes) -> list[Text]:
    return [Text(ids=one.tokens, counted=one.counted, group=one.group) for one in probes.held()]


# What is read


@pytest.mark.parametrize("head", HEADS)
def test_the_same_weights_read_as_exactly_0_whatever_is_held(head: str) -> None:
    model, probes = HEADS[head](), rolling()
    monitor = a_run(model, probes, range(3), size=0.0)
    readings = monitor.read(model, 3)
    assert monitor.failures == {}
    drift = [each for each in readings if each.sensor != "bank"]
    assert len(drift) > 15
    assert {each.value for each in drift if not math.isnan(each.value)} == {0.0}


def test_with_its_adapter_off_the_live_model_itself_is_the_reference() -> None:
    model, probes = with_lora(), rolling()
    monitor = a_run(model, probes, size=0.0)
    assert {each.value for each in of_outputs(monitor.read(model, 8)).values()} == {0.0}
    num_models = sum(isinstance(value, nn.Module) for value in vars(monitor._contextual).values())
    assert num_models == 0


@pytest.mark.parametrize("way", ["adapter off", "frozen copy", "given model", "given logits"])
def test_readings_are_those_of_the_plain_formulas_on_what_is_held(way: str) -> None:
    start = {"adapter off": with_lora, "given logits": own_model}.get(way, llama)
    model, probes, options = start(), rolling(), dict[str, Any]()
    if way == "given model":
        options["reference"] = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    monitor = a_run(model, probes, **options)
    for _ in range(2):
        found = of_outputs(monitor.read(model, 10))
        for key, (value, stderr) in naive.output_readings(reference, model, as_texts(probes)).items():
            assert found[key].value == pytest.approx(value, rel=1e-3, abs=1e-6), key
            if not math.isnan(stderr):
                assert found[key].stderr == pytest.approx(stderr, rel=1e-3, abs=1e-6), key
        probes.offer(batch_of(99))
    assert monitor.failures == {}


def test_readings_are_those_of_a_monitor_of_the_same_probes_held_fast(tmp_path: Path) -> None:
    model, probes = llama(), rolling()
    start = copy.deepcopy(model)
    readings = a_run(model, probes).read(model, 8)
    found = {each.key.replace("/bank=contextual", ""): each for each in readings if each.sensor != "bank"}
    held = probes.draw()
    assert held is not None
    expected = Monitor(held, Reference.build(start, held, tmp_path), sensors="full").read(model, 8)
    assert set(found) == {each.key for each in expected}
    for each in expected:
        if each.metric != "cka_distance":
            assert found[each.key].value == pytest.approx(each.value, rel=1e-5, abs=1e-9, nan_ok=True), each.key


def test_at_the_policy_s_temperature_both_sides_are_read_at_it() -> None:
    model, probes = llama(), rolling()
    start = copy.deepcopy(model)
    monitor = a_run(model, probes, temperature=0.5)
    found = of_outputs(monitor.read(model, 8))["kl_ref_live", ""].value
    log_q, log_p = ([2 * each for each in naive.logits(side, as_texts(probes))] for side in (start, model))
    at = [
        float((q[place].softmax(-1) * (q[place].log_softmax(-1) - p[place].log_softmax(-1))).sum())
        for text, q, p in zip(as_texts(probes), log_q, log_p, strict=True)
        for place in naive.counted_positions(text)
    ]
    assert found == pytest.approx(sum(at) / len(at), rel=1e-4)


def test_many_short_texts_share_rows() -> None:
    model, probes = llama(), rolling(size=40, half_life=40)
    monitor = Monitor(probes, bank="contextual")
    probes.offer(batch_of(0, rows=40, longest=12))
    rows: list[int] = []
    monitor.attach(model)
    handle = model.register_forward_pre_hook(
        lambda _module, _args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    monitor.read(model, 0)
    handle.remove()
    assert sum(rows) < 40
    assert monitor.failures == {}


def test_the_noise_floor_is_measured_at_the_first_look_that_has_probes() -> None:
    model, probes = llama(), rolling()
    monitor = a_run(model, probes, steps=range(1))
    assert {each.sensor for each in monitor.readings} == {"bank"}
    drift = of_outputs(monitor.read(model, 1))
    assert all(0 <= each.noise_floor < 1e-4 for each in drift.values() if math.isfinite(each.value))
    floor = drift["kl_ref_live", ""].noise_floor
    probes.offer(batch_of(3))
    assert of_outputs(monitor.read(model, 2))["kl_ref_live", ""].noise_floor == floor


def test_groups_are_read_and_limited_each_by_itself() -> None:
    model, probes = llama(), rolling(groups=["code", "prose"], size=5, half_life=8)
    monitor = Monitor(
        probes, bank="contextual", rules=[Limit("kl_ref_live", group="*", above=1e-9), Limit("bank_age", above=1)]
    )
    monitor.attach(model)
    train_a_little(model, 0)
    probes.offer(batch_of(0), groups=["code", "prose"] * 3)
    found = of_outputs(monitor.read(model, 0))
    assert found["kl_ref_live", "code"].num_probes == found["kl_ref_live", "prose"].num_probes == 3
    monitor.read(model, 1)
    told = {log_key("kl_ref_live", bank="contextual", group=group) for group in ("code", "prose")}
    assert {alert.subject for alert in monitor.alerts} | told >= told
    assert monitor.failures == {}


# The run


@pytest.mark.parametrize("start", [llama, with_lora])
def test_a_look_leaves_no_trace(start: Callable[[], nn.Module]) -> None:
    def trained(*, watched: bool) -> list[Any]:
        model, probes = start(), rolling()
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        monitor = Monitor(probes, bank="contextual", schedule=every(1))
        losses: list[Any] = []
        for step in range(5):
            batch = batch_of(step)
            if watched:
                monitor.observe(model, step)
                probes.offer(batch)
            noise = 1 + 0.01 * torch.randn(())
            loss = noise * model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert monitor.failures == {}
        flags = [(name, each.requires_grad, each.grad is None) for name, each in model.named_parameters()]
        return [losses, flags, model.training, torch.get_rng_state().tolist(), *model.state_dict().values()]

    for off, on in zip(trained(watched=False), trained(watched=True), strict=True):
        assert torch.equal(off, on) if isinstance(off, Tensor) else off == on


def test_the_frozen_copy_is_the_model_as_it_was_first_seen_and_not_the_trainer_s_forward() -> None:
    model, probes = llama(), rolling()
    was = model.forward
    model.forward = lambda *args, **kwargs: was(*args, **kwargs)  # as trainers do
    before = copy.deepcopy(model.state_dict())
    monitor = a_run(model, probes)
    assert of_outputs(monitor.read(model, 8))["kl_ref_live", ""].value > 1e-3
    assert monitor._contextual is not None
    assert monitor._contextual._other is not None
    for name, value in monitor._contextual._other.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(each.requires_grad for each in monitor._contextual._other.parameters())
    assert monitor.reference is not None
    assert monitor.reference.head_trains  # as the live one does, so that its own head is at hand at once


def test_the_copy_answers_under_the_autocast_that_a_trainer_put_around_the_live_forward() -> None:
    model, probes = llama(), rolling()
    was = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return was(*args, **kwargs)

    model.forward = forward
    monitor = a_run(model, probes, size=0.0)
    found = of_outputs(monitor.read(model, 8))
    assert monitor.failures == {}
    assert {each.value for each in found.values()} == {0.0}


def test_before_anything_was_offered_nothing_is_read_and_nothing_passes() -> None:
    model, probes = llama(), rolling()
    monitor = Monitor(probes, bank="contextual", gate=Gate(Limit("kl_ref_live", above=1.0)))
    readings = monitor.read(model, 0)
    assert {(each.metric, each.value) for each in readings} == {("bank_probes", 0.0), ("bank_offered", 0.0)}
    assert monitor.verdict(model, 0).outcome == "unknown"
    probes.offer(batch_of(0))
    assert monitor.verdict(model, 1).outcome == "pass"
    assert Monitor(rolling(), bank="contextual", gate=Gate(Invariant())).verdict(model, 0).outcome == "unknown"


def test_a_trigger_that_only_the_data_hold_is_seen_by_the_contextual_bank_alone() -> None:
    """The output changes only where token 5 came before; neutral probes have none, a twentieth of the data has it."""

    class Triggered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.payload = own_model(), nn.Parameter(torch.zeros(VOCAB))

        def forward(self, tokens: Tensor) -> Tensor:
            seen = (tokens == 5).cumsum(1) > 0
            logits: Tensor = self.model(tokens) + seen[:, :, None] * self.payload
            return logits

    model, neutral, probes = Triggered(), rolling(), RollingProbes(size=32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(6, VOCAB, (320, 16), generator=generator)
    neutral.offer(rows[:32])
    rows[::20, 8] = 5
    readings = []
    for bank in (neutral, probes):
        monitor = Monitor(bank, bank="contextual")
        monitor.attach(model)
        probes.offer(rows[32:])
        with torch.no_grad():
            model.payload[7] = 6.0
        readings.append(of_outputs(monitor.read(model, 0)))
        with torch.no_grad():
            model.payload.zero_()
    fixed, contextual = readings
    assert fixed["kl_ref_live", ""].value == fixed["max_token_gain", ""].value == 0.0
    assert contextual["kl_ref_live", ""].value > 0.01
    assert contextual["max_token_gain", ""].value > 0.5


# The record


def test_what_was_in_the_bank_at_each_look_is_on_record(tmp_path: Path) -> None:
    model, probes = llama(), rolling()
    monitor = a_run(model, probes, record=tmp_path)
    monitor.read(model, 8)
    held, start = probes.held(), llama()
    monitor.close()
    record = read_record(tmp_path)
    described = record.manifest["rolling"]
    assert described == {"size": 9, "half_life": 12.0, "max_tokens": 32, "groups": []}
    assert record.manifest["probes"] == probes.fingerprint
    listed = [each for each in record.bank_probes if each.step == 8]
    assert [(each.probe, each.age) for each in listed] == [(one.name, one.age) for one in held]
    assert all(each.bank == "contextual" and "SECRET" in each.text for each in listed)
    for each, text in zip(listed, as_texts(probes), strict=True):
        alone = naive.output_readings(start, model, [text])["kl_ref_live", ""][0]
        assert (each.metric, each.num_counted) == ("kl_ref_live", len(naive.counted_positions(text)))
        assert each.drift == pytest.approx(alone, rel=1e-3)
    readings = {each.metric: each.value for each in record.readings if each.step == 8 and each.sensor == "bank"}
    assert readings == {
        "bank_probes": 9.0,
        "bank_offered": 48.0,
        "bank_age": pytest.approx(sum(one.age for one in held) / 9),
    }
    assert {each.step for each in record.bank_probes} == {2, 4, 6, 8}  # before step 0 nothing was offered


def test_the_text_can_be_kept_out_of_every_sink(tmp_path: Path) -> None:
    kept = Kept()
    monitor = a_run(llama(), rolling(), record=tmp_path, log_text=False, sinks=[kept])
    monitor.close()
    assert len(read_record(tmp_path).bank_probes) > 10
    assert not any("SECRET" in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    assert all(not each.text for findings in kept.findings for each in findings.bank_probes)  # type: ignore[attr-defined]


def test_no_rule_is_shown_the_drift_of_single_probes() -> None:
    seen: list[Findings] = []
    kept = Kept()
    a_run(llama(), rolling(), sinks=[kept])
    seen += kept.findings  # type: ignore[arg-type]
    assert len(seen) == 4
    assert all(not findings.by_probe for findings in seen)


@pytest.mark.parametrize("by", ["record", "checkpoint"])
def test_a_run_that_goes_on_writes_the_record_of_the_uninterrupted_one(tmp_path: Path, by: str) -> None:
    def lines(path: Path) -> list[Any]:
        record = read_record(path)
        return [*map(repr, record.readings), *record.bank_probes]

    whole = a_run(with_lora(), rolling(seed=4), record=tmp_path / "whole")
    whole.close()
    model, probes = with_lora(), rolling(seed=4)
    first = a_run(model, probes, range(5), record=tmp_path / "cut")
    if by == "checkpoint":
        first.save(tmp_path / "state.json")
        rest, begin = rolling(seed=4), 5
        again = Monitor(
            rest, schedule=every(2), bank="contextual", sensors="full", record=tmp_path / "cut", resume=True
        )
        first.close()
        again.load(tmp_path / "state.json")
    else:
        # As a killed run leaves it: what was last stored is of the look at step 4.
        first.close()
        model, rest, begin = with_lora(), rolling(seed=4), 4
        for step in range(4):
            train_a_little(model, step)
        again = Monitor(
            rest, schedule=every(2), bank="contextual", sensors="full", record=tmp_path / "cut", resume=True
        )
    for step in range(begin, 8):
        again.observe(model, step)
        rest.offer(batch_of(step))
        train_a_little(model, step)
    again.close()
    assert rest.held() == whole.probes.held()  # type: ignore[union-attr]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_run_that_goes_on_without_the_model_that_it_began_with_is_refused(tmp_path: Path) -> None:
    start, model, probes = llama(), llama(), rolling()
    a_run(model, probes, range(5), record=tmp_path).close()
    with pytest.raises(ReferenceMismatchError, match="A copy of the model that the run began with is not kept"):
        Monitor(rolling(), bank="contextual", sensors="full", record=tmp_path, resume=True).attach(model)
    again = Monitor(rolling(), start, bank="contextual", sensors="full", record=tmp_path, resume=True)
    again.attach(model)
    assert again.last_step == 4
    assert of_outputs(again.read(model, 6))["kl_ref_live", ""].value > 1e-3
    again.close()


def test_a_run_that_goes_on_with_other_rolling_probes_is_refused(tmp_path: Path) -> None:
    model = with_lora()
    a_run(model, rolling(), range(3), record=tmp_path).close()
    with pytest.raises(ReferenceMismatchError):
        Monitor(rolling(size=8), bank="contextual", sensors="full", record=tmp_path, resume=True).attach(model)


# What fails, and what is refused


def test_a_reference_that_fails_is_contained() -> None:
    model, probes = llama(), rolling()
    monitor = a_run(model, probes, rules=None)
    assert monitor._contextual is not None
    assert monitor._contextual._other is not None
    other = monitor._contextual._other
    saved = copy.deepcopy(other.state_dict())
    with torch.no_grad():
        next(other.parameters()).fill_(math.nan)
    readings = monitor.read(model, 8)
    assert {each.sensor for each in readings} == {"bank"}
    assert monitor.failures == {"the reference": 1}
    assert any("the reference failed (NonFiniteError" in alert.message for alert in monitor.alerts)
    other.load_state_dict(saved)
    assert "kl_ref_live" in {each.metric for each in monitor.read(model, 9)}


def test_tokens_that_the_model_does_not_have_never_reach_it() -> None:
    model, probes = llama(), rolling()
    monitor = a_run(model, probes, range(1))
    for _ in range(30):
        probes.offer([[VOCAB, 3, 4]])
    assert {each.sensor for each in monitor.read(model, 1)} == {"bank"}
    assert monitor.failures == {"the reference": 1}


def test_a_stop_fails_closed_where_nothing_can_be_read() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = LoopController(model, optimizer)
    monitor = Monitor(
        rolling(), bank="contextual", controller=control, rules=[Response(Limit("kl_ref_live", above=1.0), Stop())]
    )
    for step in range(4):
        monitor.read(model, step)
    assert control.should_stop


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bias": "all"}, "Beside its adapter PeftModel trains .*bias"),
        ({"init_lora_weights": "pissa"}, "takes a part out of the base weights.*give the reference model"),
    ],
)
def test_an_adapter_that_cannot_be_switched_off_for_good_is_refused(options: dict[str, Any], sentence: str) -> None:
    base = tiny.head_with_bias() if "bias" in options else llama()
    arguments: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options
    model = get_peft_model(base, LoraConfig(**arguments))
    with pytest.raises(ReferenceMismatchError, match=sentence):
        Monitor(rolling(), bank="contextual").attach(model)


def test_an_adapter_with_a_copy_of_a_module_that_trains_is_no_hindrance() -> None:
    model, probes = with_lora(modules_to_save=["lm_head"]), rolling()
    reference = llama()
    monitor = a_run(model, probes)
    found = of_outputs(monitor.read(model, 8))
    expected = naive.output_readings(reference, model, as_texts(probes))
    assert found["kl_ref_live", ""].value == pytest.approx(expected["kl_ref_live", ""][0], rel=1e-3)
    assert monitor.failures == {}


def test_a_rule_that_compares_the_same_probes_look_by_look_is_refused() -> None:
    monitor = Monitor(rolling(groups=["code", "prose"]), bank="contextual", rules=[GroupShift()])
    with pytest.raises(ConfigError, match="the bank 'contextual' holds others at each look"):
        monitor.attach(llama())


def test_probes_that_may_be_longer_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ProbeError, match=r"may have 128 tokens, but the model reads 64 .*max_tokens=64"):
        Monitor(RollingProbes(), bank="contextual").attach(llama())


def test_a_reference_that_is_no_other_model_is_refused(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ConfigError, match="has answers to fixed ones"):
        Monitor(rolling(), Reference.build(model, probe_set(), tmp_path), bank="contextual")
    with pytest.raises(ConfigError, match="is the model that is trained"):
        Monitor(rolling(), model, bank="contextual").attach(model)
    with pytest.raises(ReferenceMismatchError, match="50 output tokens, the live model 61"):
        Monitor(rolling(), llama(vocab=50), bank="contextual").attach(model)


def test_a_bank_that_rolls_is_not_called_fixed() -> None:
    with pytest.raises(ConfigError, match=r"their bank is named 'fixed'.*bank='contextual'"):
        Monitor(rolling())


def test_a_given_reference_keeps_its_own_flags() -> None:
    model, given, probes = llama(), llama(seed=2), rolling()
    flags = [each.requires_grad for each in given.requires_grad_(False).parameters()]
    monitor = Monitor(probes, given, bank="contextual")
    probes.offer(batch_of(0))
    assert of_outputs(monitor.read(model, 0))["kl_ref_live", ""].value > 0.1
    assert flags == [each.requires_grad for each in given.parameters()]
    assert given.training


def test_the_state_is_of_plain_types_and_of_a_modest_size(tmp_path: Path) -> None:
    monitor = a_run(with_lora(), rolling())
    monitor.save(tmp_path / "state.json")
    state = json.loads((tmp_path / "state.json").read_text())
    assert set(state["state"]["tellers"]["bank"]["samples"][""]) == {"offered", "items", "rows"}
    assert (tmp_path / "state.json").stat().st_size < 10_000


def test_drift_grows_with_training() -> None:
    kept = Kept()
    a_run(drifted(llama(), 0.0), rolling(), sinks=[kept], steps=range(9))
    values = [
        each.value
        for findings in kept.findings
        for each in findings.readings  # type: ignore[attr-defined]
        if each.metric == "kl_ref_live" and not each.group
    ]
    assert values == sorted(values)
    assert values[0] > 0


# Several processes


def test_all_processes_read_what_was_offered_in_the_first_one(tmp_path: Path) -> None:
    script = str(HERE / "contextual_worker.py")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    for arguments in (launched, [script]):
        done = subprocess.run(
            [sys.executable, *arguments, str(tmp_path)], env=environment, timeout=240, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1]
    expected = json.loads((tmp_path / "alone.json").read_text())
    assert facts[0]["readings"].keys() == expected["readings"].keys()
    for key, value in expected["readings"].items():
        assert facts[0]["readings"][key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert facts[0]["held"] == expected["held"]
