"""The auditor: every derived figure of a report, computed again from the evidence by code that did not make it.

NumPy and the standard library, no torch, and nothing of `entropy_probe`. Each file holds the formulas of a part of
`MATH.md`: `inputs` (rewards, advantages, Ĥ at θ, P), `first_order` (U_cross, δH₁, two batches), `slopes` (along v, with
every baseline), `change` (ΔH(η), its prediction, what the noise can tell), `taylor` (small steps). `sheet` is what is
compared, and how.
"""

import math
from collections.abc import Mapping
from typing import Any

from entropy_probe_checks.audit import change, first_order, inputs, slopes, taylor
from entropy_probe_checks.audit.sheet import Line, Sheet, compared, moved

__all__ = ["LIMIT", "Line", "audit", "text", "worst"]

LIMIT = 2e-11
"""Of a difference: 2e-13 is measured, and the smallest slip that a reader would see is far above."""


def audit(report: Mapping[str, Any], evidence: Any) -> list[Line]:
    """A line for every figure. The report is a dict, that of report.json; evidence has `arrays` by name and `facts`."""
    sheets = [Sheet(report, moved(evidence.arrays, seed), evidence.facts) for seed in range(3)]
    for sheet in sheets:
        sheet.write("checkpoint", fingerprint=sheet.facts["fingerprint"])
        inputs.write(sheet)
        along = []
        # without a second moment there is no step
        if "u.gram.k" in sheet or "u.gram.sums" in sheet:
            first_order.write(sheet)
            along = slopes.write(sheet)
        change.write(sheet, along)
        if "taylor.etas" in sheet:
            taylor.write(sheet)
    return compared(*sheets)


def worst(lines: list[Line]) -> Line:
    """The figure that is furthest off; the first of several. NaN is further than anything."""
    return max(lines, key=lambda line: math.inf if math.isnan(line.difference) else line.difference)


def text(lines: list[Line]) -> str:
    """A line for each section, then one for each figure above the limit, for the eye."""
    sections: dict[str, list[Line]] = {}
    for line in lines:
        sections.setdefault(line.name.partition(".")[0].partition("[")[0], []).append(line)
    wrong = [line for line in lines if not line.difference <= LIMIT]
    shown = []
    for name, own in sections.items():
        shown.append(f"{name:16} {len(own):5} figures, at most {worst(own).difference:.1e} off")
    shown += [f"WRONG {line}" for line in wrong]
    shown.append(f"{len(lines)} figures computed again, {len(wrong)} wrong (limit {LIMIT:g})")
    return "\n".join(shown)
