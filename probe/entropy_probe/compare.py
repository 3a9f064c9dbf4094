"""Reports side by side: every quantity with its standard error, and its difference to the first report's.

    side = side_by_side([Side("before", one), Side("after", other)])
    print(side.text(), side.markdown(), side.to_json(), sep="\\n")

Two entropies on the same prompts are compared prompt by prompt, and the SE is that of the differences. Everything else
is taken as independent, SE = √(SE₁² + SE₂²): reports hold no parts of it by prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

from entropy_probe.answer import answer, checked
from entropy_probe.differences import (
    Difference,
    difference,
    entropy_per_response,
    entropy_per_token,
)
from entropy_probe.errors import ConfigError
from entropy_probe.report import Compared, Estimate, ProbeReport, Verdict
from entropy_probe.text import number_in_json

_WIDTH = 80


@dataclass(frozen=True)
class Side:
    """One report, under the name that it has beside the others, and the verdicts on it."""

    name: str
    report: ProbeReport
    verdicts: Sequence[Verdict] = ()

    @property
    def answer(self) -> str:
        return str(answer(self.report, checked(self.verdicts)))

    @property
    def failed(self) -> list[str]:
        return [verdict.criterion for verdict in self.verdicts if verdict.status == "fail"]


class Figure(NamedTuple):
    """A value; `se` is `None` where none is known."""

    value: float
    se: float | None


class Quantity(NamedTuple):
    """Of every report, in their order; `None` where a report has it not. The first difference is `None` too."""

    name: str
    unit: str
    figures: list[Figure | None]
    differences: list[Difference | Figure | None]


def _estimate(of: Estimate) -> Figure:
    return Figure(of.value, of.se)


def _change(report: ProbeReport, read: Callable[[Compared], Figure | None]) -> Figure | None:
    return None if report.next_step is None else read(report.next_step.per_token)


def _predicted(of: Compared) -> Figure | None:
    return None if of.predicted is None else Figure(of.predicted, of.predicted_se)


def _of_update(report: ProbeReport) -> Figure | None:
    return None if report.update is None else Figure(report.update.momentum_share, None)


def _ess(report: ProbeReport) -> Figure | None:
    step = report.next_step
    return None if step is None else Figure(step.unclipped_ess_fraction, None)


def _resolves(report: ProbeReport) -> Figure | None:
    return None if report.resolution is None else Figure(report.resolution.per_token, None)


def _learning_rate(report: ProbeReport) -> Figure | None:
    return None if report.update is None else Figure(report.update.lr, None)


Pairing = Callable[[ProbeReport, ProbeReport], Difference] | None
QUANTITIES: dict[str, tuple[str, Callable[[ProbeReport], Figure | None], Pairing]] = {
    "entropy per token": ("nats", lambda r: _estimate(r.entropy.per_token), entropy_per_token),
    "entropy per response": ("nats", lambda r: _estimate(r.entropy.rb), entropy_per_response),
    "predicted change per token": ("nats", lambda r: _change(r, _predicted), None),
    "realised change per token": (
        "nats",
        lambda r: _change(r, lambda of: Figure(of.realised, of.realised_se)),
        None,
    ),
    "mean reward": ("", lambda r: Figure(r.batch.mean_reward, r.batch.mean_reward_se), None),
    "momentum share of the step": ("", _of_update, None),
    "learning rate": ("", _learning_rate, None),
    "ESS/N after the step": ("", _ess, None),
    "resolves, per token (2 SE)": ("nats", _resolves, None),
}
"""Name → unit, how it is read from a report, and how two reports are compared where that is by prompt."""


@dataclass(frozen=True)
class SideBySide:
    """What `side_by_side` found."""

    sides: Sequence[Side]
    quantities: list[Quantity]

    def to_json(self) -> str:
        """Names, verdicts, and every quantity; NaN and infinities are strings, as in report.json."""
        sides = [
            {
                "name": side.name,
                "path": side.report.checkpoint.path,
                "step": side.report.checkpoint.global_step,
                "fingerprint": side.report.checkpoint.fingerprint,
                "prompts_fingerprint": side.report.batch.prompts_fingerprint,
                "answer": side.answer,
                "failed": side.failed,
            }
            for side in self.sides
        ]
        quantities = {
            of.name: {
                "unit": of.unit,
                "values": [_plain(one) for one in of.figures],
                "differences": [_plain(one) for one in of.differences],
            }
            for of in self.quantities
        }
        return json.dumps({"reports": sides, "quantities": quantities}, indent=2)

    def markdown(self) -> str:
        """A table with a column a report; the difference to the first stands below the value."""
        names = [_escaped(side.name) for side in self.sides]
        lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for of in self.quantities:
            cells = []
            for one, less in zip(of.figures, of.differences, strict=True):
                cell = _shown(one)
                cells.append(
                    cell if less is None else f"{cell}<br>{_shown(less, signed=True)}{_mark(less)}"
                )
            unit = f", {of.unit}" if of.unit else ""
            lines.append(f"| {of.name}{unit} | {' | '.join(cells)} |")
        answers = " | ".join(_escaped(side.answer) for side in self.sides)
        failed = " | ".join(", ".join(side.failed) or "none" for side in self.sides)
        lines += [f"| verdict | {answers} |", f"| failed | {failed} |", "", _note(self)]
        return "\n".join(lines) + "\n"

    def text(self, *, plain: bool = False) -> str:
        """For a terminal of 80 columns: a block a quantity, a line a report; in ASCII where `plain`."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        first = self.sides[0].name
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
        for heading in (
            "value",
            f"less {first}" if len(first) <= 18 else "less the first",
            "in SE",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        table.expand = True
        for of in self.quantities:
            unit = f", {of.unit}" if of.unit else ""
            table.add_row(Text(f"{of.name}{unit}", style="bold"))
            for side, one, less in zip(self.sides, of.figures, of.differences, strict=True):
                cells = (
                    ["", ""]
                    if less is None
                    else [_shown(less, signed=True) + _mark(less), _in_se(less)]
                )
                table.add_row(Text(f"  {side.name}"), _shown(one), *cells)
        file = StringIO()
        console = Console(file=file, width=_WIDTH, color_system=None, legacy_windows=False)
        console.print(table)
        console.print()
        for side in self.sides:
            console.print(Text(f"{side.name}: {side.answer}"))
        console.print(Text(_note(self)))
        shown = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
        return shown.translate(_ASCII) if plain else shown


_ASCII = str.maketrans({"±": "+/-", "−": "-", "–": "-", "∞": "inf", "…": "~", "Δ": "d"})


def side_by_side(sides: Sequence[Side]) -> SideBySide:
    """Every quantity of each report, and its difference to the first report's with the SE.

    Raises `ConfigError` for fewer than two.
    """
    if len(sides) < 2:
        raise ConfigError("compare", f"{len(sides)} report", "give two or more")
    quantities = []
    for name, (unit, read, paired) in QUANTITIES.items():
        figures = [read(side.report) for side in sides]
        found: list[Difference | Figure | None] = [None]
        for side, one in zip(sides[1:], figures[1:], strict=True):
            if paired is not None:
                found.append(paired(sides[0].report, side.report))
            else:
                found.append(_less(figures[0], one))
        quantities.append(Quantity(name, unit, figures, found))
    return SideBySide(sides, quantities)


def _less(first: Figure | None, other: Figure | None) -> Difference | Figure | None:
    if first is None or other is None:
        return None
    if first.se is None or other.se is None:
        return Figure(other.value - first.value, None)
    one, two = (Estimate(value=of.value, se=of.se or 0.0) for of in (first, other))
    return difference(one, two)


def _shown(one: Figure | Difference | None, *, signed: bool = False) -> str:
    from entropy_probe.page.shown import MISSING, number, with_se

    if one is None:
        return MISSING
    if one.se is None:
        return number(one.value, signed=signed)
    return with_se(one.value, one.se, signed=signed)


def _mark(less: Difference | Figure) -> str:
    return "*" if isinstance(less, Difference) and less.paired else ""


def _in_se(less: Difference | Figure) -> str:
    return "" if not less.se else f"{less.value / less.se:+.1f}".replace("-", "−")


def _note(of: SideBySide) -> str:
    paired = any(
        isinstance(less, Difference) and less.paired
        for one in of.quantities
        for less in one.differences
    )
    if paired:
        return (
            "*: over the prompts, which are the same; other errors are of independent measurements."
        )
    return "All errors of differences are of independent measurements: the prompts differ."


def _plain(one: Figure | Difference | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        key: number_in_json(value) if isinstance(value, float) else value
        for key, value in one._asdict().items()
    }


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
