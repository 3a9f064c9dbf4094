"""The tail of importance weights: the generalised Pareto fit of Zhang and Stephens (2009), and the smoothing of Vehtari
et al. (2024, arXiv:1507.02646, appendix C)."""

import math

import numpy as np


def smoothed(log_w: np.ndarray) -> tuple[np.ndarray, float | None]:
    """(log w with the quantiles of the fitted tail in place of the largest, up to a constant; k̂), or as they are and
    `None` where the largest are equal, so that nothing can be fitted.

    The tail has ⌊min(N/5, 3√N)⌋ values, what it exceeds is the largest of the others.
    """
    n, fitted = len(log_w), log_w - log_w.max()
    size = n // 5 if n <= 225 else math.floor(3 * math.sqrt(n))
    order = np.argsort(fitted, kind="stable")
    tail, cut = order[n - size :], math.exp(fitted[order[n - size - 1]])
    largest = fitted[tail]
    varied = size >= 5 and largest[-1] - largest[0] >= np.finfo(float).tiny
    found = fit(np.exp(largest) - cut) if varied else None
    if found is None:
        return log_w, None
    k, sigma = found
    log_q = np.log1p(-(np.arange(size) + 0.5) / size)  # of 1 − p
    excess = -log_q if k == 0 else np.expm1(-k * log_q) / k
    fitted[tail] = np.minimum(np.log(cut + sigma * excess), 0.0)
    return fitted, k


def fit(excess: np.ndarray) -> tuple[float, float] | None:
    """(k̂, σ̂) of sorted values above 0; `None` where it does not exist."""
    n, quarter = len(excess), excess[int(len(excess) / 4 + 0.5) - 1]
    if quarter <= 0 or excess[-1] <= 0:
        return None
    grid = 30 + int(math.sqrt(n))
    b = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(grid) + 0.5))) / (3 * quarter)
    k = np.log1p(-b[:, None] * excess).mean(1)
    profile = n * (np.log(-b / k) - k - 1)
    weights = np.exp(profile - profile.max())
    weights[weights < 10 * np.finfo(float).eps * weights.sum()] = 0.0
    b = float((b * weights).sum() / weights.sum())
    k = float(np.log1p(-b * excess).mean())
    if not (math.isfinite(k) and -k / b > 0):
        return None
    return (n * k + 10 * 0.5) / (n + 10), -k / b
