"""What a scan costs for each checkpoint, in the time to load it and to read it once.

    python benchmarks/bench_scan.py [--checkpoints 20] [--quick] [--json FILE]

A small model with random weights, and checkpoints of it, are saved: once with the reference's head in all of them, as
LoRA and a frozen head leave it, and once with heads that moved. For each checkpoint three things take turns: loading it
alone, a reading alone (of a monitor that has the model already), and the scan's own step, which does both. Shown is the
median over checkpoints of the scan's time over the sum of the other two, and how often the reference was asked. Time is
CPU time of this process. Ends with 1 where the target is missed and --check is given.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from diffsensor import Monitor, ProbeSet, Reference
from diffsensor.checkpoints import checkpoints_at, load_checkpoint
from diffsensor.scan import Scan

#: A scan also looks whether files are whole, tries the model out on one probe, and writes the record.
TARGET = 1.25
TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    head: str
    num_checkpoints: int
    ratio: float
    scan_seconds: float
    load_seconds: float
    reading_seconds: float
    times_asked: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny model and three checkpoints: seconds")
    parser.add_argument("--check", action="store_true", help="end with 1 where the target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    number = 3 if options.quick else options.checkpoints
    rows = [measured(head, number, tiny=options.quick) for head in ("frozen", "trained")]
    print(
        f"{'head':8} {'checkpoints':>11} {'scan / (load + reading)':>24} {'scan s':>8} {'load s':>8} {'reading s':>10}"
    )
    for row in rows:
        print(
            f"{row.head:8} {row.num_checkpoints:11} {row.ratio:24.2f} {row.scan_seconds:8.3f} {row.load_seconds:8.3f} "
            f"{row.reading_seconds:10.3f}   reference asked {row.times_asked} time"
        )
    print(f"target: at most {TARGET}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    missed = any(row.ratio > TARGET or row.times_asked != 1 for row in rows)
    return int(options.check and missed)


def measured(head: str, number: int, *, tiny: bool) -> Row:
    with tempfile.TemporaryDirectory() as place:
        return _measured(Path(place), head, number, tiny=tiny)


def _measured(place: Path, head: str, number: int, *, tiny: bool) -> Row:
    model = build(tiny)
    model.save_pretrained(place / "reference")
    generator = torch.Generator().manual_seed(1)
    for step in range(1, number + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if head == "trained" or "lm_head" not in name:
                    parameter += 1e-3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(place / "run" / f"checkpoint-{step}")
    ids = torch.randint(model.config.vocab_size, (4 if tiny else 16, TOKENS), generator=generator)
    probes = ProbeSet.from_tensors({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    asked = 0
    build_reference = Reference.build

    def counted(*arguments: Any, **more: Any) -> Reference:
        nonlocal asked
        asked += 1
        return build_reference(*arguments, **more)

    Reference.build = counted  # type: ignore[method-assign]
    try:
        arguments = {"probes": probes, "cache_dir": place / "cache", "rules": (), "noise_floor": False}
        scan = Scan(place / "reference", arguments, record=place / "record")
        reference = build_reference(
            model.from_pretrained(place / "reference").requires_grad_(False), probes, place / "cache", keep_head=True
        )
        like = {"dtype": torch.float32}
        times: dict[str, list[float]] = {"scan": [], "load": [], "reading": []}
        for turn, checkpoint in enumerate(checkpoints_at([place / "run"])):
            loaded = load_checkpoint(checkpoint, place / "reference", like=like)
            monitor = Monitor(probes, reference, rules=(), noise_floor=False)
            monitor.read(loaded, 0)  # attached, and buffers made

            acts: list[tuple[str, Callable[[], object]]] = [
                ("load", partial(load_checkpoint, checkpoint, place / "reference", like=like)),
                ("reading", partial(monitor.read, loaded, 1)),
                ("scan", partial(scan.read, checkpoint)),
            ]
            for name, act in acts[turn % 3 :] + acts[: turn % 3]:
                began = time.process_time()
                act()
                times[name].append(time.process_time() - began)
        scan.close()
    finally:
        Reference.build = build_reference  # type: ignore[method-assign]
    ratios = [
        one / (two + three) for one, two, three in zip(times["scan"], times["load"], times["reading"], strict=True)
    ]
    middle = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        head=head,
        num_checkpoints=number,
        ratio=statistics.median(ratios),
        scan_seconds=middle["scan"],
        load_seconds=middle["load"],
        reading_seconds=middle["reading"],
        times_asked=asked,
    )


def build(tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = (500, 32, 64, 2, 2) if tiny else (32_000, 512, 1376, 8, 8)
    vocab, dim, inner, layers, heads = sizes
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2 * TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    sys.exit(main())
