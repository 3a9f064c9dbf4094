"""`--probe-explain CRITERION`: what it measures, why its limit, what a failure means."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_entropy_probe.judge import number

if TYPE_CHECKING:
    from entropy_probe_checks.criteria.verdicts import Criterion
    from entropy_probe_checks.thresholds import Limit

ALL = "all"


def explanation(name: str) -> str:
    """The text for one criterion, or for `all`; `pytest.UsageError` for a name that none has."""
    from entropy_probe_checks.criteria import CRITERIA, GATES

    known = CRITERIA | GATES
    if name == ALL:
        return "\n".join([*(_one(criterion) for criterion in known.values()), *_budgets()])
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"give {ALL}, {', '.join(known)}"
        raise pytest.UsageError(f"--probe-explain: no criterion {name!r}; {remedy}")
    return _one(known[name])


def _budgets() -> Iterator[str]:
    """What each budget sets, and which criteria it leaves out."""
    from entropy_probe.budgets import BUDGETS
    from entropy_probe_checks.criteria import CRITERIA

    yield "budgets (--probe-budget)"
    for name, budget in BUDGETS.items():
        values: list[str] = []
        for section, of in budget.values.items():
            values += [f"{section}.{key} {value}" for key, value in of.items()]
        yield _wrapped(name, ", ".join(values) or "the defaults")
        without = [c.name for c in CRITERIA.values() if c.part in budget.left_out]
        if without:
            yield _wrapped("", f"without {', '.join(without)}")
    yield ""


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, 80, initial_indent=f"  {head:<10}", subsequent_indent=" " * 12)


def _one(criterion: Criterion) -> str:
    from entropy_probe.budgets import BUDGETS
    from entropy_probe_checks.bounds import GATES
    from entropy_probe_checks.thresholds import LIMITS

    name = criterion.name
    parts = {
        "measures": criterion.measures,
        "limit": _bounds(name) if name in GATES else _limit(LIMITS[name]),
        "failure": criterion.meaning,
    }
    without = [name for name, budget in BUDGETS.items() if criterion.part in budget.left_out]
    if without:
        parts["budget"] = f"not asked under {', '.join(without)}"
    if criterion.needs_second_moment:
        parts["optimizer"] = "only for Adam"
    wrapped = [_wrapped(head, text) for head, text in parts.items()]
    return "\n".join([f"{criterion.name} (-m {criterion.family})", *wrapped, ""])


def _limit(limit: Limit) -> str:
    value = "" if limit.value is None else f"{number(limit.value)}. "
    return f"{value}{limit.source}." + (f" Set it with {limit.key}." if limit.key else "")


def _bounds(name: str) -> str:
    """What a gate can be held against."""
    from entropy_probe_checks.bounds import COUNTS, NOISE

    if name in COUNTS:
        return f"none, the gate is off. Set limits.{name}: {{max: 0}}."
    return (
        f"none, the gate is off. Set under limits.{name}: min, max; "
        "fall, rise (shares of --probe-baseline); fall_se, rise_se (in standard errors). "
        f"Within {NOISE:g} standard errors (noise) of a bound it does not fail."
    )
