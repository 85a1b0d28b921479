"""How right a reading is: beside the same distributions compared in float64, and beside what peers would have read.

    python benchmarks/bench_accuracy.py [--quick] [--json FILE]

The truth is a plain float64 computation over all logits, made from the very hidden states that the models gave at
the counted positions and from their heads' weights, both upcast. (A whole forward pass in float64 would measure
how the body rounds, which is the model's own affair.) Ends with 1 where a target is missed.
"""

import argparse
import copy
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from diffsensor import Monitor, ProbeSet, Reference
from diffsensor.capture import Capture, leave_no_trace

METRICS = ("kl_ref_live", "kl_live_ref", "js", "tv")
#: |error| of a light reading, in nats: so much, and so much of the KL.
LIGHT_FLOOR, LIGHT_SHARE = 2e-7, 1e-3
#: Relative error of every metric of a full reading, down to a KL of 1e-8.
FULL_SHARE = 1e-4
#: Relative error of the KL where the model computes in bfloat16.
BF16_SHARE = 1e-2

#: Not a multiple of the tile's width, so that the last tile is a narrow one.
VOCAB = 9001


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    build: Callable[[], PreTrainedModel]
    trains_head: bool
    kls: tuple[float, ...]


@dataclass(slots=True, kw_only=True)
class Row:
    """One size of drift in one case. Errors are relative, but `light_error`, in nats."""

    case: str
    kl: float
    light_error: float
    light_limit: float
    full_errors: dict[str, float]
    full_limit: float
    naive_error: float
    cached_bf16_error: float
    misses: list[str] = field(default_factory=list)


def llama(*, tied: bool) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.125,
        tie_word_embeddings=tied,
    )
    return _with_spread_logits(LlamaForCausalLM(config))


def gemma() -> PreTrainedModel:
    """Like Gemma 2, with logits that are capped softly, here at 10 and not at 30, so that the cap is felt."""
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.125,
        final_logit_softcapping=10.0,
        attn_implementation="eager",
    )
    return _with_spread_logits(Gemma2ForCausalLM(config))


def _with_spread_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Logits that spread by about 3, as those of a trained model do: an untrained one is nearly uniform."""
    norm = model.get_submodule("model.norm")
    assert isinstance(norm.weight, Tensor)
    with torch.no_grad():
        # Gemma multiplies by 1 + weight.
        norm.weight.fill_(2.0 if isinstance(model, Gemma2ForCausalLM) else 3.0)
    return model.eval()


FLOAT_KLS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BF16_KLS = (0.0, 5e-6, 1e-5, 2e-5, 5e-5, 2e-4, 1e-3)
CASES = (
    Case(name="frozen head", build=lambda: llama(tied=False), trains_head=False, kls=FLOAT_KLS),
    Case(name="trained tied head", build=lambda: llama(tied=True), trains_head=True, kls=FLOAT_KLS),
    Case(name="trained untied head", build=lambda: llama(tied=False), trains_head=True, kls=FLOAT_KLS),
    Case(name="soft-capped head", build=gemma, trains_head=True, kls=FLOAT_KLS),
    Case(name="bf16, frozen head", build=lambda: llama(tied=False).bfloat16(), trains_head=False, kls=BF16_KLS),
    Case(name="bf16, trained head", build=lambda: llama(tied=False).bfloat16(), trains_head=True, kls=BF16_KLS),
    # A tied head moves the embedding, and that alone re-rounds the whole body: no smaller drift is met than this.
    Case(name="bf16, trained tied head", build=lambda: llama(tied=True).bfloat16(), trains_head=True, kls=BF16_KLS[4:]),
)


class Drift:
    """The reference's weights plus a multiple of one random direction; the head moves only where it trains."""

    def __init__(self, reference: PreTrainedModel, *, trains_head: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        head = reference.get_output_embeddings()
        self._reference, self._live = reference, copy.deepcopy(reference)
        # In bfloat16 any change of an early layer re-rounds all later ones, and the smallest drifts are never met.
        low = reference.dtype == torch.bfloat16
        last = f"model.layers.{reference.config.num_hidden_layers - 1}.mlp"
        self._direction = {
            name: torch.randn(parameter.shape, generator=generator) * parameter.float().std()
            for name, parameter in reference.named_parameters()
            if parameter.ndim == 2 and (trains_head if parameter is head.weight else not low or name.startswith(last))
        }

    def by(self, amount: float) -> PreTrainedModel:
        with torch.no_grad():
            there = dict(self._reference.named_parameters())
            for name, parameter in self._live.named_parameters():
                if name in self._direction:
                    parameter.copy_(there[name].float() + amount * self._direction[name])
        return self._live

    def to_kl(self, wanted: float, kl_at: Callable[[PreTrainedModel], float]) -> PreTrainedModel:
        """The live model whose KL is near the wanted one; not very near in bfloat16, where it goes by steps."""
        low, high, amount = 1e-9, 10.0, 0.1 * math.sqrt(wanted)
        for _ in range(40):
            kl = kl_at(self.by(amount))
            if abs(kl / wanted - 1) < 0.1:
                break
            low, high = (amount, high) if kl < wanted else (low, amount)
            # The KL of a small drift goes with its square.
            amount *= math.sqrt(wanted / kl) if kl > 0 else 2.0
            if not low < amount < high:
                amount = math.sqrt(low * high)
        return self._live


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one model shows at the counted positions."""

    hidden: Float[Tensor, "pos dim"]
    logits: Float[Tensor, "pos vocab"]
    head: nn.Module
    softcap: float | None

    def log_probabilities(self, rows: slice) -> Float[Tensor, "pos vocab"]:
        """In float64, from the hidden states and the head's weights."""
        assert isinstance(self.head.weight, Tensor)
        logits = self.hidden[rows].double() @ self.head.weight.detach().double().T
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits.log_softmax(1)


def look(model: PreTrainedModel, reference: Reference) -> Shown:
    capture = Capture(model, ())
    hidden, logits = [], []
    with leave_no_trace(model):
        for batch, piece in zip(reference.plan.batches, capture.pieces(reference.plan), strict=True):
            hidden.append(piece.hidden)
            # The model's own logits, in the model's own dtype, as a peer would take them.
            logits.append(model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.index])
    return Shown(
        hidden=torch.cat(hidden),
        logits=torch.cat(logits),
        head=model.get_output_embeddings(),
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


def row_blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, 256):
        yield slice(start, start + 256)


def truth(ref: Shown, live: Shown) -> dict[str, float]:
    """Means over positions of the four metrics, plain and in float64."""
    sums = dict.fromkeys(METRICS, 0.0)
    for rows in row_blocks(len(ref.hidden)):
        log_q, log_p = ref.log_probabilities(rows), live.log_probabilities(rows)
        q, p = log_q.exp(), log_p.exp()
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        sums["kl_ref_live"] += float((q * (log_q - log_p)).sum())
        sums["kl_live_ref"] += float((p * (log_p - log_q)).sum())
        sums["js"] += float((q * (log_q - log_m) + p * (log_p - log_m)).sum() / 2)
        sums["tv"] += float((q - p).abs().sum() / 2)
    return {name: total / len(ref.hidden) for name, total in sums.items()}


def naive_kl(ref_logits: Float[Tensor, "pos vocab"], live_logits: Float[Tensor, "pos vocab"]) -> float:
    """What peers compute: log_softmax of both models' own logits in float32, and the sum of q (log q - log p)."""
    total = 0.0
    for rows in row_blocks(len(ref_logits)):
        log_q, log_p = ref_logits[rows].float().log_softmax(1), live_logits[rows].float().log_softmax(1)
        total += float((log_q.exp() * (log_q - log_p)).sum(1).double().sum())
    return total / len(ref_logits)


def readings(model: PreTrainedModel, reference: Reference, cost: str) -> dict[str, float]:
    monitor = Monitor(reference.probes, reference, sensors=cost)
    found = {reading.key: reading.value for reading in monitor.read(model, 0)}
    if monitor.failures:
        raise RuntimeError(f"A {cost} reading failed: {monitor.failures}.")
    return found


def run(case: Case, probes: ProbeSet, cache_dir: Path) -> Iterator[Row]:
    torch.manual_seed(0)
    model = case.build()
    head = model.get_output_embeddings()
    head.requires_grad_(case.trains_head)
    reference = Reference.build(model, probes, cache_dir)
    there = look(model, reference)
    drift = Drift(model, trains_head=case.trains_head)
    for wanted in case.kls:
        if wanted:
            live = drift.to_kl(wanted, lambda live: truth(there, look(live, reference))["kl_ref_live"])
        else:
            live = drift.by(0.0)
        yield measured(case, live, there, reference)


def measured(case: Case, live: PreTrainedModel, there: Shown, reference: Reference) -> Row:
    here = look(live, reference)
    exact = truth(there, here)
    kl = exact["kl_ref_live"]
    light, full = readings(live, reference, "light"), readings(live, reference, "full")
    zero = bool(torch.equal(there.logits, here.logits))
    low = live.dtype == torch.bfloat16

    def off(value: float, name: str = "kl_ref_live") -> float:
        return value if zero else value / exact[name] - 1

    row = Row(
        case=case.name,
        kl=0.0 if zero else kl,
        light_error=light["diffsensor/kl_ref_live"] - (0.0 if zero else kl),
        light_limit=BF16_SHARE * kl if low else LIGHT_FLOOR + LIGHT_SHARE * kl,
        full_errors={name: off(full[f"diffsensor/{name}"], name) for name in METRICS},
        full_limit=BF16_SHARE if low else FULL_SHARE,
        naive_error=off(naive_kl(there.logits, here.logits)),
        cached_bf16_error=off(naive_kl(there.logits.bfloat16(), here.logits)),
    )
    if zero:
        row.light_limit = row.full_limit = 0.0
        row.misses += [name for found in (light, full) for name, value in found.items() if value != 0.0]
    elif not abs(row.light_error) <= row.light_limit:
        row.misses.append("light")
    if not zero:
        row.misses += [name for name, error in row.full_errors.items() if not abs(error) <= row.full_limit]
    return row


COLUMNS = (
    f"{'case':<24} {'KL, truth':>9} | {'light error':>11} {'limit':>8} | "
    f"{'full: kl_ref_live':>17} {'kl_live_ref':>11} {'js':>9} {'tv':>9} {'limit':>7} | "
    f"{'own logits':>10} {'bf16 cache':>10} |"
)


def line(row: Row) -> str:
    full = [row.full_errors[name] for name in METRICS]
    peers = [
        f"{error:.1e} nats" if row.kl == 0 else f"{100 * error:+.3g} %"
        for error in (row.naive_error, row.cached_bf16_error)
    ]
    return (
        f"{row.case:<24} {row.kl:>9.2e} | {row.light_error:>+11.1e} {row.light_limit:>8.1e} | "
        f"{full[0]:>+17.1e} {full[1]:>+11.1e} {full[2]:>+9.1e} {full[3]:>+9.1e} {row.full_limit:>7.0e} | "
        f"{peers[0]:>10} {peers[1]:>10} | {'missed: ' + ', '.join(row.misses) if row.misses else 'ok'}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="few positions, three sizes of drift in each case: seconds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    num_probes, length = (4, 24) if options.quick else (16, 65)
    ids = torch.randint(VOCAB, (num_probes, length), generator=torch.Generator().manual_seed(2))
    probes = ProbeSet.from_tensors(ids)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), ", end="")
    print(f"{probes.num_positions} positions x {VOCAB} tokens; errors are measured minus truth, over truth,")
    print("but light's, and all of those without drift, in nats (tv: probability)\n")
    print(COLUMNS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES:
            if options.quick:
                case = replace(case, kls=(case.kls[0], case.kls[len(case.kls) // 2], case.kls[-1]))
            for row in run(case, probes, Path(cache)):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.misses]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} rows within their limits.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
