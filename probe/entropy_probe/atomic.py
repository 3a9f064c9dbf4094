"""A file that is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from entropy_probe.errors import ProbeError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, to a temporary file beside `path`, then move it there.

    A link is followed; what is not a regular file (a pipe, /dev/stdout) is written to directly.
    """
    temporary, content = None, content.encode() if isinstance(content, str) else content
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ProbeError(
            path, f"cannot be written ({error.strerror})", "choose another path"
        ) from error
