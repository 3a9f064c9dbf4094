"""How much memory there is, and the most that a stretch of work took, measured or counted.

All sizes are in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entropy_probe.errors import MeasurementError

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# mallopt's numbers and values: the size from which glibc maps a block by itself, and what may lie
# unused at the end of the heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_AT_ONCE, _GROWN = 1 << 16, 32 << 20
# folder, limit, use, and the key in memory.stat of what is cached of files: control groups, version
# 2 and 1
_CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class Held:
    """Bytes held when a stretch of work began, and the most held during it."""

    at_start: int
    peak: int

    def then(self, later: Held) -> Held:
        """Of both stretches together."""
        return Held(self.at_start, max(self.peak, later.peak))


def kind(device: torch.device) -> Literal["resident", "allocated"]:
    """What `Peak` counts there."""
    return "allocated" if device.type == "cuda" else "resident"


class Peak:
    """The most memory held since `start`, above what was held then.

    On CUDA what torch allocated on the device; else the resident size of this process, on Linux
    alone: the kernel's own high-water mark, which is set back at the start, so that one stretch is
    measured at a time. What the allocator has kept of freed memory is used again, and does not
    count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0
        self._known = False
        self.start()

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._held, self._known = torch.cuda.memory_allocated(self._device), True
            return
        try:
            _CLEAR.write_text("5", encoding="ascii")
            held = _resident("VmRSS")
        except OSError:
            held = None
        self._held, self._known = held or 0, held is not None

    def bytes(self) -> int | None:
        """`None` where it cannot be known."""
        if not self._known:
            return None
        cuda = self._device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self._device) if cuda else _resident("VmHWM")
        return None if most is None else max(most - self._held, 0)

    def held(self) -> Held | None:
        """The same as it stands, with what was held at the start."""
        above = self.bytes()
        return None if above is None else Held(self._held, self._held + above)


def held_bytes(device: torch.device) -> int | None:
    """What is held now, and no longer used given back before: as `Peak` counts it."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim()
    return _resident("VmRSS") if _STATUS.is_file() else None


def trim() -> None:
    """Give what the heap holds of freed memory back to the system, where glibc can."""
    allocator = _glibc()
    if allocator is not None:
        allocator.malloc_trim(0)


@contextmanager
def given_back_at_once() -> Iterator[None]:
    """Within the block a tensor of 64 KiB or more goes back to the system when it is freed.

    By default glibc keeps blocks of up to 32 MiB for later, between others that are in use: the
    resident size of a pass was then 1.5 to 4 times what its tensors take, and is at most 1.08 of it
    with this, at 1.2 to 1.6 times the time. After the block the threshold is where glibc's own rule
    moves it to when it meets large blocks. With another library nothing changes there.
    """
    allocator = _glibc()
    if allocator is None:
        yield
        return
    allocator.mallopt(_MMAP_THRESHOLD, _AT_ONCE)
    allocator.mallopt(_TRIM_THRESHOLD, _AT_ONCE)
    try:
        yield
    finally:
        allocator.mallopt(_MMAP_THRESHOLD, _GROWN)
        allocator.mallopt(_TRIM_THRESHOLD, 2 * _GROWN)


def _glibc() -> Any | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def counted_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors made by `work` that lived at once, the same at every run.

    On CUDA as torch's allocator counts them; else by a mode that sees every operation, its forward
    and its backward. What an operation needs within itself is not seen.
    """
    if device.type == "cuda":
        peak = Peak(device)
        work()
        return peak.bytes() or 0
    return _count(work, device).most


@dataclass(frozen=True)
class LiveTensors:
    """Bytes of the tensors made by some work: the most that lived at once, and the largest one."""

    most: int
    largest: int


def live_tensors(work: Callable[[], object], device: torch.device) -> LiveTensors:
    """The tensors that `work` made on the device, seen operation by operation, as they come and go.

    Unlike a resident peak it does not depend on what the process did before, and it is never 0: work that makes no
    tensor there raises `MeasurementError`.
    """
    count = _count(work, device)
    if count.most == 0:
        raise MeasurementError(
            "memory", f"the work made no tensor on {device}", "count where it is done"
        )
    return LiveTensors(count.most, count.largest)


def _count(work: Callable[[], object], device: torch.device) -> _Count:
    count = _Count(device)
    with count:
        work()
    return count


class _Count(TorchDispatchMode):
    """Storages that operations made on the device, while they live."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.most = self.largest = 0
        self._device, self._now = device, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for made in tree_leaves(result):
            if not isinstance(made, Tensor) or made.device.type != self._device.type:
                continue
            storage = made.untyped_storage()
            if storage._cdata in self._alive:
                continue
            if given is None:
                inputs = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                given = {t.untyped_storage()._cdata for t in inputs}
            if storage._cdata not in given:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self._now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._now += size
        self.largest = max(self.largest, size)
        self.most = max(self.most, self._now)


def _resident(key: str) -> int | None:
    """`VmRSS`, or `VmHWM`, the largest so far, of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
    return int(found[1]) * 1024 if found else None


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there; `None` where nothing is known.

    On CUDA its free memory, with what torch holds of it unused. On Linux `MemAvailable`, or what a
    container's limit leaves where that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"))
    known = [int(found[1]) * 1024] if found else []
    known += [left for container in _CONTAINERS if (left := _left_in(*container)) is not None]
    return min(known, default=None)


def _left_in(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """What a control group's limit leaves; files that are cached make room when it is needed."""
    try:
        names = (limit, used, "memory.stat")
        most, now, stat = ((folder / name).read_text(encoding="ascii") for name in names)
    except OSError:
        return None
    if not most.strip().isdecimal():
        return None
    found = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
    return int(most) - int(now) + (int(found[1]) if found else 0)
