"""Synthetic healthy streams, changes to them, and how sure a share is: what the benchmarks of rules have in common."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import signal, stats

#: So many readings are left out in front, so that an autoregressive stream has forgotten its beginning.
BURN_IN = 200

Streams = Float[ndarray, "stream look"]
Generator = Callable[[np.random.Generator, int, int], Streams]


def iid(rng: np.random.Generator, num: int, length: int) -> Streams:
    """Normal, independent, mean 0, standard deviation 1."""
    return rng.standard_normal((num, length))


def heavy_tails(rng: np.random.Generator, num: int, length: int) -> Streams:
    """Student's t with 3 degrees of freedom, independent, standard deviation 1."""
    return rng.standard_t(3, (num, length)) / math.sqrt(3)


def autoregressive(phi: float) -> Generator:
    """x_t = phi x_(t-1) + noise, standard deviation 1."""

    def streams(rng: np.random.Generator, num: int, length: int) -> Streams:
        noise = rng.standard_normal((num, length + BURN_IN))
        found: Streams = signal.lfilter([1.0], [1.0, -phi], noise, axis=1)[:, BURN_IN:] * math.sqrt(1 - phi * phi)
        return found

    return streams


def saturating_trend(rng: np.random.Generator, num: int, length: int) -> Streams:
    """10 (1 - exp(-t / tau)) with normal noise of standard deviation 1; tau from 20 to 150, another one each time."""
    tau = rng.uniform(20, 150, (num, 1))
    trend: Streams = 10 * (1 - np.exp(-np.arange(1, length + 1) / tau)) + iid(rng, num, length)
    return trend


#: What a metric does in a run where nothing is wrong, in standard deviations.
HEALTHY: dict[str, Generator] = {
    "iid": iid,
    "heavy tails": heavy_tails,
    "AR(.5)": autoregressive(0.5),
    "AR(.9)": autoregressive(0.9),
    "saturating trend": saturating_trend,
}


def step_from(streams: Streams, look: int, size: float, layers: int | None = None) -> Streams:
    """The first `layers` of them (None: all) with `size` added from `look` on."""
    changed = streams.copy()
    changed[:layers, look:] += size
    return changed


def slope_from(streams: Streams, look: int, size: float, layers: int | None = None) -> Streams:
    """The first `layers` of them (None: all) rising by `size` a look from `look` on."""
    changed = streams.copy()
    changed[:layers, look:] += size * np.arange(1, streams.shape[1] - look + 1)
    return changed


def binomial_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of Clopper and Pearson (1934) for a share of which k in n were seen."""
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return low, high
