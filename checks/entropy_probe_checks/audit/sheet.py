"""A sheet on which every figure of a report stands beside the same figure computed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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

    def write(self, name: str, again: Any, size: Any = None) -> None:
        """Compare the field `name` of the report, a path with dots, with `again`, whose terms have that `size` (of each
        entry; without it the figure's own)."""
        self._compare(name, _at(self.report, name), again, size)

    def hold(self, name: str, again: Any, size: Any = None) -> None:
        """The same of an array of the evidence, which was used as it is."""
        self._compare(name, self[name].tolist(), again, size)

    def _compare(self, name: str, reported: Any, again: Any, size: Any) -> None:
        if isinstance(again, Mapping):
            keys = list(again) if isinstance(reported, Mapping) else []
            if not isinstance(reported, Mapping) or set(reported) != set(again):
                self.lines.append(Line(name, reported, again, math.inf))
            for key in keys if isinstance(reported, Mapping) else []:
                if key in reported:
                    own = size[key] if isinstance(size, Mapping) else size
                    self._compare(f"{name}.{key}", reported[key], again[key], own)
        elif isinstance(again, list | tuple | np.ndarray):
            if not isinstance(reported, Sequence) or len(reported) != len(again):
                self.lines.append(Line(name, reported, again, math.inf))
                return
            for k, (one, other) in enumerate(zip(reported, again, strict=True)):
                own = size[k] if isinstance(size, list | tuple | np.ndarray) else size
                self._compare(f"{name}[{k}]", one, other, own)
        else:
            self.lines.append(Line(name, reported, again, difference(reported, again, size)))


def difference(reported: Any, again: Any, size: float | None) -> float:
    """|reported − again|/size. Texts, flags and None are the same or not: 0 or infinity. So are counts."""
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


def _at(report: Any, name: str) -> Any:
    for key in name.split("."):
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report
