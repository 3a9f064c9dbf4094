"""The tail of importance weights: the generalised Pareto fit of Zhang and Stephens (2009), and the smoothing of Vehtari
et al. (2024, arXiv:1507.02646, appendix C)."""

from __future__ import annotations

import math

import numpy as np


def smoothed(log_weights: np.ndarray) -> tuple[np.ndarray, float | None]:
    """(log w with the quantiles of the fitted tail in place of the largest, up to a constant; k̂), or as they are and
    `None` where the largest are equal, so that nothing can be fitted.

    The tail has ⌊min(N/5, 3√N)⌋ values, what it exceeds is the largest of the others.
    """
    size = len(log_weights)
    relative = log_weights - log_weights.max()
    tail = size // 5 if size <= 225 else math.floor(3 * math.sqrt(size))
    order = np.argsort(relative, kind="stable")
    among, cut = order[size - tail :], math.exp(relative[order[size - tail - 1]])
    largest = relative[among]
    if tail < 5 or largest[-1] - largest[0] < np.finfo(float).tiny:
        return log_weights, None
    found = fit(np.exp(largest) - cut)
    if found is None:
        return log_weights, None
    k, sigma = found
    fitted = relative.copy()
    for place, index in enumerate(among):
        p = (place + 0.5) / tail
        excess = -math.log1p(-p) if k == 0 else math.expm1(-k * math.log1p(-p)) / k
        fitted[index] = min(math.log(cut + sigma * excess), 0.0)
    return fitted, k


def fit(excess: np.ndarray) -> tuple[float, float] | None:
    """(k̂, σ̂) of sorted values above 0; `None` where it does not exist."""
    n = len(excess)
    quarter = excess[int(n / 4 + 0.5) - 1]
    if quarter <= 0 or excess[-1] <= 0:
        return None
    grid = 30 + int(math.sqrt(n))
    profile, theta = [], []
    for j in range(1, grid + 1):
        b = 1 / excess[-1] + (1 - math.sqrt(grid / (j - 0.5))) / (3 * quarter)
        k = float(np.mean(np.log1p(-b * excess)))
        theta.append(b)
        profile.append(n * (math.log(-b / k) - k - 1))
    weights = np.exp(np.array(profile) - max(profile))
    weights /= weights.sum()
    kept = weights >= 10 * np.finfo(float).eps
    b = float((np.array(theta)[kept] * weights[kept]).sum() / weights[kept].sum())
    k = float(np.mean(np.log1p(-b * excess)))
    sigma = -k / b
    if not (math.isfinite(k) and sigma > 0):
        return None
    return (n * k + 10 * 0.5) / (n + 10), sigma
