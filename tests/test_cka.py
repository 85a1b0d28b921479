"""Debiased HSIC and CKA: a published value, a sum written out, and the invariances that are claimed."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffsensor.metrics import cka_distance, debiased_hsic


def gaussian_gram(x: Tensor) -> Tensor:
    """exp(-d^2 / (2 s^2)), s the median of all distances (the zeros of the diagonal among them)."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return (-distances.square() / (2 * distances.quantile(0.5) ** 2)).exp()


def plain_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """The U-statistic as it is defined: the mean over all quadruples of different positions."""
    total, count = 0.0, 0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
        count += 1
    return total / count


def plain_distance(x: Tensor, y: Tensor) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return 1 - debiased_hsic(k, l) / math.sqrt(debiased_hsic(k, k) * debiased_hsic(l, l))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(60, 7, dtype=torch.float64) + 1
    return x, x + 0.3 * torch.randn(60, 7, dtype=torch.float64), torch.arange(60) % 9


def distance(x: Tensor, y: Tensor, owner: Tensor) -> float:
    return cka_distance(x, y, owner)[0]


def test_hsic_has_the_published_value() -> None:
    """X = 0..49 as [10, 5], Y = sin(2 pi X / 50), Gaussian kernels: 0.0922665 in a public test of float32."""
    x = torch.arange(50, dtype=torch.float64).reshape(10, 5)
    y = torch.sin(2 * math.pi * x / 50)
    assert debiased_hsic(gaussian_gram(x), gaussian_gram(y)) == pytest.approx(0.0922664999961853, rel=1e-6)


def test_hsic_is_the_mean_over_quadruples_and_not_the_biased_one() -> None:
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert debiased_hsic(k, l) == pytest.approx(plain_hsic(k, l), rel=1e-10)
    centre = torch.eye(8, dtype=torch.float64) - 1 / 8
    biased = float((centre @ k @ centre * l).sum() / 49)
    assert debiased_hsic(k, l) != pytest.approx(biased, rel=0.2)


def test_representations_that_are_independent_have_an_hsic_of_0_on_average_even_for_few_positions() -> None:
    """The biased estimate is far above 0 for few positions and many dimensions."""
    values = []
    for _ in range(400):
        x, y = torch.randn(6, 30, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64)
        values.append(debiased_hsic(x @ x.T, y @ y.T))
    mean, spread = torch.tensor(values).mean(), torch.tensor(values).std() / 20
    assert abs(float(mean)) < 3 * float(spread)
    assert min(values) < 0


def test_a_negative_hsic_is_a_distance_above_1_and_never_nan() -> None:
    above = 0
    for _ in range(30):
        x, y = torch.randn(8, 40), torch.randn(8, 40)
        value, stderr = cka_distance(x, y, torch.arange(8) % 4)
        assert math.isfinite(value)
        assert math.isfinite(stderr)
        above += value > 1
    assert above > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_representation_has_no_distance_from_itself(dtype: torch.dtype) -> None:
    x = torch.randn(300, 16, dtype=dtype)
    assert cka_distance(x, x.clone(), torch.arange(300) % 7) == (0.0, 0.0)


def test_it_is_one_minus_the_ratio_of_three_hsics(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, owner = pair
    assert distance(x, y, owner) == pytest.approx(plain_distance(x, y), rel=1e-10)
    assert 0.001 < distance(x, y, owner) < 0.5
    assert distance(x, y, owner) == pytest.approx(distance(y, x, owner), rel=1e-12)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x @ torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q, id="orthogonal map"),
        pytest.param(lambda x: x[:, [6, 5, 4, 3, 2, 1, 0]], id="permutation of dimensions"),
        pytest.param(lambda x: -x, id="reflection"),
        pytest.param(lambda x: 1e3 * x, id="isotropic scale up"),
        pytest.param(lambda x: 1e-3 * x, id="isotropic scale down"),
        pytest.param(lambda x: x + 50 * torch.ones(7, dtype=torch.float64), id="translation"),
        pytest.param(lambda x: torch.cat([x, torch.zeros(60, 5, dtype=torch.float64)], 1), id="empty dimensions"),
    ],
)
def test_it_does_not_see(change: object, side: int, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, owner = pair
    before = cka_distance(x, y, owner)
    after = cka_distance(*((change(x), y) if side == 0 else (x, change(y))), owner)
    assert after == pytest.approx(before, rel=1e-8)
    if x.shape == (changed := change(x)).shape:
        assert distance(x, changed, owner) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x @ torch.randn(7, 7, dtype=torch.float64), id="any linear map"),
        pytest.param(lambda x: x * torch.tensor([1, 1, 1, 1, 1, 1, 9], dtype=torch.float64), id="one dimension"),
        pytest.param(lambda x: x[torch.arange(59, -1, -1)], id="other positions"),
    ],
)
def test_it_does_see(change: object, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, owner = pair
    assert distance(x, change(x), owner) > 0.01


def test_the_order_of_positions_does_not_matter(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, owner = pair
    order = torch.randperm(60)
    assert cka_distance(x[order], y[order], owner[order]) == pytest.approx(cka_distance(x, y, owner), rel=1e-9)


def test_its_error_is_the_jackknife_over_probes(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, owner = pair
    owner = torch.tensor([3, 11, 4])[owner % 3] * 10 + owner // 5  # of unequal length, with gaps
    probes = owner.unique().tolist()
    without = [plain_distance(x[owner != probe], y[owner != probe]) for probe in probes]
    mean, count = sum(without) / len(without), len(without)
    expected = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))
    assert count > 4
    assert cka_distance(x, y, owner)[1] == pytest.approx(expected, rel=1e-9)


def test_one_probe_alone_has_a_distance_but_no_error(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, _ = pair
    value, stderr = cka_distance(x, y, torch.zeros(60, dtype=torch.int64))
    assert value == pytest.approx(plain_distance(x, y), rel=1e-10)
    assert math.isnan(stderr)


def test_it_is_right_in_float32_under_a_common_mean_that_dwarfs_the_rest() -> None:
    x = torch.randn(300, 16)
    y = x + 0.05 * torch.randn(300, 16)
    owner = torch.arange(300) % 11
    expected = plain_distance(x.double(), y.double())
    assert distance(x, y, owner) == pytest.approx(expected, rel=1e-3)
    assert distance(x + 100, y + 100, owner) == pytest.approx(expected, rel=0.02)
