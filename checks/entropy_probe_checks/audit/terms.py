"""Numbers that know the size of what was added to make them; and estimates, which are means over prompts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe_checks.audit import student


@dataclass(frozen=True, eq=False)
class Terms:
    """A number or an array, and its `size`: the same formula with every term positive. Rounding is a share of it.

    The terms of B prompts [B] are an estimate: their mean is the figure, sd/√B its standard error.
    """

    value: Any
    size: Any
    __array_ufunc__ = None  # array · Terms is this class's

    def each(self, linear: Callable[[Any], Any]) -> "Terms":
        return Terms(linear(self.value), linear(self.size))

    def __getitem__(self, key: Any) -> "Terms":
        return self.each(lambda x: x[key])

    def sum(self, axis: int | None = None) -> "Terms":
        return self.each(lambda x: x.sum(axis))

    def mean(self, axis: int | None = None) -> "Terms":
        return self.each(lambda x: x.mean(axis))

    def __add__(self, other: Any) -> "Terms":
        other = terms(other)
        return Terms(self.value + other.value, self.size + other.size)

    def __mul__(self, other: Any) -> "Terms":
        other = terms(other)
        return Terms(self.value * other.value, self.size * other.size)

    def __truediv__(self, other: Any) -> "Terms":
        """Of a/b it is what an error of either changes: |a|/b + |a/b|·|b|/b."""
        if not isinstance(other, Terms):
            return self * (1 / other)
        size = self.size + abs(self.value / other.value) * other.size
        return Terms(self.value / other.value, size / abs(other.value))

    def __sub__(self, other: Any) -> "Terms":
        return self + -terms(other)

    def __neg__(self) -> "Terms":
        return Terms(-self.value, self.size)

    def __abs__(self) -> "Terms":
        return Terms(abs(self.value), self.size)

    __radd__, __rmul__ = __add__, __mul__

    @property
    def se(self) -> "Terms":
        n = len(self.value)
        return Terms(math.sqrt(scatter(self.value) / (n - 1) / n), self.size.mean())

    @property
    def both(self) -> dict[str, "Terms"]:
        return {"value": self.mean(), "se": self.se}


def terms(of: Any) -> Terms:
    """What is not made of anything else."""
    return of if isinstance(of, Terms) else Terms(of, np.abs(of))


def scatter(x: np.ndarray) -> float:
    """Σ(x − x̄)²."""
    return math.fsum((x - math.fsum(x) / len(x)) ** 2)


def norm(squares: np.ndarray) -> float:
    """√Σ of squares."""
    return math.sqrt(math.fsum(squares.ravel()))


def interval(centre: Terms, se: float, degrees: int) -> Terms:
    """95 %: centre ± t·SE."""
    half = student.quantile(0.95, degrees) * se
    return Terms(centre.value + np.array([-half, half]), (centre.size + half) * np.ones(2))


def around(value: Terms, influence: np.ndarray) -> Terms:
    """The estimate with this value, of which every prompt says so much more or less."""
    return Terms(value.value + influence - influence.mean(), value.size + 0 * influence)


def ratio(over: Any, under: Any) -> Terms:
    """The estimate h = Σa/Σb. Prompt n says (a_n − h·b_n)/b̄, with a_n and b_n the sums of its responses."""
    a, b = (terms(x).each(lambda x: x.reshape(len(x), -1).sum(1)) for x in (over, under))
    h = a.sum() / b.sum().value
    return around(h, (a.value - h.value * b.value) / b.value.mean())
