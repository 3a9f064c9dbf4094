"""The one way from a measured value and its limit to a Verdict."""

from __future__ import annotations

import math
from typing import Literal

from entropy_probe import Verdict

Family = Literal["zero_check", "scaling", "registry", "ustatistic", "importance", "sequences"]


def at_most(
    criterion: str,
    family: Family,
    value: float,
    limit: float,
    hint: str,
    otherwise: Literal["fail", "inconclusive"] = "fail",
) -> Verdict:
    """Pass where value ≤ limit; NaN never passes."""
    status = "pass" if value <= limit else otherwise
    return Verdict(criterion=criterion, family=family, status=status, value=value, limit=limit, hint=hint)


def at_least(
    criterion: str,
    family: Family,
    value: float,
    limit: float,
    hint: str,
    otherwise: Literal["fail", "inconclusive"] = "fail",
) -> Verdict:
    """Pass where value ≥ limit; NaN never passes."""
    status = "pass" if value >= limit else otherwise
    return Verdict(criterion=criterion, family=family, status=status, value=value, limit=limit, hint=hint)


def without_answer(
    criterion: str,
    family: Family,
    status: Literal["inconclusive", "not_applicable"],
    hint: str,
    value: float | None = None,
    limit: float | None = None,
) -> Verdict:
    """A criterion that cannot be asked here, or that more data could decide."""
    return Verdict(criterion=criterion, family=family, status=status, value=value, limit=limit, hint=hint)


def factor_from_one(ratio: float) -> float:
    """max(ratio, 1/ratio): how many times too large or too small; infinite for zero, negative and NaN ratios."""
    return max(ratio, 1 / ratio) if ratio > 0 and math.isfinite(ratio) else math.inf
