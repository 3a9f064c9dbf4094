"""Every failure a user can cause, in one vocabulary.

A message is one line, `where: what is wrong; what to do`. `where` names a file, an option or a configuration
key; the last part is an instruction. Nothing else is raised on purpose by this library.
"""

from __future__ import annotations

import os
from reprlib import Repr

_LONGEST_SHOWN = 120


def printable(name: object) -> str:
    """A path or name as text that every stream and JSON can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def shown(value: object) -> str:
    """`repr`, cut to the length of a line; the type where there is no repr, as of an integer of 5000 digits.

    Containers are written two levels deep, since a list that holds another one twice, and so on, has no end.
    """
    try:
        text = (
            _short.repr(value)
            if isinstance(value, list | tuple | dict | set | frozenset)
            else repr(value)
        )
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


_short = Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, _LONGEST_SHOWN, _LONGEST_SHOWN


def reason(error: Exception) -> str:
    """What a library's exception says, in at most 160 characters of one line; a heading that ends in `:` is skipped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0])[:160]


class ProbeError(Exception):
    """`where: problem; remedy` on one line.

    Parameters: `where`, the file, option or key at fault; `problem`, what was got and what was expected;
    `remedy`, what the reader should do.
    """

    def __init__(self, where: object, problem: str, remedy: str) -> None:
        self.where = str(where)
        self.problem = problem
        self.remedy = remedy
        super().__init__(printable(" ".join(f"{where}: {problem}; {remedy}".split())))

    def __reduce__(self) -> tuple[type[ProbeError], tuple[str, str, str]]:
        return type(self), (self.where, self.problem, self.remedy)


class CheckpointError(ProbeError):
    """A checkpoint that cannot be loaded exactly as its trainer left it."""


class ConfigError(ProbeError):
    """A configuration key, value or option that cannot be used."""


class RolloutsError(ProbeError):
    """A rollouts or prompts file that cannot be used; `where` names file and line."""


class OverrideError(ProbeError):
    """A direction v, or a mapping of parameters, that does not fit the model."""


class MeasurementError(ProbeError):
    """The measurement cannot be made as configured: too few prompts, no gradient."""


class CacheError(MeasurementError):
    """The model keeps no cache of what it has read, or one that cannot be used."""


class NoCopyError(MeasurementError):
    """A copy of the model cannot be made: it does not fit into memory, or holds what cannot be copied."""


class DistributedError(ProbeError):
    """Processes that measure together cannot go on: one has died, hangs, or has not come."""
