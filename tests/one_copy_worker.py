"""What each process of `test_one_copy.py` runs: `python one_copy_worker.py FOLDER CONFIGURATION [STAGE]`.

Writes RANK-of-SIZE.json: stage → the most memory that this process held in it, in bytes, above what it held before:
what it has allocated, and its part of the pages that it shares. At STAGE rank 1 dies; or by `fails at STAGE` it raises
an error that a user can act on, or by `breaks at STAGE` rank 0 raises another.

The checkpoint is `checkpoint`, or `checkpoint-1` of a run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entropy_probe import ProbeConfig, ProbeError, run_probe
from entropy_probe.errors import MeasurementError
from entropy_probe.memory import given_back_at_once
from entropy_probe.pipeline import evidence
from entropy_probe.pipeline.clock import Clock
from entropy_probe.processes.world import World
from entropy_probe.stages.gradients import products

AT_ONCE = 1 << 17
"""Numbers of rows that are multiplied at once here: 1 MiB, so that they do not decide on a small model."""
products.IN_FLOAT64 = evidence._AT_ONCE = AT_ONCE


_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


_LIBC = ctypes.CDLL(None)
IS_COUNTED = hasattr(_LIBC, "mallinfo2")
if IS_COUNTED:
    _LIBC.mallinfo2.restype = _Mallinfo


def of_its_own() -> int:
    """Bytes that are allocated; what is resident differs by what the system has fetched, kept or put away."""
    found = _LIBC.mallinfo2()
    return found.uordblks + found.hblkhd


def of_shared() -> int:
    """Bytes of shared memory, each page divided by the number of processes that have it."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Shmem:"))


class Watch:
    """The most of both in every stage: a thread looks at the first, and what is shared is added at the stage's end."""

    def __init__(self) -> None:
        self.stage, self.most, self._ended = "load", dict[str, int](), threading.Event()
        self._own, self._before = 0, of_its_own()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin(self, stage: str) -> None:
        self.stage, self._own = stage, of_its_own()

    def look(self) -> None:
        self._own = max(self._own, of_its_own())

    def end_of_stage(self) -> None:
        self.look()
        most = self._own - self._before + of_shared()
        self.most[self.stage] = max(self.most.get(self.stage, 0), most)

    def _watch(self) -> None:
        while not self._ended.wait(0.003):
            self.look()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def main(folder: Path, given: dict[str, Any], dies_at: str | None) -> None:
    torch.set_num_threads(1)
    world, watch, original = World.of_torchrun(), Watch(), Clock.__call__
    checkpoint, batches = min(folder.glob("checkpoint*")), (folder / f"{name}.jsonl" for name in ("e", "u"))

    @contextmanager
    def at(self: Clock, stage: str) -> Iterator[None]:
        watch.begin(stage)
        if stage == dies_at and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with original(self, stage):
            if dies_at == f"fails at {stage}" and world.rank == 1:
                raise MeasurementError("the model", "is spoilt", "try again")
            if dies_at == f"breaks at {stage}" and world.rank == 0:
                raise RuntimeError("something is broken")
            yield
            watch.end_of_stage()

    Clock.__call__ = at
    if dies_at == "load" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with given_back_at_once():
            report = run_probe(checkpoint, ProbeConfig.from_mapping(given), *batches, world=world)
    except ProbeError as error:
        sys.exit(str(error))
    watch.end()
    if world.first:
        report.to_json(folder / f"report-{world.size}.json")
    (folder / f"{world.rank}-of-{world.size}.json").write_text(json.dumps(watch.most))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *(sys.argv[3:] or [None]))
