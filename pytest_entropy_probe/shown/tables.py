"""What a run found, as rows, and tables of them: criteria of one checkpoint, checkpoints by step.

The terminal shows them (rich, 80 columns), and markdown.py.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entropy_probe.page.shown import brief
from pytest_entropy_probe.judge import number

if TYPE_CHECKING:
    from rich.table import Table

    from entropy_probe import ProbeReport

STATUS = {
    "pass": ("PASS", "green"),
    "fail": ("FAIL", "bold red"),
    "inconclusive": ("INCONCLUSIVE", "yellow"),
    "not_applicable": ("N/A", "dim"),
    "xfail": ("XFAIL", "yellow"),
    "xpass": ("XPASS", "bold red"),
}


_WIDTH = 80


@dataclass(frozen=True)
class Row:
    """One criterion's verdict on one checkpoint; `message` is how a failure ends its test.

    What is `noisy`, as gates are, passes on the wrong side of its limit too. What is `unseen` could
    not be asked: rounding, kinks or a missing derivative are in the way. `unit`: of value and limit, if they have one
    of their own; its first word stands beside them.
    """

    checkpoint: str
    criterion: str
    status: str
    value: float | str | None
    limit: float | str | None
    message: str = ""
    noisy: bool = False
    unseen: bool = False
    unit: str = ""
    family: str = ""

    @property
    def shown(self) -> tuple[str, str]:
        """Value and limit, as they are written."""
        unit = f" {self.unit.partition(' ')[0]}" if self.unit else ""
        cells = (self.value, self.limit)
        value, limit = ("-" if cell is None else f"{number(cell)}{unit}" for cell in cells)
        return value, limit

    @property
    def remedy(self) -> str:
        """What a failure means and what to do, below the line that says what was found."""
        return " ".join(self.message.partition("\n")[2].split())

    @property
    def margin(self) -> str:
        """How far inside the limit, as a factor.

        12x is twelve times better than asked, 0.5x misses it by two.
        """
        from entropy_probe_checks.shown import margin

        return margin(self.value, self.limit, self.status, noisy=self.noisy)

    @property
    def factor(self) -> float | None:
        """How many times better than asked, infinite for 0; `None` where that is no question."""
        from entropy_probe_checks.shown import factor

        return factor(self.value, self.limit, self.status, noisy=self.noisy)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Family after family as they come; in each what did not pass first, then the smallest margin."""
    families = list(dict.fromkeys(row.family for row in rows))

    def place(row: Row) -> tuple[int, bool, float]:
        factor = math.inf if row.factor is None else row.factor
        return families.index(row.family), row.status in PLAIN, factor

    return sorted(rows, key=place)


def trouble_of(rows: Sequence[Row]) -> str:
    """What the checks say that load and measure, where they failed."""
    messages = (row.message.strip() for row in rows if not row.criterion)
    return next((message for message in messages if message), "")


PLAIN = ("pass", "not_applicable")
"""What nobody has to look at."""


def unseen(name: str, rows: Sequence[Row]) -> list[str]:
    """What could not be asked of a checkpoint though it has all that is asked, within 80 columns."""
    names = [row.criterion for row in rows if row.unseen]
    if not names:
        return []
    what = f"{len(names)} of {len(rows)} criteria saw nothing"
    why = "for rounding, kinks or a missing derivative"
    return textwrap.wrap(f"{name}: {what}, {why}: {', '.join(names)}", 80, break_on_hyphens=False)


@dataclass(frozen=True)
class Step:
    """One checkpoint of a run: what its next step does, in `unit`, and how its verdicts ended."""

    name: str
    run: str
    step: int | None
    entropy: str
    predicted: str
    realised: str
    ess: str
    verdicts: str
    unit: str = ""
    not_chosen: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands under `STEP_HEADINGS`; a name that ends in its step says it already."""
        named = self.step is None or self.step == _last_number(self.name)
        name = self.name if named else f"{self.name} ({self.step})"
        return name, self.entropy, self.predicted, self.realised, self.ess, self.verdicts


def step_of(
    name: str,
    run: str,
    report: ProbeReport | None,
    rows: Sequence[Row],
    state: str,
) -> Step:
    """The line of one checkpoint; without a report, why there is none."""
    if report is None:
        why = state.removeprefix("checkpoint ") or "not measured"
        return Step(name, run, _last_number(name), "-", "-", "-", "-", why)
    checkpoint, per_token = report.checkpoint, report.entropy.per_token
    step, cells = report.next_step, ("-", "-", "-")
    if step is not None:
        of_token = step.per_token
        predicted = brief(of_token.predicted, of_token.predicted_se)
        cells = (
            (predicted if step.in_range else f"({predicted})") + ("*" if report.not_chosen else ""),
            brief(of_token.realised, of_token.realised_se) + ("*" if report.not_chosen else ""),
            f"{step.unclipped_ess_fraction:.2f}",
        )
    return Step(
        name,
        run,
        checkpoint.step,
        brief(per_token.value, per_token.se, signed=False) + ("*" if report.not_chosen else ""),
        *cells,
        verdicts(rows),
        "nats/token",
        report.not_chosen,
    )


def verdicts(rows: Iterable[Row]) -> str:
    """How the verdicts on one checkpoint ended, in as few words as tell."""
    ended = [row.status for row in rows]
    failed, open_ = sum(s in ("fail", "xpass") for s in ended), ended.count("inconclusive")
    said = [f"{failed} failed"] * (failed > 0) + [f"{open_} open"] * (open_ > 0)
    return ", ".join(said) or ("passed" if ended else "-")


def by_step(steps: Iterable[Step]) -> list[Step]:
    """Run after run, each in the order of its steps."""
    return sorted(steps, key=lambda s: (s.run, math.inf if s.step is None else s.step))


def _last_number(name: str) -> int | None:
    digits = name[len(name.rstrip("0123456789")) :]
    return int(digits) if digits else None


STEP_HEADINGS = ("checkpoint", "H/token", "predicted", "realised", "ESS/N", "verdicts")


def steps_title(steps: Sequence[Step]) -> str:
    """What the table shows, and in which units."""
    units = ", ".join(sorted({step.unit for step in steps if step.unit})) or "nats"
    of = f" of {len(steps)} checkpoints" if len(steps) > 1 else ""
    marks = "".join(f", *: {mark}" for mark in sorted({s.not_chosen for s in steps} - {""}))
    return f"next step{of}: change in {units}, (out of range){marks}"


def steps_table(steps: Sequence[Step], *, plain: bool) -> Table:
    """One line a checkpoint, within 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=steps_title(steps),
        title_justify="left",
        title_style="bold",
        box=box.ASCII2 if plain else box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for heading in STEP_HEADINGS:
        justify = "left" if heading in ("checkpoint", "verdicts") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading != "verdicts")
    for step, name in zip(steps, long_names(steps, plain=plain), strict=True):
        *cells, ended = map(Text, _shown(step, plain=plain))
        bad = "bold red" if "failed" in step.verdicts else "yellow"
        ended.stylize("green" if step.verdicts == "passed" else bad)
        cells[0] = Text() if name else cells[0]
        table.add_row(*cells, ended)
    return table


def _shown(step: Step, *, plain: bool) -> list[str]:
    return [cell.replace("±", "+/-") if plain else cell for cell in step.cells]


def long_names(steps: Sequence[Step], *, plain: bool) -> list[str]:
    """The name of each step that finds no room beside its figures; the others are empty."""
    rows = [list(STEP_HEADINGS), *(_shown(step, plain=plain) for step in steps)]
    figures = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[1:]]
    room = max(_WIDTH - sum(figures), len(STEP_HEADINGS[0]))
    return ["" if len(row[0]) <= room else row[0] for row in rows[1:]]


def long_criteria(rows: Sequence[Row]) -> list[str]:
    """The name of each criterion, such as a golden file's, that finds no room beside its figures."""
    shown = [(*row.shown, row.margin, STATUS.get(row.status, (row.status, ""))[0]) for row in rows]
    columns = zip(("value", "limit", "margin", "status"), *shown, strict=True)
    room = _WIDTH - 4 - sum(max(map(len, column)) + 3 for column in columns)
    return ["" if len(row.criterion) <= room else row.criterion for row in rows]


def criteria_table(name: str, rows: list[Row], *, plain: bool) -> Table:
    """One line a criterion: value, limit, margin, status."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(name),
        title_justify="left",
        title_style="bold",
        box=box.ASCII2 if plain else box.ROUNDED,
    )
    table.add_column("criterion", overflow="fold", no_wrap=True)
    for heading in ("value", "limit", "margin"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("status", no_wrap=True)
    for k, (row, name) in enumerate(zip(rows, long_criteria(rows), strict=True)):
        shown, style = STATUS.get(row.status, (row.status, ""))
        cells = ("" if name else row.criterion, *row.shown, row.margin)
        ends = k + 1 < len(rows) and rows[k + 1].family != row.family
        table.add_row(*map(Text, cells), Text(shown, style), end_section=ends)
    return table
