"""What feeds rolling probes: the batches that a trainer trains on, or the completions that it samples."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffsensor import ConfigError, RollingProbes
from diffsensor_transformers.rollouts import sampler

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("offered needs transformers: pip install 'diffsensor[transformers]'") from error

_OF_BATCH = ("input_ids", "attention_mask", "labels", "position_ids")
_OF_ROLLOUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")


@runtime_checkable
class Offers(Protocol):
    """Offers texts of a run to rolling probes, while it trains."""

    def end_step(self) -> None:
        """After a step, and before it is read."""
        ...

    def undo(self) -> None:
        """Leave the trainer as it was found."""
        ...


def offered(trainer: Trainer, probes: RollingProbes) -> Offers:
    """Offer to these probes what this trainer trains on, from now on.

    Of TRL's trainers that sample (GRPO, RLOO, Distillation) that is one completion for each prompt, whenever new ones
    were sampled: after its prompt, of which nothing counts. Of all others it is each row of a training batch, of which
    those tokens count that the loss counts.
    """
    return OfferedRollouts(trainer, probes) if sampler(trainer) else OfferedBatches(trainer, probes)


class OfferedBatches:
    """What stands in the place of a trainer's `get_batch_samples`, until `undo`."""

    def __init__(self, trainer: Trainer, probes: RollingProbes) -> None:
        self._trainer, self._probes = trainer, probes
        self._own: Any = trainer.get_batch_samples
        self._is_of_class = "get_batch_samples" not in vars(trainer)
        vars(trainer)["get_batch_samples"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = self._own(*args, **kwargs)
        for batch in batches:
            self._offer(batch)
        return batches, num_items

    def _offer(self, batch: object) -> None:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            held = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(
                f"{type(self._trainer).__name__} trains on batches of {held}, and rolling probes need 'input_ids'. "
                "Take the callback with rolling probes out, or offer texts in a loop of your own."
            )
        known = {name: batch[name] for name in _OF_BATCH if name in batch}
        self._probes.offer(known, counted=batch.get("completion_mask"))

    def end_step(self) -> None:
        pass

    def undo(self) -> None:
        vars(self._trainer)["get_batch_samples"] = self._own
        if self._is_of_class:
            del vars(self._trainer)["get_batch_samples"]


class OfferedRollouts:
    """Offers completions out of the buffer in which a trainer of TRL's keeps them until they are used up."""

    def __init__(self, trainer: Any, probes: RollingProbes) -> None:
        self._trainer, self._probes = trainer, probes
        self._seen: Tensor | None = None

    def end_step(self) -> None:
        buffered = self._trainer._buffered_inputs
        if not buffered or buffered[0]["completion_ids"] is self._seen:
            return
        self._seen = buffered[0]["completion_ids"]
        prompts: set[tuple[int, ...]] = set()
        for batch in buffered:
            first = []
            for row, prompt in enumerate(map(tuple, batch["prompt_ids"].tolist())):
                # Completions of one prompt are no independent texts.
                if prompt not in prompts:
                    prompts.add(prompt)
                    first.append(row)
            self._offer({name: batch[name][first] for name in _OF_ROLLOUTS if name in batch})

    def _offer(self, rows: Mapping[str, Tensor]) -> None:
        counted = rows["completion_mask"]
        if "tool_mask" in rows:
            counted = counted * rows["tool_mask"]
        batch = {
            "input_ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1),
            "attention_mask": torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1),
        }
        self._probes.offer(batch, counted=torch.cat([torch.zeros_like(rows["prompt_mask"]), counted], 1))

    def undo(self) -> None:
        self._seen = None
