"""A criterion that rounding, kinks or a missing derivative keep from seeing anything says so, first of all."""

from __future__ import annotations

import pytest

import kept_reports
from entropy_probe_checks.criteria import CRITERIA
from pytest_entropy_probe.shown.tables import Row, unseen

# What a fault would do that makes the Taylor tests undecidable: the section holds no order and no slope.
POISON = """
from entropy_probe_checks.criteria import scaling

def blinded(criterion):
    original = criterion.judge
    def judge(report):
        nothing = {"taylor_order": None, "delta_h_slope": None}
        return original(report.model_copy(update={"continuity": report.continuity.model_copy(update=nothing)}))
    judge.__name__, judge.__doc__, judge.__module__ = original.__name__, original.__doc__, original.__module__
    object.__setattr__(criterion, "judge", judge)

blinded(scaling.taylor_order)
blinded(scaling.delta_h_slope)
"""


@pytest.mark.parametrize("poisoned", [False, True])
def test_the_summary_begins_with_what_was_not_seen(pytester: pytest.Pytester, poisoned: bool) -> None:
    kept_reports.copy(kept_reports.OURS, pytester.path / kept_reports.PLACE)
    if poisoned:
        pytester.makeconftest(POISON)
    result = pytester.runpytest_subprocess("--probe-checkpoint=demo", "-m", "scaling", "--junitxml=junit.xml")
    shown = result.stdout.str().partition("= entropy probe =")[2].splitlines()[1:]
    first = shown[: next(i for i, line in enumerate(shown) if line.startswith("entropy  "))]
    line = "demo: 2 of 8 criteria saw nothing, for rounding, kinks or a missing derivative:"
    assert (line in first) == poisoned, first
    assert ("delta_h_slope, taylor_order" in " ".join(first)) == poisoned
    assert result.ret == 0
    assert ("probe_unseen" in (pytester.path / "junit.xml").read_text()) == poisoned


def test_within_80_columns() -> None:
    rows = [Row("c", name, "not_applicable", None, None, unseen=True) for name in CRITERIA]
    assert max(map(len, unseen("a checkpoint", rows))) <= 80
    assert unseen("a checkpoint", [Row("c", "ess", "pass", 1.0, 0.5)]) == []
