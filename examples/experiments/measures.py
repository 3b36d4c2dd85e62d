"""The statistics of the paper's appendices B (which concepts are covered) and D (Fréchet distance,
diversity), as plain functions of features by `evaluate.Scorer`, or of numbers."""

import math
from collections.abc import Callable, Sequence

import torch
from scores import mean_and_error, student_tail
from torch import Tensor


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Distances (N, M) between the rows of x (N, D) and y (M, D). Trap: cdist's default, through
    a product of matrices, finds equal rows about 1e-3 apart in float32."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def distances(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The two sets of distances of appendix B, "L2 between normalized vectors", each in [0, 2].

    samples (S, D) and images (N, D) are features; returns those among the images (N(N-1)/2,), and
    those between an image and a sample (N*S,). The concept counts as covered where `welch` of the
    two has p > 0.05.
    """
    return torch.pdist(images.double()), l2(images, samples).flatten()


def closest(values: Tensor, share: float) -> Tensor:
    """The share, in (0, 1], of the values (n,) that is closest to their mean: the "best" 1/2, 1/4,
    1/6 and 1/8 of appendix B, which "reject outliers"."""
    count = max(1, round(len(values) * share))
    return values[(values - values.mean()).abs().argsort(stable=True)[:count]]


def cluster_diversity(
    samples: Tensor, images: Tensor, distance: Callable[[Tensor, Tensor], Tensor] = l2
) -> float:
    """Appendix D: "generated images are assigned to a cluster containing their nearest training
    image [...]. The diversity metric is then the average pairwise distance between images in each
    cluster, averaged again over all the clusters." 0 for samples that repeat the training set.

    samples (S, ...) and images (N, ...) are features, or what else `distance` takes and makes
    (S, N) of. L2 between features is in [0, 2]; the paper has LPIPS, a network of its own: compare
    with numbers of the same distance only. Clusters of fewer than two samples have no pair and do
    not count, as in the code of Ojha et al. (2021).
    """
    nearest = distance(samples, images).argmin(dim=1)
    spreads = []
    for i in nearest.unique():
        cluster = samples[nearest == i]
        if (count := len(cluster)) > 1:
            spreads.append(distance(cluster, cluster).sum() / (count * (count - 1)))
    if not spreads:
        raise ValueError("no two samples are nearest to the same image; draw more samples")
    return torch.stack(spreads).mean().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, (N, D) and (M, D):
    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017), at least 0.

    Appendix D reports it of Inception's features ("FID"): compare with numbers from here only. Few
    rows bias it upwards, so compare sets of equal sizes. Needs two rows in each set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs two rows at least, found {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    # With C = R^T R, tr (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b^T. No root
    # of a matrix is taken, which for fewer rows than columns would be one of a singular matrix.
    r_a, r_b = (torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5 for x in (a, b))
    both = torch.linalg.svdvals(r_a @ r_b.T).sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (means + r_a.square().sum() + r_b.square().sum() - 2 * both).item())


def welch(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> tuple[float, float, float]:
    """Welch's t-test of equal means: t, the degrees of freedom, and the two-sided p in [0, 1].

    Appendix B says "a standard t-test". This one does not take the variances of the two sets to be
    equal, and its sets are of very unequal sizes. Each needs two values, one of them some spread.
    """
    (n, mean_a, error_a), (m, mean_b, error_b) = mean_and_error(a), mean_and_error(b)
    if error_a + error_b == 0:
        raise ValueError("no t-test of two sets without spread: all values of each are equal")
    t = (mean_a - mean_b) / math.sqrt(error_a + error_b)
    degrees = (error_a + error_b) ** 2 / (error_a**2 / (n - 1) + error_b**2 / (m - 1))
    return t, degrees, student_tail(t, degrees)
