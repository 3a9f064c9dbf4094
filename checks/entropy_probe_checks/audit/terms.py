"""Numbers that know the size of what was added to make them; and figures that are means over prompts."""

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

    def __neg__(self) -> "Terms":
        return Terms(-self.value, self.size)

    def __abs__(self) -> "Terms":
        return Terms(abs(self.value), self.size)

    def __sub__(self, other: Any) -> "Terms":
        return self + -terms(other)

    def __rsub__(self, other: Any) -> "Terms":
        return -self + other

    def __mul__(self, other: Any) -> "Terms":
        other = terms(other)
        return Terms(self.value * other.value, self.size * other.size)

    def __truediv__(self, other: Any) -> "Terms":
        """Of a/b it is what an error in either changes: |a|/b + |a/b|·|b|/b."""
        if not isinstance(other, Terms):
            return self * (1 / other)
        ratio, under = self.value / other.value, np.abs(other.value)
        return Terms(ratio, self.size / under + np.abs(ratio) * other.size / under)

    __radd__, __rmul__ = __add__, __mul__

    @property
    def se(self) -> "Terms | None":
        if len(self.value) < 2:
            return None
        return Terms(
            math.sqrt(scatter(self.value) / (len(self.value) - 1) / len(self.value)),
            self.size.mean(),
        )

    @property
    def interval(self) -> "Terms | None":
        return self.se and interval(self.mean(), self.se.value, len(self.value) - 1)

    @property
    def influence(self) -> "Terms":
        return Terms(self.value - self.value.mean(), self.size)


def terms(of: Any) -> Terms:
    """What is not made of anything else."""
    return of if isinstance(of, Terms) else Terms(of, np.abs(of))


def scatter(x: np.ndarray) -> float:
    """Σ(x − x̄)²."""
    return math.fsum((x - math.fsum(x) / len(x)) ** 2)


def interval(centre: Terms, se: float, degrees: int) -> Terms:
    """95 %: centre ± t·SE."""
    half = student.quantile(0.95, degrees) * se
    return Terms(centre.value + np.array([-half, half]), (centre.size + half) * np.ones(2))


def around(value: Terms, influence: np.ndarray) -> Terms:
    """An estimate with this value, from what each prompt says of it."""
    return Terms(value.value + influence - influence.mean(), value.size * np.ones(len(influence)))


def ratio(over: Any, under: Any) -> Terms:
    """The estimate h = Σa/Σb: prompt n says (Σ_g a_ng − h·Σ_g b_ng)/b̄, with b̄ the mean of Σ_g b_ng over prompts."""
    a, b = (terms(x).each(lambda x: x.reshape(len(x), -1).sum(1)) for x in (over, under))
    h = a.sum() / b.sum().value
    return around(h, (a.value - h.value * b.value) / b.value.mean())


def estimate(name: str, of: Terms | None, with_interval: bool = False) -> dict[str, Any]:
    """The fields of an estimate, by name."""
    found = {name: of and of.mean(), f"{name}_se": of and of.se}
    return found | ({f"{name}_interval": of and of.interval} if with_interval else {})
