"""The first screen: the answer, what was found, and what did not pass, with what to do."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pytest_entropy_probe.shown.records import FIRST
from pytest_entropy_probe.shown.tables import (
    PLAIN,
    Row,
    criteria_table,
    in_order,
    long_criteria,
    unseen,
)
from pytest_entropy_probe.shown.terminal import WIDTH, plain, write_table, written

if TYPE_CHECKING:
    from entropy_probe.answer import Answer

_COLOURS = {"good": "green", "bad": "red", "unknown": "yellow"}


def show(
    reporter: Any,
    name: str,
    said: Answer | None,
    headline: str,
    rows: Sequence[Row],
    *,
    prediction: str = "",
    in_full: bool = True,
    verbose: bool = False,
) -> None:
    """Of one checkpoint; `verbose`: every check, and `prediction`, the table η by η. Not `in_full`, as one of several:
    without what was found. Without an answer, as of tests that needed no measurement, every check too."""
    rows = [row for row in rows if row.criterion]
    if said is None:
        verbose = True
    else:
        _write(reporter, _wrapped(f"{name}: {said}"), bold=True, **{_COLOURS[said.kind]: True})
    found = headline.splitlines()
    first = [line for line in found if line.startswith(FIRST)]
    doubts = itertools.chain(*(_wrapped(doubt.removeprefix(FIRST)) for doubt in first))
    _write(reporter, itertools.chain(unseen(name, rows), doubts), yellow=True)
    if in_full:
        _write(reporter, (line for line in found if line not in first))
    shown = in_order(rows)
    if not verbose:
        shown = [row for row in shown if row.status not in PLAIN]
    if shown:
        write_table(
            reporter, criteria_table(name, shown, plain=plain()), above=long_criteria(shown)
        )
    for row in shown if not verbose else ():
        if row.remedy:
            _write(reporter, _wrapped(f"{row.criterion}: {row.remedy}"))
    if in_full:
        _write(reporter, prediction.splitlines())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _write(reporter: Any, lines: Iterable[str], **markup: bool) -> None:
    for line in lines:
        reporter.write_line(written(line), **markup)
