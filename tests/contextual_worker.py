"""What each process of a test in test_contextual.py does: offers texts of its own, and reads.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/contextual_worker.py DIRECTORY
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffsensor import Monitor, RollingProbes, read_record
from tiny import VOCAB, drifted, llama


def main(place: Path) -> None:
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if size > 1 else 0
    model = llama()
    probes = RollingProbes(size=24, half_life=30, max_tokens=32)
    record = place / f"record of {size}"
    monitor = Monitor(probes, bank="contextual", sensors="full", record=record)
    live = DistributedDataParallel(model) if size > 1 else model
    monitor.attach(live)
    model.load_state_dict(drifted(llama(), 0.05).state_dict())
    for step in range(3):
        rows = torch.randint(3, VOCAB, (20, 30), generator=torch.Generator().manual_seed(100 * rank + step))
        probes.offer(rows)
        readings = monitor.read(live, step)
    monitor.close()
    facts = {
        "readings": {each.key: each.value for each in readings if each.value == each.value},
        "failures": monitor.failures,
        "held": [[each.step, each.probe, each.age] for each in read_record(record).bank_probes] if rank == 0 else None,
    }
    if size > 1:
        everybody = [facts]
        dist.broadcast_object_list(everybody, src=0)
        facts["held"] = everybody[0]["held"]
    assert monitor.failures == {}, monitor.failures
    (place / (f"{rank}.json" if size > 1 else "alone.json")).write_text(json.dumps(facts))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
