"""The progress bar: on stderr, on a terminal, while a checkpoint is loaded and measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest


def _ignore(stage: str, done: int, total: int) -> None:
    """Nobody is looking."""


@contextmanager
def shown(config: pytest.Config, name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callable (stage, done, total) that draws; it draws nothing under -q or -s, in a worker or without a terminal.

    What the library prints is captured as ever: the bar writes to a duplicate of the stderr from before capturing.
    It has a line of its own below pytest's current one, and leaves the cursor where it was.
    """
    quiet = config.get_verbosity() < 0 or config.getoption("capture") == "no" or hasattr(config, "workerinput")
    terminal = None if quiet or os.environ.get("TERM") == "dumb" else _terminal(config)
    if terminal is None:
        yield _ignore
        return
    handle, column = terminal
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    encoding = getattr(sys.__stderr__, "encoding", None) or "utf-8"
    with open(handle, "w", encoding=encoding, errors="replace") as stream:
        bar = Progress(
            *columns, console=Console(file=stream), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[stage] = bar.add_task(f"{name}: {stage}", total=total or None)
            bar.update(tasks[stage], completed=done, total=total or None)

        stream.write("\n" if column else "")
        with bar:
            yield draw
        stream.write(f"\x1b[A\x1b[{column + 1}G" if column else "")


def _terminal(config: pytest.Config) -> tuple[int, int] | None:
    """A duplicate of the real stderr if that is a terminal, and the column where pytest's line on it ends."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        if not os.isatty(2):
            return None
        if reporter is None or not reporter.isatty:
            return os.dup(2), 0
        reporter.flush()
        return os.dup(2), reporter._tw.width_of_current_line
