import math

import pytest
import torch
from scipy import stats

from diffsensor.errors import ConfigError
from diffsensor.statistics import clustered_mean, interval, interval_of, quantile_t, ratio_mean
from diffsensor.types import Reading, Scale


def test_a_case_solved_by_hand() -> None:
    # Probe 0 holds (1, 3), probe 1 holds (5,). Mean 9/3 = 3; residuals 4 - 6 and 5 - 3; variance 2/1 (4 + 4) / 9.
    estimate = clustered_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.ones(2), 2)
    assert estimate.value == 3.0
    assert estimate.stderr == pytest.approx(4 / 3, rel=1e-15)
    assert estimate.num_probes == 2


def test_weights_multiply_a_probe_and_not_its_tokens() -> None:
    # (2 * 4 + 5) / (2 * 2 + 1) = 2.6; residuals 2 (4 - 5.2) and 5 - 2.6; variance 2 (2.4^2 + 2.4^2) / 25.
    estimate = ratio_mean(torch.tensor([4.0, 5.0]), torch.tensor([2, 1]), torch.tensor([2.0, 1.0]))
    assert estimate.value == pytest.approx(2.6, rel=1e-15)
    assert estimate.stderr == pytest.approx(math.sqrt(2 * 2 * 2.4**2 / 25), rel=1e-14)


def test_probes_of_one_token_each_have_the_ordinary_standard_error() -> None:
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = clustered_mean(values, torch.arange(50), torch.ones(50), 50)
    assert estimate.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert estimate.stderr == pytest.approx(stats.sem(values.numpy()), rel=1e-12)


def test_the_order_of_positions_and_a_common_factor_of_the_weights_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    values, probe = torch.rand(90, generator=generator), torch.randint(9, (90,), generator=generator)
    weights = torch.rand(9, generator=generator) + 0.1
    estimate = clustered_mean(values, probe, weights, 9)
    order = torch.randperm(90, generator=generator)
    shuffled = clustered_mean(values[order], probe[order], 8 * weights, 9)
    assert shuffled.value == pytest.approx(estimate.value, rel=1e-12)
    assert shuffled.stderr == pytest.approx(estimate.stderr, rel=1e-12)


def test_probes_without_positions_or_weight_take_no_part_not_even_with_a_nan() -> None:
    sums, counts = torch.tensor([4.0, 5.0, math.nan, 0.0]), torch.tensor([2, 1, 3, 0])
    estimate = ratio_mean(sums, counts, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert estimate == ratio_mean(sums[:2], counts[:2], torch.ones(2))
    assert estimate.num_probes == 2


def test_the_error_of_a_single_probe_is_nan() -> None:
    estimate = clustered_mean(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.ones(1), 1)
    assert estimate.value == 1.5
    assert math.isnan(estimate.stderr)
    assert estimate.num_probes == 1


def test_nothing_to_count_is_nan_and_not_zero() -> None:
    estimate = ratio_mean(torch.zeros(3), torch.zeros(3), torch.ones(3))
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.stderr)
    assert estimate.num_probes == 0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_all_zeros_read_exactly_zero_with_no_error_and_no_minus_sign(zero: float) -> None:
    estimate = clustered_mean(torch.full((6,), zero), torch.arange(6) % 3, torch.rand(3) + 0.1, 3)
    assert estimate.value == 0.0
    assert math.copysign(1.0, estimate.value) == 1.0
    assert estimate.stderr == 0.0
    assert math.copysign(1.0, ratio_mean(torch.tensor([zero]), torch.ones(1), torch.ones(1)).value) == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_number_that_is_not_finite_reaches_the_value(broken: float) -> None:
    estimate = clustered_mean(torch.tensor([1.0, broken, 2.0]), torch.tensor([0, 1, 2]), torch.ones(3), 3)
    assert not math.isfinite(estimate.value)
    assert math.isnan(estimate.stderr)


def test_sums_are_in_double_precision() -> None:
    tiny = clustered_mean(torch.tensor([1.0, 1e-9, -1.0]), torch.zeros(3, dtype=torch.long), torch.ones(1), 1)
    assert tiny.value == pytest.approx(1e-9 / 3, rel=1e-6)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_weight_that_means_nothing_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=f"A probe has the weight {wrong}"):
        ratio_mean(torch.ones(2), torch.ones(2), torch.tensor([1.0, wrong]))


@pytest.mark.parametrize("dof", [1, 1.5, 2, 3, 7, 31, 127, 1000, 1e6])
@pytest.mark.parametrize("p", [1e-12, 0.001, 0.025, 0.4999, 0.5, 0.500001, 0.6, 0.975, 0.995, 1 - 1e-6])
def test_t_quantiles_agree_with_scipy(p: float, dof: float) -> None:
    assert quantile_t(p, dof) == pytest.approx(stats.t.ppf(p, dof), rel=1e-8, abs=1e-300)


@pytest.mark.parametrize(("p", "dof"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.975, 0), (0.975, math.nan)])
def test_a_quantile_that_does_not_exist_is_refused(p: float, dof: float) -> None:
    with pytest.raises(ConfigError, match=r"^A (t )?quantile was asked for"):
        quantile_t(p, dof)


def test_intervals_on_both_scales_agree_with_scipy() -> None:
    t = stats.t.ppf(0.95, 9)
    assert interval(2.0, 0.5, 10, "linear", 0.9) == pytest.approx((2 - t * 0.5, 2 + t * 0.5))
    assert interval(2.0, 0.5, 10, "log", 0.9) == pytest.approx((2 * math.exp(-t / 4), 2 * math.exp(t / 4)))


def test_an_interval_on_the_log_scale_stays_above_zero_and_falls_back_where_there_is_no_logarithm() -> None:
    assert interval(1e-6, 1e-6, 8, "log")[0] > 0
    assert interval(0.0, 0.0, 8, "log") == (0.0, 0.0)
    assert interval(-1e-9, 1e-9, 8, "log") == interval(-1e-9, 1e-9, 8, "linear")
    assert interval(1.0, 1e3, 2, "log") == (0.0, math.inf)


@pytest.mark.parametrize(
    ("value", "stderr", "num_probes"), [(1.0, math.nan, 5), (math.nan, 1.0, 5), (math.inf, 1.0, 5), (1.0, 0.1, 1)]
)
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_an_interval_without_an_error_is_nan(value: float, stderr: float, num_probes: int, scale: Scale) -> None:
    assert all(math.isnan(end) for end in interval(value, stderr, num_probes, scale))


def test_a_confidence_in_percent_is_refused() -> None:
    with pytest.raises(ConfigError, match="confidence was given as 95"):
        interval(1.0, 0.1, 5, "linear", 95)


def test_the_interval_of_a_reading_uses_its_scale_and_adds_its_bound_above() -> None:
    reading = Reading(
        step=0, sensor="outputs", metric="kl_ref_live", value=2.0, unit="nats/token", stderr=0.5, num_probes=10,
        scale="log", bound=0.25,
    )  # fmt: skip
    low, high = interval(2.0, 0.5, 10, "log", 0.9)
    assert interval_of(reading, 0.9) == (low, high + 0.25)


@pytest.mark.parametrize("num_probes", [32, 128])
def test_intervals_cover_the_truth_as_often_as_they_say_where_token_level_ones_do_not(num_probes: int) -> None:
    """Lognormal probe means, lognormal tokens within a probe, probes of different lengths."""
    generator = torch.Generator().manual_seed(num_probes)
    runs, between, within = 2000, 0.5, 0.8
    truth = math.exp(between**2 / 2 + within**2 / 2)
    covered = {"linear": 0, "log": 0, "token": 0}
    for _ in range(runs):
        lengths = torch.randint(8, 25, (num_probes,), generator=generator)
        probe = torch.repeat_interleave(torch.arange(num_probes), lengths)
        means = between * torch.randn(num_probes, generator=generator)
        values = (means[probe] + within * torch.randn(len(probe), generator=generator)).exp()
        estimate = clustered_mean(values, probe, torch.ones(num_probes), num_probes)
        for scale in ("linear", "log"):
            low, high = interval(estimate.value, estimate.stderr, num_probes, scale)
            covered[scale] += low <= truth <= high
        naive = values.std().item() / math.sqrt(len(values))
        low, high = interval(estimate.value, naive, len(values), "linear")
        covered["token"] += low <= truth <= high
    shares = {name: count / runs for name, count in covered.items()}
    assert 0.93 <= shares["linear"] <= 0.96, shares
    assert 0.93 <= shares["log"] <= 0.96, shares
    assert shares["token"] < 0.75, shares
