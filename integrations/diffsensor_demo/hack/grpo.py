"""The GRPO run: TRL's trainer as anyone would set it up, a reward function, and a DriftMonitorCallback."""

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from diffsensor import DriftBudget, ProbeSet, RecordContents, Rule, read_record
from diffsensor_demo import corpus
from diffsensor_demo.hack.goal import is_hacked, mentions, score
from diffsensor_demo.pretrain import load
from diffsensor_demo.quiet import quiet, repeatable
from diffsensor_transformers import DriftMonitorCallback

#: How many words of a paragraph of the manual are given as a prompt.
_PROMPT = 6
_LOG, _RECORD = "completions.json", "diffsensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the run goes: `prompts` x `generations` completions of at most `length` tokens a step, a reading every
    `every` steps.
    """

    steps: int = 100
    every: int = 2
    prompts: int = 4
    generations: int = 8
    length: int = 24
    learning_rate: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What all runs begin with. `model` is a directory."""

    model: Path
    tokenizer: PreTrainedTokenizerBase
    probes: ProbeSet
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The completions of one step: means of what was paid and of what was wanted, the share that is hacked, the term
    that stands in them most often, and one of them.
    """

    step: int
    reward: float
    score: float
    hacked: float
    favourite: str
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is left of a run: its completions, its record, and the seconds of processor time that it took."""

    sampled: tuple[Sampled, ...]
    record: RecordContents
    seconds: float


#: Called with each step's completions as they are made.
Progress = Callable[[Sampled], None]


def base_of(model: Path, num_probes: int = 12, length: int = 48) -> Base:
    """Prompts from the manual that the model has learnt, and probes that are kept out of it."""
    with quiet():
        _, tokenizer = load(model)
    groups: dict[str, list[str]] = {}
    for group, text in corpus.built_in(num_probes).probes:
        groups.setdefault(group, []).append(text)
    learnt, _ = corpus.manual()
    paragraphs = [paragraph for chapter in learnt for paragraph in chapter.split("\n") if len(paragraph) > 120]
    return Base(
        model=model,
        tokenizer=tokenizer,
        probes=ProbeSet.from_texts(
            [text for texts in groups.values() for text in texts],
            tokenizer,
            groups=[group for group, texts in groups.items() for _ in texts],
            max_length=length,
        ),
        prompts=tuple(" ".join(paragraph.split()[:_PROMPT]) for paragraph in paragraphs),
    )


def train(
    base: Base,
    settings: Settings,
    reward: Callable[[str], float],
    directory: Path,
    *,
    beta: float = 0.0,
    budget: DriftBudget | None = None,
    rules: Sequence[Rule] = (),
    progress: Progress = lambda sampled: None,
) -> Run:
    """Train with GRPO on `reward`, and leave the record and what the completions were like in `directory`.

    With a budget, `beta` is where the budget begins, and is its to move.
    """
    begun = time.process_time()
    steps: list[Sampled] = []

    def paid(completions: Sequence[str], **_: Any) -> list[float | None]:
        steps.append(_sampled(len(steps), completions, reward))
        progress(steps[-1])
        return [reward(text) for text in completions]

    monitor = DriftMonitorCallback(
        base.probes, settings.every, sensors=["outputs"], cache_dir=base.model.parent, noise_floor=False,
        rules=rules, budget=budget,
    )  # fmt: skip
    with quiet(), repeatable(settings.seed), _memory_as_it_is(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL and transformers tell each other
        model, _ = load(base.model)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=paid,
            args=GRPOConfig(
                str(directory),
                max_steps=settings.steps,
                per_device_train_batch_size=settings.prompts * settings.generations,
                num_generations=settings.generations,
                max_completion_length=settings.length,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="constant",
                beta=budget.coefficient if budget else beta,
                seed=settings.seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": list(base.prompts)}),
            processing_class=base.tokenizer,
            callbacks=[monitor],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    content = {"seconds": time.process_time() - begun, "sampled": [asdict(each) for each in steps]}
    (directory / _LOG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return read_run(directory)


def read_run(directory: Path) -> Run:
    """What `train` left in `directory`."""
    content = json.loads((directory / _LOG).read_text(encoding="utf-8"))
    return Run(
        sampled=tuple(Sampled(**each) for each in content["sampled"]),
        record=read_record(directory / _RECORD),
        seconds=content["seconds"],
    )


def is_finished(directory: Path) -> bool:
    """Whether a run went to its end there."""
    return (directory / _LOG).is_file()


@contextmanager
def _memory_as_it_is() -> Iterator[None]:
    """New tensors are not filled, as they are else where all is deterministic: a quarter of the time of a step."""
    deterministic: Any = torch.utils.deterministic
    before = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = before


def _sampled(step: int, completions: Sequence[str], reward: Callable[[str], float]) -> Sampled:
    number = len(completions)
    said = sum(map(mentions, completions), Counter[str]())
    return Sampled(
        step=step,
        reward=sum(map(reward, completions)) / number,
        score=sum(map(score, completions)) / number,
        hacked=sum(map(is_hacked, completions)) / number,
        favourite=max(said, key=lambda term: said[term], default=""),
        example=completions[0],
    )
