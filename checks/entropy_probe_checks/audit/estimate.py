"""An estimate, from what every prompt says of it: value, standard error, 95 % interval."""

import math
from functools import cache

import numpy as np


def se(of: np.ndarray) -> np.ndarray:
    """Of the mean over prompts: sd/√B."""
    return of.std(-1, ddof=1) / math.sqrt(of.shape[-1])


def both(of: np.ndarray) -> dict[str, float | None]:
    """The mean and its standard error; one prompt has none."""
    return {"value": float(of.mean()), "se": float(se(of)) if len(of) > 1 else None}


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """The estimate h = Σa/Σb by prompt: h + (a_n − h·b_n)/b̄, with a_n and b_n the sums of its responses."""
    a, b = (x.reshape(len(x), -1).sum(1) for x in (over, under))
    h = a.sum() / b.sum()
    return h + (a - h * b) / b.mean()


def interval(mean: float, error: float, degrees: int) -> list[float]:
    """95 %: mean ± t·SE."""
    half = quantile(degrees) * error
    return [mean - half, mean + half]


@cache
def quantile(degrees: int) -> float:
    """The t with P(|T| ≤ t) = 0.95, by bisection: P = ∫₀^θ cosⁿ/∫₀^{π/2} cosⁿ, t = √ν·tan θ and n = ν − 1."""
    low, high, whole = 0.0, math.pi / 2, _of_cosine(math.pi / 2, degrees - 1)
    for _ in range(60):
        middle = (low + high) / 2
        inside = _of_cosine(middle, degrees - 1) < 0.95 * whole
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _of_cosine(angle: float, power: int) -> float:
    """∫₀^θ cosⁿ = (cos^{n−1}θ·sin θ + (n − 1)·∫₀^θ cos^{n−2})/n, from θ for n = 0 or sin θ for n = 1."""
    found = math.sin(angle) if power % 2 else angle
    for n in range(2 + power % 2, power + 1, 2):
        found = (math.cos(angle) ** (n - 1) * math.sin(angle) + (n - 1) * found) / n
    return found
