"""What a reading costs, in bare forward passes of the live model over the same probe tokens; and what peers' ways cost.

    python benchmarks/bench_reading.py [--configs A B] [--probes 8 32] [--rounds 7] [--memory] [--profile] [--cuda]

One round runs every method once, in an order that rotates from round to round, and the bare forward pass before
the first and after the last. Shown is the median over rounds of a method's time over the bare one's of its round.
Time is CPU time of this process (with --cuda: of the GPU, by events), so that neighbours on the machine disturb
little. Ends with 1 where a target is missed and --check is given: time on a shared machine is no test.
"""

import argparse
import copy
import cProfile
import gc
import json
import platform
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import diffsensor
from diffsensor import Monitor, ProbeSet, Reference

PROBE_TOKENS = 128
#: Probes in one forward pass of the bare model and of the peers.
BATCH_PROBES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A Llama with random weights and a tied head. Targets are ratios to the bare forward pass; memory in MB."""

    name: str
    dim: int
    inner: int
    layers: int
    heads: int
    vocab: int
    targets: dict[str, float] = field(default_factory=dict)
    memory_target: float = 0.0

    def build(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.dim,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=2 * PROBE_TOKENS,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()


LIGHT, STRIDE, LIGHT_TRAINED = "light", "light, every 4th position", "light, trained head"
FULL, FULL_TRAINED = "full", "full, trained head"
NAIVE, TOOLKIT, CACHED = "two forwards, all metrics", "two forwards, one KL", "cached bf16 logits"
BARE, BODY = "bare forward", "body alone"
METHODS = (BARE, BODY, LIGHT, STRIDE, LIGHT_TRAINED, FULL, FULL_TRAINED, NAIVE, TOOLKIT, CACHED)

CONFIGS = {
    "A": Config(
        name="A", dim=512, inner=1376, layers=8, heads=8, vocab=32_000, memory_target=50.0,
        targets={LIGHT: 1.10, STRIDE: 0.80, LIGHT_TRAINED: 1.75, FULL: 1.75, FULL_TRAINED: 1.75},
    ),
    "B": Config(
        name="B", dim=256, inner=688, layers=4, heads=4, vocab=128_256, memory_target=150.0,
        targets={LIGHT: 1.20, STRIDE: 0.45, LIGHT_TRAINED: 2.1, FULL: 2.1, FULL_TRAINED: 2.1},
    ),
    "tiny": Config(name="tiny", dim=32, inner=64, layers=2, heads=2, vocab=500),
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Row:
    config: str
    num_probes: int
    method: str
    ratio: float
    quartiles: tuple[float, float]
    seconds: float
    target: float | None
    memory_mb: float | None = None
    memory_target_mb: float | None = None

    @property
    def misses(self) -> bool:
        slow = self.target is not None and self.ratio > self.target
        fat = (
            self.memory_target_mb is not None and self.memory_mb is not None and self.memory_mb > self.memory_target_mb
        )
        return slow or fat


class Peers:
    """Other people's ways to the same numbers, written as plainly as theirs, eight probes at a time."""

    def __init__(self, reference: LlamaForCausalLM, live: LlamaForCausalLM, ids: Int[Tensor, "probe token"]) -> None:
        self._reference, self._live = reference, live
        self._batches = ids.split(BATCH_PROBES)
        self._cache: list[Tensor] = []

    @torch.no_grad()
    def bare(self) -> None:
        for batch in self._batches:
            self._live(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def body(self) -> None:
        for batch in self._batches:
            self._live.model(input_ids=batch, use_cache=False)

    @torch.no_grad()
    def all_metrics(self) -> None:
        """Full logits and hidden states of both models, and every metric from them."""
        for batch in self._batches:
            ref = self._reference(input_ids=batch, use_cache=False, output_hidden_states=True)
            live = self._live(input_ids=batch, use_cache=False, output_hidden_states=True)
            for there, here in zip(ref.hidden_states[1:], live.hidden_states[1:], strict=True):
                (here - there).norm(dim=-1).div(there.norm(dim=-1)).mean()
                torch.nn.functional.cosine_similarity(here, there, dim=-1).mean()
                (here - there).mean((0, 1)).norm()
            _all_from_logits(ref.logits, live.logits, batch)

    @torch.no_grad()
    def one_kl(self) -> None:
        """As diffing-toolkit's `kl` method does: both models, log_softmax of both, one direction."""
        for batch in self._batches:
            log_q = self._reference(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            log_p = self._live(input_ids=batch, use_cache=False).logits.log_softmax(-1)
            (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    @torch.no_grad()
    def cached_logits(self) -> None:
        """The reference's logits, kept in bfloat16: no second forward pass, and wrong for small drift."""
        if not self._cache:
            self._cache = [
                self._reference(input_ids=batch, use_cache=False).logits.bfloat16() for batch in self._batches
            ]
        for batch, cached in zip(self._batches, self._cache, strict=True):
            _all_from_logits(cached.float(), self._live(input_ids=batch, use_cache=False).logits, batch)


def _all_from_logits(
    ref: Float[Tensor, "probe token vocab"], live: Float[Tensor, "probe token vocab"], ids: Int[Tensor, "probe token"]
) -> None:
    log_q, log_p = ref.float().log_softmax(-1), live.float().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    difference = log_p - log_q
    (q * difference).sum(-1).mean()
    (p * difference).sum(-1).mean()
    ((q * log_q).sum(-1) - (p * log_p).sum(-1)).mean()
    difference[:, :-1].gather(2, ids[:, 1:, None]).mean()
    (log_q.argmax(-1) != log_p.argmax(-1)).float().mean()
    (p - q).mean((0, 1)).topk(10)


class Bench:
    """One configuration with one number of probes: the models, the references and the methods."""

    def __init__(self, config: Config, num_probes: int, cache_dir: Path, device: torch.device) -> None:
        self.config, self.num_probes, self.device = config, num_probes, device
        reference = config.build().to(device)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(config.vocab, (num_probes, PROBE_TOKENS), generator=generator)
        probes = ProbeSet.from_tensors(ids, groups=[f"group {probe % 2}" for probe in range(num_probes)])
        self._cache_dir = cache_dir
        self._live = {trained: _moved(reference, head=trained) for trained in (False, True)}
        self._references: dict[tuple[int, bool], Reference] = {}
        for trained in (False, True):
            reference.get_output_embeddings().requires_grad_(trained)
            for every in (1,) if trained else (1, 4):
                thin = probes.thin(every)
                self._references[every, trained] = Reference.build(reference, thin, cache_dir)
        peers = Peers(reference, self._live[False], ids.to(device))
        self.methods: dict[str, Callable[[], object]] = {
            BARE: peers.bare,
            BODY: peers.body,
            LIGHT: self._reading("light"),
            STRIDE: self._reading("light", every=4),
            LIGHT_TRAINED: self._reading("light", trained=True),
            FULL: self._reading("full"),
            FULL_TRAINED: self._reading("full", trained=True),
            NAIVE: peers.all_metrics,
            TOOLKIT: peers.one_kl,
            CACHED: peers.cached_logits,
        }

    def _reading(self, cost: str, *, every: int = 1, trained: bool = False) -> Callable[[], None]:
        reference, live = self._references[every, trained], self._live[trained]
        assert len(reference.hookpoints) == self.config.layers
        monitor = Monitor(reference.probes, reference, sensors=cost)

        def read() -> None:
            found = monitor.read(live, 0)
            if monitor.failures or not found:
                raise RuntimeError(f"A {cost} reading failed: {monitor.failures}.")

        return read

    def seconds(self, method: str) -> float:
        gc.collect()
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.methods[method]()
            stop.record()
            torch.cuda.synchronize()
            return start.elapsed_time(stop) / 1000
        before = time.process_time()
        self.methods[method]()
        return time.process_time() - before

    def memory(self, method: str) -> float:
        """The most that torch held at once during the method, in MB, beyond what it held before."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.methods[method]()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
            self.methods[method]()
        assert seen.profiler is not None
        assert seen.profiler.kineto_results is not None
        events = seen.profiler.kineto_results.events()
        changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
        held = most = 0
        for _, change in sorted(changes, key=lambda change: change[0]):
            held += change
            most = max(most, held)
        return most / 1e6


def _moved(reference: LlamaForCausalLM, *, head: bool) -> LlamaForCausalLM:
    live = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(2)
    live.get_output_embeddings().requires_grad_(head)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.ndim == 2 and (head or parameter is not live.get_output_embeddings().weight):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device) * parameter.std() * 1e-2)
    return live


def compare(bench: Bench, rounds: int, *, memory: Collection[str]) -> Iterator[Row]:
    timed = [method for method in bench.methods if method != BARE]
    for method in bench.methods:
        bench.methods[method]()  # what is done once is not what is measured
    seconds: dict[str, list[float]] = {method: [] for method in bench.methods}
    for number in range(rounds):
        turn = number * len(timed) // rounds
        bare = [bench.seconds(BARE)]
        for method in timed[turn:] + timed[:turn]:
            seconds[method].append(bench.seconds(method))
        bare.append(bench.seconds(BARE))
        seconds[BARE].append(statistics.mean(bare))
    body_memory = bench.memory(BODY) if memory else 0.0
    for method, taken in seconds.items():
        ratios = [one / bare for one, bare in zip(taken, seconds[BARE], strict=True)]
        quarters = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
        yield Row(
            config=bench.config.name,
            num_probes=bench.num_probes,
            method=method,
            ratio=statistics.median(ratios),
            quartiles=(quarters[0], quarters[2]),
            seconds=statistics.median(taken),
            target=bench.config.targets.get(method),
            memory_mb=bench.memory(method) - body_memory if method in memory else None,
            memory_target_mb=(bench.config.memory_target or None) if method == LIGHT else None,
        )


def shares(act: Callable[[], object]) -> Iterator[tuple[str, int, float, float]]:
    """Of each function of diffsensor: its name, its calls, its share of the time with and without others of ours.

    Without: what it does itself, and what it has done by torch, transformers and Python.
    """
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(act)
    stats = pstats.Stats(profiler)
    package = str(Path(diffsensor.__file__).parent)
    whole = stats.total_tt  # type: ignore[attr-defined]
    entries = stats.stats  # type: ignore[attr-defined]
    ours = {key: entry for key, entry in entries.items() if key[0].startswith(package)}
    inside = dict.fromkeys(ours, 0.0)
    for key in ours:
        for caller, (_, _, _, cumulative) in entries[key][4].items():
            if caller in inside:
                inside[caller] += cumulative
    for (file, line, name), (_, calls, _, cumulative, _) in ours.items():
        own = max(cumulative - inside[file, line, name], 0.0)
        yield f"{Path(file).relative_to(package)}:{line} {name}", calls, cumulative / whole, own / whole


def show_profile(bench: Bench, method: str) -> None:
    bench.methods[method]()
    found = sorted(shares(bench.methods[method]), key=lambda one: -one[3])
    print(f"\nWhere the time of `{method}` goes ({bench.config.name}, {bench.num_probes} probes):")
    print(f"{'function':<52} {'calls':>6} {'in all':>8} {'own':>8}")
    for name, calls, in_all, own in found:
        if own >= 0.002:
            print(f"{name:<52} {calls:>6} {in_all:>8.1%} {own:>8.1%}")


COLUMNS = (
    f"{'config':<6} {'probes':>6} {'method':<28} {'ratio':>6} {'quartiles':>13} {'target':>6} {'seconds':>8} "
    f"{'buffers':>11} {'target':>8}"
)


def line(row: Row) -> str:
    target = "" if row.target is None else f"{row.target:.2f}"
    memory = "" if row.memory_mb is None else f"{row.memory_mb:.0f} MB"
    limit = "" if row.memory_target_mb is None else f"{row.memory_target_mb:.0f} MB"
    quartiles = f"{row.quartiles[0]:.2f} .. {row.quartiles[1]:.2f}"
    return (
        f"{row.config:<6} {row.num_probes:>6} {row.method:<28} {row.ratio:>6.2f} {quartiles:>13} {target:>6} "
        f"{row.seconds:>8.3f} {memory:>11} {limit:>8}{'  missed' if row.misses else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=["A", "B"])
    parser.add_argument("--probes", nargs="+", type=int, default=[8, 32], help=f"of {PROBE_TOKENS} tokens each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="these alone, and the bare forward pass")
    parser.add_argument("--memory", action="store_true", help="also the buffers of each method, beyond the body's")
    parser.add_argument("--profile", action="store_true", help="also where the time of a light and a full reading goes")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, everything: seconds")
    parser.add_argument("--check", action="store_true", help="end with 1 where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.cuda and not torch.cuda.is_available():
        print("--cuda was given, but torch sees no GPU here; nothing was measured. Leave it out to measure the CPU.")
        return 0
    if options.quick:
        options.configs, options.probes, options.rounds = ["tiny"], [8], 1
        options.memory = options.profile = True
    # What a profiler of memory writes down takes a while to read, so only some are looked at in a hurry.
    memory = () if not options.memory else (LIGHT, NAIVE) if options.quick else METHODS
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if options.cuda else "cpu")
    place = torch.cuda.get_device_name() if options.cuda else f"{platform.machine()}, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {place}, {options.rounds} round(s)\n\n{COLUMNS}")
    rows: list[Row] = []
    for name in options.configs:
        for num_probes in options.probes:
            with tempfile.TemporaryDirectory() as cache:
                bench = Bench(CONFIGS[name], num_probes, Path(cache), device)
                if options.methods:
                    bench.methods = {
                        method: act for method, act in bench.methods.items() if method in (BARE, BODY, *options.methods)
                    }
                for row in compare(bench, options.rounds, memory=memory):
                    rows.append(row)
                    print(line(row), flush=True)
                if options.profile:
                    for method in (method for method in (LIGHT, FULL) if method in bench.methods):
                        show_profile(bench, method)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if options.check and any(row.misses for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
