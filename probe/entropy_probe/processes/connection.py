"""What joins a process to the others: sums over gloo, watched by a pulse.

Everything is sent by all-reduce, between CPUs. A process that dies or hangs ends the wait of all
others, with an error that names it: its pulse is a number in torchrun's store that it raises twice
a second. Gloo's own limits of time play no part, since a pulse decides, and not how long a step
takes.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import threading
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from entropy_probe.errors import DistributedError
from entropy_probe.processes.pulse import BEAT, REMEDY, Pulse

TIMEOUT = "ENTROPY_PROBE_TIMEOUT"
"""The variable with the seconds without a pulse after which a process is dead; 60 without it."""

_STOPPED = 5 * BEAT  # of one whose connection is gone: it need not be waited for any longer
_FOREVER = timedelta(days=30)
# One after another in the same processes: none reads what an earlier one has written.
_NUMBERS = itertools.count()


class Connection:
    """This process's end of it. Waits, when made, until all `size` processes are there.

    `lost` is the error that ended it.

    `bytes_sent` counts what this process sent for sums, counts and scalars, `bytes_of_prompts` for
    values of prompts, responses and tokens: 2(N−1)/N of its length for each all-reduce, as a ring
    of N processes sends it. The process group is none of torch's registered ones, so that it cannot
    meet one of the user's own.

    Where torchrun ends this process because another has died, the first that lives writes one line
    that names that one to the file descriptor `line_to`.
    """

    def __init__(self, rank: int, size: int, line_to: int) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = self.bytes_of_prompts = 0
        self.lost: DistributedError | None = None
        seconds = _timeout()
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        store = PrefixStore(f"entropy_probe/{next(_NUMBERS)}", store)
        self._pulse = Pulse(rank, size, store, seconds)
        self._group: Any = ProcessGroupGloo(PrefixStore("gloo", store), rank, size, _FOREVER)
        self._terminated: Any = None
        self._listen(line_to)

    def all_reduce(self, values: Tensor, *, of_prompts: bool = False) -> Tensor:
        """Σ over the processes, in place."""
        if self.lost is not None:
            raise self.lost
        if not values.numel():
            return values
        size = 2 * (self.size - 1) * values.numel() * values.element_size() // self.size
        if of_prompts:
            self.bytes_of_prompts += size
        else:
            self.bytes_sent += size
        try:
            work = self._group.allreduce([values], AllreduceOptions())
            self._pulse.wait(work.is_completed)
            work.wait()
        except (RuntimeError, DistributedError) as error:
            self._lose(self._pulse.stopped(_STOPPED), error)
        return values

    def told(self, thing: Any, who: int) -> Any:
        """The `thing` of rank `who`, on every process."""
        content = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        speaks = self.rank == who
        length = self.all_reduce(torch.tensor(len(content) if speaks else 0))
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if speaks:
            buffer[:] = content
        return pickle.loads(self.all_reduce(buffer).numpy().tobytes())  # noqa: S301

    def count_anew(self) -> None:
        """Begin to count bytes: for a report of its own."""
        self.bytes_sent = self.bytes_of_prompts = 0

    def at(self, stage: str) -> None:
        """Say where this process is, for whoever finds it dead."""
        self._pulse.stage = stage
        self._pulse.say()

    def close(self) -> None:
        self._pulse.stop()
        if self._terminated is not None:
            signal.signal(signal.SIGTERM, self._terminated)
        self._group = None

    def _lose(self, dead: str | None, error: BaseException) -> NoReturn:
        if isinstance(error, DistributedError):
            self.lost = error
        else:
            reason = str(error).splitlines()[0]
            problem = "ended" if dead else f"lost its connection ({reason})"
            self.lost = DistributedError(dead or f"rank {self.rank}", problem, REMEDY)
        raise self.lost from error

    def _listen(self, line_to: int) -> None:
        """torchrun ends all processes as soon as it finds one dead: name that one before going.

        All of them look for it, since one that went at once would be taken for it.
        """
        if threading.current_thread() is not threading.main_thread():
            return

        def terminated(number: int, frame: Any) -> None:
            dead = self._pulse.stopped(_STOPPED)
            first = 1 if dead is not None and dead.startswith("rank 0 ") else 0
            if dead is not None and self.rank == first:
                line = f"entropy-probe: {DistributedError(dead, 'ended', REMEDY)}\n"
                os.write(line_to, line.encode())
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

        self._terminated = signal.signal(signal.SIGTERM, terminated)


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise DistributedError(TIMEOUT, f"is {text!r}", "give a number of seconds")
    return max(seconds, _STOPPED)
