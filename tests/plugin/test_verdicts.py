"""How a verdict ends a test, and how it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from entropy_probe import Verdict
from pytest_entropy_probe.judge import conclude
from pytest_entropy_probe.shown.summary import Row


def _verdict(status: Any, value: float | str | None, limit: float | str | None) -> Verdict:
    return Verdict(criterion="c", family="f", status=status, value=value, limit=limit, hint="what to do")


def test_pass_says_nothing() -> None:
    conclude(_verdict("pass", 1.0, 2.0), allowed=False)


@pytest.mark.parametrize(
    ("status", "value", "limit", "head"),
    [
        ("fail", 3.14159e-3, 1e-6, "c: 0.00314 > 1e-06"),
        ("fail", 0.5, 0.9, "c: 0.5 < 0.9"),
        ("fail", 1.0, 1.0, "c: got 1, limit 1"),
        ("fail", 0.99999, 1.0, "c: 0.99999 < 1.0"),
        ("fail", float("nan"), 1.0, "c: got nan, limit 1"),
        ("fail", "2 of 5", "5 of 5", "c: got 2 of 5, limit 5 of 5"),
        ("inconclusive", 0.9, 0.7, "c: 0.9 > 0.7 (inconclusive)"),
        ("inconclusive", 0.0, None, "c: got 0 (inconclusive)"),
    ],
)
def test_line_1_of_a_failure(status: str, value: float | str, limit: float | str, head: str) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        conclude(_verdict(status, value, limit), allowed=False)
    assert str(failure.value) == f"{head}\nwhat to do"
    assert not failure.value.pytrace


@pytest.mark.parametrize(("status", "allowed"), [("not_applicable", False), ("inconclusive", True)])
def test_skips(status: str, allowed: bool) -> None:
    with pytest.raises(pytest.skip.Exception, match="what to do"):
        conclude(_verdict(status, 0.9, 0.7), allowed=allowed)


@pytest.mark.parametrize(
    ("status", "value", "limit", "margin"),
    [
        ("pass", 1e-9, 1e-6, "1000x"),
        ("pass", 0.8, 1.0, "1.2x"),
        ("fail", 2.0, 1.0, "0.5x"),
        ("pass", 1.0, 0.5, "2x"),  # a lower limit
        ("fail", 0.25, 0.5, "0.5x"),
        ("pass", 0.0, 1e-6, "exact"),
        ("pass", 0.0, 0.0, "exact"),
        ("fail", 1.0, 0.0, "-"),
        ("pass", 1e-30, 1.0, ">9999x"),
        ("pass", "text", 1.0, "-"),
        ("pass", 1.0, None, "-"),
        ("pass", -1.0, 1.0, "-"),
        ("fail", float("nan"), 1.0, "-"),
        ("inconclusive", 0.9, 0.7, "-"),
    ],
)
def test_margin(status: str, value: float | str, limit: float | None, margin: str) -> None:
    assert Row("demo", "c", status, value, limit).margin == margin
