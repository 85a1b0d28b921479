"""A copy in memory of what training changes: put back, the run goes on bit for bit as it did from there."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from diffsensor.control import Kept
from diffsensor.errors import ConfigError, RefusedError
from tiny import VOCAB, llama

pytestmark = pytest.mark.usefixtures("unchecked")  # the checks of types draw random numbers

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW, one by one": lambda p: AdamW(p, lr=1e-2, foreach=False),
    "AdamW, foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "Adam with amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "SGD with momentum": lambda p: SGD(p, lr=1e-1, momentum=0.9),
    "SGD": lambda p: SGD(p, lr=1e-1),
    "RMSprop": lambda p: RMSprop(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: Adagrad(p, lr=1e-2),
}


def batches(number: int, seed: int = 2) -> list[Tensor]:
    return list(torch.randint(3, VOCAB, (number, 4, 12), generator=torch.Generator().manual_seed(seed)))


def train(model: nn.Module, optimizers: list[Optimizer], data: list[Tensor]) -> list[Tensor]:
    losses = []
    for ids in data:
        # Draws from every generator there is, dropout from torch's.
        weight = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        logits = model(input_ids=ids).logits
        loss = weight * nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def bits(model: nn.Module, optimizers: list[Optimizer]) -> list[Tensor]:
    """All that training changes, copied."""
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    moments = [value for state in states for entry in state.values() for value in entry.values()]
    held = [*model.parameters(), *model.buffers(), *(each for each in moments if isinstance(each, Tensor))]
    return [each.detach().clone() for each in held]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("on", ["host", "device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_follows_a_rollback_is_what_followed_the_keep(name: str, on: Any) -> None:
    model = llama(dropout=0.1)
    optimizers = [OPTIMIZERS[name](model.parameters())]
    kept = Kept(model, optimizers, on=on)
    train(model, optimizers, batches(3))
    kept.keep(3)
    at_keep = bits(model, optimizers)
    losses = train(model, optimizers, batches(4, seed=5))
    at_end = bits(model, optimizers)
    assert not same(at_keep, at_end)
    train(model, optimizers, batches(3, seed=6))
    assert kept.restore() == 3
    assert same(bits(model, optimizers), at_keep)
    assert same(train(model, optimizers, batches(4, seed=5)), losses)
    assert same(bits(model, optimizers), at_end)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_had_no_state_at_the_keep_has_none_after_a_rollback(name: str) -> None:
    model = llama(dropout=0.1)
    optimizers = [OPTIMIZERS[name](model.parameters())]
    kept = Kept(model, optimizers)
    before = len(optimizers[0].state)
    kept.keep(0)
    losses = train(model, optimizers, batches(3))
    kept.restore()
    assert len(optimizers[0].state) == before
    assert same(train(model, optimizers, batches(3)), losses)


def test_what_is_put_back_is_put_into_the_same_tensors() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, [optimizer], batches(1))
    parameters = list(model.parameters())
    addresses = [each.data_ptr() for each in parameters]
    moments = [optimizer.state[each]["exp_avg"] for each in parameters]
    kept = Kept(model, [optimizer])
    kept.keep(1)
    train(model, [optimizer], batches(2))
    kept.restore()
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert [each.data_ptr() for each in model.parameters()] == addresses
    assert all(optimizer.state[each]["exp_avg"] is then for each, then in zip(parameters, moments, strict=True))


def test_state_that_an_optimizer_has_lost_is_made_anew() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, [optimizer], batches(2))
    kept = Kept(model, [optimizer])
    kept.keep(2)
    at_keep = bits(model, [optimizer])
    optimizer.state.clear()
    kept.restore()
    assert same(bits(model, [optimizer]), at_keep)
    train(model, [optimizer], batches(1))  # and it is a copy: training on does not change what is kept
    kept.restore()
    assert same(bits(model, [optimizer]), at_keep)


def test_a_second_keep_takes_no_new_memory() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    kept = Kept(model, [optimizer])
    train(model, [optimizer], batches(1))
    kept.keep(1)
    held = [each.data_ptr() for each in copies(kept)]
    assert len(held) > 40
    train(model, [optimizer], batches(2))
    kept.keep(3)
    assert [each.data_ptr() for each in copies(kept)] == held


def copies(kept: Kept) -> Iterator[Tensor]:
    from diffsensor.control.kept import _tensors

    return _tensors(kept._copies)


def test_it_says_how_many_bytes_it_takes() -> None:
    model = nn.Linear(10, 10, bias=False)
    model.register_buffer("seen", torch.zeros(5, dtype=torch.float64))
    optimizer = AdamW(model.parameters())
    kept = Kept(model, [optimizer])
    assert kept.num_bytes == 400 + 40
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert kept.num_bytes == 3 * 400 + 4 + 40
    kept.keep(1)
    assert kept.num_bytes == 3 * 400 + 4 + 40


def test_frozen_parameters_are_neither_copied_nor_put_back() -> None:
    model = llama()
    model.requires_grad_(False)
    trained = next(model.parameters()).requires_grad_()
    optimizer = AdamW([trained])
    kept = Kept(model, [optimizer])
    kept.keep(0)
    assert kept.num_bytes == trained.nbytes + sum(each.nbytes for each in model.buffers())
    frozen = list(model.parameters())[-1]
    with torch.no_grad():
        frozen.fill_(7)
        trained.fill_(7)
    kept.restore()
    assert bool((frozen == 7).all())
    assert not bool((trained == 7).any())


def test_learning_rates_stay_as_they_are_now() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    kept = Kept(model, [optimizer])
    kept.keep(0)
    optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.5)
    kept.restore()
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-3, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tied_weights_stay_tied_in_any_precision(dtype: torch.dtype) -> None:
    model = llama(tied=True, dropout=0.1).to(dtype)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    optimizers = [AdamW(model.parameters(), lr=1e-2)]
    train(model, optimizers, batches(2))
    kept = Kept(model, optimizers)
    kept.keep(2)
    losses = train(model, optimizers, batches(3, seed=5))
    kept.restore()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same(train(model, optimizers, batches(3, seed=5)), losses)


def test_several_optimizers_and_parameters_outside_the_model_are_kept() -> None:
    model = llama(dropout=0.1)
    first, *rest = model.parameters()
    outside = nn.Parameter(torch.ones(3))
    outside.grad = torch.ones(3)
    optimizers: list[Optimizer] = [
        AdamW([first], lr=1e-2),
        SGD(rest, lr=1e-1, momentum=0.9),
        SGD([outside], lr=1.0),
    ]
    train(model, optimizers[:2], batches(2))
    kept = Kept(model, optimizers)
    kept.keep(2)
    losses = train(model, optimizers[:2], batches(3, seed=5))
    optimizers[2].step()
    kept.restore()
    assert torch.equal(outside, torch.ones(3))
    assert same(train(model, optimizers[:2], batches(3, seed=5)), losses)


def test_nested_states_of_an_optimizer_are_kept() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = LBFGS([weight], lr=0.1, history_size=3, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    def three() -> list[Tensor]:
        return [optimizer.step(closure).detach() for _ in range(3)]

    kept = Kept(nn.ParameterList([weight]), [optimizer])
    three()
    kept.keep(3)
    losses = three()
    three()
    kept.restore()
    assert same(three(), losses)


def test_buffers_are_kept_even_where_they_change_their_shape() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("table", torch.arange(3.0))
    optimizer = SGD(model.parameters(), lr=0.1)
    kept = Kept(model, [optimizer])
    kept.keep(0)
    before = copy.deepcopy(dict(model.named_buffers()))
    model(torch.randn(8, 3))
    model.table = torch.arange(5.0)
    kept.restore()
    assert {name: each.tolist() for name, each in model.named_buffers()} == {
        name: each.tolist() for name, each in before.items()
    }
    assert "table" in model.state_dict()


def test_the_gradient_scaler_is_kept() -> None:
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

    def step() -> None:
        scaler.scale(model(torch.ones(2, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    kept = Kept(model, [optimizer], scaler)
    kept.keep(1)
    step()
    assert scaler.get_scale() == 32
    kept.restore()
    assert scaler.get_scale() == 16
    step()
    assert scaler.get_scale() == 32


def test_within_an_autocast_block_the_weights_put_back_are_those_used() -> None:
    model = nn.Linear(3, 3)
    kept = Kept(model, [SGD(model.parameters(), lr=0.1)])
    kept.keep(0)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(torch.ones(1, 3))
        with torch.no_grad():
            model.weight.fill_(7)
        torch.clear_autocast_cache()
        model(torch.ones(1, 3))
        kept.restore()
        assert torch.equal(model(torch.ones(1, 3)), before)


def test_a_keep_within_inference_mode_can_be_kept_over() -> None:
    model = llama()
    kept = Kept(model, [SGD(model.parameters(), lr=0.1)])
    with torch.inference_mode():
        kept.keep(0)
    kept.keep(1)
    assert kept.restore() == 1


def test_nothing_kept_is_nothing_to_go_back_to() -> None:
    model = llama()
    kept = Kept(model, [SGD(model.parameters(), lr=0.1)])
    assert kept.step is None
    with pytest.raises(RefusedError, match="Nothing has been kept"):
        kept.restore()


def test_a_keep_that_was_broken_off_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kept = Kept(model, [SGD(model.parameters(), lr=0.1)])
    kept.keep(0)
    with monkeypatch.context() as patch:
        patch.setattr("diffsensor.control.kept._random_states", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kept.keep(1)
    with pytest.raises(RefusedError, match="Nothing has been kept"):
        kept.restore()


def test_a_parameter_that_trains_only_since_the_keep_refuses_the_rollback() -> None:
    model = llama()
    first, *rest = model.parameters()
    for each in rest:
        each.requires_grad_(False)
    kept = Kept(model, [SGD([first], lr=0.1)])
    kept.keep(4)
    rest[0].requires_grad_(True)
    before = bits(model, [])
    with pytest.raises(RefusedError, match=r"1 parameters train now that did not at step 4 .* such as 'model.layers.0"):
        kept.restore()
    assert same(bits(model, []), before)


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="on='disk', expected 'host' or 'device'"):
        Kept(llama(), [], on="disk")  # type: ignore[arg-type]


def test_sharded_parameters_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = nn.Linear(4, 4)
            fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
            with pytest.raises(ConfigError, match="sharded over processes"):
                Kept(model, [SGD(model.parameters(), lr=0.1)])
        finally:
            dist.destroy_process_group()
