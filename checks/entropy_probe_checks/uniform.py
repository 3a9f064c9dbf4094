"""Whether sampled tokens are what their distributions promise: the probability integral transform, in NumPy.

A token y drawn from q becomes u = (q of all tokens before y) + V·q(y), with V uniform: u is then uniform on [0, 1),
whatever came before it, and independent of all other tokens'. So for a = √12·(u − ½), weighed by a number w that is
known before the token is drawn, every sum here has mean 0 and a known variance, and its tails are those of bounded,
symmetric numbers:

    scale      Σ wa / √Σ w²                                 of each batch and of both: drawn hotter, colder, cut
    responses  Σ_t Σ_{g<h} wa_g·wa_h / √(its variance)      responses of one prompt share noise
    prompts    Σ_t Σ_{n<m} wa_n·wa_m / √(its variance)      the same response of two prompts shares noise
    batches    Σ wa_E·wa_U / √Σ(wa_E·wa_U)²                 the same response of the two batches shares noise

w = min(1, H): of a token that is all but certain u is V, and says nothing. The variance of a sum of products is that
under signs of the a that are fair coins. Its skewness, which is that of a χ², is taken out by Wilson and Hilferty's
cube root, so that every value reads as standard errors of a normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
_ORDERS = ("likelihood", "halves")


def departures(arrays: Arrays, batches: tuple[str, ...]) -> dict[str, float]:
    """Each statistic by name, in standard errors of a normal."""
    chance = np.random.default_rng(0)
    found: dict[str, float] = {}
    for column, order in enumerate(_ORDERS):
        moved = {which: _residuals(arrays, which, column, chance) for which in batches}
        for which, (weight, a) in moved.items():
            found[f"responses of {which.upper()} by {order}"] = in_common(
                np.moveaxis(weight * a, 1, 0)
            )
            found[f"prompts of {which.upper()} by {order}"] = in_common(weight * a)
        for which, ratio in _scales(moved).items():
            found[f"scale of {which} by {order}"] = ratio
        if len(moved) == 2:
            found[f"batches by {order}"] = _across(*(weight * a for weight, a in moved.values()))
    return found


def _scales(moved: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of each batch, and of both together."""
    sums = {w.upper(): ((v * a).sum(), (v**2).sum()) for w, (v, a) in moved.items()}
    if len(sums) == 2:
        sums["both"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    return {name: abs(_ratio(*of)) for name, of in sums.items()}


def _across(e: np.ndarray, u: np.ndarray) -> float:
    """As far as both batches have a response of the same place."""
    size = tuple(slice(min(sides)) for sides in zip(e.shape, u.shape, strict=True))
    products = e[size] * u[size]
    return _ratio(products.sum(), (products**2).sum())


def _residuals(
    arrays: Arrays, which: str, column: int, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(w, a), each [B, G, T]; w is 0 past the end of a response."""
    before, logq, entropy = (arrays[f"{which}.{of}"] for of in ("before", "logq", "entropy_q"))
    inside = (
        np.arange(logq.shape[2]) < arrays[f"{which}.gen_lens"].reshape(logq.shape[:2])[..., None]
    )
    u = before[..., column] + chance.random(logq.shape) * np.exp(logq)
    return np.minimum(1.0, entropy) * inside, math.sqrt(12.0) * (u - 0.5)


def in_common(values: np.ndarray) -> float:
    """What the members [M, …] have in common: Σ_{i<j} x_i·x_j over all places, in standard errors of a normal.

    Under signs that are fair coins the sum has variance Σ e₂ and third moment 6·Σ e₃, with the elementary symmetric
    polynomials e of the x². Only more than chance counts: what is shared is shared with the same sign.
    """
    # The x of certain tokens are many powers of ten apart: a power of a sum less sums of powers is then rounding, and
    # squares leave the range of float64.
    largest = np.abs(values).max(initial=0.0)
    if not largest > 0:
        return 0.0
    products = _elementary(values / largest)[1].sum()
    _, variance, third = (of.sum() for of in _elementary((values / largest) ** 2))
    if variance == 0:
        return 0.0
    return _unskewed(_ratio(products, variance), float(6 * third / variance / math.sqrt(variance)))


def _elementary(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ x_i, Σ_{i<j} x_i·x_j and Σ_{i<j<k} x_i·x_j·x_k over the members, one member after the other."""
    e1, e2, e3 = (np.zeros(x.shape[1:]) for _ in range(3))
    for own in x:
        e3, e2, e1 = e3 + own * e2, e2 + own * e1, e1 + own
    return e1, e2, e3


def _unskewed(x: float, skewness: float) -> float:
    """x, of mean 0 and variance 1, as if it were a normal's: the cube root of a gamma of this skewness nearly is."""
    if skewness < 1e-6:
        return x
    base = 1 + skewness * x / 2
    return (math.copysign(abs(base) ** (1 / 3), base) - 1 + skewness**2 / 36) * 6 / skewness


def _ratio(total: float, variance: float) -> float:
    return 0.0 if variance == 0 else float(total / math.sqrt(variance))
