"""Shapes and types of `entropy_probe` are enforced while its tests run (`--jaxtyping-packages` in pyproject.toml)."""

from __future__ import annotations

from typing import Any

from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as everywhere else in Python's typing


def enforce(function: Any) -> Any:
    return beartype(conf=_CONF)(function)
