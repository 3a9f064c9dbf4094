"""Verdicts beside what is known of their criteria, for whoever shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from entropy_probe import ProbeReport, Verdict
from entropy_probe.page.contents import Judged
from entropy_probe_checks.bounds import COUNTS, GATES, NOISE, bounds_of
from entropy_probe_checks.criteria import CRITERIA
from entropy_probe_checks.criteria import GATES as GATE_CRITERIA
from entropy_probe_checks.playbook import steps
from entropy_probe_checks.thresholds import LIMITS


def judged(report: ProbeReport) -> list[Verdict]:
    """The verdicts of the report; where it has none, of every criterion and every gate that is on."""
    if report.verdicts:
        return report.verdicts
    on = bounds_of(report.config["limits"])
    criteria = [*CRITERIA.values(), *(GATE_CRITERIA[name] for name in on)]
    return [criterion(report) for criterion in criteria]


def explained(verdicts: Iterable[Verdict], known: Mapping[str, str] | None = None) -> list[Judged]:
    """Each verdict with what it measures, why its limit, and what a failure means; `known` gives the status of those
    whose failure was known, `xfail` or `xpass`."""
    criteria = CRITERIA | GATE_CRITERIA
    found = []
    for verdict in verdicts:
        criterion = criteria.get(verdict.criterion)
        status = (known or {}).get(verdict.criterion, verdict.status)
        found.append(
            Judged(
                name=verdict.criterion,
                family=verdict.family,
                status=status,
                value=verdict.value,
                limit=verdict.limit,
                margin=margin(verdict.value, verdict.limit, status, noisy=verdict.family == "gate"),
                measures="" if criterion is None else criterion.measures,
                source=source(verdict.criterion),
                failure="" if criterion is None else criterion.meaning,
                hint=verdict.hint,
                unit=verdict.unit,
                steps=steps(verdict.criterion, verdict.family, status),
            )
        )
    return found


def source(name: str) -> str:
    """Where the limit is from, and how it is set."""
    if name in COUNTS:
        return f"Yours: limits.{name}: {{max: 0}}."
    if name in GATES:
        return f"Yours, under limits.{name}. Within {NOISE:g} standard errors of a bound it does not fail."
    if name not in LIMITS:
        return ""
    limit = LIMITS[name]
    return f"{limit.source}." + (f" Set it with {limit.key}." if limit.key else "")


def margin(
    value: float | str | None, limit: float | str | None, status: str, *, noisy: bool = False
) -> str:
    """`factor` as it is written: 12x is twelve times better than asked, 0.5x misses it by two."""
    found = factor(value, limit, status, noisy=noisy)
    if found is None:
        return "-"
    if value == 0:
        return "0x" if found == 0 else "exact"
    if found > 9999:
        return ">9999x"
    return f"{found:.0f}x" if found >= 10 else f"{found:.2g}x"


def factor(
    value: float | str | None, limit: float | str | None, status: str, *, noisy: bool = False
) -> float | None:
    """How far inside the limit, infinite for 0; `None` where that is no question.

    What is `noisy`, as gates are, passes on the wrong side of its limit too, and has none.
    """
    if noisy or not isinstance(value, float) or not isinstance(limit, float):
        return None
    if limit == 0:
        return math.inf if value == 0 and status == "pass" else None
    above = value > limit
    is_lower_limit = above == (status == "pass")
    above_zero = value >= 0 and limit > 0
    if not above_zero or not math.isfinite(value) or status not in ("pass", "fail"):
        return None
    if value == 0:
        return 0.0 if is_lower_limit else math.inf
    return value / limit if is_lower_limit else limit / value
