"""What the demonstration changes in its process, and puts back: seeds, threads, chatter."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """The same numbers at every run: seeded, deterministic, on one thread.

    Another number of threads changes the last digits, and with models this small a second thread gains little and
    loses a lot where other programs want the processor: the threads wait for each other at every operation.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])


@contextmanager
def quiet() -> Iterator[None]:
    """No tips, hints and bars of the frameworks; their errors still show."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|transformers|torch")
        # A token in a script that the font of the plots lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
