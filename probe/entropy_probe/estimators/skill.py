"""How well figures that were known before each change of a run told the change.

Of n changes Δ_k in a row, with their standard errors, and figures x_k that were known before them, all but the first
are scored (k = 1 … n−1), so that what needs an earlier change has one:

    signs   how many x_k have the sign of Δ_k
    rank    Spearman's rank correlation of x_k and Δ_k
    skill   1 − Σ(e_k² − SE_k²)/Σ(Δ_k² − SE_k²),  e_k = Δ_k − (what was predicted of it)

Skill is 1 where every difference is the noise of Δ alone, 0 for who predicts no change, negative for who does worse.
What is predicted is x_k itself, or κ_k·x_k with κ fitted on the changes before k alone, without intercept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Skill:
    """`rank` is `None` for fewer than three changes and where all figures are equal, `skill` where the changes are not
    above their noise. `kappa` is the last that was fitted; `None` where nothing was."""

    signs: int
    count: int
    rank: float | None
    skill: float | None
    kappa: float | None


def fitted(figures: Sequence[float], changes: Sequence[float]) -> list[float]:
    """κ_k = Σ_{j<k} x_jΔ_j/Σ_{j<k} x_j² for every k; NaN for the first, and 0 where the earlier figures are 0."""
    kappas, products, squares = [math.nan], 0.0, 0.0
    for x, change in list(zip(figures, changes, strict=True))[:-1]:
        products, squares = products + x * change, squares + x * x
        kappas.append(products / squares if squares > 0 else 0.0)
    return kappas


def skill(
    figures: Sequence[float], changes: Sequence[float], errors: Sequence[float], *, fit: bool
) -> Skill:
    """Of one predictor; needs two changes."""
    kappas = fitted(figures, changes) if fit else [1.0] * len(figures)
    scored = list(zip(figures, kappas, changes, errors, strict=True))[1:]
    noise = math.fsum(se**2 for *_, se in scored)
    missed = math.fsum((change - kappa * x) ** 2 for x, kappa, change, _ in scored) - noise
    signal = math.fsum(change**2 for _, _, change, _ in scored) - noise
    return Skill(
        signs=sum(1 for x, _, change, _ in scored if x * change > 0),
        count=len(scored),
        rank=rank_correlation([x for x, *_ in scored], [change for _, _, change, _ in scored]),
        skill=1 - missed / signal if signal > 0 else None,
        kappa=kappas[-1] if fit else None,
    )


def rank_correlation(figures: Sequence[float], changes: Sequence[float]) -> float | None:
    """Spearman's, by scipy."""
    if len(figures) < 3:
        return None
    from scipy import stats  # 0.3 s, which a kept report need not wait for

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = float(stats.spearmanr(figures, changes)[0])  # pyright: ignore[reportArgumentType]
    return None if math.isnan(found) else found
