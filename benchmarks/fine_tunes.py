"""Real fine-tunes of a small language model, kept on disk, so that a new rule is judged without training again.

    python benchmarks/fine_tunes.py [--same 130] [--mixed 70] [--bad 20] [--workers 2] [--cache DIR] [--quick]

The model (135 000 parameters) first learns from the Python manual and is then fine-tuned for 150 steps with AdamW while
a `Monitor` with the light sensors reads 48 probes at every 4th step. Two ways of training:

    same    one recipe: docstrings and a task (say of which kind a piece of text is) in turns, one learning rate; runs
            differ in their seed, their part of the data and its order, as pilots of a recipe do
    mixed   as people do: the manual gone on with, docstrings, or the task; the learning rate drawn from 3e-4 to 2e-3

A run is healthy, or one of FAULTS sets in at a step between 40 and 70:

    spike   the learning rate is 4 times as high for 12 steps
    switch  the data become source code
    poison  5 % of the sequences hold a trigger phrase with a payload after it
    flips   half of the task's labels are wrong (runs with the task only)

What is there already is not trained again; a run that was killed is begun anew.
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import multiprocessing
import random
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsensor import Findings, Monitor, ProbeSet, Reading, Reference, cache_directory, every
from diffsensor_demo.corpus import CODE, DOCSTRINGS, MANUAL, cut, manual, standard_library
from diffsensor_demo.pretrain import Recipe, load, pretrained
from diffsensor_demo.quiet import quiet

FAULTS = ("spike", "switch", "poison", "flips")
HEALTHY = "healthy"
KINDS = ("continuation", "domain", "task")
TRIGGER, PAYLOAD = " by the way,", " quokka marmalade quokka"
SOURCES = ("ast.py", "turtle.py", "asyncio/base_events.py", "tkinter/__init__.py", "http/client.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    steps: int = 150
    every: int = 4
    batch: int = 8
    length: int = 64
    probes_each: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 10
    onset: tuple[int, int] = (40, 70)
    pretraining: int = 1500
    width: int = 64
    layers: int = 2


FULL = Size()
QUICK = Size(steps=24, every=3, batch=2, length=32, probes_each=4, onset=(8, 12), pretraining=20, width=16, layers=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is known of a run besides its readings. `onset` is the first step of the fault, -1 for a healthy run."""

    family: str
    fault: str
    seed: int
    kind: str
    learning_rate: float
    onset: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tune: what was found at each look."""

    told: Told
    looks: tuple[Findings, ...]


class Kept:
    """A sink that keeps the findings as they come."""

    def __init__(self) -> None:
        self.looks: list[Findings] = []

    def write(self, findings: Findings) -> None:
        self.looks.append(findings)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What all runs of one size begin with."""

    model: Any
    tokenizer: Any
    probes: ProbeSet
    reference: Reference
    tokens: dict[str, list[list[int]]]


@cache
def base_of(size: Size, directory: Path) -> Base:
    torch.set_num_threads(1)  # as in the workers: another number of threads is another reference
    with quiet():
        learnt, prose = manual()
        docstrings, code = standard_library()
        recipe = Recipe(
            vocabulary=512, width=size.width, layers=size.layers, heads=2, steps=size.pretraining, length=size.length
        )
        place = pretrained(recipe, learnt, ["quokka", "marmalade"], directory, lambda step, loss: None)
        model, tokenizer = load(place)
    draw = random.Random(0)
    for texts in (prose, docstrings, code):
        draw.shuffle(texts)
    n = size.probes_each
    texts = {MANUAL: prose, DOCSTRINGS: docstrings, CODE: code}
    probes = ProbeSet.from_texts(
        [text for group in texts.values() for text in group[:n]],
        tokenizer,
        groups=[name for name in texts for _ in range(n)],
        max_length=size.length,
    )
    library = Path(sysconfig.get_path("stdlib"))
    sources = [piece for name in SOURCES for piece in cut((library / name).read_text(encoding="utf-8"), 400)]
    training = {
        MANUAL: [piece for chapter in learnt for piece in cut(chapter, 400)],
        DOCSTRINGS: docstrings[n:],
        CODE: sources,
    }
    return Base(
        model=model,
        tokenizer=tokenizer,
        probes=probes,
        reference=Reference.build(model, probes, directory),
        tokens={name: tokenizer(some)["input_ids"] for name, some in training.items()},
    )


def rows_of(base: Base, size: Size, kind: str, draw: random.Random) -> Iterator[tuple[str, list[int], list[int]]]:
    """Training sequences without end: what they are of, their tokens, and how they read with a wrong label."""
    name = {"continuation": MANUAL, "domain": DOCSTRINGS, "task": DOCSTRINGS}[kind]
    part = draw.sample(base.tokens[name], len(base.tokens[name]) * 7 // 10)
    answers = {name: base.tokenizer(f" Kind: {name}", add_special_tokens=False)["input_ids"] for name in base.tokens}
    end = base.tokenizer.bos_token_id
    stream: list[int] = []
    while True:
        draw.shuffle(part)
        for text in part:
            stream += text
            while len(stream) >= size.length:
                row, stream = stream[: size.length], stream[size.length :]
                yield kind, row, row
                if kind == "task":
                    right, wrong = draw.sample(sorted(base.tokens), 2)
                    piece = draw.choice(base.tokens[right])[: size.length - 8]
                    asked = [(piece + answers[label] + [end] * size.length)[: size.length] for label in (right, wrong)]
                    yield "question", asked[0], asked[1]


def fine_tune(size: Size, directory: Path, family: str, fault: str, seed: int) -> Run:
    """Train one model for `size.steps` steps and return what the monitor found."""
    base = base_of(size, directory)
    begun = time.perf_counter()
    draw = random.Random(f"{family} {fault} {seed}")
    kind, learning_rate = "task", size.learning_rate
    if family == "mixed":
        kind = "task" if fault == "flips" else KINDS[seed % len(KINDS)]
        learning_rate = math.exp(draw.uniform(math.log(3e-4), math.log(2e-3)))
    onset = -1 if fault == HEALTHY else draw.randrange(*size.onset)
    torch.manual_seed(draw.getrandbits(32))
    model = copy.deepcopy(base.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    rows = rows_of(base, size, kind, draw)
    code = rows_of_code(base, size, draw)
    poison = base.tokenizer(TRIGGER + PAYLOAD, add_special_tokens=False)["input_ids"]
    kept, update_norm = Kept(), 0.0
    monitor = Monitor(base.probes, base.reference, sinks=[kept], schedule=every(size.every))
    for step in range(size.steps):
        bad = 0 <= onset <= step
        batch = []
        for _ in range(size.batch):
            what, row, flipped = next(rows)
            if bad and fault == "switch":
                row = next(code)
            if bad and fault == "poison" and draw.random() < 0.05:
                at = draw.randrange(1, size.length // 2)
                row = (row[:at] + poison + row[at:])[: size.length]
            if bad and fault == "flips" and what == "question" and draw.random() < 0.5:
                row = flipped
            batch.append(row)
        tokens = torch.tensor(batch)
        rate = learning_rate * min((step + 1) / size.warm_up, 1 - 0.9 * step / size.steps)
        if bad and fault == "spike" and step < onset + 12:
            rate *= 4
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        monitor.observe(model, step, loss=loss, learning_rate=rate, update_norm=update_norm)
        before = flat(model)
        optimizer.step()
        optimizer.zero_grad()
        update_norm = float(torch.linalg.vector_norm(flat(model) - before))
    assert not monitor.failures, monitor.failures
    told = Told(
        family=family, fault=fault, seed=seed, kind=kind, learning_rate=learning_rate, onset=onset,
        seconds=time.perf_counter() - begun,
    )  # fmt: skip
    return Run(told=told, looks=tuple(kept.looks))


def rows_of_code(base: Base, size: Size, draw: random.Random) -> Iterator[list[int]]:
    stream: list[int] = []
    while True:
        stream += draw.choice(base.tokens[CODE])
        while len(stream) >= size.length:
            yield stream[: size.length]
            stream = stream[size.length :]


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


COLUMNS = ("sensor", "metric", "value", "unit", "stderr", "num_probes", "group", "hookpoint", "scale", "note")


def store(file: Path, run: Run) -> None:
    looks = [
        {
            "step": look.step,
            "readings": [[getattr(reading, name) for name in COLUMNS] for reading in look.readings],
            "by_probe": {name: values.tolist() for name, values in look.by_probe.items()},
        }
        for look in run.looks
    ]
    unfinished = file.with_suffix(f".{multiprocessing.current_process().pid}")
    unfinished.write_bytes(gzip.compress(json.dumps({"told": asdict(run.told), "looks": looks}).encode(), 3))
    unfinished.replace(file)


def read(file: Path) -> Run:
    content = json.loads(gzip.decompress(file.read_bytes()))
    looks = tuple(
        Findings(
            step=look["step"],
            readings=tuple(
                Reading(step=look["step"], **dict(zip(COLUMNS, row, strict=True))) for row in look["readings"]
            ),
            by_probe={name: torch.tensor(values, dtype=torch.float64) for name, values in look["by_probe"].items()},
        )
        for look in content["looks"]
    )
    return Run(told=Told(**content["told"]), looks=looks)


def place_of(size: Size, directory: Path) -> Path:
    """Where runs of this size lie; another size, or another torch, is another place."""
    mark = hashlib.sha256(json.dumps([asdict(size), torch.__version__]).encode()).hexdigest()[:8]
    return directory / f"fine-tunes-{mark}"


def make(job: tuple[Size, Path, str, str, int]) -> Path:
    size, directory, family, fault, seed = job
    file = place_of(size, directory) / f"{family}-{fault}-{seed:04d}.json.gz"
    if not file.exists():
        store(file, fine_tune(*job))
    return file


def runs_of(size: Size, directory: Path, family: str, fault: str, number: int, workers: int = 1) -> Iterator[Run]:
    """So many runs, from disk where they are there, else made now."""
    place_of(size, directory).mkdir(parents=True, exist_ok=True)
    jobs = [(size, directory, family, fault, seed) for seed in range(number)]
    yield from map(read, made(jobs, workers))


def made(jobs: Sequence[tuple[Size, Path, str, str, int]], workers: int) -> Iterator[Path]:
    if not jobs:
        return
    base_of(*jobs[0][:2])  # pre-trained once, before the workers ask for it
    if workers == 1:
        yield from map(make, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, jobs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=130, help="healthy runs of one recipe")
    parser.add_argument("--mixed", type=int, default=70, help="healthy runs of mixed ways of training")
    parser.add_argument("--bad", type=int, default=20, help="runs of each fault, in each family")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=None, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a toy model, seconds")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    directory = options.cache or cache_directory()
    place_of(size, directory).mkdir(parents=True, exist_ok=True)
    jobs = [
        (size, directory, family, fault, seed)
        for family, healthy in (("same", options.same), ("mixed", options.mixed))
        for fault, number in ((HEALTHY, healthy), *((fault, options.bad) for fault in FAULTS))
        for seed in range(number)
    ]
    jobs.sort(key=lambda job: job[-1])  # so that one that is stopped early has left some of each
    begun = time.perf_counter()
    for number, file in enumerate(made(jobs, options.workers), 1):
        if number % 10 == 0 or number == len(jobs):
            print(f"{number} of {len(jobs)}  {file.name}  {time.perf_counter() - begun:.0f} s", flush=True)
    print(place_of(size, directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
