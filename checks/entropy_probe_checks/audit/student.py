"""Quantiles of Student's t, from the finite sums that its distribution is for whole degrees of freedom."""

from __future__ import annotations

import math


def inside(t: float, degrees: int) -> float:
    """P(|T| ≤ t), with θ = atan(t/√ν) (Abramowitz and Stegun 26.7.3 and 26.7.4):

    ν even   sin θ·[1 + ½cos²θ + (1·3)/(2·4)·cos⁴θ + … up to cos^{ν−2}θ]
    ν odd    (2/π)·{θ + sin θ·[cos θ + ⅔cos³θ + … up to cos^{ν−2}θ]}, 2θ/π for ν = 1
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    even = degrees % 2 == 0
    term, total = (1.0, 1.0) if even else (cosine, cosine)
    for k in range(2 if even else 3, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if even:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))


def quantile(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = level, by bisection."""
    low, high = 0.0, 1.0
    while inside(high, degrees) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if inside(middle, degrees) < level else (low, middle)
    return (low + high) / 2
