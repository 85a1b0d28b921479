"""Ray Train's TorchTrainer with the callback of `diffsensor_transformers` in it. Needs `pip install 'ray[train]'`.

    python integrations/examples/ray_torch_trainer.py               # two workers on the CPU, a minute or two
    python integrations/examples/ray_torch_trainer.py --workers 1

Nothing here is special to Ray but what Ray itself asks for: the loop of each worker is an ordinary transformers
`Trainer` with `DriftMonitorCallback`. Its readings are in the trainer's log, so Ray's own callback reports them with
each checkpoint, and they stand in `result.metrics`.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What Ray reads when it is imported: it sends nothing home.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import Trainer, TrainingArguments

from diffsensor import ProbeSet, cache_directory
from diffsensor_demo import corpus
from diffsensor_demo.pretrain import Recipe, load, pretrained
from diffsensor_transformers import DriftMonitorCallback


def work(config: Mapping[str, Any]) -> None:
    """What each worker does. The record is written by the first one, into the trainer's `output_dir`."""
    torch.set_num_threads(1)
    model, tokenizer = load(config["model"])
    texts = corpus.built_in()
    rows = [ids for text in texts.training if len(ids := tokenizer(text)["input_ids"][:64]) == 64]
    groups, held_out = zip(*texts.probes, strict=True)
    probes = ProbeSet.from_texts(held_out, tokenizer, groups, max_length=64)
    arguments = TrainingArguments(
        config["out"],
        max_steps=config["steps"],
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=config["steps"],
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
        # Ray's comes last: it reports what stands in the log when a checkpoint is saved.
        callbacks=[DriftMonitorCallback(probes, every_n_steps=5), RayTrainReportCallback()],
    )
    trainer.train()


def main(arguments: Sequence[str] | None = None, recipe: Recipe | None = None) -> Result:
    parser = argparse.ArgumentParser(description="Ray Train's TorchTrainer with a drift monitor in it.")
    parser.add_argument("--out", type=Path, default=Path("runs/ray"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)
    recipe = recipe or Recipe(vocabulary=768, width=96, layers=2, steps=400)
    place = pretrained(recipe, corpus.manual()[0], (), cache_directory(), lambda step, loss: None)
    out = given.out.resolve()
    ray.init(num_cpus=given.workers + 1, include_dashboard=False, log_to_driver=False)
    try:
        result = TorchTrainer(
            work,
            train_loop_config={"model": str(place), "out": str(out / "trainer"), "steps": given.steps},
            torch_config=TorchConfig(backend="gloo"),  # nccl on GPUs
            scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=False),
            run_config=RunConfig(name="drift", storage_path=str(out / "ray")),
        ).fit()
    finally:
        ray.shutdown()
    print(f"drift after {given.steps} steps: {result.metrics['diffsensor/kl_ref_live']:.3f} nats/token")
    return result


if __name__ == "__main__":
    main()
