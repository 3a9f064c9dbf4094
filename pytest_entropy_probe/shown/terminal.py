"""Tables on pytest's terminal, in characters that its encoding has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import SEEK_END, StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
_ASCII = str.maketrans({"±": "+/-", "×": "x", "δ": "d", "₁": "1", "Δ": "D"})


def plain() -> bool:
    """Whether ASCII has to do."""
    return not _encoding().lower().startswith("utf")


def written(text: str) -> str:
    """In characters that the terminal has."""
    encoding = _encoding()
    text = text.translate(_ASCII) if plain() else text
    return text.encode(encoding, "replace").decode(encoding)


def write_table(
    reporter: Any,
    table: Table,
    *,
    above: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """As wide as the terminal, 80 columns at most; or `width`, where words would be lost.

    `above`: what stands on a line of its own above each row, whose first cell is empty then: a name is never broken.
    """
    from rich.console import Console

    text = StringIO()
    console = Console(
        file=text,
        width=width or min(WIDTH, get_terminal_size((WIDTH, 24)).columns),
        force_terminal=reporter.hasmarkup,
        color_system="standard" if reporter.hasmarkup else None,
        legacy_windows=False,
    )
    console.print(table)
    if any(above):
        size = console.measure(table).maximum
        text = StringIO(_with_names(text.getvalue(), above, size, boxed=table.show_edge))
        text.seek(0, SEEK_END)
        console.file = text
    for line in text.getvalue().splitlines():
        reporter.write_line(written(line.rstrip()))


def _with_names(table: str, above: Sequence[str], size: int, *, boxed: bool) -> str:
    """The lines of a table with a line of its own for each of `above` that is not empty; rows have one line each."""
    lines = table.splitlines()
    first = len(lines) - len(above) - boxed
    edge = ("|" if plain() else "│") if boxed else ""
    shown: list[str] = []
    for k, line in enumerate(lines):
        name = above[k - first] if 0 <= k - first < len(above) else ""
        if name and boxed:
            shown.append(f"{edge} {name:<{size - 4}} {edge}")
        elif name:
            shown.append(name)
        shown.append(line)
    return "\n".join(shown) + "\n"


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"
