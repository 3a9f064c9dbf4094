"""Several processes that measure together: what they send one another, and who has failed or died.

`World` is one of them. It sends by all-reduce alone, over gloo between CPUs: sums, counts and scalars, and values of
each prompt as sums in which every process fills in its own. Alone nothing is sent, and everything is as it was given.

An error of one process ends the step of all (`together`): before anything is sent, all agree that none has failed, so
that nobody waits for what never comes, and the next step begins in order. A process that dies or hangs is found by its
pulse, a number in torchrun's store that it raises twice a second, and named by all others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from entropy_probe.errors import DistributedError, MeasurementError, ProbeError
from entropy_probe.processes import torchrun
from entropy_probe.processes.pulse import BEAT, REMEDY, Pulse

TIMEOUT = "ENTROPY_PROBE_TIMEOUT"
"""Seconds without a pulse after which a process counts as dead; the environment variable, 60 without."""

_STOPPED = 5 * BEAT  # of one whose connection is gone: it need not be waited for any longer
_FOREVER = timedelta(days=30)  # for gloo: a pulse decides, not how long a step takes
_BUCKET = 1 << 22  # numbers of a sum that are sent at once: 32 MiB
_WORLDS = itertools.count()  # one after another in the same processes: none reads what an earlier one has written
_T = TypeVar("_T")


class World:
    """This process and the others: `rank` of `size`. Without arguments it is alone.

    `bytes_sent` counts what this process sent for sums, counts and scalars, `bytes_of_prompts` for values of prompts,
    responses and tokens; 2(N−1)/N of its length for each all-reduce, as a ring of N processes sends it.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = self.bytes_of_prompts = 0
        self._group: Any = None
        self._pulse: Pulse | None = None
        self._agreed: Exception | None = None
        self._lost: DistributedError | None = None
        self._terminated: Any = None

    @classmethod
    def of_torchrun(cls, line_to: int = 2) -> World:
        """The processes that torchrun started, or this one alone. Waits until all are there.

        Where torchrun ends this process because another has died, rank 0 writes one line that names that one to the
        file descriptor `line_to`.
        """
        size = torchrun.size()
        if size == 1:
            return cls()
        world = cls(torchrun.rank(), size)
        seconds = _timeout()
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        store = PrefixStore(f"entropy_probe/{next(_WORLDS)}", store)
        world._pulse = Pulse(world.rank, size, store, seconds)
        world._group = ProcessGroupGloo(PrefixStore("gloo", store), world.rank, size, _FOREVER)
        world._listen(line_to)
        return world

    @property
    def first(self) -> bool:
        """Whether this is the process that reports: rank 0."""
        return self.rank == 0

    def device(self, configured: str) -> str:
        """`cuda` is cuda:LOCAL_RANK where there are several processes."""
        alone = self.size == 1 or configured not in ("cuda", "xpu")
        return configured if alone else f"{configured}:{os.environ.get('LOCAL_RANK', 0)}"

    def share(self, count: int) -> slice:
        """Which of `count` things in a row are this process's: shares differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    # What is sent

    def total(self, values: Tensor, *, of_prompts: bool = False) -> Tensor:
        """Σ over the processes, the same on each bit for bit; `of_prompts` where the length grows with the batch."""
        if self.size == 1:
            return values
        self._agree(None)
        return self._all_reduce(values.detach().cpu().clone().contiguous(), of_prompts=of_prompts)

    def totals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ over the processes of vectors by name, in float64, in buckets."""
        if self.size == 1:
            return dict(values)
        sums = {name: value.detach().cpu().double().reshape(-1).clone() for name, value in values.items()}
        self._agree(None)
        for flat in sums.values():
            for bucket in flat.split(_BUCKET):
                self._all_reduce(bucket)
        return sums

    def placed(self, values: Tensor, at: slice, count: int) -> Tensor:
        """[count, …] from everybody's part of it: entries `at` from this process."""
        if self.size == 1:
            return values
        whole = values.new_zeros(count, *values.shape[1:])
        whole[at] = values
        return self.total(whole, of_prompts=True)

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(int(flag))))

    def largest(self, value: float) -> float:
        """NaN where any is."""
        if self.size == 1:
            return value
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        return float(self.total(values).max())

    def told(self, thing: _T) -> _T:
        """Rank 0's `thing`, on every process; it must be small."""
        if self.size == 1:
            return thing
        self._agree(None)
        return self._told(thing, 0)

    def same(self, known: Mapping[str, str]) -> None:
        """Raise `MeasurementError` where a process has something else than rank 0."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in known.items()}
        for name, expected in self.told(digests).items():
            if digests[name] != expected:
                raise MeasurementError(name, "is not that of rank 0", "give every process the same files and options")

    # Who has failed

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A step of all processes, which all end alike: where one fails, each raises the error of the first of them.

        A `ProbeError` is raised as it is, with its rank in front unless that is 0; of any other the message is.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1 or error is self._agreed or error is self._lost:
                raise
            self._agree(error)
        else:
            if self.size > 1:
                self._agree(None)

    def count_anew(self) -> None:
        """Begin to count bytes: for a report of its own."""
        self.bytes_sent = self.bytes_of_prompts = 0

    def at(self, stage: str) -> None:
        """Say where this process is, for whoever finds it dead."""
        if self._pulse is not None:
            self._pulse.stage = stage
            self._pulse.say()

    def close(self) -> None:
        """The end of all steps."""
        if self._pulse is not None:
            self._pulse.stop()
            if self._terminated is not None:
                signal.signal(signal.SIGTERM, self._terminated)
        self._pulse = self._group = None

    def _agree(self, error: Exception | None) -> None:
        """Raise the same error everywhere, if any process comes with one."""
        failed = torch.zeros(self.size, dtype=torch.int64)
        failed[self.rank] = int(error is not None)
        failed = self._all_reduce(failed)
        if not bool(failed.any()):
            return
        who = int(failed.argmax())
        told: ProbeError = self._told(_portable(error, who) if error is not None else None, who)
        agreed = told if error is None or isinstance(error, ProbeError) else error
        self._agreed = agreed
        raise agreed from error

    def _told(self, thing: Any, who: int) -> Any:
        content = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        length = self._all_reduce(torch.tensor(len(content) if self.rank == who else 0))
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == who:
            buffer[:] = content
        return pickle.loads(bytes(self._all_reduce(buffer).tolist()))  # noqa: S301

    def _all_reduce(self, values: Tensor, *, of_prompts: bool = False) -> Tensor:
        """Σ over the processes, in place."""
        if self._lost is not None:
            raise self._lost
        if not values.numel():
            return values
        size = 2 * (self.size - 1) * values.numel() * values.element_size() // self.size
        if of_prompts:
            self.bytes_of_prompts += size
        else:
            self.bytes_sent += size
        assert self._pulse is not None
        try:
            work = self._group.allreduce([values], AllreduceOptions())
            self._pulse.wait(work.is_completed)
            work.wait()
        except (RuntimeError, DistributedError) as error:
            self._lose(self._pulse.stopped(_STOPPED), error)
        return values

    def _lose(self, dead: str | None, error: BaseException) -> NoReturn:
        if isinstance(error, DistributedError):
            self._lost = error
        else:
            problem = "ended" if dead else f"lost its connection ({str(error).splitlines()[0]})"
            self._lost = DistributedError(dead or f"rank {self.rank}", problem, REMEDY)
        raise self._lost from error

    def _listen(self, line_to: int) -> None:
        """torchrun ends all processes as soon as it finds one dead: name that one before going."""
        if threading.current_thread() is not threading.main_thread():
            return

        def terminated(number: int, frame: Any) -> None:
            dead = self._pulse.stopped(_STOPPED) if self._pulse is not None and self.first else None
            if dead is not None:
                os.write(line_to, f"entropy-probe: {DistributedError(dead, 'ended', REMEDY)}\n".encode())
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

        self._terminated = signal.signal(signal.SIGTERM, terminated)


ALONE = World()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise DistributedError(TIMEOUT, f"is {text!r}", "give a number of seconds")
    return max(seconds, _STOPPED)


def _portable(error: Exception, rank: int) -> ProbeError:
    """What the other processes raise."""
    if not isinstance(error, ProbeError):
        what = f"ended with {type(error).__name__}: {error}"
        return MeasurementError(f"rank {rank}", what, "see its traceback")
    return error if rank == 0 else type(error)(f"rank {rank}: {error.where}", error.problem, error.remedy)
