"""How much memory there is, and the most of it that a stretch of work took. In bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_MEMINFO, _STATUS, _CLEAR = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/proc/self/clear_refs")
# folder, limit, use, and the key in memory.stat of what is cached of files: control groups, version 2 and 1
_CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
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

    On CUDA what torch allocated on the device; else the resident size of this process, on Linux alone: the kernel's
    own high-water mark, which is set back at the start, so that one stretch is measured at a time. What the allocator
    has kept of freed memory is used again, and does not count.
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


def _resident(key: str) -> int | None:
    """`VmRSS`, or `VmHWM`, the largest so far, of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
    return int(found[1]) * 1024 if found else None


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had there: CUDA's free memory with what torch holds of it unused; on Linux
    `MemAvailable`, or what a container's limit leaves where that is less. `None` where nothing is known."""
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
        most, now, stat = ((folder / name).read_text(encoding="ascii") for name in (limit, used, "memory.stat"))
    except OSError:
        return None
    found = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
    return int(most) - int(now) + (int(found[1]) if found else 0) if most.strip().isdecimal() else None
