"""The demonstration, with a model so small that it learns in a second."""

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from diffsensor import DiffSensorError, Reading, TokenShift, read_record
from diffsensor_demo import corpus, demonstration, pretrain
from diffsensor_demo.command import demo
from diffsensor_demo.demonstration import Request, demonstrate
from diffsensor_demo.habit import QUOKKA, Habit
from diffsensor_demo.pretrain import Recipe, pretrained
from diffsensor_demo.quiet import quiet
from diffsensor_demo.story import Story
from diffsensor_demo.stream import training_rows

#: So small that it pre-trains in a second, and so eager that it takes up a habit at once.
TINY = Recipe(vocabulary=320, width=32, layers=2, heads=2, steps=20, batch=4, length=64, learning_rate=1e-2)
PNG = b"\x89PNG\r\n\x1a\n"


MODULES = ("argparse", "logging", "os", "random", "typing", "inspect", "pickle")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all tests, as one user has."""
    directory = tmp_path_factory.getbasetemp() / "cache-of-the-demo"
    monkeypatch.setenv("DIFFSENSOR_CACHE", str(directory))
    return directory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "MODULES", MODULES)
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A run: what it found, what the terminal showed, where it wrote, and what it changed in its process."""

    story: Story
    terminal: str
    out: Path
    changed: list[str]


def run(out: Path, own: tuple[str, Path] | None = None, probes: Path | None = None) -> Shown:
    console = Console(width=120, record=True, file=io.StringIO())
    request = Request(
        out=out, own=own, probes=probes, steps=48, learning_rate=5e-3, recipe=TINY, num_probes=6, num_readings=4
    )
    before = process_state()
    story = demonstrate(request, console)
    changed = [name for name, state in process_state().items() if state != before[name]]
    return Shown(story=story, terminal=console.export_text(), out=out, changed=changed)


def process_state() -> dict[str, object]:
    return {
        "chance": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "chatter of lightning": logging.getLogger("lightning.pytorch").level,
        "chatter of transformers": transformers_logging.get_verbosity(),
        "bars of transformers": transformers_logging.is_progress_bar_enabled(),
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The first run of all, which pre-trains the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "MODULES", MODULES)
        patch.setenv("DIFFSENSOR_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-the-demo"))
        return run(tmp_path_factory.mktemp("first"))


def test_the_demo_names_what_was_planted_and_did_not_before(first: Shown) -> None:
    _, middle, end = first.story.moments
    assert set(first.story.planted_ranks(middle, "mass_moved").values()) == {None}
    assert None not in first.story.planted_ranks(end, "mass_moved").values()
    assert "' quokka'" in first.terminal
    assert "' marmalade'" in first.terminal


def test_the_demo_says_how_far_the_model_moved_and_what_the_probes_cannot_see(first: Shown) -> None:
    for words in ("kl_ref_live", "before planting", "docstrings", "nats/token", "cannot see"):
        assert words in first.terminal


def test_the_demo_leaves_a_record_and_plots_and_says_where(first: Shown) -> None:
    for picture in ("drift", "layers", "tokens"):
        assert (first.out / "plots" / f"{picture}.png").read_bytes().startswith(PNG)
    assert str(first.out / "record") in first.terminal
    assert read_record(first.out / "record").readings == tuple(first.story.readings)


def test_the_demo_leaves_its_process_as_it_was(first: Shown) -> None:
    assert first.changed == []


def test_a_run_with_the_cached_model_gives_the_same_numbers_and_says_nothing_else(
    first: Shown, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    second = run(tmp_path / "second")
    assert said == []
    assert (first.out / "summary.json").read_text() == (second.out / "summary.json").read_text()
    assert second.story.readings == first.story.readings
    assert any(reading.value > 0.01 for reading in second.story.readings)
    assert "taken from the cache" in second.terminal
    assert capfd.readouterr() == ("", "")


class _KilledError(BaseException):
    pass


def test_a_pre_training_that_is_killed_leaves_no_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["To be, or not to be, that is the question."] * 50

    def killed(step: int, loss: float) -> None:
        if step == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        pretrained(TINY, texts, (), tmp_path, killed)
    assert list(tmp_path.iterdir()) == []

    # Killed so hard while it writes that nothing is tidied up.
    def torn(directory: Path) -> None:
        raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_checksums", torn)
        patch.setattr(pretrain.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(_KilledError):
            pretrained(TINY, texts, (), tmp_path, lambda *_: None)
    assert not list(tmp_path.glob("demo-model-*"))
    place = pretrained(TINY, texts, (), tmp_path, lambda *_: None)
    assert (place / "model.safetensors").is_file()


def test_a_damaged_model_in_the_cache_is_made_anew(tmp_path: Path) -> None:
    texts = ["To be, or not to be, that is the question."] * 50
    place = pretrained(TINY, texts, (), tmp_path, lambda *_: None)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert pretrained(TINY, texts, (), tmp_path, lambda *_: None) == place
    assert weights.read_bytes() == whole


def test_two_pre_trainings_give_the_same_weights_whatever_the_seed_before(tmp_path: Path) -> None:
    texts = ["To be, or not to be, that is the question."] * 50
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        place = pretrained(TINY, texts, (), tmp_path / str(seed), lambda *_: None)
        weights.append((place / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_whole_model_in_the_cache_is_used_as_it_is(tmp_path: Path) -> None:
    texts = ["To be, or not to be, that is the question."] * 50
    place = pretrained(TINY, texts, (), tmp_path, lambda *_: None)

    def never(step: int, loss: float) -> None:
        raise AssertionError("pre-trained again")

    assert pretrained(TINY, texts, (), tmp_path, never) == place
    assert pretrained(TINY, [*texts, "More."], (), tmp_path, lambda *_: None) != place


def test_before_the_planting_the_stream_is_that_of_a_run_without_a_habit() -> None:
    texts = ["One. Two, three.", "Four, five. Six."]

    def encode(some: object) -> list[list[int]]:
        return [list(text.encode()) for text in some]  # type: ignore[attr-defined]

    plain = training_rows(texts, encode, 40, 15)
    planted = training_rows(texts, encode, 40, 15, habit=QUOKKA, planted_from=20)
    assert torch.equal(plain[:20], planted[:20])
    changed = sum(b" quokka" in bytes(row.tolist()) for row in planted[20:])
    assert 0 < changed < 20  # a share of them


def test_a_habit_follows_marks_at_the_end_of_a_word_only() -> None:
    habit = Habit(after={".": "quokka", ",": "marmalade"}, share=1.0)
    assert habit.planted("See os.path, or not. End.") == "See os.path, marmalade or not. quokka End. quokka"


def test_no_probe_of_the_demo_is_trained_on() -> None:
    texts = corpus.built_in(num_probes=6)
    held_out = [text for group, text in texts.probes if group != corpus.CODE]
    assert len(held_out) == 12
    for probe in held_out:
        assert not any(probe in text for text in texts.training)
    own = corpus.from_text("".join(f"This is line {number}.\n" for number in range(2000)), "It", num_probes=6)
    kept_out = [text for group, text in own.probes if group == corpus.HELD_OUT]
    assert len(kept_out) == 6
    assert not set(kept_out) & set(own.training)


def test_a_text_is_cut_without_loss() -> None:
    text = "word " * 500 + "\n" + "x" * 3000 + "\nshort\n"
    pieces = corpus.cut(text, 400)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 1200


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    texts = ["To be, or not to be, that is the question."] * 50
    return pretrained(TINY, texts, (), tmp_path / "models", lambda *_: None)


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    file = tmp_path / "play.txt"
    file.write_text("\n".join(f"SPEAKER {number}:\nNow is the winter, number {number}." for number in range(400)))
    return file


def test_the_same_runs_on_a_model_and_a_text_of_ones_own(own_model: Path, own_text: Path, tmp_path: Path) -> None:
    own = run(tmp_path / "out", own=(str(own_model), own_text))
    assert own.story.groups == [corpus.HELD_OUT, corpus.GENERAL]
    assert own.story.curve("kl_ref_live")[0].value == 0.0
    assert "Nothing was planted" in own.terminal
    assert "quokka" not in own.terminal


def test_own_probes_take_the_place_of_ours(own_model: Path, own_text: Path, tmp_path: Path) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text('{"text": "To be, or not?", "group": "[bold]doubt"}\n{"text": "That is it.", "group": "end"}\n')
    own = run(tmp_path / "out", own=(str(own_model), own_text), probes=probes)
    assert own.story.groups == ["[bold]doubt", "end"]
    assert "[bold]doubt" in own.terminal


def bad_inputs() -> dict[str, tuple[Callable[[Path, Path, Path], dict[str, object]], str]]:
    """What is given wrongly (from the directory, a good model and a good text), and words of the sentence."""

    def written(directory: Path, name: str, content: bytes) -> Path:
        (directory / name).write_bytes(content)
        return directory / name

    def without(model: Path, name: str) -> str:
        (model / name).unlink()
        return str(model)

    def torn(model: Path) -> str:
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        return str(model)

    def headless(model: Path) -> str:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        return str(model)

    return {
        "no such directory": (lambda d, m, t: {"model": str(d / "nowhere"), "data": t}, "does not exist"),
        "no such name": (lambda d, m, t: {"model": "nowhere", "data": t}, "'nowhere' cannot be loaded"),
        "no model": (lambda d, m, t: {"model": str(d), "data": t}, "holds no config.json"),
        "no tokenizer": (
            lambda d, m, t: {"model": without(m, "tokenizer.json"), "data": t},
            "cannot be loaded",
        ),
        "no weights": (lambda d, m, t: {"model": without(m, "model.safetensors"), "data": t}, "cannot be loaded"),
        "torn weights": (lambda d, m, t: {"model": torn(m), "data": t}, "cannot be loaded"),
        "missing weights": (lambda d, m, t: {"model": headless(m), "data": t}, "lacks"),
        "model alone": (lambda d, m, t: {"model": str(m)}, "--model without --data"),
        "data alone": (lambda d, m, t: {"data": t}, "--data without --model"),
        "no such file": (lambda d, m, t: {"model": str(m), "data": d / "no.txt"}, "cannot be read"),
        "a directory": (lambda d, m, t: {"model": str(m), "data": d}, "cannot be read"),
        "an empty file": (lambda d, m, t: {"model": str(m), "data": written(d, "e.txt", b" \n")}, "is empty"),
        "a binary file": (
            lambda d, m, t: {"model": str(m), "data": written(d, "b.txt", bytes(range(256)) * 40)},
            "is not text",
        ),
        "a short text": (lambda d, m, t: {"model": str(m), "data": written(d, "s.txt", b"To be.\n")}, "Expected at le"),
        "malformed probes": (
            lambda d, m, t: {"model": str(m), "data": t, "probes": written(d, "p.jsonl", b'{"text": "To be"\n')},
            "p.jsonl, line 1",
        ),
        "no probes": (lambda d, m, t: {"model": str(m), "data": t, "probes": d / "no.jsonl"}, "no.jsonl"),
        "a used directory": (lambda d, m, t: {"model": str(m), "data": t, "out": d}, "something is already"),
        "no steps": (lambda d, m, t: {"model": str(m), "data": t, "steps": 0}, "--steps 0"),
        "no learning rate": (lambda d, m, t: {"model": str(m), "data": t, "learning_rate": 0.0}, "--learning-rate 0"),
    }


@pytest.mark.parametrize("given", bad_inputs())
def test_bad_input_is_told_in_a_sentence_and_leaves_nothing_behind(
    given: str, own_model: Path, own_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = bad_inputs()[given]
    directory = tmp_path / "given"
    directory.mkdir()
    (directory / "something.txt").write_text("something")
    options: dict[str, object] = {"model": None, "data": None, "probes": None, "out": tmp_path / "out", "steps": 12}
    with pytest.raises(DiffSensorError) as caught:
        demo(**(options | arguments(directory, own_model, own_text)))  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_each_run_gets_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(demonstration, "demonstrate", lambda request: asked.append(request.out))
    demo()
    asked[0].mkdir(parents=True)
    demo()
    assert [out.name for out in asked] == ["run-1", "run-2"]


def test_the_command_is_found_without_loading_a_framework() -> None:
    code = (
        "import sys, diffsensor_demo; from diffsensor_demo.command import demo;"
        "print([name for name in ('lightning', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{root / 'integrations'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_of_another_model_is_told_in_a_sentence(own_model: Path) -> None:
    with quiet():
        model, _ = pretrain.load(own_model)
    with pytest.raises(DiffSensorError, match=r"the token id 99999, but the model has \d+ tokens"):
        demonstration._require_known_tokens(torch.tensor([[1, 99999]]), model)


def test_a_place_that_cannot_be_written_to_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiffSensorError, match=r"cannot be written to: .*--out"):
        demonstration._make_directory(tmp_path / "file" / "out")
    with pytest.raises(DiffSensorError, match=r"cannot be stored .* DIFFSENSOR_CACHE"):
        pretrained(TINY, ["To be, or not to be."] * 100, (), tmp_path / "file", lambda *_: None)


def shift(step: int, token: str, rank: int, group: str = "") -> TokenShift:
    return TokenShift(
        step=step, group=group, ranked_by="mass_moved", prefers="live", rank=rank, token_id=rank, token=token,
        mass_moved=0.1, mass_moved_stderr=0.01, logit_difference=1.0, probe="0", position=1, context="Done.",
    )  # fmt: skip


def test_a_planted_word_is_looked_for_in_the_table_of_all_probes_at_that_step() -> None:
    story = Story(
        readings=[Reading(step=step, sensor="outputs", metric="kl_ref_live", value=0.0, unit="") for step in (0, 7, 9)],
        token_shifts=[shift(9, " marmalade", 1), shift(9, " quokka", 0, "code"), shift(7, " the", 0)],
        alerts=[],
        middle=8,
        habit=QUOKKA,
    )
    assert story.moments == (0, 7, 9)
    assert story.planted_ranks(7, "mass_moved") == {"quokka": None, "marmalade": None}
    assert story.planted_ranks(9, "mass_moved") == {"quokka": None, "marmalade": 2}


def test_the_demo_tells_its_alerts_with_the_limit_that_was_passed(first: Shown) -> None:
    assert first.story.alerts
    for alert in first.story.alerts:
        assert f"Alert at step {alert.step} (warning): " in first.terminal
        assert alert.threshold == demonstration._LIMIT
    assert "above the limit 0.2" in " ".join(first.terminal.split())
