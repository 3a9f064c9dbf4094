"""The tail of importance weights: the generalised Pareto fit of Zhang and Stephens (2009), and the smoothing of Vehtari
et al. (2024, arXiv:1507.02646, appendix C)."""

import math

import numpy as np


def smoothed(log_w: np.ndarray) -> tuple[np.ndarray, float | None]:
    """(log w with the quantiles of the fitted tail in place of the largest, up to a constant; k̂), or as they are and
    `None` where nothing can be fitted.

    The tail has ⌊min(N/5, 3√N)⌋ values, what it exceeds is the largest of the others.
    """
    n, fitted = len(log_w), log_w - log_w.max()
    size = n // 5 if n <= 225 else math.floor(3 * math.sqrt(n))
    order = np.argsort(fitted, kind="stable")
    tail, cut = order[n - size :], math.exp(fitted[order[n - size - 1]])
    excess, quarter = np.exp(fitted[tail]) - cut, int(size / 4 + 0.5) - 1
    if size < 5 or np.ptp(fitted[tail]) < np.finfo(float).tiny or excess[quarter] <= 0:
        return log_w, None
    # θ = k/σ by its mean over a grid, weighted by the profile likelihood
    grid = 30 + int(math.sqrt(size))
    spread = 1 - np.sqrt(grid / (np.arange(grid) + 0.5))
    theta = 1 / excess[-1] + spread / (3 * excess[quarter])
    k = np.log1p(-theta[:, None] * excess).mean(1)
    profile = size * (np.log(-theta / k) - k - 1)
    weights = np.exp(profile - profile.max())
    weights[weights < 10 * np.finfo(float).eps * weights.sum()] = 0.0
    mean = (theta * weights).sum() / weights.sum()
    k = float(np.log1p(-mean * excess).mean())
    sigma = -k / mean
    if not (math.isfinite(k) and sigma > 0):
        return log_w, None
    k = (size * k + 10 * 0.5) / (size + 10)
    log_q = np.log1p(-(np.arange(size) + 0.5) / size)  # q = 1 − p
    fitted[tail] = np.minimum(
        np.log(cut + sigma * (np.expm1(-k * log_q) / k if k else -log_q)), 0.0
    )
    return fitted, k
