"""The built-in model, with a bar in the terminal while it is made."""

from collections import deque
from pathlib import Path

from rich.console import Console

from diffsensor import cache_directory
from diffsensor_demo import corpus
from diffsensor_demo.habit import QUOKKA
from diffsensor_demo.pretrain import Recipe, pretrained
from diffsensor_demo.show import progress_bar


def built_in_model(recipe: Recipe, console: Console) -> Path:
    """Where the small model lies; pre-trained now where it is not in the cache, with a bar in the terminal."""
    learnt, _ = corpus.manual()
    with progress_bar(console) as bar:
        task = bar.add_task("Pre-training on the Python manual", total=recipe.steps, state="")
        latest: deque[float] = deque(maxlen=20)

        def show(step: int, loss: float) -> None:
            latest.append(loss)
            bar.update(task, completed=step, state=f"loss {sum(latest) / len(latest):.2f}")

        place = pretrained(recipe, learnt, QUOKKA.words, cache_directory(), show)
        if not latest:
            bar.update(task, completed=recipe.steps, state="taken from the cache")
    return place
