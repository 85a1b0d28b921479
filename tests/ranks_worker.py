"""What each process of tests/test_ranks.py does: one scenario after the other, each of which returns plain facts.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks_worker.py PLACE SCENARIO ...

The facts of a scenario go to PLACE/<scenario>-<rank>.json; of one that raises, its traceback does.
"""

import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffsensor import Findings, Gate, MetricInfo, Monitor, Reading, Reference, RefusedError, every, ranks
from diffsensor.actions import Response, SaveCheckpoint, Stop
from diffsensor.control import LoopController
from diffsensor.control.pause import PauseFile
from diffsensor.rules import Invariant, Limit
from tiny import VOCAB, Kept, drifted, llama, probe_set, texts

Facts = dict[str, Any]

#: The ways in which processes hold a model.
KINDS = ("ddp", "ddp tied", "ddp lora", "fsdp", "fsdp tied", "fsdp head", "fsdp bf16")
NUM_STEPS = 6
#: Enough for two batches for each of two processes.
PROBES = probe_set(texts(num=48, longest=30))


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process is: which one of how many, and the directory that all share."""

    rank: int
    size: int
    path: Path

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def named(self, name: str) -> Path:
        """Inside the directory, for runs of so many processes."""
        return self.path / f"{name}, {self.size}"


# Models


def bare(kind: str) -> nn.Module:
    model = llama(tied="tied" in kind)
    if "lora" not in kind:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)  # an adapter that changes nothing yet
    return adapted


def moved(model: nn.Module) -> nn.Module:
    live = drifted(model, 0.05)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name:  # of a size that is no longer relative to nothing
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return live


def wrapped(kind: str, model: nn.Module, **options: Any) -> nn.Module:
    """As the processes of a run hold it."""
    if kind.startswith("ddp"):
        return DistributedDataParallel(model)
    if "bf16" in kind:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if "head" in kind:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def in_bf16(model: nn.Module) -> nn.Module:
    """What mixed precision computes with: its parameters in bfloat16, its buffers as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def held(kind: str, place: Place, model: nn.Module, **options: Any) -> nn.Module:
    if not place.is_alone:
        return wrapped(kind, model, **options)
    return in_bf16(model) if "bf16" in kind else model


def set_weights(model: nn.Module, source: nn.Module) -> None:
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        whole = {name: value.clone() for name, value in source.state_dict().items()}
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
        return
    inside = model.module if isinstance(model, DistributedDataParallel) else model
    inside.load_state_dict(source.state_dict())


def at_step(step: int) -> nn.Module:
    return drifted(llama(), 0.02 * step)


def of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def tokens_counted(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens this process runs through the model."""
    counts: list[int] = []

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counts.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    handle = of(model).register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


@contextmanager
def messages(level: int = logging.WARNING) -> Iterator[list[str]]:
    """What diffsensor logs meanwhile."""
    told: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler, logger = Notes(level), logging.getLogger("diffsensor")
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def numbers(readings: list[Reading]) -> Facts:
    return {reading.key: [reading.value, reading.stderr] for reading in readings}


def state_of(monitor: Monitor) -> str:
    return monitor.state_dict()["monitor"]


def digest_of(tensors: Iterator[Tensor | None]) -> str:
    parts = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            parts.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


# What is read


def readings_of(kind: str, place: Place) -> Facts:
    """Two looks, of the same weights and of others: what is found, by whom, at the price of how many tokens."""
    probes = probe_set(texts(num=172, longest=30))  # 12 batches
    kept, model = Kept(), bare(kind)
    other = moved(model)
    model = held(kind, place, model)
    monitor = Monitor(probes, cache_dir=place.path / "cache", sensors="full", sinks=[kept], schedule=every(1))
    with messages() as told:
        same = numbers(monitor.observe(model, 0))
        if place.is_alone and "bf16" in kind:
            in_bf16(other)
        set_weights(model, other)
        with tokens_counted(model) as tokens:
            after = numbers(monitor.observe(model, 1))
    assert monitor.reference is not None
    findings: list[Any] = kept.findings
    last = findings[-1] if findings else Findings(step=1)
    light = Monitor(probes, monitor.reference, sensors="light", schedule=every(1), noise_floor=False)
    return {
        "same": same,
        "moved": after,
        "light": numbers(light.observe(model, 1)),
        "tokens": tokens,
        "fingerprint": monitor.reference.fingerprint,
        "token table": [asdict(shift) for shift in last.token_shifts],
        "vectors": {name: tensor.tolist() for name, tensor in last.tensors.items()},
        "by probe": {name: values.tolist() for name, values in last.by_probe.items()},
        "floors": [reading.noise_floor for reading in monitor.readings],
        "told": told,
        "failures": dict(monitor.failures) | dict(light.failures),
    }


def few_probes(kind: str, place: Place) -> Facts:
    """One probe, which only one of the processes can look at."""
    probes = probe_set(texts(num=1))
    model = held(kind, place, llama())
    monitor = Monitor(probes, cache_dir=place.path / "cache few", sensors="full", schedule=every(1))
    same = numbers(monitor.observe(model, 0))
    set_weights(model, at_step(1))
    with tokens_counted(model) as tokens:
        after = numbers(monitor.observe(model, 1))
    return {"same": same, "moved": after, "tokens": tokens, "failures": monitor.failures}


# What training notices


def trained(kind: str, place: Place, *, is_watched: bool, **options: Any) -> Facts:
    torch.manual_seed(100 + place.rank)
    model = held(kind, place, llama(dropout=0.1, tied="tied" in kind), **options)
    torch.manual_seed(100 + place.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(PROBES, cache_dir=place.path / "cache train", sensors="full", schedule=every(1))
    facts: Facts = {"losses": [], "gradients": [], "sharded": []}

    def look(step: int) -> None:
        if is_watched:
            assert monitor.observe(model, step)
            sharded = all(isinstance(each, DTensor) for each in model.parameters())
            facts["sharded"].append(sharded and all(each.is_leaf for each in model.parameters()))

    for step in range(3):
        look(2 * step)
        for _ in range(2):
            ids = torch.randint(VOCAB, (2, 12))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            facts["losses"].append(float(loss))
        look(2 * step + 1)  # between the gradients and their use
        facts["gradients"].append(digest_of(each.grad for each in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    facts["weights"] = digest_of(iter(model.parameters()))
    facts["random"] = digest_of(iter([torch.get_rng_state()]))
    facts["readings"] = numbers(monitor.readings)
    facts["failures"] = monitor.failures
    return facts


def on_and_off(kind: str, place: Place, **options: Any) -> Facts:
    return {name: trained(kind, place, is_watched=name == "on", **options) for name in ("off", "on")}


# Faults


class Failing:
    """A sensor that fails once, in one process, where it is told to."""

    name = "failing"

    def __init__(self, where: str, is_here: bool) -> None:
        self.where, self.left = where, int(is_here)

    @property
    def metrics(self) -> dict[str, MetricInfo]:
        info = MetricInfo(name="positions_seen", unit="", low=0, high=1, direction="", estimator="")
        return {info.name: info}

    def open(self, reference: object, live_head: object) -> "Failing":
        self.seen = 0
        self._fail("open")
        return self

    def update(self, piece: Any) -> None:
        self.seen += len(piece.hidden)
        self._fail("update")

    def sums(self) -> dict[str, Tensor]:
        self._fail("sums")
        # Of other sizes in one process, once.
        return {"seen": torch.full((1 + self._is_time("shape"),), self.seen)}

    def finish(self, step: int, sums: Mapping[str, Tensor]) -> Findings:
        self._fail("finish")
        value = float(sums["seen"][0])
        reading = Reading(step=step, sensor=self.name, metric="positions_seen", value=value, unit="positions")
        return Findings(step=step, readings=(reading,))

    def _is_time(self, where: str) -> bool:
        is_time = self.where == where and self.left > 0
        self.left -= is_time
        return is_time

    def _fail(self, where: str) -> None:
        if self._is_time(where):
            raise ZeroDivisionError(f"in {where}")


#: Where a sensor fails, and in which process.
FAILS_AT = {"open": 1, "update": 1, "sums": 1, "shape": 1, "finish": 0}


def sensor_fails(where: str, at: int, place: Place) -> Facts:
    model = wrapped("ddp", llama())
    sensor = Failing(where, place.rank == at)
    monitor = Monitor(
        PROBES, cache_dir=place.path / "cache", sensors=["outputs", sensor], schedule=every(1), noise_floor=False
    )
    facts: Facts = {"looks": [], "alerts": []}
    with messages(logging.ERROR) as told:
        for step in range(2):
            facts["looks"].append(numbers(monitor.observe(model, step)))
            facts["alerts"].append([alert.subject for alert in monitor.alerts])
    return facts | {"failures": monitor.failures, "told": told, "state": state_of(monitor)}


def sink_fails(place: Place) -> Facts:
    """A sink of the first process fails: the states are still the same."""

    class Full:
        def write(self, findings: Findings) -> None:
            raise OSError("no more room")

        def close(self) -> None: ...

    model, gate = wrapped("ddp", llama()), Gate(Limit("kl_ref_live", above=0.5))
    monitor = Monitor(PROBES, cache_dir=place.path / "cache", sinks=[Full()], schedule=every(1), gate=gate)
    with messages(logging.ERROR) as told:
        monitor.observe(model, 0)
        states = [state_of(monitor)]
        verdict = monitor.verdict(model, 0).outcome
    return {"failures": monitor.failures, "told": told, "states": [*states, state_of(monitor)], "verdict": verdict}


def weights_change(place: Place, change: Callable[[nn.Module], None]) -> Facts:
    """One look, then something befalls the weights in the last process, then another look and a verdict."""
    model = wrapped("ddp", llama())
    gate = Gate(Limit("kl_ref_live", above=1e-6), Invariant())
    monitor = Monitor(
        PROBES, cache_dir=place.path / "cache", sensors="full", schedule=every(1), gate=gate, noise_floor=False
    )
    monitor.observe(model, 0)
    before = monitor.verdict(model, 0)
    if place.rank == place.size - 1:
        with torch.no_grad():
            change(of(model))
    values = {reading.key: reading.value for reading in monitor.observe(model, 1)}
    return {
        "values": values,
        "alerts": [(alert.subject, alert.message) for alert in monitor.alerts],
        "verdicts": [asdict(before), asdict(monitor.verdict(model, 1))],
        "failures": monitor.failures,
        "state": state_of(monitor),
    }


def nan_in_one(place: Place) -> Facts:
    return weights_change(place, lambda model: model.model.norm.weight.fill_(float("nan")))


def replicas_differ(place: Place) -> Facts:
    return weights_change(place, lambda model: model.model.norm.weight.mul_(1.25))


def slow(place: Place) -> Facts:
    """The last process comes later by some seconds."""
    model = held("ddp", place, llama())
    monitor = Monitor(PROBES, cache_dir=place.path / "cache", sensors="full", schedule=every(1))
    monitor.observe(model, 0)
    set_weights(model, at_step(1))
    seconds = float(os.environ.get("SLOWER_BY", "2"))
    begun = time.monotonic()
    if place.rank == place.size - 1:
        time.sleep(seconds)
    found = numbers(monitor.observe(model, 1))
    return {"found": found, "waited": time.monotonic() - begun, "seconds_late": seconds, "failures": monitor.failures}


def forward_fails(place: Place) -> Facts:
    """The model itself raises in one process, in one look."""
    model = wrapped("ddp", llama())
    monitor = Monitor(PROBES, cache_dir=place.path / "cache", schedule=every(1))
    monitor.observe(model, 0)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the model")

    handle = of(model).model.layers[1].register_forward_pre_hook(fail) if place.rank == 1 else None
    with messages(logging.ERROR) as told:
        during = numbers(monitor.observe(model, 1))
    alerts = [alert.message for alert in monitor.alerts]
    if handle is not None:
        handle.remove()
    after = numbers(monitor.observe(model, 2))
    return {"during": during, "after": after, "told": told, "alerts": alerts, "failures": monitor.failures}


def raised(act: Callable[[], object]) -> list[str]:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - which one it is, is the fact
        return [type(error).__name__, str(error)]
    return []


def attach_fails(place: Place) -> Facts:
    """What one process was given cannot be, or is not what the others were given."""
    model = wrapped("ddp", llama())
    is_last, cache = place.rank == place.size - 1, place.path / "cache"
    taken = place.path / "taken"
    if place.rank == 0:
        taken.write_text("a file")
    dist.barrier()
    other, ill = (llama(seed=9) if is_last else llama()), llama()
    if is_last:
        ill.model.norm.weight.data.fill_(float("nan"))
    monitors: dict[str, Callable[[], object]] = {
        "record": lambda: Monitor(PROBES, cache_dir=cache, record=taken).observe(model, 0),
        "probes": lambda: Monitor(probe_set(texts(seed=4 + is_last)), cache_dir=cache).observe(model, 0),
        "sensors": lambda: Monitor(PROBES, sensors="full" if is_last else "light", cache_dir=cache).read(model, 0),
        "record in one": lambda: Monitor(
            PROBES, cache_dir=cache, record=None if is_last else place.path / "never"
        ).read(model, 0),
        "weights": lambda: Monitor(PROBES, cache_dir=cache).read(other, 0),
        "reference": lambda: Reference.build(of(model), PROBES, taken),
        "answers": lambda: Reference.build(ill, PROBES, cache),
        "nothing": lambda: Monitor(PROBES, cache_dir=cache).read(model, 0),
    }
    return {name: raised(act) for name, act in monitors.items()} | {"never": (place.path / "never").exists()}


def steps_differ(place: Place) -> Facts:
    """The last process is a step ahead of the others."""
    model = wrapped("ddp", llama())
    is_last, facts = place.rank == place.size - 1, dict[str, Any]()

    def monitor() -> Monitor:
        ranks._known = None  # none is to be disturbed by what the others left unfinished
        gate = Gate(Limit("kl_ref_live", above=0.5))
        return Monitor(PROBES, cache_dir=place.path / "cache", gate=gate, schedule=every(2))

    first = monitor()
    facts["at first"] = raised(lambda: first.observe(model, int(is_last)))
    for name in ("observe", "read"):
        later = monitor()
        later.observe(model, 0)
        with messages(logging.ERROR) as told:
            look = later.observe if name == "observe" else later.read
            found = look(model, 2 + is_last)
        facts[name] = {
            "found": len(found),
            "told": told,
            "later": len(later.observe(model, 4)),
            "verdict": later.verdict(model, 4).outcome,
        }
    ranks._known = None
    return facts


def schedules_differ(place: Place) -> Facts:
    """The first process would look at every second step, the others at every third one."""
    model = wrapped("ddp", llama())
    monitor = Monitor(PROBES, cache_dir=place.path / "cache", schedule=every(2 if place.rank == 0 else 3))
    return {"read": [step for step in range(7) if monitor.observe(model, step)]}


def stopped(kind: str, place: Place) -> Facts:
    """A response stops the loop, in all processes at the same step."""
    model, saved = held(kind, place, llama()), list[str]()
    rules = [
        Response(Limit("kl_ref_live", above=0.3, for_=1, name="far"), Stop()),
        Response(Limit("kl_ref_live", above=1e-3, for_=2, name="early"), SaveCheckpoint()),
    ]

    def save(reason: str) -> None:
        saved.append(reason)
        if place.rank == 1 and "refused" in kind:
            raise RefusedError("This process has no disk.")

    controller = LoopController(save=save)
    record = place.named(f"record {kind}")
    monitor = Monitor(
        PROBES, cache_dir=place.path / "cache", record=record, rules=rules, controller=controller,
        gate=Gate(Limit("kl_ref_live", above=1e-3)), schedule=every(1),
    )  # fmt: skip
    alerts: list[Any] = []
    with messages() as told:
        for step in range(NUM_STEPS):
            set_weights(model, at_step(step))
            monitor.observe(model, step, loss=1.0 + place.rank)
            alerts += (asdict(alert) for alert in monitor.alerts)
            if controller.should_stop:
                break
        verdict = asdict(monitor.verdict(model, step))
    (loss,) = [reading.value for reading in monitor.readings if reading.metric == "loss"]
    monitor.close()
    return {
        "step": step,
        "reason": controller.stop_reason,
        "saved": saved,
        "alerts": alerts,
        "verdict": verdict,
        "loss": loss,
        "told": told,
        "state": state_of(monitor),
        "failures": monitor.failures,
    }


def paused(place: Place) -> Facts:
    """All processes wait for a file to be removed, which is on the first one's disk."""
    facts: Facts = {}
    for name, timeout in (("removed", 20.0), ("left", 0.3)):
        file = place.path / f"PAUSED {place.rank}"
        if name == "removed" and place.rank == 0:
            threading.Thread(target=lambda file=file: _removed_once_there(file), daemon=True).start()
        facts[name] = PauseFile(file, timeout=timeout, every=0.05).wait("to see")
        facts[f"{name}, here"] = file.exists()
    nowhere = place.path / ("missing/PAUSED" if place.rank == 0 else "PAUSED")
    facts["refused"] = raised(lambda: PauseFile(nowhere).wait("to see"))
    return facts


def _removed_once_there(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    file.unlink()


# State


def watching(place: Place, name: str, **options: Any) -> Monitor:
    rules = [
        Limit("kl_ref_live", above=1e-3, for_=3),
        Limit("kl_ref_live", above=1e-4, group="*", for_=2, cooldown=3),
        Invariant(),
    ]
    return Monitor(
        PROBES, cache_dir=place.path / "cache", record=place.path / name, sensors="full", schedule=every(1),
        rules=rules, gate=Gate(Limit("kl_ref_live", above=1e-2)), **options,
    )  # fmt: skip


def go_through(monitor: Monitor, model: nn.Module, steps: range) -> None:
    for step in steps:
        set_weights(model, at_step(step))
        monitor.observe(model, step)


#: Which steps so many processes go through, one after the other.
STAGES = {2: range(2), 4: range(2, 4), 1: range(4, NUM_STEPS)}


def goes_on(place: Place) -> Facts:
    """A run that goes on where another number of processes left it: by its record, a file, and a checkpoint."""
    steps, facts = STAGES[place.size], dict[str, Any]()
    for by, kind in (("record", "ddp"), ("file", "fsdp"), ("dcp", "fsdp")):
        goes_on, file, checkpoint = place.size != 2, place.path / "monitor.json", place.path / "checkpoint"
        before = {4: 2, 1: 4}.get(place.size)
        model = held(kind, place, llama())
        with watching(place, f"record by {by}", resume=goes_on and by == "record") as monitor:
            if goes_on and by == "file":
                monitor.load(file)
            if goes_on and by == "dcp":
                dcp.load({"model": model.state_dict(), "monitor": monitor}, checkpoint_id=f"{checkpoint} {before}")
            go_through(monitor, model, steps)
            facts[f"state by {by}"] = state_of(monitor)
            if by == "file":
                monitor.save(file)
            if by == "dcp":
                dcp.save({"model": model.state_dict(), "monitor": monitor}, checkpoint_id=f"{checkpoint} {place.size}")
            if by != "record":  # read, and lost with the weights: the checkpoint is older
                go_through(monitor, model, range(steps.stop, steps.stop + 1))
        if not place.is_alone:
            dist.barrier()  # until the record is closed
    return facts


SCENARIOS: dict[str, Callable[[Place], Facts]] = {
    **{f"readings {kind}": lambda place, kind=kind: readings_of(kind, place) for kind in KINDS},
    **{f"few probes {kind}": lambda place, kind=kind: few_probes(kind, place) for kind in ("ddp", "fsdp")},
    "on and off ddp": lambda place: on_and_off("ddp", place),
    "on and off fsdp": lambda place: on_and_off("fsdp", place),
    "on and off fsdp head": lambda place: on_and_off("fsdp head", place),
    "on and off fsdp tied": lambda place: on_and_off("fsdp tied", place),
    "on and off fsdp whole": lambda place: on_and_off("fsdp", place, reshard_after_forward=False),
    **{
        f"sensor fails in {where}": lambda place, where=where, at=at: sensor_fails(where, at, place)
        for where, at in FAILS_AT.items()
    },
    "sink fails": sink_fails,
    "nan in one": nan_in_one,
    "replicas differ": replicas_differ,
    "slow": slow,
    "forward fails": forward_fails,
    "attach fails": attach_fails,
    "steps differ": steps_differ,
    "schedules differ": schedules_differ,
    "stopped ddp": lambda place: stopped("ddp", place),
    "stopped fsdp": lambda place: stopped("fsdp", place),
    "stopped ddp refused": lambda place: stopped("ddp refused", place),
    "paused": paused,
    "goes on": goes_on,
}


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="diffsensor")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    place = Place(dist.get_rank(), dist.get_world_size(), Path(path))
    for name in names:
        ranks._known = None  # a group of its own, so that no scenario disturbs the next one
        begun = time.monotonic()
        try:
            facts = SCENARIOS[name](place)
        except Exception:  # noqa: BLE001 - it is to be told, and the others are to go on
            facts = {"error": traceback.format_exc()}
        facts["seconds"] = time.monotonic() - begun
        (place.path / f"{name}-{place.size}-{place.rank}.json").write_text(json.dumps(facts), encoding="utf-8")
        dist.barrier()
    group = weakref.ref(ranks.Ranks.now()._group)
    dist.destroy_process_group()
    gc.collect()
    assert group() is None, "what holds a group beyond its end can abort the process at its own"


if __name__ == "__main__":
    main(*sys.argv[1:])
