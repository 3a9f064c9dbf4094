"""A sheet on which every figure of a report stands beside the same figure computed again.

How far rounding moves a figure is measured, as in stochastic arithmetic: the figures are computed twice more, from
evidence that is moved at random by a share of itself. What a figure moves by, over the share, is the size of its terms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe_checks.audit import student

SHARE = 2.0**-36
# it matters whether these are equal, and of these third differences are taken
STILL = ("rewards", "given_advantages", "features", "stencil")


@dataclass(frozen=True)
class Line:
    """One figure: `difference` is |reported − again| over the size of the terms; infinite where one of them is missing,
    or a text, a count or a flag is another."""

    name: str
    reported: Any
    again: Any
    difference: float

    def __str__(self) -> str:
        both = (self.reported, self.again)
        reported, again = (f"{x:.17g}" if isinstance(x, float) else str(x)[:60] for x in both)
        return f"{self.name}: {reported} reported, {again} computed again"


class Sheet(dict[str, np.ndarray]):
    """The evidence by name, the report as a plain dict, and both sides of every figure by its path."""

    def __init__(self, report: Mapping, arrays: Mapping[str, np.ndarray], facts: Mapping) -> None:
        super().__init__(arrays)
        self.report, self.facts, self.config = report, facts, report["config"]
        self.figures: dict[str, tuple[Any, Any, float]] = {}
        self.u = "u" if "u.ids" in self else "e"  # what arrays of U begin with; E serves as both
        self.restricted = self.config["generation"]["top_p"] < 1  # weights reach the nucleus alone

    def of(self, prefix: str, names: str) -> list[np.ndarray]:
        return [self[f"{prefix}.{name}"] for name in names.split()]

    def lengths(self, which: str) -> np.ndarray:
        """Tokens of every response [B, G]; 0 of one that a smaller group lacks."""
        return self[f"{which}.gen_lens"].reshape(self[f"{which}.rewards"].shape).astype(np.float64)

    def compare(self, path: str, reported: Any, again: Any, size: float = 0.0) -> None:
        """`size` is given where terms may cancel in all of the evidence."""
        own, theirs = _leaves(path, again), _leaves(path, reported)
        for name in own | theirs:
            self.figures[name] = theirs.get(name, "nothing"), own.get(name, "nothing"), size

    def write(self, path: str, size: float = 0.0, /, **figures: Any) -> None:
        """Compare fields of a section of the report, or whole sections, with these figures."""
        section: Any = self.report
        for key in path.split(".") if path else ():
            section = section[int(key)] if isinstance(section, list) else section[key]
        for name, again in figures.items():
            at = f"{path}.{name}" if path else name
            self.compare(at, section and section[name], again, size)

    def estimates(self, path: str, size: float = 0.0, /, **figures: np.ndarray | None) -> None:
        """The same of estimates and their standard errors."""
        for name, of in figures.items():
            value, error = both(of).values()
            self.write(path, size, **{name: value, f"{name}_se": error})


def _leaves(path: str, of: Any) -> dict[str, Any]:
    """The entries of mappings and lists, by their path."""
    if isinstance(of, Mapping):
        entries = {f"{path}.{key}": entry for key, entry in of.items()}
    elif np.ndim(of):
        entries = {f"{path}[{k}]": entry for k, entry in enumerate(of)}
    else:
        return {path: of}
    return {name: x for part, entry in entries.items() for name, x in _leaves(part, entry).items()}


def moved(arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
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
    for name, (reported, again, size) in sheet.figures.items():
        of = f"{name[:-3]}.value" if name.endswith(".se") else name.removesuffix("_se")
        size = max(size, sizes.get(of, 0.0))
        if isinstance(again, float):
            there = (other.figures[name][1] for other in others if name in other.figures)
            moves = [abs(x - again) / SHARE for x in there if isinstance(x, float)]
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


def se(of: np.ndarray) -> float:
    """Of the mean over prompts: sd/√B."""
    return float(of.std(ddof=1)) / math.sqrt(len(of))


def both(of: np.ndarray | None) -> dict[str, float | None]:
    """A figure and its standard error; one prompt has none."""
    value = None if of is None else float(of.mean())
    return {"value": value, "se": None if of is None or len(of) < 2 else se(of)}


def interval(mean: float, se: float, degrees: int) -> list[float]:
    """95 %: mean ± t·SE."""
    half = student.quantile(0.95, degrees) * se
    return [mean - half, mean + half]


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """The estimate h = Σa/Σb by prompt: h + (a_n − h·b_n)/b̄, with a_n and b_n the sums of its responses."""
    a, b = (x.reshape(len(x), -1).sum(1) for x in (over, under))
    h = a.sum() / b.sum()
    return h + (a - h * b) / b.mean()
