"""The run in Markdown, as GitHub shows it beside a job.

It is appended to the file that $GITHUB_STEP_SUMMARY names.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_entropy_probe.names import PAGE
from pytest_entropy_probe.shown.records import FIRST
from pytest_entropy_probe.shown.tables import (
    STATUS,
    STEP_HEADINGS,
    Row,
    Step,
    steps_title,
    unseen,
)

if TYPE_CHECKING:
    from entropy_probe.answer import Answer
    from entropy_probe.predictor_skill import RunSkill

CRITERIA_HEADINGS = ("criterion", "value", "limit", "margin", "status")
MOST_IN_FULL = 20
"""Checkpoints whose criteria are all listed: a summary may have 1 MiB, and one takes 5 kB of it."""


def summary(
    title: str,
    steps: Sequence[Step],
    rows: Mapping[str, Sequence[Row]],
    headlines: Mapping[str, str],
    answers: Mapping[str, Answer],
    notes: Sequence[str],
    skills: Sequence[RunSkill | str] = (),
) -> str:
    """One table of the checkpoints by step; of each the answer in a sentence, and what failed, with what to do.

    All criteria of each are folded away below.
    """
    lines = [f"### {_escaped(title)}", "", f"{_escaped(steps_title(steps))}; H in nats/token:", ""]
    lines += [*_table(STEP_HEADINGS, (step.cells for step in steps)), ""]
    lines += [line for skill in skills for line in _of_skill(skill)]
    for step in steps:
        mine = rows.get(step.name, ())
        failures = [row.message for row in mine if row.message]
        if len(steps) == 1 or failures or FIRST in headlines.get(step.name, ""):
            lines += [f"#### {_escaped(step.name)}: {_escaped(step.verdicts)}", ""]
            lines += [_escaped(str(answers[step.name])), ""] if step.name in answers else []
        headline = headlines.get(step.name, "")
        first = "\n".join(line for line in headline.splitlines() if line.startswith(FIRST))
        shown = [headline if len(steps) == 1 else first]
        blind = " ".join(unseen(step.name, mine))
        for text in filter(None, [*shown, blind, *failures]):
            lines += ["```text", text.replace("```", "'''"), "```", ""]
        judged = [_cells(row) for row in mine if row.criterion]
        if judged and len(steps) <= MOST_IN_FULL:
            title = f"{html.escape(step.name)}: all criteria ({len(judged)})"
            lines += [f"<details><summary>{title}</summary>", ""]
            lines += [*_table(CRITERIA_HEADINGS, judged), "", "</details>", ""]
    return "\n".join([*lines, *(f"* {_escaped(note)}" for note in notes), ""])


def _of_skill(skill: RunSkill | str) -> list[str]:
    if isinstance(skill, str):
        return [_escaped(skill), ""]
    from entropy_probe.predictor_skill import HEADINGS

    rows = _table(HEADINGS, skill.rows())
    return [f"{_escaped(skill.title)}; {_escaped(skill.note)}:", "", *rows, ""]


def append(path: Path, text: str) -> str | None:
    """Add `text` to the file. The error line, if it can't be written."""
    try:
        with path.open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(text + "\n")
    except OSError as error:
        return f"{PAGE}: {path}: cannot be written ({error.strerror})"
    return None


def _cells(row: Row) -> tuple[str, ...]:
    return row.criterion, *row.shown, row.margin, STATUS.get(row.status, (row.status, ""))[0]


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    headings = list(headings)
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for cells in rows:
        yield f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """As text: names of folders and criteria are nobody's markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
