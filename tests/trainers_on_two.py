"""What test_trainer_ranks.py runs in two processes: `torchrun --nproc-per-node 2 trainers_on_two.py WHAT DIRECTORY`.

Each process leaves what it found in DIRECTORY/<what>-<rank>.json.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import DistributedType, PartialState
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from diffsensor import Gate
from diffsensor.actions import Response, Rollback, Stop
from diffsensor.rules import Invariant, Limit
from diffsensor_transformers import DriftMonitorCallback
from tiny_trainers import TRAINERS, Kept, differences, lora, text_probes, tiny_model, trace_of

RANK = int(os.environ["RANK"])
#: The global batch of one process of batches of 4; plain SGD, which does not blow up differences in rounding.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-1, "per_device_train_batch_size": 2}
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


def model_of(path: Path) -> Any:
    return tiny_model(path, attention_dropout=0.0)


def monitor(path: Path, every_n_steps: int = 2, **options: Any) -> DriftMonitorCallback:
    return DriftMonitorCallback(
        text_probes(), every_n_steps, **({"sensors": "full", "cache_dir": path / "cache"} | options)
    )


def traced(name: str, path: Path, run: str, *callbacks: Any, **options: Any) -> dict[str, Any]:
    """`trace_of`, in a directory of its own beside the model."""
    (path / run).mkdir(exist_ok=True)
    model = options.pop("model", lambda _: model_of(path / "model"))
    return trace_of(name, path / run, callbacks, model=model, **options)


def summed(trace: dict[str, Any]) -> dict[str, float]:
    return {name: weight.double().sum().item() for name, weight in trace["weights"].items()}


def ddp(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole = PLAIN | SAVES | {"max_steps": 6}
    off = traced("Trainer", path, "off", **whole)
    watching = monitor(path, rules=[Invariant()], gate=Gate(Limit("kl_ref_live", above=1e9)))
    on = traced("Trainer", path, "on", watching, **whole)
    found["differences"] = differences(off, on)
    found["ours"], found["last passed"] = on["ours"], str(watching.last_passed)

    peft = {"peft_config": lora(), "max_steps": 2}
    runs = [traced("Trainer", path, f"lora-{len(each)}", *each, **(PLAIN | peft)) for each in ([], [monitor(path)])]
    found["differences with LoRA"] = differences(*runs)

    stops = Response(Limit("kl_ref_live", above=1e-9, for_=1), Stop())
    found["stopped at"] = traced("Trainer", path, "stop", monitor(path, rules=[stops]), **whole)["step"]

    # What step 2 reads passes, what step 4 reads does not.
    kl = {entry["step"]: entry["diffsensor/kl_ref_live"] for entry in on["ours"]}
    limit = Limit("kl_ref_live", above=(kl[2] + kl[4]) / 2, for_=1, confidence=0.500001)
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    chosen = monitor(path, gate=Gate(limit))
    best = traced("Trainer", path, "best", chosen, **(whole | evaluates))
    found["best passed"] = str(chosen.last_passed)
    found["best"] = summed(best)

    rolls = Response(limit, Rollback(), Stop())
    back = traced("Trainer", path, "back", monitor(path, rules=[rolls]), **(PLAIN | {"max_steps": 6}))
    found["rolled back"] = summed(back)

    # A run that goes on has no copy in memory, and goes back to the checkpoint that passed.
    run = path / "best" / "run"
    options = whole | {"save_total_limit": None}
    watching = monitor(path, rules=[Response(limit, Rollback(), Stop())], gate=Gate(limit))
    trainer = TRAINERS["Trainer"](run, [watching], model_of(path / "model"), **options)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    found["rolled back to a checkpoint"] = summed({"weights": trainer.model.state_dict()})

    # A run of one process goes on in two.
    kept = Kept()
    trainer = TRAINERS["Trainer"](path / "one" / "run", [monitor(path), kept], model_of(path / "model"), **whole)
    trainer.train(resume_from_checkpoint=str(path / "one" / "run" / "checkpoint-2"))
    found["went on"] = [entry for entry in trainer.state.log_history if "diffsensor/kl_ref_live" in entry]
    return found


def grpo(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    options = {"beta": 0.1, "temperature": 0.8, "logging_steps": 2, "per_device_train_batch_size": 2, **SAVES}
    off = traced("GRPO", path, "off", **options)
    on = traced("GRPO", path, "on", monitor(path, temperature="policy"), **options)
    found["differences"] = differences(off, on)
    found["ours"], found["history"] = on["ours"], on["history"]
    return found


def fsdp(path: Path) -> dict[str, Any]:
    """With the model cut up by accelerate, as it is told at its launch, and by transformers itself."""
    found: dict[str, Any] = {}
    own = PartialState.__init__

    def as_on_gpus(self: PartialState, *args: Any, **options: Any) -> None:
        # On CPUs accelerate does not cut anything up, and does not say so.
        own(self, *args, **options)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with mock.patch.object(PartialState, "__init__", as_on_gpus):
        watching = monitor(path, gate=Gate(Limit("kl_ref_live", above=1e9)))
        runs = [
            traced("Trainer", path, f"accelerate-{len(each)}", *each, **PLAIN, **SAVES) for each in ([], [watching])
        ]
    found["accelerate"] = of_sharded(path / f"accelerate-{RANK}.pt", *runs)
    found["accelerate"]["last passed"] = str(watching.last_passed)
    del os.environ["ACCELERATE_USE_FSDP"]

    def cut_up(_: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path / "model", distributed_config=DistributedConfig(fsdp_size=2))

    runs = [traced("Trainer", path, f"own-{len(each)}", *each, model=cut_up, **PLAIN) for each in ([], [monitor(path)])]
    found["transformers"] = of_sharded(path / f"transformers-{RANK}.pt", *runs)
    return found


def of_sharded(file: Path, off: dict[str, Any], on: dict[str, Any]) -> dict[str, Any]:
    rows = [trace["weights"]["lm_head.weight"].to_local().shape[0] for trace in (off, on)]
    for trace in (off, on):
        trace["weights"] = {name: weight.full_tensor() for name, weight in trace["weights"].items()}
    torch.save(on["weights"], file)
    return {"rows": rows, "differences": differences(off, on), "ours": on["ours"]}


WHAT: dict[str, Callable[[Path], dict[str, Any]]] = {"ddp": ddp, "fsdp": fsdp, "grpo": grpo}

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, directory = sys.argv[1], Path(sys.argv[2])
    found = WHAT[what](directory)
    (directory / f"{what}-{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
