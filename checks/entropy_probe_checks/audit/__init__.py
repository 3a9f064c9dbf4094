"""The auditor: every derived figure of a report, computed again from the evidence by code that did not make it.

NumPy and the standard library, no torch, and nothing of `entropy_probe`. Each file holds the formulas of a part of
`MATH.md`, in its order:

batches      counts, rewards, fingerprints; Ĥ at θ
first_order  U_cross, δH₁, two batches;   slopes  along v;   change  ΔH(η) and its prediction
resolution   what the noise can tell
predictors   those that need no gradient, and the parts of the slope
optimizer    coverage and P;   taylor  small steps;   student, tail  two distributions
terms        numbers with the size of what was added, means with standard errors
sheet        what is compared, and how
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from entropy_probe_checks.audit import batches, change, first_order, optimizer, slopes, taylor
from entropy_probe_checks.audit.sheet import Line, Sheet

__all__ = ["LIMIT", "Line", "audit", "text", "worst"]

LIMIT = 1e-10
"""Of a difference: 1e-14 is measured, and the smallest slip that a reader would see is far above."""


class Kept(Protocol):
    """Evidence: `arrays` by name and `facts`."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...


def audit(report: Mapping[str, Any], evidence: Kept) -> list[Line]:
    """A line for every figure, the report as a plain dict (that of report.json)."""
    sheet = Sheet(report, evidence.arrays, evidence.facts)
    sheet.compare(
        "checkpoint.fingerprint", report["checkpoint"]["fingerprint"], sheet.facts["fingerprint"]
    )
    batches.write(sheet)
    optimizer.write(sheet)
    along = None
    if "u.gram.k" in sheet or "u.gram.sums" in sheet:
        first_order.write(sheet)
        along = slopes.write(sheet)
    else:  # an optimizer without a second moment has no such step
        for section in ("first_order", "two_batch", "update"):
            sheet.nothing(section)
        for name in ("of_entropies", "of_visits"):
            sheet.estimate(f"predictors.{name}", None)
            sheet.estimate(f"predictors.{name}_per_response", None)
    change.write(sheet, along)
    taylor.write(sheet)
    return sheet.lines


def worst(lines: list[Line]) -> Line:
    """The figure that is furthest off; the first of several. NaN is further than anything."""
    return max(lines, key=lambda line: math.inf if math.isnan(line.difference) else line.difference)


def text(lines: list[Line]) -> str:
    """A line for each section, then one for each figure above the limit, for the eye."""
    sections: dict[str, list[Line]] = {}
    for line in lines:
        sections.setdefault(line.name.partition(".")[0], []).append(line)
    shown = [
        f"{name:16} {len(own):5} figures, at most {worst(own).difference:.1e} off"
        for name, own in sections.items()
    ]
    wrong = [line for line in lines if not line.difference <= LIMIT]
    shown += [f"WRONG {line}" for line in wrong]
    shown.append(f"{len(lines)} figures computed again, {len(wrong)} wrong (limit {LIMIT:g})")
    return "\n".join(shown)
