"""What was given for one option: on the command line, or else in the ini file.

Relative paths on the command line start at the folder pytest was started in, those in an ini file
at that file. Every complaint is one line: option, what was got, what to do.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest

from pytest_entropy_probe.names import option


def text_of(config: pytest.Config, key: str) -> str | None:
    value = config.getoption(f"probe_{key}")
    if value is not None:
        return not_empty(value, key)
    return config.getini(f"probe_{key}") or None


def flag(config: pytest.Config, key: str) -> bool:
    return bool(config.getoption(f"probe_{key}") or config.getini(f"probe_{key}"))


def not_empty(value: str, key: str) -> str:
    """An empty value is what an unset shell variable leaves behind."""
    if not value.strip():
        raise pytest.UsageError(f"{option(key)}: is empty; give a value or leave the option out")
    return value


def origin(config: pytest.Config, key: str) -> tuple[str, Path]:
    """How the value is called in a message, and the folder its relative paths start at."""
    if config.getoption(f"probe_{key}") is not None:
        return option(key), config.invocation_params.dir
    folder = config.rootpath if config.inipath is None else config.inipath.parent
    return f"probe_{key} (ini)", folder


def label(config: pytest.Config, key: str) -> str:
    """How the value is called in a message."""
    return origin(config, key)[0]


def absolute(value: str, start: Path) -> Path:
    """Absolute, with `~` expanded; links stay, since their name is what the user knows."""
    return Path(os.path.abspath(start / Path(value).expanduser()))


def place(config: pytest.Config, key: str) -> Path | None:
    """The path that the option was given, whether something is there or not."""
    value = text_of(config, key)
    if value is None:
        return None
    name, start = origin(config, key)
    path = absolute(value, start)
    try:
        path.exists()
    except OSError as error:  # a name too long, or below a folder without rights
        problem = f"{path}: cannot be written or read ({error.strerror})"
        raise pytest.UsageError(f"{name}: {problem}; give another path") from error
    return path


def existing(config: pytest.Config, key: str, kind: str) -> Path | None:
    """The path that the option was given: a `file`, a `folder`, or a `file or folder`."""
    path = place(config, key)
    if path is None or (path.is_dir() and "folder" in kind) or (path.is_file() and "file" in kind):
        return path
    problem = f"no such {kind}: {path}; give the path of an existing {kind}"
    raise pytest.UsageError(f"{label(config, key)}: {problem}")


def one_of(config: pytest.Config, key: str, valid: Collection[str]) -> str | None:
    value = text_of(config, key)
    if value is not None and value not in valid:
        choices = ", ".join(valid)
        raise pytest.UsageError(f"{label(config, key)}: got {value!r}; give one of {choices}")
    return value


def natural_number(config: pytest.Config, key: str) -> int | None:
    value = text_of(config, key)
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 0:
        problem = f"got {value!r}; give a whole number, 0 or more"
        raise pytest.UsageError(f"{label(config, key)}: {problem}")
    return number
