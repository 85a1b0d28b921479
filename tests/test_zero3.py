"""DeepSpeed's ZeRO-3 in two processes on the CPU: read as one process reads the whole model, with nothing left behind.

The processes are started once, with this very file as their program.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from diffsensor import KLPenalty, Monitor, Reading, Reference, checksums
from diffsensor.capture import Capture
from diffsensor.checksums import checksum
from diffsensor.control import LoopController
from diffsensor.errors import CaptureError
from diffsensor.rules import Invariant

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers
with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 6, 2


def lora_on_the_head() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    torch.manual_seed(2)
    return get_peft_model(tiny.llama(), config).train()


#: Each is a kind of head: trained, frozen, the embedding itself, with an adapter.
MODELS = {
    "trained": tiny.llama,
    "frozen": tiny.frozen_head,
    "tied": lambda: tiny.llama(tied=True),
    "lora": lora_on_the_head,
}
CASES = [*MODELS, "scattered"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.named_parameters()}


def train(name: str, out: Path, *, watched: bool) -> None:
    """One run in one of the processes: it leaves its readings and its last weights in `out`."""
    import deepspeed
    import torch.distributed as dist

    model = MODELS.get(name, tiny.llama)()
    # Otherwise models as small as these would be kept whole.
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if name == "scattered":  # nothing is kept for its next use, and what comes next is gathered ahead
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2000}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "gradient_clipping": 1.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    monitor = Monitor(
        tiny.probe_set(), sensors="full", cache_dir=out / "cache", rules=[Invariant()], schedule=lambda step: True
    )
    found: list[list[tuple[str, float, float]]] = []
    for step in range(STEPS + 1):
        if watched and step % EVERY == 0:
            before = [p.ds_status.name for p in model.parameters()]
            readings = monitor.read(engine if step else model, step)
            after = [p.ds_status.name for p in model.parameters()]
            assert after == before, (name, step, before, after)
            found.append([(each.key, each.value, each.stderr) for each in readings])
        if step == STEPS:
            break
        rows = torch.randint(3, tiny.VOCAB, (2, 9), generator=generator)
        engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
        engine.step()
    told = {
        "readings": found,
        "fingerprint": monitor.reference.fingerprint if monitor.reference else "",
        "failures": monitor.failures,
        "alerts": [alert.message for alert in monitor.alerts],
        "hookpoints": [] if monitor.reference is None else list(monitor.reference.hookpoints),
    }
    rank = dist.get_rank()
    (out / f"told-{rank}.json").write_text(json.dumps(told))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if rank == 0:
            save_file({name: tensor.clone() for name, tensor in weights_of(model).items()}, out / "weights.safetensors")


def main(out: Path) -> None:
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for name in CASES:
        for watched in (True, False):
            place = out / name / ("watched" if watched else "alone")
            place.mkdir(parents=True, exist_ok=True)
            train(name, place, watched=watched)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero3")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    # The first time DeepSpeed compiles a piece of its own, which takes minutes where the machine is busy.
    done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def told(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((runs / name / "watched" / f"told-{rank}.json").read_text())


@with_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_two_processes_read_under_zero3_what_one_reads_of_the_whole_model(
    runs: Path, name: str, tmp_path: Path
) -> None:
    model = MODELS.get(name, tiny.llama)()
    reference = Reference.build(model, tiny.probe_set(), tmp_path)
    monitor = Monitor(tiny.probe_set(), reference, sensors="full")
    last = load_file(runs / name / "watched" / "weights.safetensors")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(last[key])
    expected: list[Reading] = monitor.read(model, STEPS)
    there = told(runs, name)
    assert there["failures"] == {}
    assert there["alerts"] == []
    # No reading of another model can be taken from the cache by mistake: the fingerprint is that of the whole weights.
    assert there["fingerprint"] == reference.fingerprint
    assert there["hookpoints"] == list(reference.hookpoints)
    assert all(value == 0 for _, value, _ in there["readings"][0])
    found = {key: (value, stderr) for key, value, stderr in there["readings"][-1]}
    assert found.keys() == {reading.key for reading in expected}
    for reading in expected:
        assert found[reading.key] == pytest.approx((reading.value, reading.stderr), rel=1e-6, abs=1e-12, nan_ok=True)
    assert any(reading.value > 1e-3 for reading in expected)


@with_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_all_processes_are_told_the_same(runs: Path, name: str) -> None:
    assert json.dumps(told(runs, name, 0)) == json.dumps(told(runs, name, 1))


@with_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_training_under_zero3_is_bit_for_bit_that_without_a_monitor(runs: Path, name: str) -> None:
    watched, alone = (load_file(runs / name / kind / "weights.safetensors") for kind in ("watched", "alone"))
    assert all(torch.equal(watched[key], alone[key]) for key in alone)
    at_first = weights_of(MODELS.get(name, tiny.llama)())
    assert any(not torch.equal(alone[key], at_first[key]) for key in alone)


class Part(nn.Parameter):
    """A parameter as ZeRO-3 leaves it in one process; the part's end may lie beyond the parameter's."""

    def __new__(cls, whole: Tensor, rank: int, world: int) -> "Part":
        return super().__new__(cls, torch.empty(0, dtype=whole.dtype), requires_grad=False)

    def __init__(self, whole: Tensor, rank: int, world: int) -> None:
        size = -(-whole.numel() // world)
        padded = torch.cat([whole.flatten(), torch.full((size * world - whole.numel(),), 7).to(whole.dtype)])
        self.ds_numel, self.ds_shape = whole.numel(), whole.shape
        self.ds_tensor = padded[rank * size : (rank + 1) * size].clone()
        self.ds_process_group = None
        self.ds_status, self.ds_active_sub_modules = "NOT_AVAILABLE", set[int]()

    def all_gather(self, param_list: object) -> None: ...

    def partition(self) -> None: ...


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (11,), (1, 1), (), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_sums_of_the_parts_are_those_of_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(shape).to(dtype)
    parts = [Part(whole, rank, world) for rank in range(world)]
    monkeypatch.setattr(checksums.dist, "get_world_size", lambda _group: world)
    monkeypatch.setattr(checksums.dist, "all_reduce", lambda _sums, group: None)
    added: list[Tensor] = []
    for rank, part in enumerate(parts):
        monkeypatch.setattr(checksums.dist, "get_rank", lambda _group, rank=rank: rank)
        mine = checksums._sums_of_parts(part, part.device)
        added = [one + other for one, other in zip(added, mine, strict=True)] if added else list(mine)
    expected = checksums._sums(whole)
    assert all(torch.equal(one, other) for one, other in zip(added, expected, strict=True))
    # And so the checksum is: here that of the one process that there is.
    monkeypatch.setattr(checksums.dist, "get_world_size", lambda _group: 1)
    monkeypatch.setattr(checksums.dist, "get_rank", lambda _group: 0)
    assert checksum(Part(whole, 0, 1)) == checksum(whole)


def test_parts_that_do_not_make_up_the_parameter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(torch.randn(4, 4), 0, 2)
    part.ds_tensor = part.ds_tensor[:3]  # packed into fewer numbers
    monkeypatch.setattr(checksums.dist, "get_world_size", lambda _group: 2)
    monkeypatch.setattr(checksums.dist, "get_rank", lambda _group: 0)
    with pytest.raises(CaptureError, match=r"parts of shape \[3\], which do not make it up"):
        checksum(part)


def test_a_rollback_of_parameters_in_parts_is_refused() -> None:
    model = in_parts(tiny.llama()).requires_grad_()
    controller = LoopController(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "sharded over processes" in controller.cannot("rollback")


def test_a_copy_of_parameters_in_parts_is_refused() -> None:
    with pytest.raises(CaptureError, match="a copy of it would be empty"):
        KLPenalty.frozen_copy(in_parts(tiny.llama()))


def test_a_penalty_on_parameters_in_parts_is_refused() -> None:
    reference = tiny.llama()
    with pytest.raises(CaptureError, match="needs the output head whole"):
        KLPenalty(reference).check(in_parts(tiny.llama()))


def test_the_stack_of_blocks_is_found_by_the_weights_of_all_processes() -> None:
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)]), "many": nn.ModuleList([nn.Linear(8, 8)])})
    assert list(Capture(in_parts(model)).modules) == ["many.0"]


def in_parts(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, Part(parameter.detach(), 0, 2))
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Not by the usual way, on which a process that has used DeepSpeed and gloo is aborted now and then, read or not.
    os._exit(0)
