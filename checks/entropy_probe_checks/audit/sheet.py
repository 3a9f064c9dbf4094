"""A sheet on which every figure of a report stands beside the same figure computed again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe_checks.audit import student

ROUNDING = 2.0**-50
"""By how much of itself a number of the evidence is moved to see what depends on its last places."""


@dataclass(frozen=True)
class Line:
    """One figure: `difference` is |reported − again| over its size; infinite where one of them is missing, or a text, a
    count or a flag is another."""

    name: str
    reported: Any
    again: Any
    difference: float

    def __str__(self) -> str:
        both = (self.reported, self.again)
        reported, again = (f"{x:.17g}" if isinstance(x, float) else str(x)[:60] for x in both)
        return f"{self.name}: {reported} reported, {again} computed again"


class Sheet:
    """The report as a plain dict, the evidence, and the figures that are written so far, by their path."""

    def __init__(self, report: Mapping, arrays: Mapping[str, np.ndarray], facts: Mapping) -> None:
        self.report, self.arrays, self.facts = report, arrays, facts
        self.reported: dict[str, Any] = {}
        self.again: dict[str, Any] = {}
        self.config = report["config"]
        self.u = "u" if "u.ids" in arrays else "e"  # what arrays of U begin with; E serves as both
        self.restricted = self.config["generation"]["top_p"] < 1  # weights reach the nucleus alone

    def __getitem__(self, name: str) -> np.ndarray:
        """An array of the evidence, in float64 unless it holds integers."""
        array = self.arrays[name]
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def of(self, prefix: str, names: str) -> list[np.ndarray]:
        return [self[f"{prefix}.{name}"] for name in names.split()]

    def lengths(self, which: str) -> np.ndarray:
        """Tokens of every response [B, G]; 0 of one that a smaller group lacks."""
        return self[f"{which}.gen_lens"].reshape(self[f"{which}.rewards"].shape).astype(np.float64)

    def compare(self, path: str, reported: Any, again: Any) -> None:
        self.reported |= _leaves(path, reported)
        self.again |= _leaves(path, again)

    def write(self, path: str, /, **figures: Any) -> None:
        """Compare fields of a section of the report with these figures."""
        section: Any = self.report
        for key in path.split("."):
            section = section[int(key)] if isinstance(section, list) else section[key]
        for name, again in figures.items():
            self.compare(f"{path}.{name}", section and section[name], again)

    def estimates(self, path: str, /, **figures: np.ndarray | None) -> None:
        """The same of estimates and their standard errors."""
        for name, of in figures.items():
            mean = None if of is None else of.mean()
            self.write(path, **{name: mean, f"{name}_se": None if of is None else se(of)})

    def nothing(self, *sections: str) -> None:
        """Say that the report has no such sections."""
        for section in sections:
            self.compare(section, self.report[section], None)

    def lines(self, moved: list[dict[str, Any]]) -> list[Line]:
        """The size of a figure is its own, or what it moves by over what the evidence was moved by."""
        found = []
        for name, again in (self.again | self.reported).items():
            reported, again = (of.get(name, "nothing") for of in (self.reported, self.again))
            size = 0.0
            if isinstance(again, float):
                others = [other.get(name) for other in moved]
                off = [abs(x - again) for x in others if isinstance(x, float)]
                size = max(abs(again), *(x / ROUNDING for x in off if math.isfinite(x)), 0.0)
            found.append(Line(name, reported, again, difference(reported, again, size)))
        return found


def _leaves(path: str, of: Any) -> dict[str, Any]:
    """The entries of mappings and lists, by their path."""
    if isinstance(of, Mapping):
        entries = {f"{path}.{key}": entry for key, entry in of.items()}
    elif np.ndim(of):
        entries = {f"{path}[{k}]": entry for k, entry in enumerate(of)}
    else:
        return {path: of}
    return {name: x for part, entry in entries.items() for name, x in _leaves(part, entry).items()}


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
    return off if math.isfinite(off) else math.inf


def moved(arrays: Mapping[str, np.ndarray], seed: float) -> dict[str, np.ndarray]:
    """Every number by up to 4 of its last places, by its bits, so that equal ones stay so."""
    found = dict(arrays)
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            x = array.astype(np.float64)
            found[name] = x * (1 + ROUNDING * np.sin(seed * (x.view(np.int64) % 999983)))
    return found


def se(of: np.ndarray) -> float | None:
    """Of the mean over prompts: sd/√B."""
    return float(of.std(ddof=1)) / math.sqrt(len(of)) if len(of) > 1 else None


def both(of: np.ndarray) -> dict[str, float | None]:
    return {"value": float(of.mean()), "se": se(of)}


def interval(mean: float, se: float, degrees: int) -> list[float]:
    """95 %: mean ± t·SE."""
    half = student.quantile(0.95, degrees) * se
    return [mean - half, mean + half]


def norm(squares: np.ndarray) -> float:
    """√Σ of squares."""
    return math.sqrt(math.fsum(squares.ravel()))


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """The estimate h = Σa/Σb by prompt: h and (a_n − h·b_n)/b̄, with a_n and b_n the sums of its responses."""
    a, b = (x.reshape(len(x), -1).sum(1) for x in (over, under))
    h = a.sum() / b.sum()
    return h + (a - h * b) / b.mean()
