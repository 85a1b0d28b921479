"""The worked example of a loop of one's own: it learns, it is read, it is steered, and a reading changes nothing."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import tiny
from diffsensor import Verdict, read_record, read_verdict
from diffsensor_demo.pretrain import Recipe

EXAMPLES = Path(__file__).parent.parent / "integrations" / "examples"
#: What the policy is paid for.
WANTED = 7


class Blind:
    """A monitor that never looks."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def observe(self, *_: object, **__: object) -> list[object]:
        return []

    def verdict(self, _model: nn.Module, step: int) -> Verdict:
        return Verdict(step=step, outcome="unknown", reason="Nothing was read.")

    def __enter__(self) -> "Blind":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def ppo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ppo_loop", EXAMPLES / "ppo_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_loop"] = module  # where dataclasses look for the module of a class
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ppo_loop"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSENSOR_CACHE", str(tmp_path / "cache"))


def train(ppo: ModuleType, out: Path, **changed: float) -> nn.Module:
    """A short run of a model of some thousand parameters."""
    out.mkdir()
    policy = tiny.llama()
    prompts = torch.randint(3, tiny.VOCAB, (12, 4), generator=torch.Generator().manual_seed(3))
    usual = ppo.Settings(updates=12, batch=32, new_tokens=6, learning_rate=1e-2, read_every=3, save_every=6)
    torch.manual_seed(0)
    ppo.train(policy, prompts, share_of_wanted, tiny.probe_set(), out, replace(usual, **changed))
    return policy


def share_of_wanted(rows: Tensor) -> Tensor:
    return (rows == WANTED).float().mean(-1)


def values(out: Path, metric: str) -> list[float]:
    found = read_record(out / "drift").readings
    return [reading.value for reading in found if reading.metric == metric and not reading.group]


def test_the_reward_and_the_drift_grow_and_both_are_on_record(ppo: ModuleType, tmp_path: Path) -> None:
    train(ppo, tmp_path / "run", drift_limit=10.0)
    drift, reward = values(tmp_path / "run", "kl_ref_live"), values(tmp_path / "run", "reward")
    assert drift[0] == 0
    assert drift == sorted(drift)
    assert drift[-1] > 0.02
    assert reward[-1] > 2 * reward[0]
    # At the two checkpoints it is the gate that reads, to which the loop tells nothing.
    assert len(values(tmp_path / "run", "entropy")) == len(reward) == len(drift) - 2


def test_the_policy_is_bit_for_bit_that_of_a_loop_without_a_monitor(
    ppo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = train(ppo, tmp_path / "watched", drift_limit=10.0).state_dict()
    monkeypatch.setattr(ppo, "Monitor", Blind)
    alone = train(ppo, tmp_path / "alone", drift_limit=10.0).state_dict()
    assert not (tmp_path / "alone" / "drift").exists()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)
    assert any(not torch.equal(alone[name], at_first) for name, at_first in tiny.llama().state_dict().items())


def test_drift_beyond_the_limit_raises_the_penalty_and_fails_the_gate(ppo: ModuleType, tmp_path: Path) -> None:
    train(ppo, tmp_path / "run", drift_limit=1e-3)
    contents = read_record(tmp_path / "run" / "drift")
    assert [(taken.action, taken.outcome) for taken in contents.actions] == [("scale_kl_coefficient(3)", "done")]
    assert "0.05 -> 0.15" in contents.actions[0].detail
    assert read_verdict(tmp_path / "run" / "policy-12.pt").outcome == "fail"


def test_a_policy_that_has_stopped_choosing_is_stopped(
    ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(ppo, tmp_path / "run", kl=0.0, learning_rate=5e-2, updates=40, drift_limit=100.0)
    assert "Stopped. entropy below 1" in capsys.readouterr().out
    assert values(tmp_path / "run", "entropy")[-1] < 1


def test_the_example_runs_as_its_first_lines_say(
    ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(vocabulary=320, width=32, layers=2, heads=2, steps=5, batch=4, length=64)
    ppo.main(["--out", str(tmp_path / "run"), "--updates", "1"], recipe)
    assert "drift 0.000" in capsys.readouterr().out
    assert values(tmp_path / "run", "kl_ref_live") == [0.0]
