"""Progress on stderr while a checkpoint is loaded and measured.

A bar on a terminal, now and then a line elsewhere.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

import pytest

SECONDS_BETWEEN_LINES = 10.0


def _ignore(stage: str, done: int, total: int) -> None:
    """Nobody is looking."""


@contextmanager
def shown(config: pytest.Config, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callable (stage, done, total) that draws; nothing under -q or -s, or in an xdist worker.

    Without a terminal it writes a plain line every ten seconds, so that a short run writes none;
    pytest's line is ended before them, and stands again, as far as it was, behind them. What the
    library prints is captured as ever: the bar writes to a duplicate of the stderr from before
    capturing. It has a line of its own below pytest's current one, and leaves the cursor where it
    was.
    """
    quiet = config.get_verbosity() < 0 or config.getoption("capture") == "no"
    if quiet or hasattr(config, "workerinput"):
        yield _ignore
        return
    handle, column, row = _stderr(config)
    if column is None or os.environ.get("TERM") == "dumb":
        with open(handle, "w", encoding="ascii", errors="replace") as stream:
            yield _lines(stream, name, row.leave)
        row.resume()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    stage_column = TextColumn("{task.description}")
    count_column = TextColumn("{task.fields[count]}")
    encoding = getattr(sys.__stderr__, "encoding", None) or "utf-8"
    with open(handle, "w", encoding=encoding, errors="replace") as stream:
        bar = Progress(
            stage_column,
            BarColumn(),
            count_column,
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
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


def _lines(
    stream: TextIO, name: str, leave_row: Callable[[], None]
) -> Callable[[str, int, int], None]:
    """A callable (stage, done, total) that writes a line every ten seconds; before the first one it leaves the row."""
    started = last = time.monotonic()
    written = False

    def write(stage: str, done: int, total: int) -> None:
        nonlocal last, written
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            count = f" {done}/{total}" if total > 1 else ""
            if not written:
                leave_row()
            written = True
            line = f"entropy-probe: {name}: {stage}{count}, {now - started:.0f} s"
            print(line, file=stream, flush=True)

    return write


class _Row:
    """The line that pytest is writing on stdout, such as a file's name with its dots."""

    def __init__(self, config: pytest.Config, *, beside: bool) -> None:
        self._config = config
        self._beside = beside
        self._text = ""

    def leave(self) -> None:
        """End it, where other lines come to stand beside it."""
        if self._beside:
            with _writing(self._config) as terminal:
                self._text = terminal._current_line
                if self._text:
                    terminal.line()
                    terminal.flush()

    def resume(self) -> None:
        """Begin it again, as far as it was."""
        if self._text:
            with _writing(self._config) as terminal:
                terminal.write(self._text, flush=True)


@contextmanager
def _writing(config: pytest.Config) -> Iterator[Any]:
    """pytest's terminal, while nothing is captured."""
    with _uncaptured(config):
        yield config.get_terminal_writer()


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    return capture.global_and_fixture_disabled() if capture else nullcontext()


def _stderr(config: pytest.Config) -> tuple[int, int | None, _Row]:
    """A duplicate of the real stderr, the column where pytest's line on it ends, and that line.

    The column is `None` where no bar can be drawn: stderr is no terminal, or pytest's line may be
    shown on it by somebody else, as by `| tee`.
    """
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    with _uncaptured(config):
        handle = os.dup(2)
        out, is_terminal = os.fstat(1), os.isatty(2)
        by_another = is_terminal and stat.S_ISFIFO(out.st_mode)
        row = _Row(config, beside=by_another or os.path.samestat(out, os.fstat(2)))
        if not is_terminal or by_another:
            return handle, None, row
        if reporter is None or not reporter.isatty:
            return handle, 0, row
        reporter.flush()
        return handle, reporter._tw.width_of_current_line, row
