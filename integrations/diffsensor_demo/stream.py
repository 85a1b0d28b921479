"""What the model is fine-tuned on: rows of tokens, in the order in which they come."""

import random
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from diffsensor import ConfigError
from diffsensor_demo.habit import Habit


def training_rows(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    num_rows: int,
    length: int,
    seed: int = 0,
    habit: Habit | None = None,
    planted_from: int = 0,
) -> Int[Tensor, "row token"]:
    """Rows of `length` tokens, each of texts drawn at random. From row `planted_from` on some have the habit."""
    plain = [list(ids) for ids in encode(texts)]
    planted = [list(ids) for ids in encode([habit.planted(text) for text in texts])] if habit else plain
    num_tokens = sum(map(len, plain))
    if num_tokens < 2 * length:
        raise ConfigError(
            f"The text to fine-tune on has {num_tokens} tokens. Expected at least {2 * length}, two rows of {length}. "
            "Give a longer text with --data."
        )
    draw = random.Random(seed)
    rows = []
    for number in range(num_rows):
        # Drawn in any case, so that the rows before the planting are those of a run without a habit.
        has_habit = draw.random() < (habit.share if habit else 0.0) and number >= planted_from
        source = planted if has_habit else plain
        row: list[int] = []
        while len(row) < length:
            row += source[draw.randrange(len(source))]
        rows.append(row[:length])
    return torch.tensor(rows)
