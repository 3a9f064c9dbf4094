"""Shapes and types of `entropy_probe` are enforced while its tests run (`--jaxtyping-packages` in pyproject.toml)."""

from __future__ import annotations

import builtins
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as everywhere else in Python's typing


def make_shapes_known() -> None:
    """Let annotations find `Float`, `Int` and `Bool`, which the library imports for type checkers alone.

    Call it before `entropy_probe` is imported: jaxtyping takes an annotation with an unknown name for `Any`.
    """
    for name in ("Bool", "Float", "Int"):
        setattr(builtins, name, getattr(jaxtyping, name))


def enforce(function: Any) -> Any:
    return beartype(conf=_CONF)(function)
