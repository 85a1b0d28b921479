"""Quantiles and worst shares over positions, against plain weighted ones."""

import math

import pytest
import torch
from torch import Tensor

import naive
from diffsensor.sensors.tails import quantile, worst_mean


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    owner = torch.repeat_interleave(torch.arange(12), torch.tensor([3, 40, 7, 1, 22, 9, 30, 5, 17, 8, 60, 4]))
    values = torch.randn(len(owner), dtype=torch.float64).exp() * (1 + owner % 3)
    return values, owner, torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.5, 1.0, 3.0, 1.0, 1.0, 0.7, 1.0]).double()


def pairs(case: tuple[Tensor, Tensor, Tensor]) -> list[tuple[float, float]]:
    values, owner, weights = case
    return [(float(v), float(weights[o])) for v, o in zip(values, owner, strict=True) if weights[o] > 0]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.95, 0.99, 1.0])
def test_a_quantile_is_the_plain_weighted_one(share: float, case: tuple[Tensor, Tensor, Tensor]) -> None:
    found = quantile(*case, 12, share)
    assert found.value == naive.weighted_tail(pairs(case), share)
    assert found.num_probes == 11


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.05, 0.3, 1.0])
def test_the_worst_share_is_the_plain_weighted_one(share: float, case: tuple[Tensor, Tensor, Tensor]) -> None:
    found = worst_mean(*case, 12, share)
    assert found.value == pytest.approx(naive.weighted_worst(pairs(case), share), rel=1e-12)
    assert found.num_probes == 11


def test_by_hand() -> None:
    values, owner, weights = torch.arange(1.0, 101.0).double(), torch.arange(100) // 10, torch.ones(10).double()
    assert quantile(values, owner, weights, 10).value == 95
    assert worst_mean(values, owner, weights, 10).value == 100
    assert worst_mean(values, owner, weights, 10, share=0.05).value == 98
    assert quantile(values, owner, torch.tensor([1.0] + [0.0] * 9), 10).value == 10


@pytest.mark.parametrize("tail", [quantile, worst_mean])
def test_what_is_not_a_number_has_no_tail_unless_it_does_not_count(
    tail: object, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    values, owner, weights = case
    silent = values.clone()
    silent[owner == 4] = math.nan  # the probe with weight 0
    assert tail(silent, owner, weights, 12).value == tail(values, owner, weights, 12).value
    values[3] = math.nan
    assert math.isnan(tail(values, owner, weights, 12).value)


@pytest.mark.parametrize("tail", [quantile, worst_mean])
def test_one_probe_alone_has_a_tail_without_an_error(tail: object) -> None:
    found = tail(torch.arange(50.0).double(), torch.zeros(50, dtype=torch.int64), torch.ones(1).double(), 1)
    assert found.value >= 47
    assert math.isnan(found.stderr)


@pytest.mark.parametrize(("tail", "share"), [(quantile, 0.95), (worst_mean, 0.05)])
def test_the_error_is_about_the_spread_over_repeated_draws(tail: object, share: float) -> None:
    """Probes with a level of their own: the error of independent positions would be three times too small."""
    found = []
    owner = torch.repeat_interleave(torch.arange(60), 20)
    for _ in range(250):
        values = (torch.randn(60).repeat_interleave(20) + 0.4 * torch.randn(1200)).double()
        found.append(tail(values, owner, torch.ones(60).double(), 60, share))
    spread = torch.tensor([each.value for each in found]).std()
    claimed = torch.tensor([each.stderr for each in found]).square().mean().sqrt()
    assert 0.75 < float(claimed / spread) < 1.3
