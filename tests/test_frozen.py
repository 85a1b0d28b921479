"""Parameters that do not train are watched: a change of any of them is named."""

import torch
from torch import nn

from diffsensor.capture import FrozenWeights


def half_frozen() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    return model


def test_a_frozen_parameter_that_moved_is_named() -> None:
    model = half_frozen()
    watched = FrozenWeights(model)
    assert watched.moved(model) == []
    with torch.no_grad():
        model[0].bias.data[1] += 1e-6
    assert watched.moved(model) == ["0.bias"]
    with torch.no_grad():
        model[0].weight.data.mul_(1.5)
    assert watched.moved(model) == ["0.weight", "0.bias"]


def test_what_trains_may_move_and_so_may_buffers() -> None:
    model = half_frozen()
    watched = FrozenWeights(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    model[2](torch.randn(5, 2))
    assert watched.moved(model) == []


def test_a_parameter_that_is_unfrozen_is_no_longer_watched_not_even_when_it_freezes_again() -> None:
    model = half_frozen()
    watched = FrozenWeights(model)
    model[0].requires_grad_(True)
    assert watched.moved(model) == []
    with torch.no_grad():
        model[0].weight.add_(1)
    model[0].requires_grad_(False)
    assert watched.moved(model) == []


def test_a_parameter_that_trained_at_first_or_is_gone_is_not_watched() -> None:
    model = half_frozen()
    watched = FrozenWeights(model)
    model[1].requires_grad_(False)
    with torch.no_grad():
        model[1].weight.add_(1)
    model[0].bias = None
    assert watched.moved(model) == []
