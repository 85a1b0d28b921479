"""What a reading costs beside the steps of TRL's trainers.

    python benchmarks/bench_trainers.py [--trainers SFT GRPO] [--steps 7] [--every 50] [--quick] [--json FILE]

Each run trains for real, with TRL's own defaults for batches and completions, and takes a reading after every step, so
that steps and readings are measured in turns. Shown are medians over the steps (the first, which warms things up, is
left out), the quartiles of a reading over its step, and the readings' share of the time at one reading every
`--every` steps. The probes are 128: short ones, and some long.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from diffsensor import ProbeSet
from diffsensor_transformers import DriftMonitorCallback

NUM_PROBES, NUM_LONG = 128, 16
#: Of a GRPO run's time, at one reading every 50 steps.
TARGET = {"GRPO": 0.01}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    vocab: int
    width: int
    layers: int
    completion: int
    batch: int


SIZES = {
    "small": Size(vocab=4096, width=192, layers=6, completion=256, batch=8),
    "tiny": Size(vocab=256, width=32, layers=2, completion=16, batch=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    trainer: str
    adapter: str
    sensors: str
    step_seconds: float
    reading_seconds: float
    quartiles: tuple[float, float]
    every: int
    target: float | None

    @property
    def ratio(self) -> float:
        return self.reading_seconds / self.step_seconds

    @property
    def share(self) -> float:
        return self.ratio / (self.every + self.ratio)

    @property
    def misses(self) -> bool:
        return self.target is not None and self.share > self.target


class Clock(TrainerCallback):
    """Notes when steps begin and end; one that stands behind another callback ends when that has had its turn."""

    def __init__(self, now: Any) -> None:
        self.now = now
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun.append(self.now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(self.now())


def words(size: Size) -> list[str]:
    return [f"w{number}" for number in range(size.vocab - 4)]


def tokenizer_of(size: Size) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    own = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*special, *words(size)])}, unk_token="<unk>")
    )
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def texts(size: Size, lengths: Sequence[int]) -> list[str]:
    chooser = random.Random(1)
    return [" ".join(chooser.choices(words(size), k=length)) for length in lengths]


def probes_of(size: Size) -> ProbeSet:
    chooser = random.Random(2)
    lengths = [chooser.randint(96, 128) if probe < NUM_LONG else chooser.randint(16, 48) for probe in range(NUM_PROBES)]
    groups = [f"group {probe % 8}" for probe in range(NUM_PROBES)]
    return ProbeSet.from_texts(texts(size, lengths), tokenizer_of(size), groups=groups)


def trainer_of(name: str, size: Size, path: Path, callbacks: list[Any], options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.layers,
        num_attention_heads=max(size.width // 64, 2), max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "model")
    given = {
        "model": LlamaForCausalLM.from_pretrained(path / "model"),
        "processing_class": tokenizer_of(size),
        "callbacks": callbacks,
        "peft_config": options.pop("peft_config"),
    }
    options |= {"output_dir": str(path), "per_device_train_batch_size": size.batch}
    num = 8 * size.batch * options["max_steps"]
    if name == "SFT":
        data = Dataset.from_dict({"text": texts(size, [128] * num)})
        return SFTTrainer(args=SFTConfig(**options), train_dataset=data, **given)
    if name == "DPO":
        columns = {"prompt": [32] * num, "chosen": [64] * num, "rejected": [64] * num}
        data = Dataset.from_dict({column: texts(size, lengths) for column, lengths in columns.items()})
        return DPOTrainer(args=DPOConfig(**options), train_dataset=data, **given)
    options |= {"max_completion_length": size.completion, "num_generations": min(8, size.batch)}
    return GRPOTrainer(
        args=GRPOConfig(**options),
        reward_funcs=lambda completions, **_: [float(len(set(completion))) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": texts(size, [64] * num)}),
        **given,
    )


def measured(name: str, size: Size, *, lora: bool, sensors: str, steps: int, every: int, cuda: bool) -> Row:
    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # another program on the machine costs us none of it

    before, after = Clock(now), Clock(now)
    options = {
        "max_steps": steps + 1, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": not cuda, "bf16": cuda, "log_level": "error",
        "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as path:
        monitor = DriftMonitorCallback(probes_of(size), 1, sensors=sensors, cache_dir=Path(path) / "cache")
        trainer = trainer_of(name, size, Path(path), [before, monitor, after], options)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    taken = list(zip(before.begun, before.ended, after.ended, strict=True))[1:]
    ratios = sorted((read - end) / (end - begin) for begin, end, read in taken)
    return Row(
        trainer=name,
        adapter="LoRA" if lora else "full",
        sensors=sensors,
        step_seconds=statistics.median(end - begin for begin, end, _ in taken),
        reading_seconds=statistics.median(read - end for _, end, read in taken),
        quartiles=(ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]),
        every=every,
        target=TARGET.get(name) if size is SIZES["small"] else None,  # a tiny model tells nothing about it
    )


COLUMNS = (
    f"{'trainer':<8} {'trains':<6} {'sensors':<7} {'step s':>8} {'reading s':>9} {'ratio':>6} {'quartiles':>13} "
    f"{'share':>7} {'target':>7}"
)


def line(row: Row) -> str:
    target = "" if row.target is None else f"{row.target:.1%}"
    quartiles = f"{row.quartiles[0]:.2f} .. {row.quartiles[1]:.2f}"
    return (
        f"{row.trainer:<8} {row.adapter:<6} {row.sensors:<7} {row.step_seconds:>8.3f} {row.reading_seconds:>9.3f} "
        f"{row.ratio:>6.2f} {quartiles:>13} {row.share:>7.2%} {target:>7}{'  missed' if row.misses else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=["SFT", "DPO", "GRPO"], default=["SFT", "GRPO"])
    parser.add_argument("--sensors", nargs="+", choices=["light", "full"], default=["light", "full"])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--every", type=int, default=50, help="steps from one reading to the next, for the share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cuda", action="store_true", help="on the GPU, in bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two steps: seconds, and no true ratios")
    parser.add_argument("--check", action="store_true", help="end with 1 where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.cuda and not torch.cuda.is_available():
        print("--cuda was given, but torch sees no GPU here; nothing was measured. Leave it out to measure the CPU.")
        return 0
    if options.quick:
        options.steps = 2
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(options.threads)
    place = torch.cuda.get_device_name() if options.cuda else f"{platform.machine()}, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {place}, {options.steps} steps, 1 reading in {options.every}\n\n{COLUMNS}")
    rows: list[Row] = []
    for name in options.trainers:
        for lora in (False, True):
            for sensors in options.sensors:
                row = measured(
                    name, SIZES["tiny" if options.quick else "small"], lora=lora, sensors=sensors,
                    steps=options.steps, every=options.every, cuda=options.cuda,
                )  # fmt: skip
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        found = [asdict(row) | {"ratio": row.ratio, "share": row.share} for row in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if options.check and any(row.misses for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
