"""What holds for every test: shapes and types are checked, nothing goes to the network, chance is seeded."""

import os

# Read by the libraries when they are first imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    JSONARGPARSE_DEPRECATION_WARNINGS="off",  # about a call in Lightning's own CLI
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
)

from jaxtyping import config, install_import_hook

# Before anything of ours is imported: what is loaded already stays unchecked.
install_import_hook(
    ["diffsensor", *(f"diffsensor_{name}" for name in ("demo", "lightning", "transformers", "wandb"))],
    "type_checks.check",
)

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# The number of threads changes the last digits.
torch.set_num_threads(1)

settings.register_profile("same every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same every time")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of types, as users run it: for tests that give an argument of a wrong type."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
