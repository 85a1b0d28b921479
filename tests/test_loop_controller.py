"""What a plain loop lets an action ask for, what it refuses, and when what was asked for happens."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffsensor.control import LoopController, PauseFile
from diffsensor.errors import ConfigError, RefusedError
from diffsensor.protocols import Controller
from diffsensor.types import Ability


class Coefficient:
    def __init__(self) -> None:
        self.coefficient = 0.5


def built(optimizers: int = 1) -> tuple[nn.Module, list[Optimizer]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    halves = [model.parameters()] if optimizers == 1 else [model[0].parameters(), model[2].parameters()]
    return model, [AdamW(each, lr=1e-2) for each in halves]


def update(model: nn.Module, optimizers: list[Optimizer], batch: Tensor) -> None:
    model(batch).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


BATCHES = list(torch.randn(9, 8, 4, generator=torch.Generator().manual_seed(3)))


def test_a_stop_is_told_to_the_loop_with_its_first_reason() -> None:
    controller = LoopController()
    assert isinstance(controller, Controller)
    assert not controller.should_stop
    assert controller.stop("KL is 0.4.") == "the loop was told to stop"
    controller.stop("another")
    assert controller.should_stop
    assert controller.stop_reason == "KL is 0.4."


def test_a_checkpoint_is_saved_by_the_loop_with_the_reason() -> None:
    reasons: list[str] = []
    assert LoopController(save=reasons.append).save_checkpoint("KL is 0.4.") == "the loop saved a checkpoint"
    assert reasons == ["KL is 0.4."]


def test_the_coefficient_of_a_penalty_is_read_and_set() -> None:
    penalty = Coefficient()
    controller = LoopController(penalty=penalty)
    assert controller.kl_coefficient() == 0.5
    assert controller.set_kl_coefficient(2.0) == "KL coefficient 0.5 -> 2"
    assert penalty.coefficient == 2.0


def test_learning_rates_are_scaled_in_optimizer_and_scheduler() -> None:
    model, optimizers = built(2)
    schedulers = [LambdaLR(each, lambda n: 0.9**n) for each in optimizers]
    controller = LoopController(model, optimizers, scheduler=schedulers)
    assert controller.scale_learning_rate(0.5) == "learning rate 0.01 -> 0.005 in 2 groups"
    update(model, optimizers, BATCHES[0])
    for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0045)


@pytest.mark.parametrize(
    ("ability", "remedy"),
    [
        ("save_checkpoint", "LoopController(save=...)"),
        ("scale_learning_rate", "This loop gave no optimizer: LoopController(optimizer=...)."),
        ("set_kl_coefficient", "LoopController(penalty=...)"),
        ("rollback", "This loop gave no model to roll back: LoopController(model, optimizer)."),
    ],
)
def test_what_it_was_not_given_it_cannot_do_and_says_how(ability: Ability, remedy: str) -> None:
    controller = LoopController()
    assert remedy in controller.cannot(ability)
    request = getattr(controller, ability)
    with pytest.raises(RefusedError):
        request("why" if ability in ("save_checkpoint", "rollback") else 0.5)
    assert controller.cannot("stop") == controller.cannot("pause") == ""


def test_what_it_was_given_it_can_do() -> None:
    model, (optimizer,) = built()
    controller = LoopController(model, optimizer, save=print, penalty=Coefficient())
    abilities: list[Ability] = ["stop", "save_checkpoint", "scale_learning_rate", "set_kl_coefficient", "rollback"]
    assert [controller.cannot(ability) for ability in abilities] == [""] * 5
    assert "no optimizer to roll back" in LoopController(model).cannot("rollback")


def test_a_scheduler_that_was_not_given_is_named_at_attach() -> None:
    model, (optimizer,) = built()
    LambdaLR(optimizer, lambda n: 0.9**n)
    assert "Give the scheduler too" in LoopController(model, optimizer).cannot("scale_learning_rate")


def test_a_rollback_before_anything_passed_is_refused() -> None:
    model, (optimizer,) = built()
    with pytest.raises(RefusedError, match="Nothing has passed yet"):
        LoopController(model, optimizer).rollback("KL is 0.4.")


def continued(rollback_at: int, *, in_midst: bool = False, optimizers: int = 1) -> list[Tensor]:
    """Keep before step 2, roll back at a step, and train two steps more on the data that follow."""
    torch.manual_seed(1)
    model, opts = built(optimizers)
    controller = LoopController(model, opts)
    for step in range(rollback_at + 3):
        if step == 2:
            controller.keep(step)
        if step == rollback_at and not in_midst:
            said = controller.rollback("KL is 0.4.")
            assert said == "goes back to step 2 after this update; data and step go on"
        loss = model(BATCHES[0] if step < 2 else BATCHES[step - rollback_at - 1]).square().mean()
        if step == rollback_at and in_midst:
            controller.rollback("KL is 0.4.")
        loss.backward()
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def plain() -> list[Tensor]:
    """The same without the detour: two steps, and then those that follow the rollback."""
    torch.manual_seed(1)
    model, opts = built()
    for batch in (BATCHES[0], BATCHES[0], BATCHES[0], BATCHES[1]):
        update(model, opts, batch)
    return weights(model)


@pytest.mark.parametrize("rollback_at", [2, 4])
@pytest.mark.parametrize("in_midst", [False, True])
def test_after_a_rollback_the_run_is_that_which_never_left(rollback_at: int, in_midst: bool) -> None:
    assert same(continued(rollback_at, in_midst=in_midst), plain())


def test_a_rollback_waits_until_all_optimizers_have_made_their_update() -> None:
    assert same(continued(4, in_midst=True, optimizers=2), plain())


def test_a_rollback_happens_once_and_leaves_no_hook() -> None:
    model, (optimizer,) = built()
    controller = LoopController(model, optimizer)
    controller.keep(0)
    at_keep = weights(model)
    update(model, [optimizer], BATCHES[0])
    controller.rollback("first")
    controller.rollback("and once more, before it happened")
    controller.keep(1)  # what is about to be replaced is not kept
    update(model, [optimizer], BATCHES[1])
    assert same(weights(model), at_keep)
    assert not optimizer._optimizer_step_post_hooks
    update(model, [optimizer], BATCHES[2])
    assert not same(weights(model), at_keep)


def test_a_rollback_that_has_become_impossible_is_logged_and_the_loop_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = SGD(model[1].parameters(), lr=0.1)
    controller = LoopController(model, optimizer)
    controller.keep(0)
    model[0].requires_grad_(True)
    controller.rollback("KL is 0.4.")
    update(model, [optimizer], BATCHES[0])
    assert "The rollback was not carried out. 2 parameters train now" in caplog.text


@pytest.mark.usefixtures("unchecked")
def test_what_accelerate_wraps_is_rolled_back_and_scaled_inside() -> None:
    try:
        model, (optimizer,) = built()
        prepared, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
        controller = LoopController(prepared, wrapped)
        controller.keep(0)
        at_keep = weights(model)
        controller.rollback("KL is 0.4.")
        controller.scale_learning_rate(0.5)
        update(prepared, [wrapped], BATCHES[0])
        assert same(weights(model), at_keep)
        assert optimizer.param_groups[0]["lr"] == 0.005
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def remove_soon(file: Path, seen: list[str]) -> threading.Thread:
    def look() -> None:
        while not file.exists() or not file.read_text():
            time.sleep(0.005)
        seen.append(file.read_text())
        file.unlink()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def test_a_pause_waits_until_the_file_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    file = tmp_path / "PAUSED"
    thread = remove_soon(file, seen)
    with caplog.at_level(logging.WARNING):
        controller = LoopController(wait=PauseFile(file, every=0.01))
        assert controller.pause("KL is 0.4.") == "waited until a person let the run go on"
    thread.join()
    assert seen == ["KL is 0.4.\n\nThe run waits. Remove this file to let it go on.\n"]
    assert len(caplog.records) == 1
    assert f"waits until {file} is removed" in caplog.text
    assert not controller.should_stop


def test_a_pause_that_nobody_answers_stops_the_loop(tmp_path: Path) -> None:
    controller = LoopController(wait=PauseFile(tmp_path / "PAUSED", timeout=0.05, every=0.01))
    assert "nobody let the run go on, and the loop was told to stop" in controller.pause("KL is 0.4.")
    assert controller.should_stop
    assert controller.stop_reason.endswith("within 0.05 s. KL is 0.4.")
    assert not (tmp_path / "PAUSED").exists()


def test_ctrl_c_ends_a_pause_and_removes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        assert (tmp_path / "PAUSED").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PauseFile(tmp_path / "PAUSED").wait("KL is 0.4.")
    assert not (tmp_path / "PAUSED").exists()


def test_a_pause_that_cannot_write_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"cannot be written .No such file or directory.. Name another place"):
        LoopController(wait=tmp_path / "nowhere" / "PAUSED").pause("KL is 0.4.")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: PauseFile(timeout=0), "timeout=0, expected seconds above 0, or None"),
        (lambda: PauseFile(every=-1), "every=-1, expected seconds above 0"),
        (lambda: LoopController(save="here"), "save='here', expected a function of one reason"),
        (lambda: LoopController(penalty=0.5), "penalty=0.5, which has no coefficient"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(build: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build()
