"""A sheet on which every figure of a report stands beside the same figure computed again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entropy_probe_checks.audit.terms import Terms, interval, terms


@dataclass(frozen=True)
class Line:
    """One figure: `difference` is |reported − again| over the size of the terms; infinite where one of them is missing,
    or a text, a count or a flag is another."""

    name: str
    reported: Any
    again: Any
    difference: float

    def __str__(self) -> str:
        reported, again = (
            f"{x:.17g}" if isinstance(x, float) else str(x)[:60]
            for x in (self.reported, self.again)
        )
        return f"{self.name}: {reported} reported, {again} computed again"


@dataclass
class Sheet:
    """The report as a plain dict, the evidence, and the lines that are written so far."""

    report: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.report["config"]
        self.u = "u" if "u.ids" in self else "e"  # what arrays of U begin with; E serves as both
        self.restricted = self.config["generation"]["top_p"] < 1  # weights reach the nucleus alone

    def __getitem__(self, name: str) -> np.ndarray:
        """An array of the evidence, in float64 unless it holds integers."""
        array = self.arrays[name]
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def terms(self, prefix: str, names: str) -> list[Terms]:
        return [terms(self[f"{prefix}.{name}"]) for name in names.split()]

    def lengths(self, which: str) -> np.ndarray:
        """Tokens of every response [B, G]; 0 of one that a smaller group lacks."""
        return self[f"{which}.gen_lens"].reshape(self[f"{which}.rewards"].shape).astype(np.float64)

    def section(self, path: str) -> dict[str, Any]:
        found: Any = self.report
        for key in path.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    def write(self, path: str, /, **figures: Any) -> None:
        """Compare fields of a section, whose path has dots, with these figures."""
        reported = self.section(path)
        for name, again in figures.items():
            self.compare(f"{path}.{name}", reported and reported[name], again)

    def estimates(self, path: str, /, **figures: Terms | None) -> None:
        """The same of estimates, their standard errors, and their intervals where the section has them."""
        for name, of in figures.items():
            se = of.se if of and len(of.value) > 1 else None
            self.write(path, **{name: of and of.mean(), f"{name}_se": se})
            if f"{name}_interval" in (self.section(path) or ()):
                around = interval(of.mean(), se.value, len(of.value) - 1) if of and se else None
                self.write(path, **{f"{name}_interval": around})

    def nothing(self, *sections: str) -> None:
        """Say that the report has no such section."""
        for section in sections:
            self.compare(section, self.report[section], None)

    def compare(self, name: str, reported: Any, again: Any) -> None:
        own, theirs = _entries(again), _entries(reported) or {}
        if own is None:
            value, size = (again.value, again.size) if isinstance(again, Terms) else (again, None)
            self.lines.append(Line(name, reported, value, difference(reported, value, size)))
        elif own.keys() != theirs.keys():
            self.lines.append(Line(name, reported, again, math.inf))
        for key, entry in (own or {}).items():
            if key in theirs:
                self.compare(name + key, theirs[key], entry)


def _entries(of: Any) -> dict[str, Any] | None:
    """Of a mapping or a list, by what their names end with. Those of an array are all of its mean size."""
    if isinstance(of, Mapping):
        return {f".{key}": entry for key, entry in of.items()}
    if isinstance(of, Terms) and np.ndim(of.value):
        of = [Terms(value, of.size.mean()) for value in of.value]
    return {f"[{k}]": of[k] for k in range(len(of))} if np.ndim(of) else None


def difference(reported: Any, again: Any, size: float | None = None) -> float:
    """|reported − again|/size, without a size over |again|. Texts, flags, counts and None are the same or not: 0 or
    infinity."""
    if not isinstance(again, float):
        return 0.0 if reported == again else math.inf
    if isinstance(reported, bool | None):
        return math.inf
    reported = float(reported)  # "NaN" and "Infinity" are texts in JSON
    if reported == again or (math.isnan(reported) and math.isnan(again)):
        return 0.0
    scale = max(abs(again) if size is None else float(size), abs(again))
    off = abs(reported - again) / scale if scale > 0 else math.inf
    return off if math.isfinite(off) else math.inf
