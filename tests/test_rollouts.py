"""What a trainer that samples knows of its own completions: the numbers that it logs, beside those of the probes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer

from diffsensor import ConfigError, Monitor, Reading, Reference, read_record
from diffsensor.actions import Response, Stop
from diffsensor.rules import Limit
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import TRAINERS, lora, sentences, text_probes, tiny_model, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing(_enable|_disable)?. is deprecated:FutureWarning"),
]

#: What a reading is called, and what the trainer calls the same.
NAMES = {
    "rollout_entropy": "entropy",
    "rollout_length": "completions/mean_length",
    "rollout_clipped": "completions/clipped_ratio",
    "rollout_reward": "reward",
    "rollout_reward_std": "reward_std",
    "rollout_reward/letters": "rewards/letters/mean",
    "rollout_reward_std/letters": "rewards/letters/std",
}
KL_OF = {"GRPO": "rollout_kl_k3", "RLOO": "rollout_kl_k1"}


def trainer_of(name: str, path: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    model = tiny_model(path / "model", attention_dropout=0.0)
    return TRAINERS[name](path / "run", list(callbacks), model, **options)


def monitor(path: Path, every_n_steps: int = 2, **options: Any) -> DriftMonitorCallback:
    options = {"sensors": "full", "cache_dir": path / "cache", "noise_floor": False} | options
    return DriftMonitorCallback(text_probes(), every_n_steps, **options)


def rollouts(path: Path) -> dict[str, dict[int, float]]:
    """By metric and step."""
    found: dict[str, dict[int, float]] = {}
    for reading in of_record(path):
        found.setdefault(reading.metric, {})[reading.step] = reading.value
    return found


def of_record(path: Path) -> list[Reading]:
    return [each for each in read_record(path / "run" / "diffsensor").readings if each.sensor == "rollouts"]


def probe_kl(path: Path, metric: str) -> dict[int, float]:
    readings = read_record(path / "run" / "diffsensor").readings
    return {each.step: each.value for each in readings if each.metric == metric and not each.group}


def logged(trainer: Trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("peft", [False, True])
def test_the_readings_are_what_the_trainer_logs(name: str, peft: bool, tmp_path: Path) -> None:
    options = {"beta": 0.1, "logging_steps": 2, "gradient_accumulation_steps": 2, "temperature": 0.8}
    trainer = trainer_of(name, tmp_path, monitor(tmp_path), peft_config=lora() if peft else None, **options)
    trainer.train()
    found = rollouts(tmp_path)
    for ours, theirs in (NAMES | {KL_OF[name]: "kl"}).items():
        assert found[ours] == logged(trainer, theirs), ours
        assert found[ours] == logged(trainer, f"diffsensor/{ours}")
        assert set(found[ours]) == {2, 4}  # and none before the first step
    assert found[KL_OF[name]][4] != 0
    assert len(set(found["rollout_entropy"].values())) == 2


class Spy(TrainerCallback):
    """What was kept at each step: the trainer's log, made anew each time."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, list[float]]] = {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "entropy" in logs:
            self.kept[state.global_step] = logs


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
def test_each_reading_is_of_the_steps_since_the_last_one(every_n_steps: int, tmp_path: Path) -> None:
    spy = Spy()
    trainer_of("GRPO", tmp_path, monitor(tmp_path, every_n_steps), spy, beta=0.1, max_steps=6).train()
    last = 0
    for step in range(every_n_steps, 7, every_n_steps):
        for ours, theirs in (NAMES | {"rollout_kl_k3": "kl"}).items():
            kept = [spy.kept[each][theirs] for each in range(last + 1, step + 1)]
            assert rollouts(tmp_path)[ours][step] == pytest.approx(sum(kept) / len(kept), rel=1e-12)
        last = step


def test_a_log_between_two_readings_takes_nothing_out_of_them(tmp_path: Path) -> None:
    found = []
    for number, logging_steps in enumerate((1, 2, 3, 6)):
        path = tmp_path / str(number)
        trainer_of("GRPO", path, monitor(path, 3), beta=0.1, max_steps=6, logging_steps=logging_steps).train()
        found.append(rollouts(path))
    assert found[0] == found[1] == found[2] == found[3]


class Naive:
    """The same from the model's plain logits, the reference's, and the sampled tokens, batch by batch."""

    def __init__(self, trainer: Any, name: str) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self._own = trainer._compute_loss
        self._trainer, self._name = trainer, name
        trainer._compute_loss = self

    def __call__(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]

        def of(each: Any) -> Tensor:
            with torch.no_grad():
                logits = each(input_ids=ids, attention_mask=attended).logits[:, -length - 1 : -1]
            return (logits.double() / self._trainer.args.temperature).log_softmax(-1)

        live, reference = of(model), of(self._trainer.ref_model)
        token = inputs["completion_ids"][..., None]
        p, q = live.gather(-1, token).squeeze(-1), reference.gather(-1, token).squeeze(-1)
        counted = inputs["completion_mask"].bool()
        self.batches.append(
            {
                "rollout_kl_k3": (torch.exp(q - p) - 1 - (q - p))[counted].mean(),
                "rollout_kl_k1": (p - q)[counted].mean(),
                "rollout_entropy": -(live.exp() * live).sum(-1)[counted].mean(),
                "rollout_length": counted.sum(1).double().mean(),
            }
        )
        loss: Tensor = self._own(model, inputs)
        return loss

    def mean(self, metric: str) -> float:
        values = [batch[metric].item() for batch in self.batches]
        return sum(values) / len(values)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_they_are_what_comes_of_the_models_logits(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, monitor(tmp_path, 4), beta=0.1, temperature=0.7)
    naive = Naive(trainer, name)
    trainer.train()
    found = rollouts(tmp_path)
    for metric in (KL_OF[name], "rollout_entropy", "rollout_length"):
        assert found[metric][4] == pytest.approx(naive.mean(metric), rel=2e-5), metric
    # Which estimator it is can be told: the other one reads otherwise.
    other = "rollout_kl_k1" if name == "GRPO" else "rollout_kl_k3"
    assert abs(naive.mean(other) / naive.mean(KL_OF[name]) - 1) > 0.01
    rewards = trainer.reward_funcs[0]
    seen = [sum(map(ord, text)) % 7 / 7 for text in rewards.seen]
    assert found["rollout_reward"][4] == pytest.approx(sum(seen) / len(seen), rel=1e-6)


@pytest.mark.parametrize("sensors", ["light", "full"])
def test_the_gap_is_the_sampled_kl_less_that_on_the_probes_over_the_same_steps(sensors: str, tmp_path: Path) -> None:
    trainer_of("GRPO", tmp_path, monitor(tmp_path, sensors=sensors), beta=0.1, temperature=0.9).train()
    metric = "kl_live_ref" if sensors == "full" else "kl_ref_live"
    found, probes = rollouts(tmp_path), probe_kl(tmp_path, metric)
    gap = found[f"rollout_kl_minus_{metric}"]
    assert set(gap) == {2, 4}
    for step, value in gap.items():
        sampled = found["rollout_kl_k3"][step]
        assert value == pytest.approx(sampled - (probes[step - 2] + probes[step]) / 2, rel=1e-12)
    assert [name for name in found if "minus" in name] == [f"rollout_kl_minus_{metric}"]
    notes = {each.metric: each.note for each in of_record(tmp_path)}
    assert notes[f"rollout_kl_minus_{metric}"] == "completions at temperature 0.9, probes at 1"


def _adapted(path: Path) -> Any:
    from peft import get_peft_model

    return get_peft_model(tiny_model(path / "model", attention_dropout=0.0), lora())


@pytest.mark.parametrize("why", ["no KL", "another reference", "a reference that moves", "an adapter as reference"])
def test_without_a_kl_to_the_same_reference_there_is_no_gap(why: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta": 0.0 if why == "no KL" else 0.1}
    reference = None
    if why == "another reference":
        reference = Reference.build(tiny_model(tmp_path / "model", attention_dropout=0.0), text_probes(), tmp_path)
    if why == "a reference that moves":
        options |= {"sync_ref_model": True, "ref_model_sync_steps": 1}
    model = (_adapted if why == "an adapter as reference" else lambda path: tiny_model(path / "model"))(tmp_path)
    TRAINERS["GRPO"](tmp_path / "run", [monitor(tmp_path, reference=reference)], model, **options).train()
    found = rollouts(tmp_path)
    assert ("rollout_kl_k3" in found) == (why != "no KL")
    assert not any("minus" in name for name in found)
    assert set(found) >= set(NAMES)


@pytest.mark.parametrize("is_weighted", [True, False])
def test_completions_that_are_used_for_several_steps_are_told_at_each(is_weighted: bool, tmp_path: Path) -> None:
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    options["use_bias_correction_kl"] = is_weighted
    trainer_of("GRPO", tmp_path, monitor(tmp_path, 1), beta=0.1, max_steps=4, **options).train()
    length = rollouts(tmp_path)["rollout_length"]
    assert length[1] == length[2] != length[3] == length[4]
    notes = {each.note for each in of_record(tmp_path) if each.metric == "rollout_kl_k3"}
    how = "tokens are weighted by p_live / p_sampled" if is_weighted else "most are of an earlier model"
    assert notes == {f"completions are used for several steps: {how}"}


def test_a_sampled_kl_says_what_its_estimator_is_not_right_for(tmp_path: Path) -> None:
    options = {"top_p": 0.9, "top_k": 5}
    trainer_of("GRPO", tmp_path, monitor(tmp_path), beta=0.1, max_steps=2, **options).train()
    notes = {each.metric: each.note for each in of_record(tmp_path)}
    assert notes["rollout_kl_k3"] == (
        "completions are sampled with top_p=0.9, top_k=5, and not from all of the distribution"
    )
    assert notes["rollout_entropy"] == ""


def test_the_manifest_says_what_each_number_is(tmp_path: Path) -> None:
    trainer_of("GRPO", tmp_path, monitor(tmp_path), beta=0.1, max_steps=2).train()
    metrics: Any = read_record(tmp_path / "run" / "diffsensor").manifest["metrics"]
    assert {each.metric for each in of_record(tmp_path)} <= set(metrics)
    assert metrics["rollout_kl_k3"]["estimator"].startswith("sampled, k3: r - 1 - log r with r = p_ref / p_live")
    units = {each.metric: each.unit for each in of_record(tmp_path)}
    assert units == {name: metrics[name]["unit"] for name in units}


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_a_trainer_that_samples_nothing_has_no_rollouts(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(name, tmp_path, monitor(tmp_path), max_steps=2)
    trainer.train()
    assert not of_record(tmp_path)


def test_a_trainer_built_on_trl_s_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(GRPOTrainer):
        pass

    monkeypatch.setattr("tiny_trainers.GRPOTrainer", Own)
    trainer_of("GRPO", tmp_path, monitor(tmp_path), beta=0.1, max_steps=2).train()
    assert set(rollouts(tmp_path)) >= {*NAMES, "rollout_kl_k3", "rollout_kl_minus_kl_live_ref"}


def test_distillation_tells_the_entropy_and_the_lengths_of_what_the_student_wrote(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", attention_dropout=0.0)
    args = DistillationConfig(
        str(tmp_path / "run"),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        max_completion_length=6,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    torch.manual_seed(5)
    trainer = DistillationTrainer(
        model=model,
        teacher_model=type(model)(model.config),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": sentences(16, 3)}),
        processing_class=tokenizer(),
        callbacks=[monitor(tmp_path)],
    )
    trainer.train()
    found = rollouts(tmp_path)
    assert set(found) == {"rollout_entropy", "rollout_length", "rollout_clipped"}
    for metric in found:
        assert found[metric] == logged(trainer, NAMES[metric])


def test_rules_look_at_them_and_may_act(tmp_path: Path) -> None:
    limit = Limit("rollout_entropy", below=100.0, for_=2)
    rules = [
        Response(limit, Stop()),
        Limit("rollout_reward/letters", above=1e9),
        Limit("rollout_kl_minus_kl_live_ref", below=-1e9),
    ]
    trainer = trainer_of("GRPO", tmp_path, monitor(tmp_path, 1, rules=rules), beta=0.1)
    trainer.train()
    assert trainer.state.global_step == 2  # of 4: the second look at a number, for there is none at step 0
    (alert,) = read_record(tmp_path / "run" / "diffsensor").alerts
    assert "nats/token" in alert.message
    assert "Read completions of those steps beside their rewards" in alert.message


def test_at_the_policy_s_temperature_probes_are_read_as_it_samples(tmp_path: Path) -> None:
    trainer = trainer_of("GRPO", tmp_path, monitor(tmp_path, temperature="policy"), beta=0.1, temperature=0.7)
    trainer.train()
    by_hand = Monitor(text_probes(), sensors="full", cache_dir=tmp_path / "cache", temperature=0.7, noise_floor=False)
    by_hand.attach(tiny_model(tmp_path / "model", attention_dropout=0.0))
    plain = Monitor(text_probes(), sensors="full", cache_dir=tmp_path / "cache", noise_floor=False)
    plain.attach(tiny_model(tmp_path / "model", attention_dropout=0.0))
    for monitor_, is_it in ((by_hand, True), (plain, False)):
        read = {each.key: each.value for each in monitor_.read(trainer.model, 4)}
        assert (read["diffsensor/kl_live_ref"] == probe_kl(tmp_path, "kl_live_ref")[4]) == is_it
    notes = {each.note for each in of_record(tmp_path)}
    assert notes == {""}


def test_there_is_no_policy_s_temperature_where_nothing_is_sampled(tmp_path: Path) -> None:
    trainer = trainer_of("SFT", tmp_path, monitor(tmp_path, temperature="policy"))
    with pytest.raises(ConfigError, match="temperature='policy' was given, and SFTTrainer samples nothing"):
        trainer.train()


def test_a_rule_on_a_kl_that_the_trainer_does_not_have_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("GRPO", tmp_path, monitor(tmp_path, rules=[Limit("rollout_kl_k3", above=1.0)]))
    with pytest.raises(ConfigError, match="No metric that is read here is named 'rollout_kl_k3'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_sealed_ones_are_in_the_record_and_not_in_the_log(tmp_path: Path) -> None:
    trainer = trainer_of("GRPO", tmp_path, monitor(tmp_path, sealed=True), max_steps=2)
    trainer.train()
    assert of_record(tmp_path)
    assert not any(key.startswith("diffsensor/") for entry in trainer.state.log_history for key in entry)


def test_the_console_shows_them_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of("GRPO", tmp_path, monitor(tmp_path), max_steps=2).train()
    shown = capsys.readouterr().out
    assert "diffsensor/kl_ref_live" in shown
    assert "rollout_" not in shown


def test_what_the_trainer_keeps_are_plain_numbers_so_that_no_step_waits(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.kept |= {key: list(values) for key, values in trainer._metrics["train"].items()}

    look = Look()
    trainer = trainer_of("GRPO", tmp_path, look, beta=0.1, max_steps=1)
    trainer.train()
    assert all(type(value) in (int, float) for values in look.kept.values() for value in values)
    assert set(NAMES.values()) <= set(look.kept)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_run_that_goes_on_between_two_readings_tells_what_the_uninterrupted_one_does(
    name: str, tmp_path: Path
) -> None:
    found = []
    for path, resume in ((tmp_path / "whole", False), (tmp_path / "halves", True)):
        options = {"beta": 0.1, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        trainer_of(name, path, monitor(path), **options).train()
        if resume:
            checkpoint = str(path / "run" / "checkpoint-3")
            trainer_of(name, path, monitor(path), **options).train(resume_from_checkpoint=checkpoint)
        found.append(rollouts(path))
    assert found[0] == found[1]
    assert set(found[0]["rollout_length"]) == {2, 4, 6}


def test_batches_without_a_reward_are_left_out_as_the_trainer_does(tmp_path: Path) -> None:
    class Sometimes:
        __name__ = "letters"
        calls = 0

        def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
            self.calls += 1
            return [None if self.calls == 1 else len(text) / 7 for text in completions]

    trainer = trainer_of("GRPO", tmp_path, monitor(tmp_path), logging_steps=2, max_steps=2)
    trainer.reward_funcs = [Sometimes()]
    trainer.train()
    found = rollouts(tmp_path)
    assert found["rollout_reward"] == logged(trainer, "reward")
    assert math.isfinite(found["rollout_reward"][2])
