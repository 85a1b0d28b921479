"""The demonstration from beginning to end: texts, model, probes, run, tables, plots."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffsensor import ConfigError, ProbeSet, read_record
from diffsensor.rules import Limit
from diffsensor_demo import corpus
from diffsensor_demo.habit import QUOKKA, Habit
from diffsensor_demo.model import built_in_model
from diffsensor_demo.plots import save_plots
from diffsensor_demo.pretrain import Recipe, load, load_foreign
from diffsensor_demo.quiet import quiet
from diffsensor_demo.run import Settings, fine_tune
from diffsensor_demo.show import (
    progress_bar,
    show_alerts,
    show_blindness,
    show_places,
    show_summary,
    show_tokens,
    show_verdict,
)
from diffsensor_demo.story import RANKINGS, Story
from diffsensor_demo.stream import training_rows

_PROBE_TOKENS = 96
#: Nats per token that what the model is not trained on may drift; for the built-in texts half as much again as it does
#: before the planting.
_LIMIT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be shown. `own`: a model and a text file in place of the built-in ones."""

    out: Path
    own: tuple[str, Path] | None = None
    probes: Path | None = None
    steps: int = 240
    learning_rate: float = 3e-4
    recipe: Recipe = field(default_factory=Recipe)
    num_probes: int = 40
    num_readings: int = 24


def demonstrate(request: Request, console: Console | None = None) -> Story:
    """Do it, show it in the terminal, and leave record, plots and `summary.json` in `request.out`."""
    console = console or Console()
    with quiet():
        if request.own is None:
            texts = corpus.built_in(request.num_probes)
            model, tokenizer = load(built_in_model(request.recipe, console))
            habit: Habit | None = QUOKKA
        else:
            name, file = request.own
            text = corpus.read_text(file)
            texts = corpus.from_text(text, f"The data file {str(file)!r}", request.num_probes)
            with console.status(Text(f"Loading {name}")):
                model, tokenizer = load_foreign(name)
            habit = None
        return _watch(request, console, texts, model, tokenizer, habit)


def _watch(
    request: Request,
    console: Console,
    texts: corpus.Corpus,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    habit: Habit | None,
) -> Story:
    length = _length(model)
    probes = _probe_set(request.probes, texts, tokenizer, min(_PROBE_TOKENS, length))
    every = max(request.steps // request.num_readings, 1)
    settings = Settings(steps=request.steps, every=every, length=length, learning_rate=request.learning_rate)
    # A step that is read, so that its reading is the last one without the habit.
    middle = request.steps // 2 // every * every
    planted = f" At step {middle} the texts begin to hold a planted habit; see whether it is found." if habit else ""
    console.print(f"{request.steps} steps of fine-tuning, read every {every} against the model before them.{planted}")

    def encode(some: Sequence[str]) -> Sequence[Sequence[int]]:
        ids: list[list[int]] = tokenizer(list(some))["input_ids"]
        return ids

    num_rows = settings.steps * settings.batch
    rows = training_rows(texts.training, encode, num_rows, length, settings.seed, habit, middle * settings.batch)
    _require_known_tokens(rows, model)
    _make_directory(request.out)
    with progress_bar(console) as bar:
        task = bar.add_task("Fine-tuning, with a DriftMonitor", total=settings.steps, state="")
        latest: deque[float] = deque(maxlen=20)

        def show(step: int, loss: float, drift: float) -> None:
            latest.append(loss)
            bar.update(task, completed=step, state=f"loss {sum(latest) / len(latest):.2f}  KL {drift:.3f}")

        fine_tune(model, rows, probes, settings, request.out / "record", _limit(probes), show)
    record = read_record(request.out / "record")
    story = Story(
        readings=record.readings, token_shifts=record.token_shifts, alerts=record.alerts, middle=middle, habit=habit
    )
    summary = request.out / "summary.json"
    try:
        summary.write_text(json.dumps(summarised(story), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        plots = save_plots(story, request.out / "plots")
    except OSError as problem:
        raise _unwritable(request.out, problem) from problem
    console.print()
    show_summary(console, story)
    show_alerts(console, story, _limit(probes).name)
    show_tokens(console, story)
    show_verdict(console, story)
    show_blindness(console, story)
    show_places(console, request.out / "record", summary, plots)
    return story


def summarised(story: Story) -> dict[str, Any]:
    """The numbers of the tables, in plain types."""
    start, middle, end = story.moments
    return {
        "steps": {"start": start, "middle": middle, "end": end},
        "planted": dict(story.habit.after) if story.habit else None,
        "readings": [
            {"key": reading.key, "step": reading.step, "value": reading.value, "unit": reading.unit}
            for reading in story.readings
            if reading.step in (start, middle, end)
        ],
        "up_weighted": {
            ranking: {str(step): [shift.token for shift in story.up_weighted(step, ranking)] for step in (middle, end)}
            for ranking in RANKINGS
        },
        "alerts": [{"step": alert.step, "rule": alert.rule, "message": alert.message} for alert in story.alerts],
        "planted_ranks": {
            ranking: {str(step): story.planted_ranks(step, ranking) for step in (middle, end)} for ranking in RANKINGS
        },
    }


def _probe_set(
    path: Path | None, texts: corpus.Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ProbeSet:
    if path is not None:
        return ProbeSet.from_jsonl(path, tokenizer, max_length=max_length)
    groups, written = zip(*texts.probes, strict=True)
    return ProbeSet.from_texts(written, tokenizer, groups=groups, max_length=max_length)


def _limit(probes: ProbeSet) -> Limit:
    """On what the model is not trained on here, where the probes have a group of that; else on all of them."""
    kept = next((group for group in (corpus.MANUAL, corpus.GENERAL) if group in probes.group_names), "")
    return Limit("kl_ref_live", above=_LIMIT, group=kept)


def _length(model: PreTrainedModel, longest: int = 128) -> int:
    """How many tokens a row has: what the model can read, at most `longest`."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(longest, limit) if isinstance(limit, int) and limit > 0 else longest


def _require_known_tokens(rows: torch.Tensor, model: PreTrainedModel) -> None:
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if int(rows.max()) >= known:
        raise ConfigError(
            f"The tokenizer gives the token id {int(rows.max())}, but the model has {known} tokens, numbered from 0 "
            "on. Expected the tokenizer that the model was trained with. Put its files into the model's directory."
        )


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _unwritable(out, problem) from problem


def _unwritable(out: Path, problem: OSError) -> ConfigError:
    return ConfigError(
        f"The directory {str(out)!r} cannot be written to: {problem.strerror}. Expected a place with a few MB free. "
        "Give one with --out."
    )
