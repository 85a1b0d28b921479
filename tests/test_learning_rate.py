"""Scaled learning rates stay scaled: each following step has `factor` times what it would have had."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as s
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR
from transformers.optimization import Adafactor, GreedyLR, get_scheduler

from diffsensor.control import cannot_scale, scale_learning_rate
from diffsensor.errors import RefusedError

Build = Callable[[Optimizer], Any]

STEPS = 24
SCHEDULERS: dict[str, Build] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: s.LambdaLR(o, lambda n: min(1.0, n / 4) * 0.97**n),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: s.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [3, 11, 15], 0.3),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.3, 9),
    "LinearLR": lambda o: s.LinearLR(o, 0.1, 1.0, 9),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 10, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 4, 2, eta_min=1e-3),
    "CyclicLR": lambda o: s.CyclicLR(o, 1e-3, 1e-1, 5, cycle_momentum=False),
    "OneCycleLR": lambda o: s.OneCycleLR(o, 1e-1, STEPS, cycle_momentum=False),
    "OneCycleLR with three phases": lambda o: s.OneCycleLR(
        o, [1e-1, 2e-2], STEPS, three_phase=True, cycle_momentum=False, anneal_strategy="linear"
    ),
    "SWALR": lambda o: SWALR(o, 1e-3, 9),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.3, 9), s.CosineAnnealingLR(o, 9, 1e-3)]),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.LinearLR(o, 0.1, 1.0, 8), s.CosineAnnealingLR(o, 9, 1e-3)], [8]),
    "ChainedScheduler of a SequentialLR": lambda o: s.ChainedScheduler(
        [
            s.SequentialLR(o, [s.ConstantLR(o, 0.2, 3), s.CosineAnnealingWarmRestarts(o, 4, eta_min=2e-3)], [3]),
            s.ExponentialLR(o, 0.9),
        ]
    ),
    "linear of transformers": lambda o: get_scheduler("linear", o, 4, STEPS),
    "cosine_with_min_lr of transformers": lambda o: get_scheduler("cosine_with_min_lr", o, 4, STEPS, {"min_lr": 1e-3}),
    "polynomial of transformers": lambda o: get_scheduler("polynomial", o, 4, STEPS, {"lr_end": 1e-3}),
    "wsd of transformers": lambda o: get_scheduler("warmup_stable_decay", o, 4, STEPS, {"num_decay_steps": 9}),
}


def two_groups(lr: float | torch.Tensor = 1e-2, other: float | torch.Tensor = 4e-3) -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "lr": other}]
    optimizer = AdamW(groups, lr=lr, capturable=False, foreach=False)
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    return optimizer


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def run(build: Build, at: int, factor: float, optimizer: Optimizer | None = None) -> list[list[float]]:
    """The rates of each step, of a run in which they are scaled before step `at`."""
    optimizer = optimizer or two_groups()
    scheduler = build(optimizer)
    seen = []
    for step in range(STEPS):
        if step == at:
            scale_learning_rate([optimizer], [] if scheduler is None else [scheduler], factor)
            if isinstance(scheduler, LRScheduler):
                assert [float(lr) for lr in scheduler.get_last_lr()] == pytest.approx(rates(optimizer))
        seen.append(rates(optimizer))
        optimizer.step()
        if scheduler is not None and step < STEPS - 1:
            with warnings.catch_warnings():
                # SequentialLR's own, at each milestone
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step()
            if isinstance(scheduler, LRScheduler):
                assert [float(lr) for lr in scheduler.get_last_lr()] == rates(optimizer)
    return seen


def expected(unscaled: list[list[float]], at: int, factor: float) -> list[list[float]]:
    return [[lr * (factor if step >= at else 1) for lr in lrs] for step, lrs in enumerate(unscaled)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_following_rate_is_scaled_whatever_the_scheduler(name: str) -> None:
    unscaled = run(SCHEDULERS[name], at=STEPS, factor=1.0)
    for at in (0, 1, 7, 8, 9, 10, 15, 20):
        for factor in (0.5, 3.0):
            for here, there in zip(run(SCHEDULERS[name], at, factor), expected(unscaled, at, factor), strict=True):
                assert here == pytest.approx(there, rel=1e-9, abs=1e-18)


def test_scaling_twice_is_scaling_by_the_product() -> None:
    optimizer = two_groups()
    scheduler = s.CosineAnnealingLR(optimizer, 10, eta_min=1e-3)
    for _ in range(2):
        scale_learning_rate([optimizer], [scheduler], 0.5)
    assert rates(optimizer) == pytest.approx([0.0025, 0.001])
    assert scheduler.eta_min == 0.00025


@pytest.mark.parametrize("name", ["none", "LambdaLR", "CosineAnnealingLR", "SequentialLR", "OneCycleLR", "LinearLR"])
def test_rates_in_tensors_are_scaled_in_place(name: str) -> None:
    def tensors() -> Optimizer:
        return two_groups(torch.tensor(1e-2, dtype=torch.float64), torch.tensor(4e-3, dtype=torch.float64))

    unscaled = run(SCHEDULERS[name], STEPS, 1.0, tensors())
    optimizer = tensors()
    held = [group["lr"] for group in optimizer.param_groups]
    scaled = run(SCHEDULERS[name], 5, 0.5, optimizer)
    assert [group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True)] == [True, True]
    for here, there in zip(scaled, expected(unscaled, 5, 0.5), strict=True):
        assert here == pytest.approx(there, rel=1e-6)


def test_a_tensor_that_is_the_rate_of_two_groups_is_scaled_once() -> None:
    shared = torch.tensor(1e-2)
    optimizer = two_groups(shared, shared)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    scale_learning_rate([optimizer], [], 0.5)
    assert rates(optimizer) == pytest.approx([5e-3, 5e-3])


@pytest.mark.parametrize("at", [0, 3, 9])
def test_reduce_on_plateau_keeps_its_floor_and_its_least_change_scaled(at: int) -> None:
    def plateau(scaled_at: int) -> list[float]:
        optimizer = two_groups()
        scheduler = s.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=1e-3, eps=1e-3)
        seen = []
        for step in range(STEPS):
            if step == scaled_at:
                scale_learning_rate([optimizer], [scheduler], 0.1)
            seen += rates(optimizer)
            scheduler.step(1.0)
        return seen

    unscaled, scaled = plateau(STEPS), plateau(at)
    assert len(set(unscaled)) > 3
    assert scaled == pytest.approx([lr * (0.1 if n >= 2 * at else 1) for n, lr in enumerate(unscaled)])


def test_a_run_that_goes_on_has_its_scaled_rates_still() -> None:
    def built() -> tuple[Optimizer, LRScheduler]:
        optimizer = two_groups()
        return optimizer, s.CosineAnnealingLR(optimizer, 10, eta_min=1e-3)

    optimizer, scheduler = built()
    scale_learning_rate([optimizer], [scheduler], 0.5)
    resumed, its_scheduler = built()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for _ in range(9):
        for each, its in ((optimizer, scheduler), (resumed, its_scheduler)):
            each.step()
            its.step()
        assert rates(resumed) == rates(optimizer)


def test_it_says_what_it_did() -> None:
    assert scale_learning_rate([two_groups(1e-4, 1e-4)], [], 0.5) == "learning rate 0.0001 -> 5e-05 in 2 groups"
    assert scale_learning_rate([two_groups()], [], 0.5) == "learning rate 0.01 -> 0.005, 0.004 -> 0.002 in 2 groups"
    one = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert scale_learning_rate([one], [], 2) == "learning rate 1 -> 2 in 1 group"


def test_all_optimizers_are_scaled() -> None:
    pair = [two_groups(), two_groups()]
    schedulers = [SCHEDULERS["LambdaLR"](each) for each in pair]
    for each, scheduler in zip(pair, schedulers, strict=True):
        each.step()
        scheduler.step()
    before = rates(pair[0])
    scale_learning_rate(pair, schedulers, 0.5)
    assert rates(pair[0]) == rates(pair[1]) == [lr / 2 for lr in before]


def test_a_scheduler_that_was_not_given_is_noticed() -> None:
    optimizer = two_groups()
    scheduler = SCHEDULERS["LambdaLR"](optimizer)
    assert "made by a scheduler, which was not given" in cannot_scale([optimizer])
    with pytest.raises(RefusedError, match="Give the scheduler too"):
        scale_learning_rate([optimizer], [], 0.5)
    assert cannot_scale([optimizer], [scheduler]) == ""


class OwnCurve(LRScheduler):
    def get_lr(self) -> list[float | torch.Tensor]:
        return [1e-3 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]


class OtherLambda(s.LambdaLR):
    def get_lr(self) -> list[float | torch.Tensor]:
        return [1e-3 for _ in self.optimizer.param_groups]


class NamedLambda(s.LambdaLR):
    """Computes nothing in a way of its own."""


@pytest.mark.parametrize(
    "build",
    [
        OwnCurve,
        lambda o: OtherLambda(o, lambda n: 1.0),
        lambda o: GreedyLR(o),
        lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.2, 3), OwnCurve(o)], [3]),
    ],
)
def test_a_scheduler_with_a_way_of_its_own_is_refused_and_nothing_changes(build: Build) -> None:
    optimizer = two_groups()
    scheduler = build(optimizer)
    before = rates(optimizer)
    with pytest.raises(RefusedError, match="computes learning rates in a way of its own"):
        scale_learning_rate([optimizer], [scheduler], 0.5)
    assert rates(optimizer) == before


def test_a_subclass_that_computes_nothing_of_its_own_is_like_its_parent() -> None:
    build: Build = lambda o: NamedLambda(o, lambda n: 0.9**n)  # noqa: E731
    unscaled = run(build, STEPS, 1.0)
    assert run(build, 5, 0.5)[-1] == pytest.approx(expected(unscaled, 5, 0.5)[-1])


def test_an_optimizer_without_a_rate_of_its_own_is_refused() -> None:
    adafactor = Adafactor([nn.Parameter(torch.ones(2))])
    assert "Parameter group 0 of Adafactor has no learning rate of its own" in cannot_scale([adafactor])


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unchecked")
def test_what_accelerate_wraps_is_scaled_inside(accelerator: Accelerator) -> None:
    model = nn.Linear(2, 2)
    optimizer = Adam(model.parameters(), lr=1e-2)
    scheduler = s.LambdaLR(optimizer, lambda n: math.exp(-n / 5))
    _, wrapped, its_scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert wrapped is not optimizer
    assert its_scheduler is not scheduler
    scale_learning_rate([wrapped], [its_scheduler], 0.5)
    optimizer.step()
    its_scheduler.step()
    assert rates(optimizer) == pytest.approx([0.5e-2 * math.exp(-1 / 5)])
