"""Text files that a user or a checkpoint gives: regular files only, and never more than fits."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from entropy_probe.errors import CheckpointError

LARGEST = 1 << 30
"""Bytes; a gigabyte of JSON takes ten of memory."""


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file. `OSError` for anything else: a pipe would wait, a device never end."""
    stream = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer opens at once
    with os.fdopen(stream, "rb") as file:
        status = os.fstat(stream)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if status.st_size > LARGEST:
            raise OSError(errno.EFBIG, f"is larger than {LARGEST >> 30} GiB", str(path))
        return file.read().decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(path, f"holds a {type(content).__name__}, not an object", "restore the file")
    return content


def load_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(path, "is missing", "copy the whole checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not readable JSON ({error})", "restore the file") from error
