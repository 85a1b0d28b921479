"""Runs of DriftMonitor in several processes, for test_lightning_ranks.py: `torchrun lightning_in_ranks.py DIRECTORY`.

Each process writes what it saw of each run into a file of its own.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from diffsensor import Gate, Verdict, write_verdict
from diffsensor.actions import Response, SaveCheckpoint, Stop
from diffsensor.rules import Limit
from diffsensor_lightning import DriftMonitor, gated_checkpoints
from tiny_lightning import TinyModule, data, differences, tiny_llama, tiny_probes, trace_of, trainer

KL = "diffsensor/kl_ref_live"
LIMIT = 0.01
DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2}


class Sharded(TinyModule):
    """The same model, cut by `fully_shard`, as ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def in_double(kind: Callable[..., TinyModule]) -> TinyModule:
    """With weights of float64, in which the order of a sum over processes does not show."""
    return kind(tiny_llama().double())


def sharded(**options: Any) -> dict[str, Any]:
    return {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options), "devices": 2}


def loader(num: int, processes: int) -> DataLoader[Any]:
    """The same batches of four texts, whatever the number of processes that share them.

    Lightning itself would give several processes a sampler that shuffles.
    """
    texts = data(num).dataset
    sampler = DistributedSampler(texts, processes, int(os.environ["RANK"]), shuffle=False) if processes > 1 else None
    return DataLoader(texts, batch_size=4 // processes, sampler=sampler)


def perturbed() -> nn.Module:
    model, generator = tiny_llama(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.double()


class Jumps(Callback):
    """Moves the weights at some steps far away, and back at the others: what fails a gate, and what passes it."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps, self.is_away = set(steps), False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        away = trainer.global_step in self.steps
        if away != self.is_away:
            with torch.no_grad():
                pl_module.model.lm_head.weight.mul_(4.0 if away else 0.25)  # exact, there and back
        self.is_away = away


class Crash(Callback):
    def __init__(self, step: int, here: bool = True) -> None:
        self.step, self.here = step, here

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.here:
            raise ZeroDivisionError


def drift_monitor(root: Path, every: int = 2, **options: Any) -> DriftMonitor:
    return DriftMonitor(tiny_probes(), every, **({"cache_dir": root / "cache", "record": root / "record"} | options))


def read_against_another(root: Path, kind: Callable[..., TinyModule] = TinyModule, **options: Any) -> dict[str, Any]:
    """A run compared with a model other than its own, so that already its first reading is of a drift."""
    seen = Seen()
    monitor = drift_monitor(root, sensors="full", reference=perturbed())
    runner = trainer([monitor, seen], root, **options)
    runner.fit(in_double(kind), loader(24, options.get("devices", 1)))
    return {"kl": seen.kl, "step": runner.global_step, "last": float(runner.callback_metrics[KL])}


class Seen(Callback):
    """What other callbacks see of the readings."""

    def __init__(self) -> None:
        self.kl: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.kl.append(float(trainer.callback_metrics[KL]))


def run_of_parts(
    root: Path,
    *extra: Callback,
    ckpt: Path | None = None,
    kind: Callable[..., TinyModule] = TinyModule,
    **options: Any,
) -> dict[str, Any]:
    """Seven steps with a checkpoint after each, all or from one of them on, into the same record."""
    saved = ModelCheckpoint(root / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=1)
    monitor = drift_monitor(root, sensors="full", gate=Gate(Limit("kl_ref_live", above=10.0)))
    # One epoch for each batch: every checkpoint is one at an epoch's end, from which Lightning resumes exactly.
    runner = trainer([monitor, *extra, saved], root, enable_checkpointing=True, max_epochs=7, **options)
    try:
        runner.fit(in_double(kind), loader(4, options.get("devices", 1)), ckpt_path=ckpt, weights_only=False)
    except ZeroDivisionError:
        return {"crashed": True}
    return {"crashed": False, "step": runner.global_step, "passed": monitor.last_passed}


def on_and_off(root: Path, module: Callable[[], TinyModule] = TinyModule, **options: Any) -> dict[str, Any]:
    """Where a run with a monitor differs, in anything, from one without. A strategy's dict is used up by one run."""

    def trace(name: str, callbacks: Iterable[Callback]) -> Any:
        strategy = options["strategy"] if isinstance(options["strategy"], str) else sharded()["strategy"]
        saved = ModelCheckpoint(root / name, "{step}", every_n_train_steps=3)
        return local(
            trace_of(
                [*callbacks, saved],
                root,
                module=module,
                loader=lambda: loader(24, 2),
                enable_checkpointing=True,
                **(options | {"strategy": strategy}),
            )
        )

    gate = Gate(Limit("kl_ref_live", above=10.0))
    rules = [Response(Limit("kl_ref_live", above=10.0), Stop())]
    on = trace("on", [drift_monitor(root, sensors="full", gate=gate, rules=rules)])
    off = trace("off", [])
    return {"differences": differences(on, off), "step": on["step"], "losses": on["losses"]}


def local(tree: Any) -> Any:
    """The same, of sharded tensors what this process has."""
    if isinstance(tree, DTensor):
        return tree.to_local()
    if isinstance(tree, dict):
        return {key: local(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [local(value) for value in tree]
    return tree


def stopped(root: Path, rank: int) -> dict[str, Any]:
    """Actions, of which one can only fail in the first process; a logger, which only that one has."""
    logger: CSVLogger | bool = False
    if rank == 0:
        logger = CSVLogger(root / "logs", name="")
        blocked = Path(logger.log_dir) / "diffsensor-checkpoints"
        blocked.parent.mkdir(parents=True)
        blocked.touch()
    rules = [Response(Limit("kl_ref_live", above=LIMIT, for_=1), SaveCheckpoint(), Stop())]
    monitor = drift_monitor(root, 1, record="auto", rules=rules)
    runner = trainer([Jumps([3]), monitor], root, logger=logger, **DDP)
    runner.fit(TinyModule(lr=1e-7), loader(24, 2))
    return {"step": runner.global_step}


def gated(root: Path, rank: int, options: dict[str, Any], module: Callable[..., TinyModule]) -> dict[str, Any]:
    """A gate, with ModelCheckpoints whose processes would wait for each other if their accounts were not the same."""
    written: list[str] = []

    def counted(path: Path, verdict: Verdict) -> None:
        written.append(Path(path).name)
        write_verdict(path, verdict)

    gated_checkpoints.write_verdict = counted  # type: ignore[assignment]
    best = ModelCheckpoint(root / "best", "{step}", KL, every_n_train_steps=1, save_top_k=2, mode="max")
    every = ModelCheckpoint(root / "all", "{step}", every_n_train_steps=1, save_last=True)
    monitor = drift_monitor(root, 5, gate=Gate(Limit("kl_ref_live", above=LIMIT)))
    runner = trainer([Jumps([1, 3, 4, 6]), monitor, best, every], root, enable_checkpointing=True, **options)
    runner.fit(module(lr=1e-7), loader(24, 2))
    runner.save_checkpoint(root / "end.ckpt", weights_only=True)
    gated_checkpoints.write_verdict = write_verdict
    return {
        "written": written,
        "best": [path_of(path) for path in sorted(best.best_k_models)],
        "best of all": path_of(every.best_model_path),
        "passed": path_of(monitor.last_passed),
    }


def path_of(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def one_crashes(root: Path, rank: int) -> dict[str, Any]:
    """One process leaves in the midst of a run, which ends the others': neither waits."""
    begun = time.monotonic()
    runner = trainer([Crash(3, rank == 1), drift_monitor(root, 1)], root, **DDP)
    told: dict[str, Any] = {"raised": ""}
    try:
        runner.fit(TinyModule(), loader(24, 2))
    except (ZeroDivisionError, RuntimeError) as error:
        told["raised"] = type(error).__name__
    return told | {"seconds": time.monotonic() - begun}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ddp": lambda root: read_against_another(root, **DDP),
        "fsdp2": lambda root: read_against_another(root, Sharded, **sharded()),
        "ddp-trace": lambda root: on_and_off(root, **DDP),
        "fsdp2-trace": lambda root: on_and_off(root, Sharded, **sharded()),
        "stopped": lambda root: stopped(root, rank),
        "ddp-gated": lambda root: gated(root, rank, DDP, TinyModule),
        "fsdp2-gated": lambda root: gated(root, rank, sharded(), Sharded),
        "one-to-two": lambda root: run_of_parts(root, ckpt=root / "ckpt" / "step=3.ckpt", **DDP),
        "two-to-one": lambda root: run_of_parts(root, Crash(5), **DDP),
        "fsdp2-to-one": lambda root: run_of_parts(
            root, Crash(5), kind=Sharded, **sharded(save_distributed_checkpoint=False)
        ),
        "fsdp2-parts": lambda root: run_of_parts(root, Crash(5), kind=Sharded, **sharded()),
        "fsdp2-resumed": lambda root: run_of_parts(
            out / "fsdp2-parts", ckpt=out / "fsdp2-parts" / "ckpt" / "step=3.ckpt", kind=Sharded, **sharded()
        ),
        "one-crashes": lambda root: one_crashes(root, rank),  # the last, for then the processes have lost each other
    }
    for name, run in runs.items():
        print(f"process {rank}: {name}", flush=True)
        torch.save(run(out / name), out / f"{name}-{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # without the parting of a group that is broken


if __name__ == "__main__":
    main(Path(sys.argv[1]))
