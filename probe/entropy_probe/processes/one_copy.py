"""Memory that all processes of one machine see, so that what is as long as the parameters is held once.

A file without a name, in memory or in a folder: one process makes it, and the others open it by its descriptor, as
/proc/PID/fd/N, while that process waits. It is gone with the last process that maps it, however that ends. Nothing is
sent but the path.
"""

from __future__ import annotations

import ctypes
import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.storage import TypedStorage

from entropy_probe.errors import ConfigError

_ALIGNED = 64
"""Bytes: torch puts tensors at multiples of it, and a product of one row goes another way elsewhere."""
_LENGTH = 8  # bytes of a number, the last of a file


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


def with_thing(thing: object, *, moved: bool = False) -> int:
    """The descriptor of a file in memory that `thing_in` reads it from. Raises `ConfigError` if it cannot be pickled.

    What all tensors hold, one behind the other; then all else. A thing that is `moved` is of no use any more: what a
    tensor held is given up as soon as the file has it, so that all of it is never there twice.
    """
    storages: list[UntypedStorage] = []
    try:
        said = _pickled(thing, storages)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        problem = f"parameter cannot hand the model to the other processes ({error})"
        raise ConfigError("sharding", problem, "set sharding: prompt") from error
    file, places = nameless(), []
    with open(file, "wb", closefd=False) as stream:
        for storage in storages:
            start, size = stream.seek(-(-stream.tell() // _ALIGNED) * _ALIGNED), storage.nbytes()
            places.append((start, start + size))
            if size:  # as an array of NumPy it could not be given up any more
                stream.write((ctypes.c_char * size).from_address(storage.data_ptr()))
            if moved and storage.resizable():
                storage.resize_(0)
        rest = pickle.dumps((said, places))
        stream.write(rest + len(rest).to_bytes(_LENGTH, "little"))
    return file


def _pickled(thing: object, storages: list[UntypedStorage]) -> bytes:
    """All but what tensors hold, of which it has the number in the list."""
    numbers: dict[int, int] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple[int, torch.dtype] | None:
            if not isinstance(obj, TypedStorage):
                return None
            storage = obj._untyped_storage
            if storage._cdata not in numbers:
                numbers[storage._cdata] = len(storages)
                storages.append(storage)
            return numbers[storage._cdata], obj.dtype

    stream = io.BytesIO()
    Pickler(stream).dump(thing)
    return stream.getvalue()


def thing_in(path: str) -> Any:
    """What `with_thing` put there. What is written into its tensors, this process alone sees."""
    with open(path, "rb") as stream:
        stream.seek(-_LENGTH, os.SEEK_END)
        size = int.from_bytes(stream.read(_LENGTH), "little")
        end = stream.seek(-_LENGTH - size, os.SEEK_END)
        said, places = pickle.loads(stream.read(size))  # noqa: S301 (written by rank 0 of this run)
    whole = UntypedStorage.from_file(path, False, end)
    storages = [whole[start:stop] for start, stop in places]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: tuple[int, torch.dtype]) -> Any:
            number, dtype = pid
            return TypedStorage(wrap_storage=storages[number], dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(said)).load()


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
