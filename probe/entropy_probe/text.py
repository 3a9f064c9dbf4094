"""Texts that a user or a checkpoint gives: regular files only, and never more than fits."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from entropy_probe.errors import CheckpointError, RolloutsError

LARGEST = 1 << 30
"""Bytes; a gigabyte of JSON takes ten of memory."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading.

    Raises `OSError` for anything else: a pipe would wait, a device never end.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer opens at once
    stream = os.open(path, os.O_RDONLY | at_once)
    file = os.fdopen(stream, "rb")
    mode = os.fstat(stream).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file. Raises `OSError` for anything else, and for one that is too large."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise OSError(errno.EFBIG, f"is larger than {LARGEST >> 30} GiB", str(path))
        return file.read().decode("utf-8")


def json_lines(path: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) for every line that is not blank, one after the other: the file is never held whole.

    Raises `RolloutsError`; `form` says what to write.
    """
    number = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(LARGEST + 1):  # JSON may hold other line separators
                number += 1
                if len(line) > LARGEST:
                    raise OSError(errno.EFBIG, f"line {number} is larger than {LARGEST >> 30} GiB")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", _object(text, f"{path}:{number}", form)
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        raise RolloutsError(path, f"cannot be read ({error})", "give a JSON-lines file") from error


def _object(line: str, where: str, form: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RolloutsError(where, f"is not JSON ({error})", form) from error
    if not isinstance(row, dict):
        raise RolloutsError(where, f"is a {type(row).__name__}", form)
    return row


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds half of a pair, which JSON can hold and UTF-8 cannot."""
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def read_json(path: Path) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            path, f"holds a {type(content).__name__}, not an object", "restore the file"
        )
    return content


def load_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(path, "is missing", "copy the whole checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            path, f"is not readable JSON ({error})", "restore the file"
        ) from error


def number_in_json(value: float) -> float | str:
    """The number, or the string by which report.json writes one that JSON has not: NaN, Infinity, -Infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
