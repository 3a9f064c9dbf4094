"""Tables on pytest's terminal, in characters that its encoding has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
_ASCII = str.maketrans({"±": "+/-", "×": "x", "δ": "d", "₁": "1", "Δ": "D"})


def plain() -> bool:
    """Whether ASCII has to do."""
    return not _encoding().lower().startswith("utf")


def write_table(
    reporter: Any,
    table: Table,
    below: Iterable[str] = (),
    *,
    width: int | None = None,
) -> None:
    """As wide as the terminal, 80 columns at most; or `width`, where words would be lost."""
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
    for lines in filter(None, below):
        console.out(lines.translate(_ASCII) if plain() else lines, highlight=False)
    encoding = _encoding()
    for line in text.getvalue().encode(encoding, "replace").decode(encoding).splitlines():
        reporter.write_line(line.rstrip())


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"
