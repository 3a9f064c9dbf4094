"""Names in `-m` that no marker has, which pytest takes for markers that no test has."""

from __future__ import annotations

import difflib
import re

import pytest

from pytest_entropy_probe.names import MARKERS

_NEAR = 0.8
"""Of difflib: `acceptanec`, `scalling` and `gates` are nearer to a marker of ours, a name of one's own hardly is."""


class Markers:
    """Looks at `-m` when every plugin and conftest.py has registered its markers."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """`pytest.UsageError` for a misspelt marker: what it should have selected would be left out without a word."""
        registered = {re.split(r"[:(]", line)[0].strip() for line in self._config.getini("markers")}
        for name in _names_in(self._config.option.markexpr):
            if name not in registered and (near := _near(name)):
                raise pytest.UsageError(f"-m: there is no marker {name}; did you mean {near}?")


def why_nothing(expression: str, *, has_checkpoint: bool) -> str:
    """What a user should know whose `-m` selected nothing; empty where it speaks of no marker of ours."""
    names = _names_in(expression)
    if has_checkpoint:
        return f"-m {expression} selects no check; markers of the checks are {', '.join(MARKERS)}"
    for name in names:
        if near := _near(name):
            misspelt = "" if near == name else f"there is no marker {name}, did you mean {near}? "
            needed = f"-m {near} selects checks of a checkpoint"
            return f"{misspelt}{needed}; add --probe-checkpoint=PATH"
    return ""


def _names_in(expression: str) -> list[str]:
    """The markers in an expression of `-m`, without what stands in brackets behind them, such as `(key=1)`."""
    without = re.sub(r"(?<=\w)\([^()]*\)", "", expression or "")
    return [name for name in re.findall(r"\w+", without) if name not in ("and", "or", "not")]


def _near(name: str) -> str:
    return next(iter(difflib.get_close_matches(name, MARKERS, n=1, cutoff=_NEAR)), "")
