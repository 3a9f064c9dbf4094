"""How a verdict ends a test: pass, skip with its reason, or a failure.

Line 1 of a failure is `criterion: value > limit`: it is all that short summaries keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from entropy_probe import Verdict


def conclude(verdict: Verdict, *, allowed: bool) -> None:
    __tracebackhide__ = True
    if verdict.status == "pass":
        return
    if verdict.status == "not_applicable":
        pytest.skip(verdict.hint)
    head = f"{verdict.criterion}: {_comparison(verdict.value, verdict.limit)}"
    if verdict.unit:
        head = f"{head} ({verdict.unit})"
    if verdict.status == "inconclusive":
        head = f"{head} (inconclusive)"
        if allowed:
            pytest.skip(f"{head}; allowed by allow_inconclusive: {verdict.hint}")
    pytest.fail(f"{head}\n{verdict.hint}", pytrace=False)


def number(value: float | str | None) -> str:
    """`value` as it is shown: three digits of a number, text as it is."""
    return f"{value + 0.0:.3g}" if isinstance(value, int | float) else str(value)  # -0 is 0


def _comparison(value: float | str | None, limit: float | str | None) -> str:
    """`value > limit`, with the sign that is true; all digits where three are the same."""
    if isinstance(value, int | float) and isinstance(limit, int | float):
        for sign, holds in ((">", value > limit), ("<", value < limit)):
            if holds:
                shown = (number(value), number(limit))
                left, right = shown if len(set(shown)) == 2 else (repr(value), repr(limit))
                return f"{left} {sign} {right}"
    return f"got {number(value)}" + ("" if limit is None else f", limit {number(limit)}")
