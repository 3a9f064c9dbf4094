"""The processes of a training, as its trainer has joined them by torch.distributed.

They are not ours to watch: whoever waits here waits as long as the training's own time limit. So nobody sends anything
before all have said that they can (`agreed`), and an error of one process is an error of all.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from entropy_probe.errors import MeasurementError, ProbeError, reason

_T = TypeVar("_T")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Another one for each kernel, and each time that it starts."""


class Joined:
    """What joins them while they measure together: `Connection` without a pulse of its own.

    Sums over gloo, in a group beside that of the training, which may be NCCL's. All processes make it at one point.
    """

    lost = None

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), size()
        self.bytes_sent = self.bytes_of_prompts = 0
        self._group = _beside_the_training()

    def all_reduce(self, values: Tensor, *, of_prompts: bool = False) -> Tensor:
        """Σ over the processes, in place."""
        if values.numel():
            torch.distributed.all_reduce(values, group=self._group)
        sent = 2 * (self.size - 1) * values.numel() * values.element_size() // self.size
        if of_prompts:
            self.bytes_of_prompts += sent
        else:
            self.bytes_sent += sent
        return values

    def told(self, thing: Any, who: int) -> Any:
        """The `thing` of rank `who`, on every process."""
        held = [thing]
        torch.distributed.broadcast_object_list(held, src=who, group=self._group)
        return held[0]

    def count_anew(self) -> None:
        """Begin to count bytes: for a report of its own."""
        self.bytes_sent = self.bytes_of_prompts = 0

    def at(self, stage: str) -> None:
        """Nobody asks."""

    def close(self) -> None:
        """The group stays for the next step (`part`)."""


_known: tuple[Any, Any] | None = None


def _beside_the_training() -> Any:
    """A group of the same processes over gloo, one for each group that a training has joined them in."""
    global _known
    training = torch.distributed.group.WORLD
    if _known is None or _known[0] is not training:
        if _known is None:
            atexit.register(part)
        made = torch.distributed.new_group(backend="gloo", timeout=_time_limit(training))
        _known = training, made
    return _known[1]


def part() -> None:
    """End the group beside the training's, where there is one: gloo's threads may abort an interpreter that ends."""
    global _known
    of, _known = _known, None
    if of is not None and of[0] is torch.distributed.group.WORLD:
        torch.distributed.destroy_process_group(of[1])


def _time_limit(training: Any) -> timedelta | None:
    """The training's own; that of torch where it does not say."""
    for device in ("cuda", "xpu", "cpu"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return training._get_backend(torch.device(device)).options._timeout
    return None


def on_one_machine() -> bool:
    """Whether all of them run under one kernel; they may yet not see one another's files."""
    try:
        boot = _BOOT.read_text()
    except OSError:
        boot = ""
    known = set(of_all(boot))
    return len(known) == 1 and "" not in known


def are_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def size() -> int:
    """How many there are: 1 where none have been joined."""
    return torch.distributed.get_world_size() if are_joined() else 1


def is_first() -> bool:
    return size() == 1 or torch.distributed.get_rank() == 0


def of_first(thing: _T) -> _T:
    """What the first process says, in all of them; they wait for it here."""
    if size() == 1:
        return thing
    held: list[Any] = [thing]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def of_all(thing: _T) -> list[_T]:
    """What each of them says, in all of them."""
    if size() == 1:
        return [thing]
    held: list[Any] = [None] * size()
    torch.distributed.all_gather_object(held, thing)
    return held


def agreed(work: Callable[[], _T]) -> _T:
    """`work()` in every process. If it fails in one, all raise: that one its own error, the others what it said.

    The work itself must send nothing.
    """
    found: Any = None
    error: Exception | None = None
    try:
        found = work()
    except Exception as failed:
        error = failed
    said = of_all(None if error is None else _as_ours(error))
    try:
        if error is not None:
            raise error
        for other in said:
            if other is not None:
                raise other
    finally:
        del error, said  # a traceback holds this frame, and all that the work had made
    return found


def _as_ours(error: Exception) -> ProbeError:
    if isinstance(error, ProbeError):
        return error
    where = f"process {torch.distributed.get_rank() if size() > 1 else 0}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MeasurementError(where, "has too little memory", "free some of it on that device")
    problem = f"{type(error).__name__}: {reason(error)}"
    return MeasurementError(where, problem, "take the callback out, or report this")
