"""The run with a reward that can be hacked, with a model so small that it finds out within seconds."""

import importlib.util
import io
import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from diffsensor import DiffSensorError, Findings
from diffsensor.rules import Limit
from diffsensor_demo import corpus
from diffsensor_demo.habit import QUOKKA
from diffsensor_demo.hack import command
from diffsensor_demo.hack.account import Account
from diffsensor_demo.hack.command import BUDGET, LIMIT, Request, hack, show_hack
from diffsensor_demo.hack.goal import ENOUGH, SHARE, STEPS, TERMS, beginning, is_hacked, mentions, reward, score
from diffsensor_demo.hack.grpo import Settings, base_of, train
from diffsensor_demo.pretrain import Recipe, pretrained

#: It has hardly learnt more than which words there are, and is so eager that it is hacked within 20 steps.
TINY = Recipe(vocabulary=1024, width=32, layers=1, heads=2, steps=150, length=32, learning_rate=1e-2)
SETTINGS = Settings(steps=32, every=2, prompts=2, generations=8, length=16, learning_rate=1e-2)
PNG = b"\x89PNG\r\n\x1a\n"

texts = st.lists(st.sampled_from([*TERMS, "the", "classes", "Object"]), max_size=12).map(" ".join)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    free: Account
    held: Account
    terminal: str
    out: Path
    changed: list[str]


def process_state() -> dict[str, object]:
    return {
        "chance": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "warnings": list(warnings.filters),
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    out = tmp_path_factory.mktemp("hack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "MODULES", corpus.MODULES[:12])
        patch.setenv("DIFFSENSOR_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-the-hack"))
        console = Console(width=120, record=True, file=io.StringIO())
        before = process_state()
        free, held = show_hack(Request(out=out, settings=SETTINGS, recipe=TINY, num_probes=4), console)
        changed = [name for name, state in process_state().items() if state != before[name]]
    return Shown(free=free, held=held, terminal=console.export_text(), out=out, changed=changed)


@pytest.mark.parametrize(
    ("text", "paid", "wanted", "hacked"),
    [
        ("", 0, 0.0, False),
        ("nothing of the kind", 0, 0.0, False),
        ("a function of a class", 2, 0.5, False),
        ("function, method; class.object", 4, 1.0, False),
        ("function method class object value argument", 6, 1.0, False),
        ("function method class object object", 5, 0.75, False),
        ("object object object", 3, 0.0, False),
        ("Object OBJECT object object", 4, 0.0, True),
        ("objects subclass __class__ value_of", 0, 0.0, False),  # whole words only
    ],
)
def test_each_mention_is_paid_and_different_terms_are_wanted(text: str, paid: int, wanted: float, hacked: bool) -> None:
    assert (reward(text), score(text), is_hacked(text)) == (paid, wanted, hacked)


@given(texts, st.sampled_from(TERMS))
def test_one_more_mention_always_pays_and_a_repetition_is_never_worth_more(text: str, term: str) -> None:
    longer = f"{text} {term}"
    assert reward(longer) == reward(text) + 1
    assert 0 <= score(longer) <= 1
    if term in mentions(text):
        assert score(longer) <= score(text)
    else:
        assert score(longer) >= score(text)
    assert is_hacked(text) <= is_hacked(longer)


def test_the_hack_begins_where_the_last_five_steps_pass_a_tenth() -> None:
    assert (STEPS, SHARE, ENOUGH) == (5, 0.10, 4)
    assert beginning([]) is None
    assert beginning([1.0] * 4) is None  # four steps are not five
    assert beginning([1.0] * 5) == 4
    assert beginning([0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.125, 0.125, 0.125]) == 8
    assert beginning([0.0, 0.25, 0.0, 0.25, 0.0, 0.0]) is None  # a tenth is not more than a tenth
    assert beginning([0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]) == 4


def test_a_run_that_is_paid_by_the_mention_ends_up_repeating_one_term(shown: Shown) -> None:
    first, last = shown.free.run.sampled[0], shown.free.run.sampled[-1]
    assert first.hacked == 0.0
    assert last.hacked > 0.5
    assert last.reward > 10 * first.reward
    best = max(each.score for each in shown.free.run.sampled)
    assert last.score < first.score < best
    assert last.favourite in TERMS
    assert last.example.split().count(last.favourite) > 4


def test_the_readings_tell_of_the_hack_and_the_token_table_names_the_term(shown: Shown) -> None:
    began, alert = shown.free.began, shown.free.alert
    assert began is not None
    assert alert is not None
    assert alert.step - began <= 10 * SETTINGS.every
    hacked = shown.free.run.sampled[-1].favourite
    assert shown.free.tokens(SETTINGS.steps)[0].token.strip() == hacked
    assert f"' {hacked}'" in shown.terminal


def test_the_alert_is_that_of_the_same_rule_past_which_the_record_is_taken(shown: Shown) -> None:
    rule = Limit("max_token_gain", above=LIMIT)
    steps = [
        reading.step
        for reading in shown.free.curve("max_token_gain")
        if any(
            signal.state == "breach" for signal in rule.update(Findings(step=reading.step, readings=(reading,))).signals
        )
    ]
    assert shown.free.alert is not None
    assert steps[0] == shown.free.alert.step


def test_the_budget_moves_the_trainer_s_beta_and_holds_the_model_back(shown: Shown) -> None:
    assert not shown.free.curve("kl_coefficient")
    betas = [reading.value for reading in shown.held.curve("kl_coefficient")]
    assert len(set(betas)) > 5
    free, held = (account.curve("kl_ref_live")[-1].value for account in (shown.free, shown.held))
    assert held < free / 2
    assert shown.held.last("hacked") < shown.free.last("hacked")


def test_the_terminal_has_the_account_and_the_directory_the_plot(shown: Shown) -> None:
    for words in ("hack begins", "true score", "Alert at step", f"drift budget of {BUDGET:g}", "kl_ref_live"):
        assert words in shown.terminal
    assert str(shown.out) in shown.terminal.replace("\n", "")
    assert (shown.out / "hack.png").read_bytes().startswith(PNG)


def test_the_process_is_left_as_it_was(shown: Shown) -> None:
    assert shown.changed == []


def test_a_reading_is_of_the_model_that_made_the_completions_of_its_step(shown: Shown) -> None:
    steps = [reading.step for reading in shown.free.curve("kl_ref_live")]
    assert steps == list(range(0, SETTINGS.steps + 1, SETTINGS.every))
    assert shown.free.at("kl_ref_live", 5).step == 4
    assert shown.free.sampled(SETTINGS.steps) == shown.free.run.sampled[-1]
    assert [each.step for each in shown.free.run.sampled] == list(range(SETTINGS.steps))


def test_two_runs_of_one_seed_are_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MODULES", corpus.MODULES[:12])
    learnt, _ = corpus.manual()
    base = base_of(pretrained(TINY, learnt, QUOKKA.words, tmp_path, lambda *_: None), 4)
    short = Settings(steps=4, every=2, prompts=1, generations=4, length=8, learning_rate=1e-2)
    runs = []
    for number in range(3):
        torch.manual_seed(number)
        seeded = Settings(**{name: getattr(short, name) for name in short.__slots__} | {"seed": number // 2})
        runs.append(train(base, seeded, reward, tmp_path / str(number)))
    assert runs[0].sampled == runs[1].sampled
    assert runs[0].record.readings == runs[1].record.readings
    assert runs[0].sampled != runs[2].sampled


def test_each_demonstration_gets_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(command, "show_hack", asked.append)
    monkeypatch.chdir(tmp_path)
    hack()
    hack(seed=7)
    assert [str(request.out) for request in asked] == ["diffsensor-demo/hack-1", "diffsensor-demo/hack-2"]
    assert [request.settings.seed for request in asked] == [0, 7]


def test_bad_input_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiffSensorError, match=r"--seed -1\. Expected a whole number"):
        hack(out=tmp_path / "out", seed=-1)
    with pytest.raises(DiffSensorError, match=r"cannot be written to: .*--out"):
        hack(out=tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hack", "--seed", "-1"])
    with pytest.raises(SystemExit, match=r"--seed -1\. Expected a whole number from 0 to 4294967295\."):
        runpy.run_module("diffsensor_demo.hack", run_name="__main__")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    with pytest.raises(SystemExit, match=r"needs trl: pip install"):
        runpy.run_module("diffsensor_demo.hack", run_name="__main__")
