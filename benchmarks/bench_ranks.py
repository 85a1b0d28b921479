"""What a reading costs each of several processes, in readings of one process that does it all.

    python benchmarks/bench_ranks.py [--processes 2] [--config A] [--probes 16] [--rounds 7] [--quick] [--json FILE]

torchrun starts the processes, each with one thread. In each round the first process reads alone while the others wait,
and then all read together, so that both are measured in turns. A ratio is the time of the process that takes longest
over that of the one alone in the same round; shown are medians and quartiles over rounds. CPU time is that of the
process, so that neighbours on the machine disturb little; wall time has them in it, and the processes' waiting for each
other. Tokens are those that went into the model, in the process with most of them, over those of all probes. Ends with
1 where a target is missed. Targets are for copies of the model (DDP); where it is sharded (FSDP2) each of many forward
passes also gathers the weights, which on CPUs, through gloo, is far from what it costs a GPU.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from bench_reading import CONFIGS, PROBE_TOKENS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffsensor import Monitor, ProbeSet

#: Of the CPU time of one process that does it all, for each of two that share it.
TARGET = 0.65


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    model: str
    sensors: str
    processes: int
    config: str
    num_probes: int
    tokens: float
    cpu: float
    cpu_quartiles: tuple[float, float]
    wall: float
    wall_quartiles: tuple[float, float]
    alone_cpu_seconds: float
    alone_wall_seconds: float
    target: float | None

    @property
    def misses(self) -> bool:
        return self.target is not None and self.cpu > self.target


def timed(act: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.process_time() - cpu, time.perf_counter() - wall


def reader(monitor: Monitor, model: nn.Module) -> Callable[[], None]:
    def read() -> None:
        found = monitor.read(model, 0)
        if monitor.failures or not found:
            raise RuntimeError(f"A reading failed: {monitor.failures}.")

    return read


def tokens_of(act: Callable[[], object], root: nn.Module) -> int:
    """How many tokens this process runs through the model meanwhile."""
    seen: list[int] = []
    handle = root.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    act()
    handle.remove()
    return sum(seen)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    return model


def measured_by(options: argparse.Namespace) -> None:
    """What each process does; the first one writes what was found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config = CONFIGS[options.config]
    model = config.build()
    ids = torch.randint(config.vocab, (options.probes, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))
    probes = ProbeSet.from_tensors(ids, groups=[f"group {probe % 2}" for probe in range(options.probes)])
    cache = options.child / f"cache {os.environ['RANK']}"
    alone: dict[str, Monitor] = {}
    for sensors in options.sensors:
        alone[sensors] = Monitor(probes, cache_dir=cache, sensors=sensors, noise_floor=False)
        alone[sensors].attach(model)  # while each process still knows of itself only
    dist.init_process_group("gloo")
    rank, rows = dist.get_rank(), list[Row]()
    held = {"DDP": DistributedDataParallel(copy.deepcopy(model)), "FSDP2": sharded(copy.deepcopy(model))}
    for name, live in held.items():
        for sensors in options.sensors:
            together = Monitor(probes, cache_dir=options.child / "cache", sensors=sensors, noise_floor=False)
            together.attach(live)
            one, all_ = reader(alone[sensors], model), reader(together, live)
            root = live.module if isinstance(live, DistributedDataParallel) else live
            counts = [tokens_of(one, model), tokens_of(all_, root)]  # and what is done once is done
            taken: list[tuple[tuple[float, float], tuple[float, float]]] = []
            for _ in range(options.rounds):
                dist.barrier()
                first = timed(one) if rank == 0 else (0.0, 0.0)
                dist.barrier()
                taken.append((first, timed(all_)))
            every: list[tuple[list[int], list[tuple[tuple[float, float], tuple[float, float]]]]]
            every = [([], [])] * dist.get_world_size()
            dist.all_gather_object(every, (counts, taken))
            rows.append(row_of(name, sensors, options, every))
    if rank == 0:
        (options.child / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def row_of(
    name: str,
    sensors: str,
    options: argparse.Namespace,
    every: Sequence[tuple[list[int], list[tuple[tuple[float, float], tuple[float, float]]]]],
) -> Row:
    alone = [first for first, _ in every[0][1]]
    cpu, wall = (
        [max(taken[turn][1][kind] for _, taken in every) / alone[turn][kind] for turn in range(options.rounds)]
        for kind in (0, 1)
    )
    is_judged = name == "DDP" and options.config != "tiny" and len(every) == 2  # a tiny model tells nothing about it
    return Row(
        model=name,
        sensors=sensors,
        processes=len(every),
        config=options.config,
        num_probes=options.probes,
        tokens=max(counts[1] for counts, _ in every) / every[0][0][0],
        cpu=statistics.median(cpu),
        cpu_quartiles=quartiles(cpu),
        wall=statistics.median(wall),
        wall_quartiles=quartiles(wall),
        alone_cpu_seconds=statistics.median(each[0] for each in alone),
        alone_wall_seconds=statistics.median(each[1] for each in alone),
        target=TARGET if is_judged else None,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def measured(options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes),
            __file__, "--child", place, "--config", options.config, "--probes", str(options.probes),
            "--rounds", str(options.rounds), "--sensors", *options.sensors,
        ]  # fmt: skip
        folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}, check=True)
        found = json.loads((Path(place) / "rows.json").read_text(encoding="utf-8"))
    return [Row(**row) for row in found]


COLUMNS = (
    f"{'model':<6} {'sensors':<7} {'processes':>9} {'probes':>6} {'tokens':>6} {'CPU':>5} {'quartiles':>13} "
    f"{'target':>6} {'wall':>5} {'quartiles':>13} {'alone, CPU s':>12} {'wall s':>6}"
)


def line(row: Row) -> str:
    target = "" if row.target is None else f"{row.target:.2f}"
    cpu, wall = (f"{low:.2f} .. {high:.2f}" for low, high in (row.cpu_quartiles, row.wall_quartiles))
    return (
        f"{row.model:<6} {row.sensors:<7} {row.processes:>9} {row.num_probes:>6} {row.tokens:>6.2f} {row.cpu:>5.2f} "
        f"{cpu:>13} {target:>6} {row.wall:>5.2f} {wall:>13} {row.alone_cpu_seconds:>12.2f} "
        f"{row.alone_wall_seconds:>6.2f}{'  missed' if row.misses else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--config", choices=list(CONFIGS), default="A")
    parser.add_argument("--probes", type=int, default=16, help=f"of {PROBE_TOKENS} tokens each")
    parser.add_argument("--sensors", nargs="+", choices=["light", "full"], default=["light", "full"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: seconds, and no true ratios")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # where one of the processes writes
    options = parser.parse_args(arguments)
    if options.quick:
        options.config, options.rounds = "tiny", 1
    if options.child:
        measured_by(options)
        return 0
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, 1 thread for each process, config "
        f"{options.config}, {options.rounds} round(s)\n\n{COLUMNS}",
        flush=True,
    )
    rows = measured(options)
    for row in rows:
        print(line(row))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.misses for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
