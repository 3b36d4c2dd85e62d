"""The statistics of appendices B and D beside numpy and scipy."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import units
from measures import closest, cluster_diversity, distances, frechet, welch


def test_distances():
    samples, images = units(30, 16), units(6, 16, seed=1)
    within, between = distances(samples, images)
    x, y = samples.double().numpy(), images.double().numpy()
    wanted = [np.linalg.norm(y[i] - y[j]) for i in range(6) for j in range(i + 1, 6)]
    np.testing.assert_allclose(within.numpy(), wanted, atol=1e-12)
    wanted = [np.linalg.norm(y[i] - x[j]) for i in range(6) for j in range(30)]
    np.testing.assert_allclose(between.numpy(), wanted, atol=1e-12)
    assert distances(images, images)[1].view(6, 6).diag().max() == 0
    reference = scipy.stats.ttest_ind(within, between, equal_var=False)
    assert abs(welch(within, between)[2] - reference.pvalue) <= 1e-6


def test_closest():
    values = torch.tensor([10.0, 1.0, 2.0, 3.0, -6.0, 2.5])  # their mean is 2.083
    assert closest(values, 1 / 2).tolist() == [2.0, 2.5, 3.0]
    assert closest(values, 1 / 100).tolist() == [2.0]
    assert sorted(closest(values, 1).tolist()) == sorted(values.tolist())


def test_cluster_diversity():
    images = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]), dim=1)
    near = torch.tensor([[9.0, 1, 0], [9, 0, 1], [9, -1, 0], [1, 9, 0], [0, 9, 1], [0, 1, 9]])
    samples = F.normalize(near, dim=1)  # three, two, one and none beside the four images
    d = lambda i, j: (samples[i] - samples[j]).norm().item()
    wanted = ((d(0, 1) + d(0, 2) + d(1, 2)) / 3 + d(3, 4)) / 2
    assert abs(cluster_diversity(samples, images) - wanted) <= 1e-6
    # "Methods which simply memorize the training set will be assigned a score of zero."
    many = units(40, 16)
    assert cluster_diversity(many.repeat(3, 1), many) == 0
    with pytest.raises(ValueError, match="more samples"):
        cluster_diversity(images, images)


@pytest.mark.parametrize("n, m, width", ((60, 50, 8), (9, 7, 24), (3, 40, 16), (2, 2, 5)))
def test_frechet(n, m, width):
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, width, generator=generator)
    b = 0.5 + torch.randn(m, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    x, y = a.double().numpy(), b.double().numpy()
    s, t = np.cov(x.T), np.cov(y.T)
    # sqrtm of a product of singular matrices is of little use: s^(1/2) t s^(1/2) has the same
    # eigenvalues and is symmetric.
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    if min(n, m) > width:
        assert abs(trace - np.trace(scipy.linalg.sqrtm(s @ t)).real) <= 1e-6
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * trace
    assert abs(frechet(a, b) - wanted) <= 1e-4
    assert abs(frechet(b, a) - frechet(a, b)) <= 1e-9
    assert 0 <= frechet(a, a) <= 1e-9
    shifted = a + torch.ones(width)
    assert abs(frechet(a, shifted) - width) <= 1e-5


def test_frechet_of_one_row():
    with pytest.raises(ValueError, match="two rows"):
        frechet(units(1, 4), units(5, 4))


@pytest.mark.parametrize("n, m", ((2, 2), (3, 700), (10, 2560), (50, 50), (4, 100_000)))
@pytest.mark.parametrize("shift", (0.0, 0.1, 1.0, 8.0))
def test_welch(n, m, shift):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0, 1, n), rng.normal(shift, 0.3, m)
    reference = scipy.stats.ttest_ind(a, b, equal_var=False)
    t, degrees, p = welch(torch.from_numpy(a), b.tolist())
    assert abs(t - reference.statistic) <= 1e-6 * max(1, abs(t))
    assert abs(degrees - reference.df) <= 1e-6 * degrees
    assert abs(p - reference.pvalue) <= 1e-6 and abs(p / reference.pvalue - 1) <= 1e-6


def test_welch_of_equal_means():
    assert welch([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])[::2] == (0.0, 1.0)
    assert welch([1.0, 1.0], [2.0, 4.0])[0] < 0


def test_statistics_of_too_little():
    with pytest.raises(ValueError, match="two values"):
        welch([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="without spread"):
        welch([1.0, 1.0], [2.0, 2.0])
