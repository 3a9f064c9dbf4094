"""A file that is written whole or not at all; and whether it will be, asked before hours of work go into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from entropy_probe.errors import ConfigError, ProbeError


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
        temporary = _beside(path)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ProbeError(
            path, f"cannot be written ({error.strerror})", "choose another path"
        ) from error


def require_writable(path: Path) -> None:
    """Raise `ConfigError` where `write_atomically(path)` would fail, by making an empty file and removing it.

    What is not a regular file is not tried: writing to a pipe has consequences. Nor is a full disk seen.
    """
    try:
        place = path.resolve()
        if place.is_dir():
            raise ConfigError(path, "is a folder", "give the path of a file")
        if place.exists() and not place.is_file():
            return
        there = next(folder for folder in place.parents if folder.exists())
        if not there.is_dir():
            raise ConfigError(path, f"{there} is not a folder", "choose another path")
        for part in place.relative_to(there).parts:  # which may be too long
            (there / part).exists()
        if there == place.parent:
            temporary = _beside(place)
            temporary.touch()
            temporary.unlink()
        else:
            os.rmdir(tempfile.mkdtemp(dir=there))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # also a NUL in the name, and a loop of links
        why = getattr(error, "strerror", None) or error
        raise ConfigError(path, f"cannot be written ({why})", "choose another path") from error


def require_appendable(path: Path) -> None:
    """Raise `ConfigError` where the file `path` cannot be opened for more text; a new one is not left behind."""
    is_new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError(path, problem, "choose another path") from error


def require_folder(path: Path) -> None:
    """Raise `ConfigError` where no files could be written into the folder `path`, which need not be there."""
    if path.exists() and not path.is_dir():
        raise ConfigError(path, "is a file", "give a folder")
    try:
        require_writable(path / "file")
    except ConfigError as error:
        raise ConfigError(path, error.problem, error.remedy) from error


def _beside(path: Path) -> Path:
    """The temporary file that takes the place of `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")
