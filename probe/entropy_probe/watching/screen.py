"""What is seen of a watch: a page on a terminal that is kept up to date, or a line an event where there is none."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from shutil import get_terminal_size
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from entropy_probe.page.shown import brief
from entropy_probe.watching.state import Record

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_COLOURS = {
    "good": "green",
    "bad": "red",
    "unknown": "yellow",
    "warning": "yellow",
    "running": "cyan",
}
_NARROW = 100
"""Columns, from which on the table has more of them."""
_CHART = 7
"""Lines of the chart."""
_EVENTS = 3
"""Events that stay on the page."""


class Shown(NamedTuple):
    """One run: what was measured, in the order of steps, the name of what is measured now and for how many seconds, and
    what else is there, with what it waits for."""

    run: str
    records: Sequence[Record]
    running: tuple[str, float] | None
    waiting: Sequence[tuple[str, str]]


class Screen:
    """`live`: whether a page is shown; by default where the standard output is a terminal."""

    def __init__(self, live: bool | None = None) -> None:
        self._events: list[tuple[str, str]] = []
        self._shown: Sequence[Shown] = ()
        self._next_look: float | None = None
        self._live: Live | None = None
        self._encoding = (
            sys.stdout.encoding or "ascii"
        ).lower()  # before rich puts its own stream there
        if sys.stdout.isatty() if live is None else live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(highlight=False),
                get_renderable=self._page,
                auto_refresh=False,
                vertical_overflow="crop",
            )

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def say(self, text: str, kind: str = "") -> None:
        """An event: `kind` colours it."""
        self._events = [*self._events, (f"{time.strftime('%H:%M:%S')} {text}", kind)][-_EVENTS:]
        if self._live is None:
            print(text.encode(self._encoding, "replace").decode(self._encoding), flush=True)
        else:
            self._live.refresh()

    def show(self, shown: Sequence[Shown], next_look: float | None) -> None:
        """What is known now; `next_look`: in so many seconds, where nothing is measured."""
        self._shown, self._next_look = shown, next_look
        if self._live is not None:
            self._live.refresh()

    def _page(self) -> RenderableType:
        size = get_terminal_size((80, 24))
        utf = self._encoding.startswith("utf")
        return page(
            self._shown,
            self._events,
            self._next_look,
            width=size.columns,
            height=size.lines,
            plain=not utf,
        )


def page(
    shown: Sequence[Shown],
    events: Sequence[tuple[str, str]],
    next_look: float | None,
    *,
    width: int,
    height: int,
    plain: bool = False,
) -> RenderableType:
    """The whole page, within so many columns and lines; in ASCII where `plain`."""
    from rich.console import Group
    from rich.text import Text

    below = [Text(_short(text, width), style=_COLOURS.get(kind, "")) for text, kind in events]
    if next_look is not None:
        below.append(Text(f"next look in {math.ceil(next_look)} s; Ctrl-C ends", style="dim"))
    room = (height - 1 - len(below)) // max(1, len(shown))
    blocks = [block for one in shown for block in _of_run(one, width, room, plain=plain)]
    return Group(*blocks, *below)


def _of_run(one: Shown, width: int, room: int, *, plain: bool) -> list[RenderableType]:
    """Heading, chart, table, and what is measured now."""
    from rich.text import Text

    title = Text(_short(one.run, width - 30), style="bold")
    passed = sum(record.passed for record in one.records)
    title.append(f"  {len(one.records)} measured, {passed} passed", style="")
    if passed < len(one.records):
        title.append(f", {len(one.records) - passed} failed", style="bold red")
    below: list[RenderableType] = []
    if one.running is not None:
        name, seconds = one.running
        below.append(Text(f"measuring {name}: {_duration(seconds)}", style=_COLOURS["running"]))
    waiting = [
        f"{name}{f' ({why})' if why else ''}"
        for name, why in one.waiting
        if one.running is None or name != one.running[0]
    ]
    if waiting:
        below.append(Text(_short(f"waiting: {', '.join(waiting)}", width), style="dim"))
    drawn = [record for record in one.records if record.figure("entropy") is not None]
    rows = room - 1 - len(below) - 2  # the headings of the table
    chart = len(drawn) > 1 and rows >= _CHART + 2 + 3
    if chart:
        rows -= _CHART + 2
    blocks: list[RenderableType] = [title]
    if chart:
        blocks.append(entropy_chart(drawn, width, _CHART, plain=plain))
    if one.records:
        legend = "ΔH/token: predicted and realised by the next step, came by the next checkpoint"
        blocks.append(Text(legend.replace("Δ", "d") if plain else legend, style="dim"))
        blocks.append(_table(one.records, max(1, rows), width, plain=plain))
    return blocks + below


def entropy_chart(records: Sequence[Record], width: int, height: int, *, plain: bool) -> Text:
    """Entropy per token over steps: a point a checkpoint, with ±2 SE around it, in `height` lines and an axis."""
    from rich.text import Text

    point, bar, corner, side, base = (
        ("*", "|", "+", "|", "-") if plain else ("●", "│", "└", "┤", "─")
    )
    found = [
        (r.step, r.figure("entropy") or 0.0, 2 * (r.figure("entropy_se") or 0.0), r.kind)
        for r in records
    ]
    found = [of for of in found if math.isfinite(of[1]) and math.isfinite(of[2])]
    if not found:
        return Text()
    low, high = min(h - band for _, h, band, _ in found), max(h + band for _, h, band, _ in found)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    labels = [f"{high - (high - low) * k / (height - 1):.3g}" for k in range(height)]
    gutter = max(map(len, labels))
    columns = max(1, width - gutter - 3)
    first, last = found[0][0], found[-1][0]
    cells: dict[tuple[int, int], tuple[str, str]] = {}

    def line_of(value: float) -> int:
        return round((high - value) / (high - low) * (height - 1))

    for step, h, band, kind in found:
        x = 0 if last == first else round((step - first) / (last - first) * (columns - 1))
        for y in range(line_of(h + band), line_of(h - band) + 1):
            if cells.get((y, x), ("", ""))[0] != point:
                cells[y, x] = (bar, "dim")
        cells[line_of(h), x] = (point, _COLOURS[kind])
    text = Text("H, nats/token; bars: 2 SE\n", style="dim")
    for y, label in enumerate(labels):
        shown = label if y in (0, height // 2, height - 1) else ""
        text.append(f"{shown:>{gutter}} {side}", style="dim")
        row = [cells.get((y, x), (" ", "")) for x in range(columns)]
        while row and row[-1][0] == " ":
            row.pop()
        for cell, style in row:
            text.append(cell, style=style)
        text.append("\n")
    ends = f"step {first}", "" if last == first else str(last)
    gap = max(1, columns - len(ends[0]) - len(ends[1]) - 2)
    text.append(
        f"{'':>{gutter}} {corner}{base} {ends[0]} {base * (gap - 2)} {ends[1]}"[:width], style="dim"
    )
    return text


_HEADINGS = ("step", "H/token", "predicted", "realised", "came", "cos v", "verdict")
_WIDE = ("ESS/N", "momentum", "answer")


def _table(records: Sequence[Record], most: int, width: int, *, plain: bool) -> Table:
    """A line a checkpoint, the newest `most` of them: ΔH per token predicted and realised for the next step, and how
    far it `came` to the next checkpoint; the cosine of v with the step that was made."""
    from rich.table import Table
    from rich.text import Text

    wide = width >= _NARROW
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in (*_HEADINGS, *(_WIDE if wide else ())):
        left = heading in ("verdict", "answer")
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=True, overflow="ellipsis"
        )
    came = {record.change.since: record.change for record in records if record.change is not None}
    for record in records[-most:]:
        change = came.get(record.checkpoint)
        cells = [
            str(record.step),
            brief(record.figure("entropy"), record.figure("entropy_se"), signed=False),
            brief(record.figure("delta_h_predicted"), record.figure("delta_h_se")),
            brief(record.figure("delta_h_realised"), record.figure("delta_h_realised_se")),
            "-" if change is None else brief(change.delta_h, change.se),
            "-" if record.fidelity is None else f"{record.fidelity.cosine:.3f}",
        ]
        if plain:
            cells = [cell.replace("±", "+/-") for cell in cells]
        ended, style = _verdict(record)
        more: list[str | Text] = []
        if wide:
            ess, momentum = record.figure("ess"), record.figure("momentum_share")
            more = [
                "-" if ess is None else f"{ess:.2f}",
                "-" if momentum is None else f"{momentum:.0%}",
                Text(record.answer.partition(":")[0], style=_COLOURS[record.kind]),
            ]
        table.add_row(*cells, Text(ended, style=style), *more)
    return table


def _verdict(record: Record) -> tuple[str, str]:
    if record.report is None:
        return "no report", "bold red"
    if record.passed:
        return "passed", "green"
    return f"{len(record.failed)} failed" if record.failed else "failed", "bold red"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _short(text: str, width: int) -> str:
    """The end of a long path, and the beginning of a long line, tell most; a line is cut at its end."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."
