"""The sums over the vocabulary, from given hidden states: exact, of the right sign, within their bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import naive
from diffsensor.head import LinearHead
from diffsensor.metrics import OUTPUT_METRICS, PairTile, Sums, tiles
from diffsensor.metrics.outputs import half_absolute_difference, jensen_shannon
from diffsensor.metrics.tiles import FullPass, LightPass, reference_rows, token_mass
from diffsensor.types import ReferenceRows

CPU = torch.device("cpu")
DIM, ROWS, VOCAB = 24, 120, 1500
FOLDS = {name: metric.fold for name, metric in OUTPUT_METRICS.items() if metric.fold is not None}


def head(seed: int = 0, size: float = 0.3) -> LinearHead:
    generator = torch.Generator().manual_seed(seed)
    return LinearHead(weight=size * torch.randn(VOCAB, DIM, generator=generator))


def states(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def cached(of: LinearHead, hidden: Tensor, target: Tensor) -> ReferenceRows:
    rows, weights, _ = reference_rows(of, hidden, target)
    q = weights / rows.log_sum.exp().float()[:, None]
    mean = q.double() @ (of.scale * of.weight.double())
    fields = {name: getattr(rows, name) for name in rows.__slots__}
    return ReferenceRows(**(fields | {"mean_unembedding": mean.float()}))


def compare(
    ref_head: LinearHead, ref_hidden: Tensor, live_head: LinearHead, hidden: Tensor, target: Tensor
) -> tuple[Sums, Tensor]:
    ref = cached(ref_head, ref_hidden, target)
    strata = torch.ones(1, len(hidden), dtype=torch.float64)
    return FullPass(ref_head, live_head, CPU).compare(hidden, ref, strata, FOLDS)


def one_head(of: LinearHead, ref_hidden: Tensor, hidden: Tensor, target: Tensor) -> tuple[Sums, Tensor]:
    strata = torch.ones(1, len(hidden), dtype=torch.float64)
    return LightPass(of, CPU).compare(hidden, cached(of, ref_hidden, target), strata)


def truth(ref_head: LinearHead, ref_hidden: Tensor, live_head: LinearHead, hidden: Tensor, target: Tensor) -> dict:
    def log_probabilities(of: LinearHead, state: Tensor) -> Tensor:
        logits = state.double() @ of.weight.double().T
        if of.bias is not None:
            logits += of.bias.double()
        logits *= of.scale
        if of.softcap is not None:
            logits = of.softcap * (logits / of.softcap).tanh()
        return logits.log_softmax(1)

    pairs = zip(log_probabilities(ref_head, ref_hidden), log_probabilities(live_head, hidden), target, strict=True)
    rows = [naive.output_metrics(log_q, log_p, int(place)) for log_q, log_p, place in pairs]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def found_in(sums: Sums) -> dict[str, Tensor]:
    made = {name: metric.finish(sums) for name, metric in OUTPUT_METRICS.items() if metric.cost == "light"}
    if sums.folds:
        made = {name: metric.finish(sums) for name, metric in OUTPUT_METRICS.items()}
    return made | {"gain": sums.max_gain}


TARGET = torch.arange(ROWS) * 7 % VOCAB


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_both_heads_agree_with_float64_to_1e_4_down_to_a_kl_of_1e_8(size: float) -> None:
    h = states()
    live = h + size * states(2)
    expected = truth(head(), h, head(), live, TARGET)
    if size == 1e-4:
        assert 1e-8 < float(expected["kl_ref_live"].mean()) < 3e-8
    for name, values in found_in(compare(head(), h, head(), live, TARGET)[0]).items():
        wanted = float(expected[name].mean())
        # A signed change is small beside its parts, which float32 logits of size 10 give to 1e-6.
        floor = 2e-7 if expected[name].min() < 0 else 1e-8 if name == "gain" else 1e-12
        # A single position is good to 1e-3 at the smallest drift, and these are the mean of only 120.
        assert float(values.mean()) == pytest.approx(wanted, rel=3e-4 if size == 1e-4 else 1e-4, abs=floor), name


def test_both_heads_agree_where_only_the_head_has_moved() -> None:
    h, moved = states(), LinearHead(weight=head().weight + 1e-4 * head(9).weight)
    expected = truth(head(), h, moved, h, TARGET)
    assert 1e-8 < float(expected["kl_ref_live"].mean()) < 3e-8
    sums, _ = compare(head(), h, moved, h, TARGET)
    for name in ("kl_ref_live", "kl_live_ref", "js"):
        assert float(OUTPUT_METRICS[name].finish(sums).mean()) == pytest.approx(float(expected[name].mean()), rel=2e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])
def test_one_head_is_within_2e_7_and_a_thousandth(size: float) -> None:
    h = states()
    live = h + size * states(2)
    expected = truth(head(), h, head(), live, TARGET)
    sums, mass = one_head(head(), h, live, TARGET)
    wanted = float(expected["kl_ref_live"].mean())
    assert abs(float(sums.kl_ref_live.mean()) - wanted) <= 2e-7 + 1e-3 * wanted
    for name in ("nll_change", "entropy_change"):
        assert float(getattr(sums, name).mean()) == pytest.approx(float(expected[name].mean()), rel=1e-4, abs=2e-7)
    assert torch.equal(sums.top1_flip, expected["top1_flip"])
    p = (live.double() @ head().weight.double().T).softmax(1)
    assert mass[0].double() == pytest.approx(p.sum(0), rel=1e-5)
    assert bool((sums.max_gain >= expected["gain"] - 2e-6).all())


def test_every_metric_says_what_it_is_in_words_that_match_its_formula() -> None:
    """The direction is the formula: KL(reference || live) weighs by the reference's probabilities."""
    q, p = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    one = LinearHead(weight=torch.eye(2))
    sums, _ = compare(one, q.log()[None], one, p.log()[None], torch.tensor([0]))
    by_hand = {
        "kl_ref_live": 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
        "kl_live_ref": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
        "js": (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
               + 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)) / 2,
        "tv": 0.4,
        "top1_flip": 0.0,
        "entropy_change": math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1),
        "nll_change": math.log(0.9 / 0.5),
    }  # fmt: skip
    for name, metric in OUTPUT_METRICS.items():
        assert float(metric.finish(sums)[0]) == pytest.approx(by_hand[name], rel=1e-5, abs=1e-7), name
    assert OUTPUT_METRICS["kl_ref_live"].info.direction.startswith("KL(reference || live)")
    assert OUTPUT_METRICS["kl_live_ref"].info.direction.startswith("KL(live || reference)")


@pytest.mark.parametrize(
    "shape", [{}, {"scale": 0.25}, {"bias": True}, {"bias": True, "scale": 2.0}, {"softcap": 3.0}], ids=str
)
def test_scale_bias_and_cap_of_a_head_are_felt(shape: dict[str, object]) -> None:
    bias = torch.randn(VOCAB) if shape.get("bias") else None
    one = LinearHead(weight=head().weight, bias=bias, scale=shape.get("scale", 1.0), softcap=shape.get("softcap"))
    h, live = states(), states() + 0.1 * states(2)
    expected = truth(one, h, one, live, TARGET)
    made = {"both": compare(one, h, one, live, TARGET)[0]}
    if one.is_linear:
        made["one"] = one_head(one, h, live, TARGET)[0]
    for sums in made.values():
        assert float(sums.kl_ref_live.mean()) == pytest.approx(float(expected["kl_ref_live"].mean()), rel=2e-5)
        assert float(sums.nll_change.mean()) == pytest.approx(float(expected["nll_change"].mean()), rel=2e-5, abs=1e-6)


def test_the_same_states_give_exactly_0() -> None:
    h = states()
    for sums, mass in (one_head(head(), h, h.clone(), TARGET), compare(head(), h, head(), h.clone(), TARGET)):
        for name, values in found_in(sums).items():
            assert not values.any(), name
        assert mass is not None
    rows, weights, _ = reference_rows(head(), h, TARGET)
    strata = torch.ones(1, ROWS, dtype=torch.float64)
    assert torch.equal(token_mass(weights, rows.log_sum.exp(), strata), one_head(head(), h, h, TARGET)[1])
    assert not compare(head(), h, head(), h, TARGET)[1].any()


def test_both_heads_never_read_a_divergence_below_0() -> None:
    for size in (1e-7, 1e-6, 1e-5, 1e-3, 0.1, 3.0):
        h = states()
        sums, _ = compare(head(), h, head(), h + size * states(3), TARGET)
        for name in ("js", "tv"):
            assert float(sums.folds[name].min()) >= 0
        # Of a position alone: what is left of rounding, far below a KL of 1e-8.
        assert float(sums.kl_ref_live.min()) > -1e-10
        assert float(sums.kl_live_ref.min()) > -1e-10
        assert float(sums.folds["js"].max()) <= math.log(2) + 1e-6


@pytest.mark.parametrize("shift", [-80, -30, -12, -5, -2, -0.5, 0.5, 2, 5, 12, 30, 80])
def test_a_shift_of_all_logits_is_no_drift(shift: float) -> None:
    """As training without weight decay brings: the distribution is the same. 1 + sum q expm1(d) cancels there."""
    h, live = states(), states() + 0.01 * states(2)
    one = LinearHead(weight=head().weight, bias=torch.zeros(VOCAB))
    other = LinearHead(weight=head().weight, bias=torch.full((VOCAB,), float(shift)))
    expected = truth(one, h, other, live, TARGET)
    for name, values in found_in(compare(one, h, other, live, TARGET)[0]).items():
        assert float(values.mean()) == pytest.approx(float(expected[name].mean()), rel=1e-4, abs=1e-6), name
    ratio = compare(one, h, other, live, TARGET)[0].log_ratio
    plain = [(state.double() @ each.weight.double().T + each.bias).logsumexp(1) for each, state in
             ((one, h), (other, live))]  # fmt: skip
    assert ratio.numpy() == pytest.approx((plain[1] - plain[0]).numpy(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shift", [-30, -5, -1, 0, 1, 5, 30])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_the_light_pass_with_a_head_that_trains_is_within_2e_7_and_a_thousandth(size: float, shift: float) -> None:
    h, live = states(), states() + size * states(2)
    one = LinearHead(weight=head().weight, bias=torch.zeros(VOCAB))
    other = LinearHead(weight=head().weight + size / 10 * head(9).weight, bias=torch.full((VOCAB,), float(shift)))
    expected = truth(one, h, other, live, TARGET)
    strata = torch.ones(1, ROWS, dtype=torch.float64)
    sums, mass = LightPass(other, CPU, one).compare(live, cached(one, h, TARGET), strata)
    for name in ("kl_ref_live", "nll_change", "entropy_change"):
        wanted = float(expected[name].mean())
        assert abs(float(getattr(sums, name).mean()) - wanted) <= 3e-7 + 1e-3 * abs(wanted), name
    assert bool((sums.max_gain >= expected["gain"] - 2e-6).all())
    p = (live.double() @ other.weight.double().T).softmax(1)
    assert mass[0].double().numpy() == pytest.approx(p.sum(0).numpy(), rel=1e-4)


@pytest.mark.parametrize("factor", [20.0, 100.0, 1e4])
def test_partition_functions_that_lie_far_apart_are_handled(factor: float) -> None:
    h = states()
    live = factor * states(4)
    expected = truth(head(), h, head(), live, TARGET)
    for sums, mass in (one_head(head(), h, live, TARGET), compare(head(), h, head(), live, TARGET)):
        for name, values in found_in(sums).items():
            if name == "gain" and not sums.folds:
                assert bool((values >= expected[name] - 1e-5).all())
                continue
            # float32 products of this size are themselves no better than that.
            floor = 1e-5 + 1e-6 * factor
            assert values.numpy() == pytest.approx(expected[name].numpy(), rel=1e-4, abs=floor), name
        assert mass.isfinite().all()
    p = (live.double() @ head().weight.double().T).softmax(1)
    assert one_head(head(), h, live, TARGET)[1][0].double().numpy() == pytest.approx(p.sum(0).numpy(), abs=1e-4)


def test_a_state_that_is_not_a_number_gives_none() -> None:
    h, live = states(), states()
    live[3, 5] = math.nan
    live[8] = math.inf
    for sums, _ in (one_head(head(), h, live, TARGET), compare(head(), h, head(), live, TARGET)):
        for name, values in found_in(sums).items():
            wrong = ~values.isfinite()
            assert wrong[3], name
            assert wrong[8], name
            assert not wrong[torch.tensor([row not in (3, 8) for row in range(ROWS)])].any(), name


def test_a_tie_with_the_favourite_token_is_no_flip() -> None:
    one = LinearHead(weight=torch.eye(3))
    h = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    live = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.1, 0.0]])
    for sums in (one_head(one, h, live, torch.zeros(2, dtype=torch.int64))[0],
                 compare(one, h, one, live, torch.zeros(2, dtype=torch.int64))[0]):  # fmt: skip
        assert sums.top1_flip.tolist() == [0.0, 1.0]


@given(st.integers(0, 10_000), st.floats(1e-6, 20), st.floats(0.01, 3))
def test_the_limit_of_one_head_is_never_below_the_gain(seed: int, drift: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = LinearHead(weight=size * torch.randn(40, 6, generator=generator))
    h, change = torch.randn(2, 12, 6, generator=generator)
    target = torch.zeros(12, dtype=torch.int64)
    expected = truth(one, h, one, h + drift * change, target)["gain"]
    limit = one_head(one, h, h + drift * change, target)[0].max_gain
    assert bool((limit >= expected * (1 - 1e-4) - 1e-6).all())
    both = compare(one, h, one, h + drift * change, target)[0].max_gain
    assert both.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


@given(st.integers(0, 10_000), st.floats(-7, 0.5))
def test_js_and_tv_agree_with_their_definitions(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = (3 * torch.randn(5, 20, generator=generator).double()).softmax(1)
    p = (q.log() + 10**exponent * torch.randn(5, 20, generator=generator).double()).softmax(1)
    tile = PairTile(q=q.float(), moved=(p - q).float())
    m = (p + q) / 2
    # By its series where the definition cancels: JS = sum (p - q)^2 / (8 m) for p near q.
    plain = ((q * (q / m).log()).sum(1) + (p * (p / m).log()).sum(1)) / 2
    near = ((p - q).square() / (8 * m)).sum(1)
    js = jensen_shannon(tile)
    assert js.numpy() == pytest.approx((plain if exponent > -3 else near).numpy(), rel=3e-4)
    assert half_absolute_difference(tile).numpy() == pytest.approx(((p - q).abs().sum(1) / 2).numpy(), rel=1e-4)
    assert bool((js <= math.log(2) + 1e-6).all())


def test_distributions_without_overlap_have_a_js_of_log_2() -> None:
    q, p = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    tile = PairTile(q=q, moved=p - q)
    assert float(jensen_shannon(tile)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(half_absolute_difference(tile)) == 1.0


def test_the_reference_keeps_its_favourite_tokens_in_order() -> None:
    h = states()
    rows, *_ = reference_rows(head(), h, TARGET)
    log_q = (h.double() @ head().weight.double().T).log_softmax(1)
    assert rows.top.shape == (ROWS, tiles.TOP_TOKENS)
    assert torch.equal(rows.top, log_q.topk(tiles.TOP_TOKENS, dim=1).indices)
    assert rows.top_probability.numpy() == pytest.approx(log_q.exp().gather(1, rows.top).numpy(), rel=1e-5)
    assert rows.target_logprob.numpy() == pytest.approx(log_q[torch.arange(ROWS), TARGET].numpy(), abs=1e-5)
    assert rows.entropy.numpy() == pytest.approx(-(log_q.exp() * log_q).sum(1).numpy(), rel=1e-5)
