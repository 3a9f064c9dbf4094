"""Shapes and types of `entropy_probe` are enforced while its tests run (`--jaxtyping-packages` in pyproject.toml)."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as everywhere else in Python's typing
# Whole measurements again and again, or 300 000 calls: the checks would be half of the time, and what they see here
# the tests of the units have seen.
_UNCHECKED = {"faults", "fuzz", "hostile", "page", "test_audit.py", "test_cost.py", "test_oracle.py"}


_INNER: dict[tuple[Any, ...], Any] = {}


def make_shapes_known() -> None:
    """Let annotations find `Float`, `Int` and `Bool`, which the library imports for type checkers alone.

    Call it before `entropy_probe` is imported: jaxtyping takes an annotation with an unknown name for `Any`.
    """
    for name in ("Bool", "Float", "Int"):
        setattr(builtins, name, getattr(jaxtyping, name))


def enforce(function: Any) -> Any:
    """What jaxtyping calls with a function that has a signature and does nothing, to have arguments or results checked.

    A function inside of another is made again at every call of that one; the checks of its signature are not.
    """
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    names = function.__code__.co_varnames, repr(function.__annotations__)
    key = (function.__module__, function.__qualname__, *names)
    if key not in _INNER:
        _INNER[key] = _checked(function)
    return _INNER[key]


def _checked(function: Any) -> Any:
    return beartype(conf=_CONF)(function)


def is_checked(file: Path) -> bool:
    """Whether calls are checked in the tests of this file."""
    return _UNCHECKED.isdisjoint(file.relative_to(Path(__file__).parent).parts)


@contextmanager
def unchecked() -> Iterator[None]:
    """No call is checked in here."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
