"""A sheet on which every figure of a report stands beside the same figure computed again.

How far rounding moves a figure is measured, as in stochastic arithmetic: the figures are computed twice more, from
evidence that is moved at random by a share of itself. What a figure moves by, over the share, is the size of its terms.
"""

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

# every field of these sections is computed again, or has to be null, but for those that other criteria judge
SECTIONS = (
    "checkpoint batch update_batch entropy predictors sampler_parity registry preconditioner first_order two_batch "
    "update entropy_change resolution continuity"
)
OF_OTHERS = r"""checkpoint\.(?!fingerprint) | registry\.(explained|taken) | preconditioner\.difference
    | update\.(grad_norm_logged|num_kinked) | continuity\.(zero|eta|\w+_ratio)"""
SHARE = 2.0**-36
# it matters whether these are equal, and of these third differences are taken
STILL = ("rewards", "given_advantages", "features", "stencil")


class Line(NamedTuple):
    """One figure: `difference` is |reported − again| over the size of the terms; infinite where one of them is missing,
    or a text, a count or a flag is another."""

    name: str
    reported: Any
    again: Any
    difference: float

    def __str__(self) -> str:
        sides = (self.reported, self.again)
        reported, again = (f"{x:.17g}" if isinstance(x, float) else str(x)[:60] for x in sides)
        return f"{self.name}: {reported} reported, {again} computed again"


class Sheet(dict[str, Array]):
    """The evidence by name; and by path what is reported, and what is computed again with a size of its terms."""

    def __init__(self, report: Mapping, arrays: Mapping[str, Array], facts: Mapping) -> None:
        super().__init__(arrays)
        self.report, self.facts, self.config = report, facts, report["config"]
        figures = _leaves("", {name: report[name] for name in SECTIONS.split()}).items()
        self.reported = {n: x for n, x in figures if not re.match(OF_OTHERS, n, re.VERBOSE)}
        self.again: dict[str, tuple[Any, float]] = {}
        self.u = "u" if "u.ids" in self else "e"  # what arrays of U begin with; E serves as both
        self.restricted = self.config["generation"]["top_p"] < 1  # weights reach the nucleus alone

    def of(self, prefix: str, names: str) -> list[Array]:
        return [self[f"{prefix}.{name}"] for name in names.split()]

    def lengths(self, which: str) -> Array:
        """Tokens of every response [B, G]; 0 of one that a smaller group lacks."""
        return self[f"{which}.gen_lens"].reshape(self[f"{which}.rewards"].shape).astype(np.float64)

    def tokens(self, which: str) -> Array:
        """Where there are tokens [B, G, T]."""
        return np.arange(self[f"{which}.logp"].shape[2]) < self.lengths(which)[..., None]

    def write(self, path: str, size: float = 0.0, /, **figures: Any) -> None:
        """Fields of a part of the report. `size` is given where terms may cancel in all of the evidence."""
        self.again |= {name: (x, size) for name, x in _leaves(path, figures).items()}

    def estimates(self, path: str, size: float = 0.0, /, **figures: Array) -> None:
        """Means over prompts, and their standard errors."""
        for name, of in figures.items():
            value, error = both(of).values()
            self.write(path, size, **{name: value, f"{name}_se": error})

    def intervals(self, path: str, /, **figures: Array) -> None:
        """The same with 95 % intervals."""
        self.estimates(path, **figures)
        for name, of in figures.items():
            self.write(path, **{f"{name}_interval": interval(of.mean(), se(of), len(of) - 1)})

    def hold(self, name: str, evidence: Any, again: Any, size: float = 0.0) -> None:
        """Compare what is no figure of these sections."""
        self.reported |= _leaves(name, evidence)
        self.write("", size, **{name: again})


def _leaves(path: str, of: Any) -> dict[str, Any]:
    """The entries of mappings and lists, by their path."""
    if isinstance(of, Mapping):
        entries = {f"{path}.{key}".lstrip("."): entry for key, entry in of.items()}
    elif isinstance(of, list | tuple | Array):
        entries = {f"{path}[{k}]": entry for k, entry in enumerate(of)}
    else:
        return {path: of}
    return {name: x for part, entry in entries.items() for name, x in _leaves(part, entry).items()}


def moved(arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """In float64 and integers; by up to a share of itself each, but for the first seed."""
    found, random = dict(arrays), np.random.default_rng(seed)
    for name, array in sorted(arrays.items()):
        if array.dtype.kind == "f":
            most = 0.0 if seed == 0 or name.endswith(STILL) else SHARE
            found[name] = array * (1 + most * random.uniform(-1, 1, array.shape))
    return found


def compared(sheet: Sheet, *others: Sheet) -> list[Line]:
    """A line for every figure. A standard error has at least the size of what it is the error of."""
    found: list[Line] = []
    sizes: dict[str, float] = {}
    for name in sheet.again | sheet.reported:
        again, size = sheet.again.get(name, (None, 0.0))
        reported = sheet.reported.get(name, "nothing")
        of = f"{name[:-3]}.value" if name.endswith(".se") else name.removesuffix("_se")
        size = max(size, sizes.get(of, 0.0))
        if isinstance(again, float):
            there = (other.again.get(name, (None,))[0] for other in others)
            moves = [abs(float(x) - float(again)) / SHARE for x in there if isinstance(x, float)]
            size = max(size, abs(again), *(x for x in moves if math.isfinite(x)))
        sizes[name] = size
        found.append(Line(name, reported, again, difference(reported, again, size)))
    return found


def difference(reported: Any, again: Any, size: float) -> float:
    """|reported − again|/size. Texts, flags, counts and None are the same or not: 0 or infinity."""
    if not isinstance(again, float):
        return 0.0 if reported == again else math.inf
    if isinstance(reported, bool | None) or reported == "nothing":
        return math.inf
    reported = float(reported)  # "NaN" and "Infinity" are texts in JSON
    if reported == again or (math.isnan(reported) and math.isnan(again)):
        return 0.0
    off = abs(reported - again) / size if size > 0 else math.inf
    return float(off) if math.isfinite(off) else math.inf


def se(of: Array) -> Any:
    """Of the mean over prompts: sd/√B."""
    return of.std(-1, ddof=1) / math.sqrt(of.shape[-1])


def both(of: Array) -> dict[str, float | None]:
    """The mean and its standard error; one prompt has none."""
    return {"value": float(of.mean()), "se": float(se(of)) if len(of) > 1 else None}


def ratio(over: Array, under: Array) -> Array:
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
