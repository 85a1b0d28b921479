"""DriftMonitor with rules, actions, a budget and a gate: what is asked of a Lightning run, and what becomes of it."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from diffsensor import DriftBudget, Gate, KLPenalty, Outputs, Sealed, Verdict, read_record, read_verdict
from diffsensor.actions import Pause, Response, Rollback, SaveCheckpoint, ScaleLearningRate, Stop
from diffsensor.errors import ConfigError
from diffsensor.rules import Invariant, Limit
from diffsensor_lightning import DriftMonitor
from tiny_lightning import TinyModule, ValidatedModule, data, differences, tiny_llama, tiny_probes, trace_of, trainer

KL = "diffsensor/kl_ref_live"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch
]


class Jumps(Callback):
    """Moves the weights at some steps far away, and back at the others: what fails a gate, and what passes it."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps, self.is_away = set(steps), False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        away = trainer.global_step in self.steps
        if away != self.is_away:
            with torch.no_grad():
                pl_module.model.lm_head.weight.mul_(4.0 if away else 0.25)  # exact, there and back
        self.is_away = away

    def state_dict(self) -> dict[str, Any]:
        return {"is_away": self.is_away}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_away = state_dict["is_away"]


class Still(TinyModule):
    """A module that hardly learns, so that only jumps move it."""

    def __init__(self) -> None:
        super().__init__(lr=1e-7)


class StillValidated(ValidatedModule):
    def __init__(self) -> None:
        super().__init__(lr=1e-7)


GATE_LIMIT = 0.01


def gate() -> Gate:
    return Gate(Limit("kl_ref_live", above=GATE_LIMIT))


def breach() -> Limit:
    return Limit("kl_ref_live", above=GATE_LIMIT, for_=1)


def drift_monitor(tmp_path: Path, every_n_train_steps: int | None = 1, **options: Any) -> DriftMonitor:
    defaults = {"cache_dir": tmp_path / "cache", "record": tmp_path / "record", "noise_floor": False}
    return DriftMonitor(tiny_probes(), every_n_train_steps, **(defaults | options))


def taken(tmp_path: Path) -> list[tuple[int, str, str]]:
    return [(each.step, each.action, each.outcome) for each in read_record(tmp_path / "record").actions]


def verdict_beside(path: Path | str) -> str:
    return read_verdict(f"{path}.verdict.json").outcome


def inside(path: Path | str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def of_monitor(state: dict[str, Any]) -> dict[str, Any]:
    """The monitor's own state, which is one text in that of the callback."""
    loaded: dict[str, Any] = json.loads(state["monitor"]["monitor"])["monitor"]
    return loaded


# What is told and shown


class Keys(Logger):
    """A logger that keeps what it is given."""

    name = version = "keys"

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.values.setdefault(key, []).append(float(value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_and_learning_rate_are_in_the_record_and_nowhere_else(accumulate: int, tmp_path: Path) -> None:
    module, logger = TinyModule(), Keys()
    runner = trainer([drift_monitor(tmp_path)], tmp_path, logger=logger, accumulate_grad_batches=accumulate)
    runner.fit(module, data(16))
    told = {(r.metric, r.step): r.value for r in read_record(tmp_path / "record").readings if r.sensor == "progress"}
    losses = [float(loss) for loss in module.losses][accumulate - 1 :: accumulate]
    assert [told["loss", step] for step in range(1, 4 // accumulate + 1)] == pytest.approx(losses)
    assert {told["learning_rate", step] for step in range(4 // accumulate + 1)} == {1e-2}
    assert ("loss", 0) not in told
    assert KL in logger.values
    shown = {*logger.values, *map(str, runner.callback_metrics)}
    assert not any("loss" in key or "learning_rate" in key for key in shown)


def test_a_step_that_is_read_before_its_loss_is_known_is_not_given_the_loss_of_another(tmp_path: Path) -> None:
    class SavesFirst(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    trainer([SavesFirst(), drift_monitor(tmp_path, 2, gate=gate())], tmp_path).fit(TinyModule(), data())
    told = [r for r in read_record(tmp_path / "record").readings if r.sensor == "progress"]
    assert [r.step for r in told if r.metric == "learning_rate"] == [0, 2, 3, 4, 6]
    assert [r.step for r in told if r.metric == "loss"] == [2, 4, 6]


def test_a_rule_may_look_at_the_loss(tmp_path: Path) -> None:
    runner = trainer([drift_monitor(tmp_path, rules=[Response(Limit("loss", above=1.0, for_=2), Stop())])], tmp_path)
    runner.fit(TinyModule(), data())
    assert runner.global_step == 2


def test_loggers_draw_the_noise_floor_and_callbacks_do_not_see_it(tmp_path: Path) -> None:
    logger = Keys()
    runner = trainer([drift_monitor(tmp_path, 3, noise_floor=True)], tmp_path, logger=logger)
    runner.fit(TinyModule(), data())
    floors = logger.values[f"{KL}/noise_floor"]
    expected = [r.noise_floor for r in read_record(tmp_path / "record").readings if r.key == KL]
    assert floors == expected
    assert len(floors) == 3
    assert not any("/noise_floor" in key and ("group=" in key or "at=" in key) for key in logger.values)
    assert not any("noise_floor" in key for key in runner.callback_metrics)
    without = Keys()
    trainer([drift_monitor(tmp_path / "other", 3)], tmp_path, logger=without).fit(TinyModule(), data())
    assert not any("noise_floor" in key for key in without.values)


def test_sealed_readings_go_to_loggers_and_where_nothing_can_act_on_them(tmp_path: Path) -> None:
    shown: list[set[str]] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            shown.append({*self.get_metrics(trainer, pl_module), *trainer.callback_metrics})

    bar, logger = Bar(), Keys()
    bar.disable()
    sealed = drift_monitor(tmp_path, 2, sealed=True, bank="secret")
    part = drift_monitor(tmp_path / "part", 2, sensors=[Sealed(Outputs()), "activations"], hookpoints="auto")
    runner = trainer([sealed, part, bar], tmp_path, logger=logger, enable_progress_bar=True)
    runner.fit(TinyModule(), data())
    runner.save_checkpoint(tmp_path / "end.ckpt")
    assert {KL, f"{KL}/bank=secret"} <= logger.values.keys()
    assert len(shown) == 6
    assert not any("secret" in key or "kl_ref_live" in key for keys in shown for key in keys)
    assert any("/at=" in key for key in shown[-1])  # what is not sealed is there
    # Nor after a resume.
    assert inside(tmp_path / "end.ckpt")["callbacks"]["DriftMonitor-secret"]["latest"] == {}


# Controlling the run


def test_an_action_stops_the_run_and_its_reason_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = trainer([Jumps([3]), drift_monitor(tmp_path, rules=[Response(breach(), Stop())])], tmp_path)
    with caplog.at_level(logging.WARNING, "diffsensor_lightning"):
        runner.fit(Still(), data())
    assert runner.global_step == 3
    assert taken(tmp_path) == [(3, "stop", "done")]
    assert "The run ends after step 3. kl_ref_live above 0.01" in caplog.text


def test_a_stop_says_what_lightning_waits_for(tmp_path: Path) -> None:
    monitor = drift_monitor(tmp_path, rules=[Response(breach(), Stop())])
    runner = trainer([Jumps([3, 4, 5, 6]), monitor], tmp_path, max_epochs=4, min_steps=5)
    runner.fit(Still(), data(8))
    assert runner.global_step == 5
    actions = read_record(tmp_path / "record").actions
    assert [action.step for action in actions] == [3, 4, 5]  # asked for as long as the breach lasts
    assert actions[0].detail == "the trainer was told to stop; it goes on until min_steps=5 is met"


def test_an_action_saves_a_checkpoint_with_its_verdict_beside_it(tmp_path: Path) -> None:
    monitor = drift_monitor(tmp_path, rules=[Response(breach(), SaveCheckpoint())], gate=gate())
    runner = trainer([Jumps([3]), monitor], tmp_path, logger=CSVLogger(tmp_path / "csv"))
    runner.fit(Still(), data())
    assert runner.logger is not None
    path = Path(runner.logger.log_dir or "") / "diffsensor-checkpoints" / "step=3.ckpt"
    assert taken(tmp_path) == [(3, "save_checkpoint", "done")]
    assert verdict_beside(path) == "fail"
    checkpoint = inside(path)
    assert checkpoint["global_step"] == 3
    state = checkpoint["callbacks"]["DriftMonitor"]
    assert (state["read"], of_monitor(state)["last_step"]) == (3, 3)
    assert state["latest"][KL] > GATE_LIMIT  # of this step, though the reading had not yet been handed on
    assert [verdict.step for verdict in read_record(tmp_path / "record").verdicts] == [3, 6]


class Scheduled(Still):
    def __init__(self, interval: str) -> None:
        super().__init__()
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-8)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scaled_learning_rate_stays_scaled_whatever_the_scheduler_does(interval: str, tmp_path: Path) -> None:
    def rates(*callbacks: Callback) -> list[float]:
        seen: list[float] = []

        class Looks(Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer([*callbacks, Looks()], tmp_path, max_epochs=3).fit(Scheduled(interval), data(8))
        return seen

    plain = rates()
    scaled = rates(Jumps([3]), drift_monitor(tmp_path, rules=[Response(breach(), ScaleLearningRate(0.1))]))
    assert scaled == pytest.approx([rate * (1.0 if step < 3 else 0.1) for step, rate in enumerate(plain)], rel=1e-9)
    assert taken(tmp_path) == [(3, "scale_learning_rate(0.1)", "done")]


class Seen(Callback):
    """Keeps the weights and optimizer states after each step, and each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        self.states.append(
            {
                "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "optimizer": {key: {k: v.clone() for k, v in each.items()} for key, each in state.items()},
                "batch": batch[0].clone(),
            }
        )


def test_a_rollback_puts_back_what_passed_and_the_run_goes_on(tmp_path: Path) -> None:
    class Spoils(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    pl_module.model.lm_head.weight.mul_(4.0)

    seen, plain = Seen(), Seen()
    monitor = drift_monitor(tmp_path, rules=[Response(breach(), Rollback())])
    trainer([Spoils(), monitor, seen], tmp_path).fit(Still(), data())
    trainer([plain], tmp_path).fit(Still(), data())
    (action,) = read_record(tmp_path / "record").actions
    assert (action.step, action.outcome, action.detail) == (4, "done", "went back to step 3; data and step go on")
    # A list of one run, without the update that was thrown away: weights and moments are those of step 3.
    assert differences(seen.states[3]["weights"], seen.states[2]["weights"]) == []
    assert differences(seen.states[3]["optimizer"], seen.states[2]["optimizer"]) == []
    assert differences(seen.states[:3], plain.states[:3]) == []
    assert len(seen.states) == 6
    assert differences([s["batch"] for s in seen.states], [s["batch"] for s in plain.states]) == []
    assert differences(seen.states[4]["weights"], seen.states[3]["weights"]) != []


def test_a_run_that_goes_on_from_a_checkpoint_that_passed_can_roll_back_to_it(tmp_path: Path) -> None:
    def fit(steps: int, jumps: list[int], ckpt: Path | None = None) -> pl.Trainer:
        monitor = drift_monitor(tmp_path, 2, rules=[Response(breach(), Rollback())], gate=gate())
        runner = trainer([Jumps(jumps), monitor], tmp_path, max_epochs=steps)
        runner.fit(Still(), data(4), ckpt_path=ckpt)
        return runner

    fit(3, []).save_checkpoint(tmp_path / "three.ckpt")
    kept = inside(tmp_path / "three.ckpt")["state_dict"]
    fit(4, [4], tmp_path / "three.ckpt").save_checkpoint(tmp_path / "four.ckpt")
    assert taken(tmp_path) == [(4, "rollback", "done")]
    assert differences(dict(inside(tmp_path / "four.ckpt")["state_dict"]), dict(kept)) == []


def test_a_rollback_in_the_midst_of_a_step_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    class SavesInside(Still):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3:
                with torch.no_grad():
                    self.model.model.norm.weight.mul_(8.0)
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                loss = super().training_step(batch, batch_idx)
            return loss

    monitor = drift_monitor(tmp_path, 2, rules=[Response(breach(), Rollback())], gate=gate())
    runner = trainer([monitor], tmp_path)
    runner.fit(SavesInside(), data())
    (action, *_) = read_record(tmp_path / "record").actions
    assert (action.step, action.outcome) == (3, "refused")
    assert "in the midst of a training step" in action.detail
    assert runner.global_step == 6


def test_a_pause_waits_until_its_file_is_removed(tmp_path: Path) -> None:
    def lets_go() -> None:
        while not (tmp_path / "PAUSED").exists():
            time.sleep(0.02)
        told.append((tmp_path / "PAUSED").read_text())
        (tmp_path / "PAUSED").unlink()

    told: list[str] = []
    person = threading.Thread(target=lets_go)
    person.start()
    runner = trainer([Jumps([3]), drift_monitor(tmp_path, rules=[Response(breach(), Pause())])], tmp_path)
    runner.fit(Still(), data())
    person.join()
    assert "kl_ref_live" in told[0]
    assert runner.global_step == 6
    assert taken(tmp_path) == [(3, "pause", "done")]


class OwnWay(SingleDeviceStrategy):
    """Saves in a way of its own, into a directory, as sharded strategies do."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Path(filepath).mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint.pop("state_dict"), Path(filepath) / "weights.pt")
        torch.save(checkpoint, Path(filepath) / "meta.pt")


class LambdaByHand(Still):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-8)

        class Own(torch.optim.lr_scheduler.LRScheduler):
            def get_lr(self) -> list[float]:
                return [1e-8 for _ in self.optimizer.param_groups]

        return [optimizer], [Own(optimizer)]


@pytest.mark.parametrize(
    ("action", "module", "options", "sentence"),
    [
        (Rollback(), Still, {"callbacks": [StochasticWeightAveraging(1e-3)]}, "StochasticWeightAveraging averages"),
        (Rollback(), Still, {"strategy": OwnWay(torch.device("cpu"))}, "OwnWay holds weights"),
        (ScaleLearningRate(0.5), LambdaByHand, {}, "computes learning rates in a way of its own"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused_before_the_first_step(
    action: Any, module: Callable[[], TinyModule], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    callbacks = [drift_monitor(tmp_path, rules=[Response(breach(), action)]), *options.pop("callbacks", [])]
    runner = trainer(callbacks, tmp_path, **options)
    with pytest.raises(ConfigError, match=sentence):
        runner.fit(module(), data())
    assert runner.global_step == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"budget": DriftBudget(0.2)}, r"a budget and no penalty.*penalty=KLPenalty"),
        ({"penalty": object()}, "has no number `coefficient`"),
        ({"gate": gate(), "sealed": True}, "sealed"),
        ({"rules": [breach(), breach()]}, "Two rules are named"),
        ({"rules": [Response(breach(), Stop())], "sensors": [Sealed(Outputs())]}, "sealed metric"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_argument_is_refused_at_once(wrong: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        drift_monitor(tmp_path, **wrong)


def test_a_rule_on_a_metric_that_is_not_read_is_refused_with_the_closest(tmp_path: Path) -> None:
    runner = trainer([drift_monitor(tmp_path, rules=[Limit("kl_ref_liv", above=1.0)])], tmp_path)
    with pytest.raises(ConfigError, match="kl_ref_live"):
        runner.fit(Still(), data())


# The budget


class Penalised(TinyModule):
    """The loss of the task and the penalty, as a module of one's own would add them."""

    def __init__(self) -> None:
        super().__init__(lr=3e-3)
        self.penalty = KLPenalty.frozen_copy(self.model)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (ids,) = batch
        logits = self.model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.penalty(self.model, logits, ids)


def test_a_budget_moves_the_penalty_of_training_step_and_is_gone_on_with(tmp_path: Path) -> None:
    def fit(record: str, epochs: int, ckpt: Path | None = None) -> tuple[pl.Trainer, Penalised]:
        module = Penalised()
        monitor = drift_monitor(
            tmp_path,
            1,
            record=tmp_path / record,
            budget=DriftBudget(0.002, start=0.3),
            penalty=module.penalty,
            rules=[],
        )
        runner = trainer([monitor], tmp_path, max_epochs=epochs)
        runner.fit(module, data(4), ckpt_path=ckpt)
        return runner, module

    _, whole = fit("whole", 8)
    half, _ = fit("parts", 5)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, parts = fit("parts", 8, tmp_path / "half.ckpt")
    found = read_record(tmp_path / "whole")
    coefficients = [r.value for r in found.readings if r.metric == "kl_coefficient"]
    assert len(coefficients) == 9
    assert coefficients[0] < 0.3  # it had not moved yet
    assert coefficients[-1] > coefficients[0]  # and was held back later
    assert whole.penalty.coefficient == coefficients[-1] == parts.penalty.coefficient
    assert [(a.step, a.rule, a.outcome) for a in found.actions] == [(n, "drift budget", "done") for n in range(9)]
    assert same(read_record(tmp_path / "parts")) == same(found)
    assert differences(dict(parts.state_dict()), dict(whole.state_dict())) == []


# The gate

EPOCH_END = {}
SAVERS = {
    "the last one": {},
    "all": {"save_top_k": -1},
    "the two lowest": {"monitor": KL, "mode": "min", "save_top_k": 2},
    "the highest": {"monitor": KL, "mode": "max", "save_top_k": 1},
    "all, the highest best": {"monitor": KL, "mode": "max", "save_top_k": -1},
}


class Follows(Callback):
    """Notes after each step what ModelCheckpoint says of its best, with what is on the disk."""

    def __init__(self, saver: ModelCheckpoint) -> None:
        self.saver = saver
        self.best: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.saver.best_model_path
        self.best.append(number(path) if path else 0)
        if path:
            assert verdict_beside(path) == "pass"
            assert Path(path).exists()
        for ranked in self.saver.best_k_models:
            assert verdict_beside(ranked) == "pass"

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_start(trainer)


def number(path: Path | str) -> int:
    return int(Path(path).stem.removeprefix("step="))


def on_disk(folder: Path) -> list[int]:
    """The steps of the checkpoints there, each with its verdict beside it and nothing else."""
    steps = sorted(number(path) for path in folder.glob("*.ckpt"))
    assert sorted(path.name for path in folder.glob("*.json")) == sorted(f"step={n}.ckpt.verdict.json" for n in steps)
    return steps


@pytest.mark.parametrize(
    ("saver", "best", "kept"),
    [
        ("the last one", [0, 0, 2, 2, 2, 5, 5], [5, 6]),
        ("all", [0, 0, 2, 2, 2, 5, 5], [1, 2, 3, 4, 5, 6]),
        ("the two lowest", [0, 0, 2, 2, 2, 2, 2], [2, 5]),
        ("the highest", [0, 0, 2, 2, 2, 5, 5], [5]),
        ("all, the highest best", [0, 0, 2, 2, 2, 5, 5], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_checkpoint_that_did_not_pass_is_never_the_best(
    saver: str, best: list[int], kept: list[int], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1, **SAVERS[saver])
    follows = Follows(checkpoints)
    monitor = drift_monitor(tmp_path, gate=gate())
    runner = trainer([Jumps([1, 3, 4, 6]), monitor, follows, checkpoints], tmp_path, enable_checkpointing=True)
    runner.fit(Still(), data())
    assert follows.best == best
    assert on_disk(tmp_path / "ckpt") == kept
    assert monitor.last_passed.endswith("step=5.ckpt")
    verdicts = {verdict.step: verdict.outcome for verdict in read_record(tmp_path / "record").verdicts}
    assert all(verdicts[step] == ("pass" if step in (2, 5) else "fail") for step in verdicts)
    for step in kept:
        checkpoint = inside(tmp_path / "ckpt" / f"step={step}.ckpt")
        assert checkpoint["diffsensor_verdict"]["outcome"] == verdict_beside(tmp_path / "ckpt" / f"step={step}.ckpt")
        stored = checkpoint["callbacks"][checkpoints.state_key]
        assert stored["best_model_path"] == "" or number(stored["best_model_path"]) in (2, 5)
        assert {number(path) for path in stored["best_k_models"]} <= {2, 5}
        assert all(number(path) in (2, 5) for path in checkpoint["callbacks"]["DriftMonitor"]["passed"])
    assert "check_monitor_top_k" not in vars(checkpoints)


@pytest.mark.parametrize("where", ["epoch end", "validation end"])
def test_verdicts_are_made_wherever_lightning_saves(where: str, tmp_path: Path) -> None:
    """The step was not read by then; at the end of a validation without gradients."""
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, save_on_train_epoch_end=where[0] == "e")
    rules = [Response(breach(), Rollback())]
    monitor = drift_monitor(tmp_path, 5, gate=gate(), rules=rules)
    runner = trainer([Jumps([4]), monitor, checkpoints], tmp_path, enable_checkpointing=True, max_epochs=3)
    runner.fit(StillValidated(), data(8), data(8))
    assert on_disk(tmp_path / "ckpt") == [2, 4, 6]
    verdicts = [(verdict.step, verdict.outcome) for verdict in read_record(tmp_path / "record").verdicts]
    assert verdicts == [(2, "pass"), (4, "fail"), (6, "pass")]
    assert taken(tmp_path) == [(4, "rollback", "done")]
    assert runner.global_step == 6


def test_the_state_in_a_checkpoint_is_the_one_after_the_verdict_s_reading(tmp_path: Path) -> None:
    monitor = drift_monitor(tmp_path, 4, gate=gate(), rules=[Response(breach(), ScaleLearningRate(0.5))])
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=3)
    runner = trainer([Jumps([3]), monitor, checkpoints], tmp_path, enable_checkpointing=True, max_steps=3)
    runner.fit(Still(), data())
    checkpoint = inside(tmp_path / "ckpt" / "step=3.ckpt")
    state = checkpoint["callbacks"]["DriftMonitor"]
    assert (state["read"], of_monitor(state)["last_step"], of_monitor(state)["verdict"]["step"]) == (3, 3, 3)
    # What that reading led to is in it as well.
    assert taken(tmp_path) == [(3, "scale_learning_rate(0.5)", "done")]
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 5e-8


def test_every_way_of_saving_gives_a_verdict(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=trainer.global_step == 2)

    monitor = drift_monitor(tmp_path, 6, gate=gate())
    runner = trainer([Jumps([2]), monitor, Saves()], tmp_path)
    runner.fit(Still(), data())
    assert [verdict_beside(tmp_path / f"{step}.ckpt") for step in range(1, 7)] == ["pass", "fail", *["pass"] * 4]
    light = inside(tmp_path / "2.ckpt")
    assert light["diffsensor_verdict"]["outcome"] == "fail"
    assert "callbacks" not in light
    # After fit the verdict is that of the last step.
    runner.save_checkpoint(tmp_path / "end.ckpt")
    assert verdict_beside(tmp_path / "end.ckpt") == "pass"
    assert monitor.last_passed == str(tmp_path / "end.ckpt")
    verdict = Verdict(**inside(tmp_path / "end.ckpt")["diffsensor_verdict"])
    assert verdict == read_verdict(tmp_path / "end.ckpt.verdict.json")


def test_a_checkpoint_of_a_run_that_ended_by_an_exception_is_unknown(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise ZeroDivisionError

        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_on_exception=True, every_n_epochs=0)
    monitor, module = drift_monitor(tmp_path, gate=gate()), Still()
    runner = trainer([Crash(), monitor, checkpoints], tmp_path, enable_checkpointing=True)
    runner.fit(module, data(12))  # at whose end this step has passed
    runner.fit_loop.max_epochs = 2
    with pytest.raises(ZeroDivisionError):
        runner.fit(module, data(12))
    assert verdict_beside(tmp_path / "ckpt" / "step=3.ckpt") == "unknown"
    assert verdict_beside(tmp_path / "own.ckpt") == "unknown"  # while the monitor was still there
    assert monitor.last_passed == ""


def test_a_file_that_is_written_over_by_one_that_fails_is_not_the_best_any_more(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "newest", every_n_train_steps=1)
    monitor = drift_monitor(tmp_path, gate=gate())
    runner = trainer([Jumps([6]), monitor, checkpoints], tmp_path, enable_checkpointing=True)
    runner.fit(Still(), data())
    assert [path.name for path in (tmp_path / "ckpt").glob("*.ckpt")] == ["newest.ckpt"]
    assert verdict_beside(tmp_path / "ckpt" / "newest.ckpt") == "fail"
    assert checkpoints.best_model_path == monitor.last_passed == ""


def test_a_resumed_run_keeps_the_best_that_passed_and_drops_what_is_not_proven(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(epochs: int, ckpt: Path | None = None) -> tuple[DriftMonitor, ModelCheckpoint]:
        checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", monitor=KL, mode="max", save_top_k=-1)
        monitor = drift_monitor(tmp_path, gate=gate())
        runner = trainer([Jumps([3, 4]), monitor, checkpoints], tmp_path, enable_checkpointing=True, max_epochs=epochs)
        runner.fit(Still(), data(4), ckpt_path=ckpt)
        return monitor, checkpoints

    fit(3)
    monitor, checkpoints = fit(4, tmp_path / "ckpt" / "step=3.ckpt")
    assert [number(path) for path in checkpoints.best_k_models] == [1, 2]
    assert number(monitor.last_passed) == number(checkpoints.best_model_path) == 2
    (tmp_path / "ckpt" / "step=2.ckpt.verdict.json").unlink()  # a missing verdict is unknown, and unknown is not a pass
    caplog.clear()
    monitor, checkpoints = fit(4, tmp_path / "ckpt" / "step=3.ckpt")
    assert [number(path) for path in checkpoints.best_k_models] == [1]
    assert number(monitor.last_passed) == number(checkpoints.best_model_path) == 1
    assert "step=2.ckpt has no verdict, or did not pass the gate" in caplog.text


def test_two_gates_have_two_verdicts_and_both_must_pass(tmp_path: Path) -> None:
    strict = Gate(Limit("kl_ref_live", above=0.01))
    lenient = Gate(Limit("kl_ref_live", above=10.0))
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1)
    callbacks = [
        Jumps([3]),
        drift_monitor(tmp_path, gate=lenient),
        drift_monitor(tmp_path, gate=strict, bank="code", record=None),
        checkpoints,
    ]
    trainer(callbacks, tmp_path, enable_checkpointing=True, max_steps=3).fit(Still(), data())
    assert verdict_beside(tmp_path / "ckpt" / "step=3.ckpt") == "pass"
    assert verdict_beside(tmp_path / "ckpt" / "step=3.ckpt-code") == "fail"
    assert {"diffsensor_verdict", "diffsensor_verdict-code"} <= inside(tmp_path / "ckpt" / "step=3.ckpt").keys()
    assert number(checkpoints.best_model_path) == 2
    assert (tmp_path / "ckpt" / "step=2.ckpt").exists()


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_checkpoint_that_is_a_directory_has_its_verdict_inside(save_last: Any, tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1, save_last=save_last)
    monitor, verdicts = drift_monitor(tmp_path, gate=gate()), {}

    class Reads(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            verdicts[trainer.global_step] = sorted(
                f"{path.name} {read_verdict(path).outcome} {read_verdict(path).step}"
                for path in (tmp_path / "ckpt").glob("*.ckpt")
            )

    runner = trainer(
        [Jumps([3]), monitor, Reads(), checkpoints],
        tmp_path,
        enable_checkpointing=True,
        strategy=OwnWay(torch.device("cpu")),
        max_steps=5,
    )
    runner.fit(Still(), data())
    assert verdicts[2] == ["last.ckpt pass 2", "step=2.ckpt pass 2"]
    assert verdicts[3] == ["last.ckpt fail 3", "step=2.ckpt pass 2", "step=3.ckpt fail 3"]
    assert verdicts[4] == ["last.ckpt pass 4", "step=4.ckpt pass 4"]
    inside_it = inside(tmp_path / "ckpt" / "step=5.ckpt" / "meta.pt")["diffsensor_verdict"]
    assert Verdict(**inside_it) == read_verdict(tmp_path / "ckpt" / "step=5.ckpt")
    assert not list((tmp_path / "ckpt").glob("*.json"))
    assert monitor.last_passed == str(tmp_path / "ckpt" / ("step=5.ckpt" if save_last == "link" else "last.ckpt"))


@pytest.mark.parametrize("kind", [OwnWay, SingleDeviceStrategy])
def test_a_checkpoint_that_was_written_over_in_part_has_no_verdict(
    kind: type[SingleDeviceStrategy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = kind.save_checkpoint

    def broken_off(self: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if checkpoint["global_step"] == 2:
            raise OSError("the disk is full")
        write(self, checkpoint, *args, **kwargs)

    class Saves(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "newest.ckpt")
            assert read_verdict(tmp_path / "newest.ckpt").outcome == "pass"

    monkeypatch.setattr(kind, "save_checkpoint", broken_off)
    callbacks = [drift_monitor(tmp_path, gate=gate()), Saves()]
    with pytest.raises(OSError, match="the disk is full"):
        trainer(callbacks, tmp_path, strategy=kind(torch.device("cpu"))).fit(Still(), data())
    assert (tmp_path / "newest.ckpt").exists()
    assert read_verdict(tmp_path / "newest.ckpt").outcome == "unknown"


def test_checkpoints_may_be_written_in_a_thread(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1)
    monitor = drift_monitor(tmp_path, gate=gate())
    options = {"plugins": [AsyncCheckpointIO()], "enable_checkpointing": True}
    trainer([Jumps([2]), monitor, checkpoints], tmp_path, max_steps=3, **options).fit(Still(), data())
    assert on_disk(tmp_path / "ckpt") == [1, 2, 3]
    assert inside(tmp_path / "ckpt" / "step=2.ckpt")["diffsensor_verdict"]["outcome"] == "fail"
    assert number(checkpoints.best_model_path) == 3


def test_without_a_gate_nothing_of_the_trainer_is_changed(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=1)
    monitor = drift_monitor(tmp_path, 2)
    runner = trainer([Jumps([6]), monitor, checkpoints], tmp_path, enable_checkpointing=True)
    runner.fit(Still(), data())
    for each in (runner, runner.strategy):
        assert not {"save_checkpoint", "remove_checkpoint"} & vars(each).keys()
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step=6.ckpt"]
    assert "diffsensor_verdict" not in inside(tmp_path / "ckpt" / "step=6.ckpt")
    assert monitor.last_passed == ""
    assert not read_record(tmp_path / "record").verdicts


# The run stays what it is


@pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers
def test_rules_that_never_act_and_a_gate_leave_no_trace_in_the_run(tmp_path: Path) -> None:
    def run(*callbacks: Callback, name: str) -> dict[str, Any]:
        checkpoints = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=2, save_top_k=-1)
        return trace_of(
            [*callbacks, checkpoints],
            tmp_path,
            module=lambda: TinyModule(tiny_llama(dropout=0.1)),
            loader=lambda: data(shuffle=True),
            enable_checkpointing=True,
        )

    never = Limit("kl_ref_live", above=1e3)
    monitor = drift_monitor(
        tmp_path,
        3,
        rules=[Response(never, Rollback(), SaveCheckpoint(), Stop()), Limit("loss", above=1e3), Invariant()],
        gate=gate(),
        noise_floor=True,
        sensors="full",
    )
    with_it, without = run(monitor, name="with"), run(name="without")
    assert differences(with_it, without) == []
    for step in (2, 4, 6):
        one, other = (inside(tmp_path / name / f"step={step}.ckpt") for name in ("with", "without"))
        assert one["callbacks"].pop("DriftMonitor")["read"] == step
        assert one.pop("diffsensor_verdict")
        for checkpoint in (one, other):
            checkpoint.pop("callbacks")  # ModelCheckpoint's own: paths
        assert differences(one, other) == []


def same(record: Any) -> list[Any]:
    """All that is in a record, in an order and a form that can be compared; without what tells that it was resumed."""
    parts = [*record.readings, *record.actions, *record.verdicts]
    alerts = [repr(alert).replace("is_repeat=True", "is_repeat=False") for alert in record.alerts]
    return sorted({*map(repr, parts), *alerts})  # what was done twice is there twice


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_resumed_run_alerts_acts_and_judges_as_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    class Crash(Callback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == self.step:
                raise ZeroDivisionError

    def fit(record: Path, *extra: Callback, ckpt: Path | None = None) -> list[float]:
        saved = ModelCheckpoint(record.parent, "{step}", save_top_k=-1, every_n_train_steps=1)
        rules = [
            Response(Limit("kl_ref_live", above=GATE_LIMIT, for_=2, cooldown=3), ScaleLearningRate(0.5)),
            Response(Limit("loss", above=1.0, for_=4), ScaleLearningRate(0.1), patience=1),
            Invariant(),
        ]
        monitor = drift_monitor(tmp_path, 2, record=record, rules=rules, gate=gate())
        callbacks = [Jumps([2, 3, 5, 6, 7]), monitor, *extra, saved]
        runner = trainer(callbacks, tmp_path, enable_checkpointing=True, max_epochs=8)
        runner.fit(Still(), data(4), ckpt_path=ckpt, weights_only=True)
        return [group["lr"] for group in runner.optimizers[0].param_groups]

    whole, parts = tmp_path / "whole" / "record", tmp_path / "parts" / "record"
    rates = fit(whole)
    assert len(read_record(whole).actions) == len(read_record(whole).alerts) == 2
    with pytest.raises(ZeroDivisionError):  # past the checkpoint: what came after it is read again
        fit(parts, Crash(min(step + 2, 8)))
    assert fit(parts, ckpt=parts.parent / f"step={step}.ckpt") == rates
    state = inside(parts.parent / "step=8.ckpt")["callbacks"]["DriftMonitor"]
    assert state["optimizers"] == [{"class": "AdamW", "groups": [{"lr": 1e-7, "weight_decay": 0.01}]}]
    assert same(read_record(parts)) == same(read_record(whole))


def test_a_second_run_of_one_callback_begins_its_rules_anew(tmp_path: Path) -> None:
    rules = [Response(Limit("loss", above=1.0, for_=4), Stop())]
    monitor = drift_monitor(tmp_path, record=None, rules=rules, gate=gate())
    for _ in range(2):
        runner = trainer([monitor], tmp_path)
        runner.fit(Still(), data())
        assert runner.global_step == 4
        runner.save_checkpoint(tmp_path / "end.ckpt")
        assert monitor.last_passed == str(tmp_path / "end.ckpt")
    trainer([monitor], tmp_path, max_steps=1).fit(Still(), data())
    assert monitor.last_passed == ""


class TinyData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return data()


class StillOfCLI(Still):
    pass


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own
def test_rules_may_come_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    tiny_probes().save(tmp_path / "probes")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        seed_everything: 5
        trainer:
          accelerator: cpu
          max_epochs: 1
          enable_progress_bar: false
          enable_model_summary: false
          enable_checkpointing: false
          default_root_dir: {tmp_path}
          logger: false
          callbacks:
            - class_path: diffsensor_lightning.DriftMonitor
              init_args:
                probes: {tmp_path / "probes"}
                every_n_train_steps: 2
                record: {tmp_path / "record"}
                cache_dir: {tmp_path / "cache"}
                rules:
                  - {{class_path: diffsensor.rules.Invariant}}
                  - class_path: diffsensor.rules.Limit
                    init_args: {{metric: loss, above: 1.0, for_: 2}}
        """
    )
    LightningCLI(StillOfCLI, TinyData, args=["fit", "--config", str(config)], save_config_callback=None)
    (alert,) = read_record(tmp_path / "record").alerts
    assert (alert.step, alert.rule) == (4, "loss above 1")


def test_the_state_is_plain(tmp_path: Path) -> None:
    monitor = drift_monitor(tmp_path, gate=gate(), rules=[Response(breach(), ScaleLearningRate(0.5))])
    trainer([Jumps([2]), monitor], tmp_path, max_steps=3).fit(Still(), data())
    state = monitor.state_dict()
    assert json.loads(json.dumps(state)) == state


def test_the_recipe_says_how_was_trained_and_not_where(tmp_path: Path) -> None:
    class WithHparams(Still):
        def __init__(self, rank: int, seed: int, out: str) -> None:
            super().__init__()
            self.save_hyperparameters()

    def recipe(name: str, seed: int, **options: Any) -> dict[str, Any]:
        monitor = drift_monitor(tmp_path, record=tmp_path / name)
        trainer([monitor], tmp_path, **options).fit(WithHparams(8, seed, name), data())
        return dict(read_record(tmp_path / name).manifest["recipe"])

    first = recipe("first", 1)
    assert first == recipe("second", 2)
    assert first["hparams"] == {"rank": 8}
    assert first["optimizers"] == [{"class": "AdamW", "groups": [{"lr": 1e-7, "weight_decay": 0.01}]}]
    assert first != recipe("third", 1, gradient_clip_val=1.0)
