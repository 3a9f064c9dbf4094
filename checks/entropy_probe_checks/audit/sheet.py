"""A sheet on which every figure of a report stands beside the same figure computed again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entropy_probe_checks.audit.terms import Terms, terms


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
            f"{value:.17g}" if isinstance(value, float) else str(value)[:60]
            for value in (self.reported, self.again)
        )
        return f"{self.name}: {reported} reported, {again} computed again"


@dataclass
class Sheet:
    """The report as a plain dict, the evidence, and the lines that are written so far."""

    report: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)

    def __getitem__(self, name: str) -> np.ndarray:
        """An array of the evidence, in float64 unless it holds integers."""
        array = self.arrays[name]
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def has(self, name: str) -> bool:
        return name in self.arrays

    def terms(self, prefix: str, names: str) -> list[Terms]:
        return [terms(self[f"{prefix}.{name}"]) for name in names.split()]

    def lengths(self, which: str) -> np.ndarray:
        """Tokens of every response [B, G]."""
        prompts = len(self[f"{which}.rewards"])
        return self[f"{which}.gen_lens"].reshape(prompts, -1).astype(np.float64)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.report["config"]

    @property
    def restricted(self) -> bool:
        """Whether weights reach no further than the nucleus."""
        return self.config["generation"]["top_p"] < 1

    def write(self, name: str, again: Any) -> None:
        """Compare the field `name` of the report, a path with dots, with `again`."""
        reported: Any = self.report
        for key in name.split("."):
            reported = reported[int(key)] if isinstance(reported, list) else reported[key]
        self._compare(name, reported, again)

    def section(self, name: str, figures: Mapping[str, Any]) -> None:
        for key, again in figures.items():
            self.write(f"{name}.{key}", again)

    def hold(self, name: str, again: Any) -> None:
        """Compare an array of the evidence, which was used as it is."""
        self._compare(name, self[name], again)

    def _compare(self, name: str, reported: Any, again: Any) -> None:
        own, theirs = _parts(again), _parts(reported)
        if own is None:
            again, size = (again.value, again.size) if isinstance(again, Terms) else (again, None)
            self.lines.append(Line(name, reported, again, difference(reported, again, size)))
            return
        theirs = theirs or {}
        if own.keys() != theirs.keys():
            self.lines.append(Line(name, reported, again, math.inf))
        for key, entry in own.items():
            if key in theirs:
                self._compare(name + key, theirs[key], entry)


def _parts(of: Any) -> dict[str, Any] | None:
    """The entries of a mapping or a list, by what their names end with."""
    if isinstance(of, Mapping):
        return {f".{key}": entry for key, entry in of.items()}
    if isinstance(of, list | tuple) or np.ndim(of.value if isinstance(of, Terms) else of):
        size = len(of.value if isinstance(of, Terms) else of)
        return {f"[{k}]": of[k] for k in range(size)}
    return None


def difference(reported: Any, again: Any, size: float | None = None) -> float:
    """|reported − again|/size, without a size over |again|. Texts, flags, counts and None are the same or not: 0 or
    infinity."""
    if isinstance(again, np.generic):
        again = again.item()
    if not isinstance(again, float):
        return 0.0 if reported == again else math.inf
    if reported is None or isinstance(reported, bool):
        return math.inf
    reported = float(reported)  # "NaN" and "Infinity" are texts in JSON
    if reported == again or (math.isnan(reported) and math.isnan(again)):
        return 0.0
    if not (math.isfinite(reported) and math.isfinite(again)):
        return math.inf
    scale = max(abs(again) if size is None else float(size), abs(again))
    return abs(reported - again) / scale if scale > 0 else math.inf
