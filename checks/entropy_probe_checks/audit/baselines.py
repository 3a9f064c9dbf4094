"""The coefficient of every token in the slope, by baseline (MATH.md, slope and curvature)."""

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

# of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing
NOTICED = 1e-6
# of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0


def coefficients(sheet: Sheet, baseline: str = "") -> list[np.ndarray]:
    """c_t = R_{≥t} − b_t of every token [B, G, T], 0 past the end; and that of the length, whose steps count 1 each.

    b_t is 0 (none), H_t (hk), or H_t and what is expected of R_{>t}: the mean over other prompts' responses that have a
    step t (hk_ema), the same shrunk to from the own prompt's other responses (hk_group), or a ridge regression fitted
    on other folds of prompts (hk_ridge).
    """
    baseline = baseline or sheet.config["first_order"]["baseline"]
    there = np.arange(sheet["e.entropy"].shape[2]) < sheet.lengths("e")[..., None]
    found = []
    for h in (np.where(there, sheet["e.entropy"], 0.0), 1.0 * there):
        onward = np.cumsum(h[..., ::-1], -1)[..., ::-1]
        c = later = onward - h
        if baseline == "none":
            c = onward
        elif baseline == "hk_ema":
            total, count = later.sum(1, keepdims=True), there.sum(1, keepdims=True)
            c = later - (total.sum(0) - total) / np.maximum(count.sum(0) - count, 1)
        elif baseline == "hk_ridge":
            c = later - _ridge(sheet["e.features"], later, there)
        elif baseline != "hk":
            c = later - _shrunk(later, there)
        found.append(c * there)
    return found


def _ridge(phi: np.ndarray, later: np.ndarray, there: np.ndarray) -> np.ndarray:
    """φᵀβ + the mean, φ standardised; β and the mean of the prompts of a fold are of the other folds."""
    fold, found = np.arange(len(later)) % FOLDS, np.zeros(later.shape)
    for own in range(min(FOLDS, len(later)) if len(later) > 1 else 0):
        x, y = (of[fold != own][there[fold != own]] for of in (phi, later))
        sd = x.std(0)
        sd[sd <= 1e-12 * np.sqrt((x**2).mean(0))] = np.inf
        z, of_fold = (
            np.clip((of - x.mean(0)) / sd, -DEVIATIONS, DEVIATIONS) for of in (x, phi[fold == own])
        )
        centred = z - z.mean(0)
        penalty = RIDGE * len(z) * np.eye(z.shape[1])
        beta = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean()))
        found[fold == own] = y.mean() + (of_fold - z.mean(0)) @ beta
    return found


def _shrunk(later: np.ndarray, there: np.ndarray) -> np.ndarray:
    """nτ²/(nτ² + σ²) of the way from the other prompts' mean to that of the own prompt's n other responses.

    σ² within and τ² between prompts are those of the others, by moments: with k responses of mean m that have a step,
    Σk(m − m̄)² over prompts and steps has expectation Σ(prompts − 1)·σ² + Σ(K − Σk²/K)·τ², K = Σk.
    """
    found = np.zeros(later.shape)
    for own in range(len(later)):
        others = np.arange(len(later)) != own
        k = there[others].sum(1)
        m = later[others].sum(1) / np.maximum(k, 1)
        sum_k = np.maximum(k.sum(0), 1)
        mean, some = (k * m).sum(0) / sum_k, k.sum(0) > 0
        within = ((later[others] - m[:, None]) ** 2 * there[others]).sum()
        sigma2 = within / max(np.maximum(k - 1, 0).sum(), 1)
        between = (k * (m - mean) ** 2).sum() - ((k > 0).sum(0) - 1)[some].sum() * sigma2
        tau2 = between / max((sum_k - (k**2).sum(0) / sum_k)[some].sum(), 1.0)
        tau2 = tau2 if tau2 > (NOTICED * np.abs(mean).max()) ** 2 else 0.0
        n = there[own].sum(0) - there[own]
        of_own = (later[own].sum(0) - later[own]) / np.maximum(n, 1)
        shrunk = n * tau2 / np.maximum(n * tau2 + sigma2, np.finfo(float).tiny)
        share = np.where(some, shrunk, n > 0)
        found[own] = share * of_own + (1 - share) * mean
    return found
