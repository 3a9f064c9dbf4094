"""Progress on stderr while a checkpoint is loaded and measured.

A bar on a terminal, now and then a line elsewhere.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

import pytest

SECONDS_BETWEEN_LINES = 10.0


def _ignore(stage: str, done: int, total: int) -> None:
    """Nobody is looking."""


@contextmanager
def shown(config: pytest.Config, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callable (stage, done, total) that draws; nothing under -q or -s, or in an xdist worker.

    Without a terminal it writes a plain line every ten seconds, so that a short run writes none.
    What the library prints is captured as ever: the bar writes to a duplicate of the stderr from
    before capturing. It has a line of its own below pytest's current one, and leaves the cursor
    where it was.
    """
    quiet = config.get_verbosity() < 0 or config.getoption("capture") == "no"
    if quiet or hasattr(config, "workerinput"):
        yield _ignore
        return
    handle, column = _stderr(config)
    if column is None or os.environ.get("TERM") == "dumb":
        with open(handle, "w", encoding="ascii", errors="replace") as stream:
            yield _lines(stream, name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    stage_column = TextColumn("{task.description}")
    count_column = TextColumn("{task.fields[count]}")
    encoding = getattr(sys.__stderr__, "encoding", None) or "utf-8"
    with open(handle, "w", encoding=encoding, errors="replace") as stream:
        bar = Progress(
            stage_column,
            BarColumn(),
            count_column,
            TimeElapsedColumn(),
            console=Console(file=stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[stage] = bar.add_task(f"{name}: {stage}", total=None, count="")
            known = total > 1
            count = f"{done}/{total}" if known else ""
            bar.update(tasks[stage], completed=done, total=total if known else None, count=count)

        stream.write("\n" if column else "")
        with bar:
            yield draw
        stream.write(f"\x1b[A\x1b[{column + 1}G" if column else "")


def _lines(stream: TextIO, name: str) -> Callable[[str, int, int], None]:
    """A callable (stage, done, total) that writes a line every ten seconds."""
    started = last = time.monotonic()
    written = False

    def write(stage: str, done: int, total: int) -> None:
        nonlocal last, written
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            count = f" {done}/{total}" if total > 1 else ""
            break_line = "" if written else "\n"  # off the line on which pytest writes its dots
            written = True
            line = f"entropy-probe: {name}: {stage}{count}, {now - started:.0f} s"
            print(f"{break_line}{line}", file=stream, flush=True)

    return write


def _stderr(config: pytest.Config) -> tuple[int, int | None]:
    """A duplicate of the real stderr, and the column where pytest's line on it ends.

    The column is `None` if it is no terminal.
    """
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        handle = os.dup(2)
        if not os.isatty(2):
            return handle, None
        if reporter is None or not reporter.isatty:
            return handle, 0
        reporter.flush()
        return handle, reporter._tw.width_of_current_line
