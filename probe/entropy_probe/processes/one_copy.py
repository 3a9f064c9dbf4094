"""Memory that all processes of one machine see, so that what is as long as the parameters is held once.

A file without a name, in memory or in a folder: one process makes it, and the others open it by its descriptor, as
/proc/PID/fd/N, while that process waits. It is gone with the last process that maps it, however that ends. Nothing is
sent but the path.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.errors import ConfigError

_ALIGNED = 64
"""Bytes: torch puts tensors at multiples of it, and a product of one row goes another way elsewhere."""


def nameless(folder: Path | None = None, size: int = 0) -> int:
    """The descriptor of a file without a name, of so many bytes, in memory or in a folder.

    On disk all room is reserved at once. Raises `OSError` where there is not enough.
    """
    if folder is None:
        file = os.memfd_create("entropy-probe")
        os.ftruncate(file, size)
        return file
    with tempfile.TemporaryFile(dir=folder) as temporary:
        if size:
            os.posix_fallocate(temporary.fileno(), 0, size)
        return os.dup(temporary.fileno())


def is_possible() -> bool:
    """On Linux, where /proc is."""
    return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


def with_content(content: bytes) -> int:
    """The descriptor of a file in memory."""
    file = nameless()
    os.write(file, content)
    return file


def with_thing(thing: object) -> int:
    """The descriptor of a file in memory that `torch.load` reads it from. Raises `ConfigError` where it cannot be
    pickled."""
    file = nameless()
    try:
        with open(file, "wb", closefd=False) as stream:
            torch.save(thing, stream)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        os.close(file)
        problem = f"parameter cannot hand the model to the other processes ({error})"
        raise ConfigError("sharding", problem, "set sharding: prompt") from error
    return file


def has_content(path: str, content: bytes) -> bool:
    """Whether this process finds a file there with that in it."""
    try:
        return Path(path).read_bytes() == content
    except OSError:
        return False


def path_of(file: int) -> str:
    """Under which other processes of this machine find it, while this one has it open."""
    return f"/proc/{os.getpid()}/fd/{file}"


def size_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of the tensors of `mapped`."""
    return sum(_length(shape, dtype) for shape in shapes.values())


def mapped(
    path: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by name, one behind the other in the file: what one process writes all read."""
    size, found, start = size_of(shapes, dtype), {}, 0
    if not size:
        return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    with open(path, "r+b") as file:
        pages = mmap.mmap(file.fileno(), size)
    for name, shape in shapes.items():
        count = math.prod(shape)
        part = torch.frombuffer(pages, dtype=dtype, count=count, offset=start) if count else None
        found[name] = torch.zeros(shape, dtype=dtype) if part is None else part.view(shape)
        start += _length(shape, dtype)
    return found


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Names for each of `count` processes, with about as many numbers for each: the largest first, to who has least."""
    found: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        found[least].append(name)
        loads[least] += sizes[name]
    return found


def _length(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
