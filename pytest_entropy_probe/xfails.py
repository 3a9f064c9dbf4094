"""`--probe-xfails FILE`: known failures of the shipped checks, a line each, strict.

# prefix of an id, then the reason
probe-checks/test_importance.py::test_ess[run3]  lr was raised by hand; reported upstream
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class KnownFailure:
    """Every check whose id starts with `prefix` must fail, for `reason`."""

    prefix: str
    reason: str


def covers(selector: str, nodeid: str) -> bool:
    """Whether `selector` names the node or one of its ancestors."""
    below = tuple(f"{selector}{separator}" for separator in ("/", "::", "["))
    return nodeid == selector or nodeid.startswith(below)


def read_xfails(path: Path, ids: list[str]) -> tuple[KnownFailure, ...]:
    """The lines of the file.

    `pytest.UsageError` for one without a reason, or whose prefix none of `ids` has. A blank in a
    checkpoint's name belongs to the prefix, the longest start of the line that fits an id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"--probe-xfails: {path}: cannot be read ({error})") from error
    known = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--probe-xfails: {path}:{number}"
        line = line.strip()
        gaps = [gap.start() for gap in re.finditer(r"\s+", line)]
        starts = [line, *(line[:gap] for gap in reversed(gaps))]
        prefix = next((p for p in starts if any(covers(p, nodeid) for nodeid in ids)), None)
        if prefix is None:
            problem = f"no check's id starts with {starts[-1]!r}"
            raise pytest.UsageError(f"{where}: {problem}; remove the line or correct the id")
        reason = line[len(prefix) :].strip()
        if not reason:
            raise pytest.UsageError(f"{where}: no reason; write one after the id")
        known.append(KnownFailure(prefix, reason))
    return tuple(known)


def mark(items: list[pytest.Item], known: tuple[KnownFailure, ...]) -> None:
    """Mark what is known to fail: it then is `xfailed`, and fails the run if it passes."""
    for item in items:
        for failure in known:
            if covers(failure.prefix, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=failure.reason, strict=True))
