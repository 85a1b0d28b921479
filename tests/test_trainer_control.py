"""The callback in transformers' and TRL's trainers, with rules, actions, a budget and a gate."""

import json
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import diffsensor_transformers
from diffsensor import (
    ConfigError,
    DriftBudget,
    Findings,
    Gate,
    Judgement,
    KLPenalty,
    RefusedError,
    Signal,
    Verdict,
    VerdictLedger,
    read_record,
    read_verdict,
)
from diffsensor.actions import (
    Pause,
    Response,
    Rollback,
    SaveCheckpoint,
    ScaleKLCoefficient,
    ScaleLearningRate,
    SetKLCoefficient,
    Stop,
)
from diffsensor.errors import CorruptFileError
from diffsensor.rules import Limit
from diffsensor_transformers import DriftMonitorCallback, TrainerController
from tiny_trainers import (
    TRAINERS,
    differences,
    lora,
    plain,
    sentences,
    text_probes,
    tiny_model,
    trace_of,
)

pytestmark = [
    # Calls of TRL and of transformers itself.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
]

KL = "diffsensor/kl_ref_live"
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


class At:
    """A rule in breach at some steps; as a criterion, not met at these. It counts its looks, as rules do."""

    def __init__(self, *steps: int, name: str = "at") -> None:
        self.steps, self.name = steps, name
        self.severity, self.cooldown, self.may_stop, self.metrics = "warning", 0, True, frozenset({"kl_ref_live"})
        self.looks: list[int] = []

    def check(self, scope: Any) -> None: ...

    def update(self, findings: Findings) -> Judgement:
        self.looks.append(findings.step)
        state = "breach" if findings.step in self.steps else "quiet"
        return Judgement(signals=(Signal(subject=KL, state=state, what=f"look {len(self.looks)}"),))

    def verdict(self, findings: Findings) -> Verdict:
        outcome = "fail" if findings.step in self.steps else "pass"
        return Verdict(step=findings.step, outcome=outcome, reason="By hand.", rule=self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"looks": list(self.looks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.looks = list(state["looks"])


def callback(path: Path, every_n_steps: int = 1, **options: Any) -> DriftMonitorCallback:
    options = {"noise_floor": False, **options}  # it is measured where it is tested
    return DriftMonitorCallback(text_probes(), every_n_steps, cache_dir=path / "cache", **options)


def trainer_of(path: Path, *callbacks: TrainerCallback, run: str = "run", **options: Any) -> Trainer:
    torch.manual_seed(3)
    return plain(path / run, list(callbacks), tiny_model(path / "m"), **options)


def trained(path: Path, *callbacks: TrainerCallback, run: str = "run", resume: Any = None, **options: Any) -> Trainer:
    trainer = trainer_of(path, *callbacks, run=run, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def actions(path: Path, run: str = "run") -> list[tuple[int, str, str]]:
    found = read_record(path / run / "diffsensor").actions
    return [(taken.step, taken.action, taken.outcome) for taken in found]


def logged(trainer: Trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Weights(TrainerCallback):
    """The weights after each step, as callbacks after ours find them."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.after[state.global_step] = weights_of(model)


class Killed(BaseException):
    """What no callback hears of."""


def killed(trainer: Trainer, **options: Any) -> None:
    with pytest.raises(Killed):
        trainer.train(**options)
    for monitor in trainer.callback_handler.callbacks:
        if isinstance(monitor, DriftMonitorCallback):
            monitor.close()  # as the end of the process would


class KillAfter(TrainerCallback):
    """Right after the checkpoint of a step, when callbacks before this one have been told of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


# What never acts changes nothing


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
@pytest.mark.parametrize("run", ["evaluated", "LoRA", "SFT"])
def test_a_run_with_rules_that_never_act_is_bit_identical_to_the_run_without(run: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_steps": 2},
        "LoRA": {"peft_config": lora(), "save_steps": 2},
        "SFT": {"save_steps": 2},
    }[run]
    watching = callback(
        tmp_path,
        noise_floor=True,
        rules=[
            Response(At(), Stop()),
            Response(At(name="b"), ScaleLearningRate(0.5), Rollback(), patience=2),
            Limit("loss", above=1e9),
        ],
        gate=Gate(At()),
    )
    name = "SFT" if run == "SFT" else "Trainer"
    traces = [trace_of(name, tmp_path, callbacks, **options, save_strategy="steps") for callbacks in ([], [watching])]
    assert differences(*traces) == []
    assert [entry[KL] for entry in traces[1]["ours"] if KL in entry][1:] != []
    assert watching.last_passed == tmp_path / "run" / "last-passed" / "checkpoint-4"


# Actions


def test_a_stop_ends_the_run_after_the_step_with_its_last_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    trainer = trained(tmp_path, callback(tmp_path, rules=[Response(At(2), Stop())]), **options, max_steps=5)
    assert trainer.state.global_step == 2
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2]
    assert actions(tmp_path) == [(2, "stop", "done")]
    assert list(logged(trainer, KL)) == [0, 1, 2]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_checkpoint_is_saved_when_a_rule_asks_for_it(strategy: str, tmp_path: Path) -> None:
    trained(
        tmp_path, callback(tmp_path, rules=[Response(At(2), SaveCheckpoint())]), save_strategy=strategy, max_steps=3
    )
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {"checkpoint-2"} | ({"checkpoint-3"} if strategy == "epoch" else set())
    assert actions(tmp_path) == [(2, "save_checkpoint", "done")]


def test_what_is_asked_before_the_first_step_is_done_after_it(tmp_path: Path) -> None:
    # The trainer forgets the request when a step begins.
    trained(tmp_path, callback(tmp_path, rules=[Response(At(0), SaveCheckpoint())]), max_steps=3)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_checkpoint_asked_for_when_the_run_is_over_is_refused(tmp_path: Path) -> None:
    controller = TrainerController(trained(tmp_path, max_steps=1))
    controller.is_over = True
    with pytest.raises(RefusedError, match="saves no checkpoint any more"):
        controller.save_checkpoint("by hand")


@pytest.mark.parametrize("scheduler", ["linear", "cosine_with_min_lr"])
def test_a_scaled_learning_rate_stays_scaled(scheduler: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_scheduler_type": scheduler, "max_steps": 6}
    if scheduler != "linear":
        options["lr_scheduler_kwargs"] = {"min_lr": 1e-3}
    plainly = logged(trained(tmp_path, run="plain", **options), "learning_rate")
    scaled = trained(tmp_path, callback(tmp_path, rules=[Response(At(3), ScaleLearningRate(0.5))]), **options)
    rates = logged(scaled, "learning_rate")
    # The trainer logs with each step the rate that it has before the scheduler goes on.
    assert [rates[step] / plainly[step] for step in range(1, 7)] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])
    told = {
        reading.step: reading.value
        for reading in read_record(tmp_path / "run" / "diffsensor").readings
        if reading.metric == "learning_rate"
    }
    assert told[2] == pytest.approx(rates[3])
    assert told[4] == pytest.approx(rates[5])


ROLLBACKS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"peft_config": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ROLLBACKS)
def test_a_rollback_puts_back_what_passed_last(kind: str, tmp_path: Path) -> None:
    options = ROLLBACKS[kind] | ({"peft_config": lora()} if kind == "LoRA" else {})
    weights = Weights()
    trainer = trained(
        tmp_path, callback(tmp_path, rules=[Response(At(3), Rollback())]), weights, max_steps=4, **options
    )
    assert are_equal(weights.after[3], weights.after[2])
    assert not are_equal(weights.after[4], weights.after[3])
    assert trainer.state.global_step == 4
    assert actions(tmp_path) == [(3, "rollback", "done")]


def test_a_rollback_before_anything_has_passed_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, callback(tmp_path, rules=[Response(At(0, 1), Rollback())]), max_steps=2)
    (taken,) = read_record(tmp_path / "run" / "diffsensor").actions
    assert (taken.step, taken.outcome) == (0, "refused")
    assert "Nothing has passed yet" in taken.detail


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("peft", [False, True])
def test_a_run_that_goes_on_rolls_back_to_the_checkpoint_that_passed_last(peft: bool, tmp_path: Path) -> None:
    options = SAVING | {"max_steps": 6} | ({"peft_config": lora()} if peft else {})

    def watching() -> DriftMonitorCallback:
        return callback(tmp_path, rules=[Response(At(4), Rollback())], gate=Gate(At(3, 4)))

    whole, parts = Weights(), Weights()
    trained(tmp_path, watching(), whole, run="whole", **options)
    killed(trainer_of(tmp_path, watching(), KillAfter(3), run="parts", **options))
    trained(tmp_path, watching(), parts, run="parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    assert actions(tmp_path, "whole") == actions(tmp_path, "parts") == [(4, "rollback", "done")]
    detail = read_record(tmp_path / "parts" / "diffsensor").actions[0].detail
    assert "went back to the state of step 2, from " in detail
    assert are_equal(whole.after[4], whole.after[2])
    # And with the same random numbers, moments and learning rates from there on.
    assert all(are_equal(whole.after[step], parts.after[step]) for step in (4, 5, 6))


def test_a_checkpoint_after_a_rollback_is_judged_as_what_it_holds(tmp_path: Path) -> None:
    watching = callback(tmp_path, rules=[Response(At(3), Rollback())], gate=Gate(At(3)))
    trained(tmp_path, watching, **(SAVING | {"max_steps": 3}))
    verdict = read_verdict(tmp_path / "run" / "checkpoint-3" / "diffsensor-verdict.json")
    assert (verdict.outcome, verdict.reason) == (
        "pass",
        "Rolled back at step 3 to the state of step 2, which passed.",
    )


def test_a_pause_waits_until_its_file_is_removed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback(tmp_path, rules=[Response(At(1), Pause())]), max_steps=2)
    file, seen = tmp_path / "run" / "PAUSED", []

    def person() -> None:
        while not file.exists():
            time.sleep(0.01)
        seen.append((trainer.state.global_step, file.read_text(encoding="utf-8")))
        file.unlink()

    thread = threading.Thread(target=person)
    thread.start()
    trainer.train()
    thread.join()
    assert seen[0][0] == 1
    assert "Remove this file" in seen[0][1]
    assert trainer.state.global_step == 2


def test_rules_begin_anew_with_each_run(tmp_path: Path) -> None:
    # It counts its looks, and says so in its alerts.
    response = Response(At(1), ScaleLearningRate(0.5))
    trainer = trainer_of(tmp_path, callback(tmp_path, rules=[response]), max_steps=2)
    trainer.train()
    trainer.train()
    for record in ("diffsensor", "diffsensor.2"):
        found = read_record(tmp_path / "run" / record)
        assert [(each.step, each.message) for each in found.alerts] == [(1, "look 2, since step 1.")]
        assert [(each.step, each.outcome) for each in found.actions] == [(1, "done")]


# Going on


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_that_goes_on_alerts_and_acts_as_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    def watching() -> DriftMonitorCallback:
        ladder = Response(At(2, 3, 4, 5), ScaleLearningRate(0.5), ScaleLearningRate(0.1), Stop(), patience=1)
        return callback(tmp_path, rules=[ladder, At(4, name="other")])

    options = SAVING | {"max_steps": 7}
    whole, parts = Weights(), Weights()
    trained(tmp_path, watching(), whole, run="whole", **options)
    killed(trainer_of(tmp_path, watching(), KillAfter(step), run="parts", **options))
    trained(tmp_path, watching(), parts, run="parts", resume=True, **options)
    whole_run, in_parts = actions(tmp_path, "whole"), actions(tmp_path, "parts")
    assert [taken[0] for taken in whole_run] == [2, 3, 4]
    # Killed after its stop, it goes on in breach: it is stopped again, at its next look.
    assert in_parts == whole_run + ([(5, "stop", "done")] if step == 4 else [])
    alerts = [read_record(tmp_path / run / "diffsensor").alerts for run in ("whole", "parts")]
    assert [(each.step, each.rule, each.message) for each in alerts[0]] == [
        (each.step, each.rule, each.message) for each in alerts[1]
    ]
    assert len(alerts[0]) == 2
    last = max(whole.after)
    assert last == 4
    assert step == 4 or are_equal(whole.after[last], parts.after[last])


# A KL penalty and a budget

STEERED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Trainer, full": ("Trainer", {}, True),
    "SFT, full": ("SFT", {}, True),
    "SFT, LoRA": ("SFT", {"peft_config": True}, True),
    "DPO": ("DPO", {}, False),
    "GRPO": ("GRPO", {"beta": 0.04}, False),
}


def penalty_for(path: Path, options: Mapping[str, Any], coefficient: float = 0.3) -> KLPenalty:
    if "peft_config" in options:
        return KLPenalty(coefficient=coefficient)
    return KLPenalty.frozen_copy(tiny_model(path / "m"), coefficient=coefficient)


@pytest.mark.parametrize("kind", STEERED)
def test_a_budget_moves_the_coefficient_and_the_run_feels_it(kind: str, tmp_path: Path) -> None:
    name, options, has_penalty = STEERED[kind]
    options = options | ({"peft_config": lora()} if "peft_config" in options else {})
    runs = {}
    for run, limit in (("tight", 1e-4), ("loose", 10.0)):
        torch.manual_seed(3)
        model = tiny_model(tmp_path / "m")
        penalty = penalty_for(tmp_path, options) if has_penalty else None
        watching = callback(
            tmp_path, budget=DriftBudget(limit, start=1.0), **({"penalty": penalty} if penalty is not None else {})
        )
        trainer = TRAINERS[name](tmp_path / run, [watching], model, **options)
        before = trainer.compute_loss
        trainer.train()
        assert trainer.compute_loss == before
        runs[run] = (trainer, trainer.beta if penalty is None else penalty.coefficient)
    told = {
        run: {
            reading.step: reading.value
            for reading in read_record(tmp_path / run / "diffsensor").readings
            if reading.metric == "kl_coefficient"
        }
        for run in runs
    }
    # Far above the budget it goes up, far below it down; at step 0 nothing has moved, which is far below.
    assert told["tight"][0] < 1 < told["tight"][4]
    assert told["loose"][4] < told["loose"][0] < 1
    assert runs["tight"][1] == pytest.approx(told["tight"][4])
    assert logged(runs["tight"][0], "diffsensor/kl_coefficient") == pytest.approx(told["tight"])
    taken = read_record(tmp_path / "tight" / "diffsensor").actions
    assert [(each.step, each.rule, each.outcome) for each in taken] == [
        (step, "drift budget", "done") for step in range(5)
    ]
    drifts = [logged(runs[run][0], KL) for run in ("tight", "loose")]
    assert drifts[0][4] != drifts[1][4]
    if name != "DPO":  # whose beta also multiplies the gradient
        assert drifts[0][4] < drifts[1][4]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_run_that_goes_on_has_the_coefficients_of_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    weights = {}

    def run(run: str, *extra: TrainerCallback) -> Trainer:
        torch.manual_seed(3)
        penalty = penalty_for(tmp_path, {}) if name == "SFT" else None
        watching = callback(tmp_path, budget=DriftBudget(1e-3), penalty=penalty)
        kept = weights.setdefault(run, Weights())
        return TRAINERS[name](tmp_path / run, [watching, *extra, kept], tiny_model(tmp_path / "m"), **SAVING)

    run("whole").train()
    killed(run("parts", KillAfter(3)))
    run("parts").train(resume_from_checkpoint=True)
    assert actions(tmp_path, "whole") == actions(tmp_path, "parts")
    assert len(actions(tmp_path, "whole")) == 6
    assert are_equal(weights["whole"].after[5], weights["parts"].after[5])


def test_a_penalty_alone_is_added_and_taken_off_and_responses_move_it(tmp_path: Path) -> None:
    penalty = penalty_for(tmp_path, {}, coefficient=0.5)
    rules = [Response(At(1), SetKLCoefficient(3.0)), Response(At(2, name="b"), ScaleKLCoefficient(2.0))]
    watching = callback(tmp_path, rules=rules, penalty=penalty)
    trainer = trainer_of(tmp_path, watching, max_steps=3)
    trainer.train()
    assert penalty.coefficient == 6.0
    assert penalty.last_kl > 0
    assert "compute_loss" not in vars(trainer)
    first = weights_of(trainer.model)
    without = trained(tmp_path, run="without", max_steps=3)
    assert not are_equal(first, weights_of(without.model))
    # A second run begins with the coefficient that was given.
    fresh = trainer_of(tmp_path, watching, run="again", max_steps=3)
    fresh.train()
    assert are_equal(first, weights_of(fresh.model))


def refused(trainer: Trainer, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "compute_loss" not in vars(trainer)
    assert "_determine_best_metric" not in vars(trainer)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a budget without a coefficient": ("Trainer", {"budget": DriftBudget(0.2)}, "has no KL coefficient.*KLPenalty"),
    "GRPO that began without a reference": ("GRPO", {"budget": DriftBudget(0.2)}, r"beta=0.*beta=1e-6"),
    "a response without a coefficient": (
        "SFT",
        {"rules": [Response(At(1), SetKLCoefficient(1.0))]},
        "has no KL coefficient",
    ),
    "a penalty where there is a beta": ("DPO", {"penalty": True}, "coefficient of its own, beta"),
    "a penalty without a reference": ("Trainer", {"penalty": KLPenalty()}, "The penalty has no reference"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_this_trainer_cannot_do_is_refused_before_the_first_step(what: str, tmp_path: Path) -> None:
    name, given, sentence = REFUSED[what]
    if given.get("penalty") is True:
        given = {"penalty": penalty_for(tmp_path, {})}
    watching = callback(tmp_path, **given, gate=Gate(At()))
    refused(TRAINERS[name](tmp_path / "run", [watching], tiny_model(tmp_path / "m")), sentence)


def test_a_learning_rate_that_a_scheduler_would_undo_is_refused(tmp_path: Path) -> None:
    watching = callback(tmp_path, rules=[Response(At(1), ScaleLearningRate(0.5))])
    options = {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-3}
    refused(trainer_of(tmp_path, watching, **options), "GreedyLR computes learning rates in a way of its own")


def test_two_budgets_are_refused(tmp_path: Path) -> None:
    both = [callback(tmp_path, budget=DriftBudget(0.2)), callback(tmp_path, budget=DriftBudget(0.2), bank="b")]
    refused(trainer_of(tmp_path, *both), "have a budget")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"penalty": 0.3}, r"penalty=KLPenalty\(\)"),
        ({"bank": "verdict"}, "names other files"),
        ({"sealed": True, "gate": Gate(Limit("kl_ref_live", above=0.1))}, "never drive an action"),
        ({"rules": [Limit("kl_ref_live", above=0.1)] * 2}, "Two rules are named"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_argument_is_refused_at_once(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DriftMonitorCallback(text_probes(), **wrong)


def test_a_rule_on_what_is_not_read_is_refused_before_the_first_step(tmp_path: Path) -> None:
    refused(trainer_of(tmp_path, callback(tmp_path, rules=[Limit("js", above=0.1)])), "'js'")


# What is told, and where


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_and_the_learning_rate_are_in_the_record_alone(accumulation: int, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    every = logged(trained(tmp_path, run="every", **options), "loss")
    trainer = trained(tmp_path, callback(tmp_path), logging_steps=3, **options)
    readings = [each for each in read_record(tmp_path / "run" / "diffsensor").readings if each.sensor == "progress"]
    losses = {each.step: each.value for each in readings if each.metric == "loss"}
    # Those of single steps, whenever the trainer logs: here the mean of three of them.
    assert losses == pytest.approx(every, rel=1e-3)
    assert {each.step for each in readings if each.metric == "learning_rate"} == set(range(6))
    assert not [key for entry in trainer.state.log_history for key in entry if key in ("diffsensor/loss", "lr")]


def test_the_noise_floor_is_in_the_log_beside_its_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trained(tmp_path, callback(tmp_path, 2, noise_floor=True))
    read = read_record(tmp_path / "run" / "diffsensor").readings
    floors = {each.noise_floor for each in read if each.key == KL}
    assert len(floors) == 1
    assert set(logged(trainer, f"{KL}/noise_floor").values()) == floors
    assert not [key for entry in trainer.state.log_history for key in entry if "group=" in key and "noise" in key]
    assert "noise_floor" not in capsys.readouterr().out


def test_sealed_readings_are_in_the_record_and_not_in_the_log(tmp_path: Path) -> None:
    trainer = trained(tmp_path, callback(tmp_path, sealed=True, rules=[Limit("kl_ref_live", above=1e-9, for_=1)]))
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("diffsensor/")]
    record = read_record(tmp_path / "run" / "diffsensor")
    assert {reading.step for reading in record.readings} == set(range(5))


def test_the_recipe_is_on_record_and_has_no_seed_in_it(tmp_path: Path) -> None:
    manifests = []
    for run, options in (("a", {"seed": 1}), ("b", {"seed": 2}), ("c", {"learning_rate": 1e-3})):
        options = {"gradient_accumulation_steps": 2, "peft_config": lora(), "max_steps": 1} | options
        trained(tmp_path, callback(tmp_path), run=run, **options)
        manifests.append(read_record(tmp_path / run / "diffsensor").manifest["recipe"])
    assert manifests[0] == manifests[1] != manifests[2]
    assert manifests[0]["trainer"] == "Trainer"
    assert manifests[0]["batch_size"] == 4
    assert manifests[0]["adapter default"]["r"] == 4


# The gate


def verdicts_of(path: Path, run: str = "run") -> dict[str, str]:
    ledger = VerdictLedger(path / run / "diffsensor-verdicts.json")
    return {name: verdict.outcome for name, verdict in ledger.verdicts.items()}


def beside(path: Path, run: str = "run") -> dict[str, str]:
    found = sorted((path / run).glob("checkpoint-*"), key=lambda each: int(each.name.rsplit("-", 1)[1]))
    return {each.name: read_verdict(each / "diffsensor-verdict.json").outcome for each in found}


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def content_of(checkpoint: Path) -> list[bytes]:
    # The trainer writes the first into a new file, and the second into the one that is there.
    return [(checkpoint / name).read_bytes() for name in ("model.safetensors", "optimizer.pt")]


def test_every_checkpoint_has_a_verdict_and_the_ledger_is_there_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = []
    own = Trainer._save_checkpoint

    def saving(self: Trainer, *args: Any) -> None:
        before.append(verdicts_of(tmp_path)[f"checkpoint-{self.state.global_step}"])
        own(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", saving)
    watching = callback(tmp_path, 100, gate=Gate(At(2, 5)))
    trainer = trained(tmp_path, watching, **SAVING)
    assert before == ["pass", "fail", "pass", "pass", "fail"]
    assert verdicts_of(tmp_path) == beside(tmp_path) == {f"checkpoint-{n + 1}": each for n, each in enumerate(before)}
    found = read_record(tmp_path / "run" / "diffsensor")
    assert [each.outcome for each in found.verdicts] == before
    # Read for the verdict, so it is in the log as well.
    assert list(logged(trainer, KL)) == [0, 1, 2, 3, 4, 5]


def test_the_checkpoint_that_passed_last_survives_the_trainer_s_limit(tmp_path: Path) -> None:
    weights = Weights()
    watching = callback(tmp_path, gate=Gate(At(3, 4, 5)))
    trained(tmp_path, watching, weights, save_total_limit=1, **SAVING)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    place = tmp_path / "run" / "last-passed" / "checkpoint-2"
    assert watching.last_passed == place
    assert [path.name for path in place.parent.iterdir()] == ["checkpoint-2"]
    assert read_verdict(place / "diffsensor-verdict.json").outcome == "pass"
    stored = stored_weights(place)
    assert all(torch.equal(weights.after[2][name], value) for name, value in stored.items())
    assert VerdictLedger(tmp_path / "run" / "diffsensor-verdicts.json").last_passed == "last-passed/checkpoint-2"
    # transformers takes neither for one of its own, and finds it when asked in there.
    assert get_last_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-5")
    assert get_last_checkpoint(str(place.parent)) == str(place)


def test_what_passed_last_takes_no_room_while_its_checkpoint_is_there(tmp_path: Path) -> None:
    trained(tmp_path, callback(tmp_path, gate=Gate(At())), **SAVING)
    for name in ("model.safetensors", "optimizer.pt"):
        one, other = (tmp_path / "run" / part / name for part in ("checkpoint-5", "last-passed/checkpoint-5"))
        assert one.samefile(other)


def test_where_no_links_can_be_made_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    watching = callback(tmp_path, gate=Gate(At()))
    trained(tmp_path, watching, **(SAVING | {"max_steps": 2}))
    assert watching.last_passed is not None
    assert {path.name for path in watching.last_passed.iterdir()} == {
        path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()
    }


class SavesAt(TrainerCallback):
    def __init__(self, step: int, event: str) -> None:
        self.step, self.event = step, event

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.event == "step" and state.global_step == self.step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.event == "epoch" and state.global_step == self.step


@pytest.mark.parametrize(("step", "event"), [(2, "step"), (3, "epoch")])
def test_a_checkpoint_that_a_later_callback_asks_for_has_a_verdict(step: int, event: str, tmp_path: Path) -> None:
    watching = callback(tmp_path, 100, gate=Gate(At(2)))
    trained(tmp_path, watching, SavesAt(step, event), max_steps=3)
    expected = {f"checkpoint-{step}": "fail" if step == 2 else "pass"}
    assert verdicts_of(tmp_path) == beside(tmp_path) == expected


@pytest.mark.parametrize("strategy", ["steps", "best", "epoch"])
def test_a_checkpoint_that_did_not_pass_is_never_the_best(strategy: str, tmp_path: Path) -> None:
    # The loss falls from epoch to epoch (of 8 steps), so that the last one would always be the best.
    watching = callback(tmp_path, 100, gate=Gate(At(16, 24)))
    kept = Weights()
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    by_step = {"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8, "save_strategy": strategy}
    trainer = trained(
        tmp_path, watching, kept, max_steps=-1, num_train_epochs=3, learning_rate=1e-3, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", save_total_limit=1, **(by_epoch if strategy == "epoch" else by_step),
    )  # fmt: skip
    losses = logged(trainer, "eval_loss")
    assert losses[24] < losses[16] < losses[8]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-8")
    assert trainer.state.best_metric == losses[8]
    assert are_equal(weights_of(trainer.model), kept.after[8])
    assert "_determine_best_metric" not in vars(trainer)
    if strategy == "best":
        assert verdicts_of(tmp_path) == {"checkpoint-8": "pass"}


def test_without_any_that_passed_none_is_loaded_as_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watching = callback(tmp_path, 100, gate=Gate(At(1, 2)))
    trainer = trained(
        tmp_path, watching, max_steps=2, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint is None
    assert watching.last_passed is None
    assert "No checkpoint that was evaluated passed the gate" in caplog.text


def test_a_best_checkpoint_that_never_passed_is_forgotten_when_the_run_goes_on(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    killed(trainer_of(tmp_path, callback(tmp_path), KillAfter(2), **options, max_steps=4))
    watching = callback(tmp_path, gate=Gate(At(3, 4)))
    trainer = trained(tmp_path, watching, resume=True, **options, max_steps=4)
    assert trainer.state.best_model_checkpoint is None


def test_without_a_gate_there_are_no_verdicts(tmp_path: Path) -> None:
    watching = callback(tmp_path)
    trained(tmp_path, watching, **SAVING)
    assert watching.last_passed is None
    assert not list((tmp_path / "run").rglob("diffsensor-verdict*"))
    assert not (tmp_path / "run" / "last-passed").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("moment", "outcome"),
    [
        ("before the save", "pass"),
        ("before the save", "fail"),
        ("after the save", "pass"),
        ("after the save", "fail"),
        ("before it is kept", "pass"),
    ],
)
def test_a_kill_around_a_save_leaves_the_right_files_once_the_run_went_on(
    moment: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = (2,) if outcome == "pass" else (2, 3)

    def watching() -> DriftMonitorCallback:
        return callback(tmp_path, 100, gate=Gate(At(*failing)))

    def dying(self: Trainer, *args: Any) -> None:
        if self.state.global_step == 3 and moment == "before the save":
            raise Killed
        own(self, *args)
        if self.state.global_step == 3 and moment == "after the save":
            raise Killed

    def copying(directory: Path, place: Path, **_: Any) -> None:
        if directory.name == "checkpoint-3":
            raise Killed
        copytree(directory, place, **_)

    own, copytree = Trainer._save_checkpoint, shutil.copytree
    options = SAVING | {"max_steps": 4}
    whole, parts = Weights(), Weights()
    trained(tmp_path, watching(), whole, run="whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_checkpoint", dying)
        if moment == "before it is kept":
            patched.setattr(shutil, "copytree", copying)
        killed(trainer_of(tmp_path, watching(), run="parts", **options))
    assert "checkpoint-3" in verdicts_of(tmp_path, "parts")
    assert (beside(tmp_path, "parts").get("checkpoint-3") == "unknown") == (moment == "after the save")
    again = watching()
    seen: list[Any] = []

    class Looks(TrainerCallback):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            seen.append((again.last_passed, beside(tmp_path, "parts")))

    trained(tmp_path, again, Looks(), parts, run="parts", resume=True, **options)
    assert verdicts_of(tmp_path, "parts") == beside(tmp_path, "parts") == verdicts_of(tmp_path, "whole")
    assert again.last_passed == tmp_path / "parts" / "last-passed" / "checkpoint-4"
    if moment != "before the save":
        place = "checkpoint-3" if outcome == "pass" else "checkpoint-1"
        assert seen[0] == (
            tmp_path / "parts" / "last-passed" / place,
            {"checkpoint-1": "pass", "checkpoint-2": "fail", "checkpoint-3": outcome},
        )
    manifests = [read_record(tmp_path / run / "diffsensor").manifest["reference"] for run in ("whole", "parts")]
    assert manifests[0] == manifests[1]
    assert not (tmp_path / "parts" / "diffsensor.2").exists()
    assert are_equal(whole.after[4], parts.after[4])


def test_a_checkpoint_about_to_be_written_over_loses_its_verdict_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SAVING | {"max_steps": 2}
    trained(tmp_path, callback(tmp_path, gate=Gate(At())), **options)
    trainer = trainer_of(tmp_path, callback(tmp_path, gate=Gate(At(2))), **options)

    def dying(self: Trainer, *args: Any) -> None:
        raise Killed

    monkeypatch.setattr(Trainer, "_save_checkpoint", dying)
    killed(trainer, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert beside(tmp_path) == {"checkpoint-1": "pass", "checkpoint-2": "unknown"}
    assert verdicts_of(tmp_path) == {"checkpoint-1": "pass", "checkpoint-2": "fail"}


def test_what_passed_last_is_not_written_over_when_the_run_goes_on_from_before(tmp_path: Path) -> None:
    options = SAVING | {"max_steps": 3}
    first = callback(tmp_path, gate=Gate(At(1)))
    trained(tmp_path, first, **options)
    assert first.last_passed is not None
    passed = content_of(first.last_passed)
    # Now the same steps end elsewhere, and do not pass.
    second = callback(tmp_path, gate=Gate(At(1, 2, 3)))
    trained(tmp_path, second, resume=str(tmp_path / "run" / "checkpoint-1"), **(options | {"max_grad_norm": 1e-6}))
    assert beside(tmp_path) == {"checkpoint-1": "fail", "checkpoint-2": "fail", "checkpoint-3": "fail"}
    assert content_of(tmp_path / "run" / "checkpoint-3") != passed
    assert second.last_passed == first.last_passed
    assert content_of(second.last_passed) == passed


def test_a_run_that_goes_on_from_before_has_what_had_passed_by_then(tmp_path: Path) -> None:
    options = SAVING | {"max_steps": 4}
    trained(tmp_path, callback(tmp_path, gate=Gate(At(2, 3))), **options)
    second = callback(tmp_path, gate=Gate(At(2, 3, 4)), rules=[Response(At(4), Rollback())])
    second_stop = callback(tmp_path, gate=Gate(At(2, 3, 4)))
    (tmp_path / "run" / "checkpoint-mine").mkdir()  # by the user
    trained(tmp_path, second_stop, resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert second_stop.last_passed == tmp_path / "run" / "last-passed" / "checkpoint-1"
    trained(tmp_path, second, resume=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert "went back to the state of step 1, from" in read_record(tmp_path / "run" / "diffsensor").actions[-1].detail


def test_a_new_run_in_the_same_directory_sets_what_passed_before_aside(tmp_path: Path) -> None:
    options = SAVING | {"max_steps": 2}
    first = callback(tmp_path, gate=Gate(At()))
    trained(tmp_path, first, **options)
    passed = content_of(tmp_path / "run" / "last-passed" / "checkpoint-2")
    second = callback(tmp_path, gate=Gate(At(1, 2)))
    trained(tmp_path, second, **options, learning_rate=3e-2)
    assert second.last_passed is None
    assert not (tmp_path / "run" / "last-passed").exists()
    assert verdicts_of(tmp_path) == {"checkpoint-1": "fail", "checkpoint-2": "fail"}
    assert content_of(tmp_path / "run" / "last-passed.1" / "checkpoint-2") == passed


def test_each_bank_has_verdicts_of_its_own(tmp_path: Path) -> None:
    one, other = callback(tmp_path, gate=Gate(At(2))), callback(tmp_path, gate=Gate(At(1)), bank="code")
    trainer = trained(
        tmp_path, one, other, **(SAVING | {"max_steps": 2}), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    assert (one.last_passed, other.last_passed) == (
        tmp_path / "run" / "last-passed" / "checkpoint-1",
        tmp_path / "run" / "last-passed-code" / "checkpoint-2",
    )
    assert read_verdict(tmp_path / "run" / "checkpoint-2" / "diffsensor-verdict-code.json").outcome == "pass"
    assert (tmp_path / "run" / "diffsensor-verdicts-code.json").exists()
    # The best one has to pass both.
    assert trainer.state.best_model_checkpoint is None
    assert "_determine_best_metric" not in vars(trainer)


def test_a_verdict_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(VerdictLedger, "add", full)
    watching = callback(tmp_path, gate=Gate(At()))
    assert trained(tmp_path, watching, **SAVING).state.global_step == 5
    assert "one that is missing is unknown. No space left on device" in caplog.text


@pytest.mark.parametrize("file", ["diffsensor-verdicts.json", "checkpoint-2/diffsensor-verdict.json"])
def test_a_damaged_verdict_is_refused_when_the_run_goes_on(file: str, tmp_path: Path) -> None:
    killed(trainer_of(tmp_path, callback(tmp_path, gate=Gate(At())), KillAfter(2), **SAVING))
    place = tmp_path / "run" / file
    place.write_bytes(place.read_bytes().replace(b"pass", b"fail"))
    trainer = trainer_of(tmp_path, callback(tmp_path, gate=Gate(At())), **SAVING)
    with pytest.raises(CorruptFileError, match=place.name.replace(".", r"\.")):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:.*'pin_memory' argument:UserWarning")
def test_the_readme_s_watched_run_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(diffsensor_transformers.__file__).parent / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (script,) = [block for block in blocks if '"out/watched"' in block]
    script, steps = re.subn(r"max_steps=\d+, logging_steps=\d+, save_steps=\d+", "max_steps=3, save_steps=2", script)
    assert steps == 1
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("DIFFSENSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "model", max_position_embeddings=256)
    lines = [json.dumps({"question": text, "answer": text[::-1]}) for text in sentences(20)]
    (tmp_path / "data").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["watched.py", str(tmp_path / "model"), str(tmp_path / "data")])
    exec(compile(script, "watched.py", "exec"), {"__name__": "__main__"})
    assert verdicts_of(tmp_path / "out", "watched") == beside(tmp_path / "out", "watched")
    assert set(verdicts_of(tmp_path / "out", "watched")) == {"checkpoint-2", "checkpoint-3"}
    taken = read_record(tmp_path / "out" / "watched" / "diffsensor").actions
    assert [each.rule for each in taken] == ["drift budget"] * len(taken)
