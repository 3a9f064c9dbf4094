"""Quantiles of Student's t, from the finite sums that its distribution is for whole degrees of freedom."""

import math


def inside(t: float, degrees: int) -> float:
    """P(|T| ≤ t), with θ = atan(t/√ν) (Abramowitz and Stegun 26.7.3 and 26.7.4):

    ν even   sin θ·[1 + ½cos²θ + (1·3)/(2·4)·cos⁴θ + … up to cos^{ν−2}θ]
    ν odd    (2/π)·{θ + sin θ·[cos θ + ⅔cos³θ + … up to cos^{ν−2}θ]}, 2θ/π for ν = 1
    """
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def quantile(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = level, by bisection."""
    low, high = 0.0, 1.0
    while inside(high, degrees) < level:
        high *= 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, degrees) < level else (low, middle)
    return high
