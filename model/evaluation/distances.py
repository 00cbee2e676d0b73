"""Distances between two sets of feature vectors, and their bootstrap intervals: pure functions of tensors.

Shapes in names: N videos, F rows of a video (1, or one for every frame), D features. Everything is computed in float64, on the
device of the features, which therefore has to know float64 (the CPU and CUDA do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES, LEAST_RESAMPLES = 200, 5
CONFIDENCE = 0.95
"""Share of the resamples that lies inside an interval."""
SPLITS = 10
"""Random halves that a floor is the mean of."""
_ROWS = 2048
"""Rows of features whose kernel values are held at once, some 30 MB."""


def gaussian(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of at least two rows, float64."""
    _check(features_ND, least=2)
    centred, mean = _centred(features_ND)
    return mean, centred.T @ centred / (len(centred) - 1)


def frechet_of_gaussians(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2, which are those of the symmetric C1^½ C2 C1^½ and
    so real and not negative; no root of a non-symmetric matrix is taken.
    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions"; FID: Heusel et al. 2017.

    Args:
        mean, other_mean: (D,).
        covariance, other_covariance: (D, D), symmetric, positive semi-definite.
    """
    first, second = covariance.double(), other_covariance.double()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ second @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return _frechet(mean.double(), other_mean.double(), first.trace() + second.trace(), trace_of_root)


def frechet(features_ND: Tensor, other_ND: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians that have the mean and covariance of two sets of rows.

    With fewer rows than features the covariances are singular, and the roots of eigenvalues that should be zero would add up to an
    error. Then the trace is taken as the sum of the singular values of X Yᵀ instead, X and Y the centred rows over the root of
    their number less one: with C1 = XᵀX and C2 = YᵀY, the eigenvalues of C1 C2 other than zero are those of (X Yᵀ)(X Yᵀ)ᵀ.

    Args:
        features_ND, other_ND: at least two rows each; the numbers of rows may differ.

    Raises:
        ValueError: too few rows, different numbers of features, or a feature is no number.
    """
    _check(features_ND, least=2)
    _check(other_ND, least=2)
    _check_alike(features_ND, other_ND)
    if min(len(features_ND), len(other_ND)) > features_ND.shape[1]:
        return frechet_of_gaussians(*gaussian(features_ND), *gaussian(other_ND))
    (first, mean), (second, other_mean) = _centred(features_ND), _centred(other_ND)
    first, second = first / (len(first) - 1) ** 0.5, second / (len(second) - 1) ** 0.5
    trace_of_root = torch.linalg.svdvals(first @ second.T).sum()
    return _frechet(mean, other_mean, first.square().sum() + second.square().sum(), trace_of_root)


def _frechet(mean: Tensor, other_mean: Tensor, traces: Tensor, trace_of_root: Tensor) -> float:
    # Rounding may leave a little less than zero of two equal sets.
    return max(0.0, float((mean - other_mean).square().sum() + traces - 2 * trace_of_root))


def frechet_of_videos(features_NFD: Tensor, other_NFD: Tensor) -> float:
    """`frechet` of all rows of all videos."""
    return frechet(features_NFD.flatten(0, 1), other_NFD.flatten(0, 1))


@dataclass(frozen=True)
class KernelSums:
    """Sums of kernel values between the rows of two sets of videos, from which the MMD of any resample of videos follows.

    Attributes:
        within, other_within: (N, N) and (M, M), the sum over the rows of both videos; on the diagonal over different rows of one.
        across: (N, M).
        rows, other_rows: rows of a video.
    """

    within: Tensor
    other_within: Tensor
    across: Tensor
    rows: int
    other_rows: int

    def mmd(self, weights_N: Tensor, other_weights_M: Tensor) -> float:
        """The unbiased squared maximum mean discrepancy, with each video counted so many times; it can be below 0.

        A video drawn twice is not paired with its copy, which would make the sets seem narrower than they are.
        """
        first, second = weights_N.to(self.within), other_weights_M.to(self.within)
        inside = _mean_pair(self.within, first, self.rows) + _mean_pair(self.other_within, second, self.other_rows)
        pairs = first.sum() * second.sum() * self.rows * self.other_rows
        return float(inside - 2 * (first @ self.across @ second) / pairs)


def _mean_pair(sums: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Mean kernel value of two different rows."""
    own = sums.diagonal()
    total = weights @ sums @ weights - weights.square() @ own + weights @ own
    pairs = weights.sum().square() - weights.square().sum()
    return total / (pairs * rows**2 + weights.sum() * rows * (rows - 1))


def kernel_sums(features_NFD: Tensor, other_MGD: Tensor) -> KernelSums:
    """Sums of the polynomial kernel k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018, "Demystifying MMD GANs") over rows of videos.

    Raises:
        ValueError: fewer than two videos in a set, different numbers of features, or a feature is no number.
    """
    _check(features_NFD.flatten(0, 1), least=2)
    _check(other_MGD.flatten(0, 1), least=2)
    _check_alike(features_NFD, other_MGD)
    if min(len(features_NFD), len(other_MGD)) < 2:
        raise ValueError(f"sets of {len(features_NFD)} and {len(other_MGD)} videos; a kernel distance needs at least 2 in each")
    within, other_within = _sums(features_NFD, features_NFD), _sums(other_MGD, other_MGD)
    for sums, features in ((within, features_NFD), (other_within, other_MGD)):
        squares = features.double().square().sum(-1) / features.shape[-1]
        sums.diagonal().sub_((squares + 1).pow(3).sum(-1))
    across = _sums(features_NFD, other_MGD)
    return KernelSums(within, other_within, across, features_NFD.shape[1], other_MGD.shape[1])


def _sums(features_NFD: Tensor, other_MGD: Tensor) -> Tensor:
    count, rows, width = features_NFD.shape
    others, other_rows, _ = other_MGD.shape
    result = torch.empty(count, others, dtype=torch.float64, device=features_NFD.device)
    for begin in range(0, count, step := max(1, _ROWS // rows)):
        part = features_NFD[begin : begin + step].double().flatten(0, 1)
        for other_begin in range(0, others, other_step := max(1, _ROWS // other_rows)):
            other_part = other_MGD[other_begin : other_begin + other_step].double().flatten(0, 1)
            kernel = (part @ other_part.T / width + 1).pow(3)
            blocks = kernel.view(-1, rows, len(other_part) // other_rows, other_rows)
            result[begin : begin + step, other_begin : other_begin + other_step] = blocks.sum((1, 3))
    return result


def kernel_distance(features_NFD: Tensor, other_MGD: Tensor) -> float:
    """The unbiased squared MMD of all rows of two sets of videos with the polynomial kernel; what KID is; it can be below 0.

    Over all pairs at once, where other programs take the mean over random subsets: the same expectation, less noise.
    """
    sums = kernel_sums(features_NFD, other_MGD)
    return sums.mmd(torch.ones(len(features_NFD)), torch.ones(len(other_MGD)))


@dataclass(frozen=True)
class Interval:
    """How far a score may be off because other videos might have been drawn.

    Attributes:
        low, high: percentiles of the resamples, moved by their bias.
        resampled_mean, resampled_low, resampled_high: of the resamples as they are. Distances of resamples lie higher than the
            value, for a set with repetitions is narrower than the one it was drawn from; that is the bias.
        resamples: their number.
        confidence: share of the resamples between `low` and `high`.
    """

    low: float
    high: float
    resampled_mean: float
    resampled_low: float
    resampled_high: float
    resamples: int
    confidence: float = CONFIDENCE


def bootstrap(
    statistic: Callable[..., float], counts: tuple[int, ...], value: float, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile interval of a statistic over resamples of whole videos, drawn with replacement (Efron 1979).

    Args:
        statistic: called with the numbers of the drawn videos, an int64 tensor for each set.
        counts: videos of each set.
        value: the statistic of all videos.
        resamples: at least 5.
        seed: of the draws.

    Raises:
        ValueError: fewer than 5 resamples.
    """
    if resamples < LEAST_RESAMPLES:
        raise ValueError(f"{resamples} resamples say nothing of an interval; at least {LEAST_RESAMPLES} are needed")
    generator = torch.Generator().manual_seed(seed)
    values = [statistic(*(torch.randint(n, (n,), generator=generator) for n in counts)) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    drawn = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    mean = float(drawn.mean())
    return Interval(low - mean + value, high - mean + value, mean, low, high, resamples)


def floor(statistic: Callable[[Tensor, Tensor], float], count: int, splits: int = SPLITS, seed: int = 0) -> list[float]:
    """A distance between random halves of one set, for each of `splits` divisions: what no generator falls below by being good.

    Args:
        statistic: called with the numbers of the videos of both halves; with an odd count one video is left out.
        count: videos, at least 4.

    Raises:
        ValueError: fewer than 4 videos.
    """
    if count < 4:
        raise ValueError(f"{count} videos have no halves to compare; at least 4 are needed")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(splits)]
    return [statistic(order[: count // 2], order[count // 2 : 2 * (count // 2)]) for order in orders]


def _centred(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    features = features_ND.double()
    mean = features.mean(0)
    return features - mean, mean


def _check(features: Tensor, least: int) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"features of the shape {tuple(features.shape)}; at least {least} rows of features are needed")
    if not bool(features.isfinite().all()):
        raise ValueError("a feature is no number; the extractor cannot cope with these videos")


def _check_alike(features: Tensor, other: Tensor) -> None:
    if features.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{features.shape[-1]} features in one set and {other.shape[-1]} in the other; use one extractor for both"
        )
