"""Several processes that measure together, each a part of the prompts.

`World` is one of them. They send sums, counts and scalars, and values of each prompt as sums in
which every process fills in its own. Alone nothing is sent, and everything is as it was given.

An error of one process ends the step of all (`together`): before anything is sent, all agree that
none has failed, so that nobody waits for what never comes, and the next step begins in order. A
process that dies or hangs is found and named by the others (`connection.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from entropy_probe.errors import MeasurementError, ProbeError
from entropy_probe.processes import one_copy, torchrun
from entropy_probe.processes.connection import Connection
from entropy_probe.processes.of_training import Joined

_AGREED = "_all_processes_have_raised_it"
_BUCKET = 1 << 22  # numbers of a sum that are sent at once: 32 MiB
_T = TypeVar("_T")


class World:
    """This process and the others: `rank` of `size`. Without a connection it is alone.

    `one_copy`: what is as long as the parameters is held once, in memory that all processes see.
    """

    def __init__(
        self, connection: Connection | Joined | None = None, *, one_copy: bool = False
    ) -> None:
        self.rank = 0 if connection is None else connection.rank
        self.size = 1 if connection is None else connection.size
        self.one_copy = one_copy and self.size > 1
        self._connection = connection

    @classmethod
    def of_torchrun(cls, line_to: int = 2) -> World:
        """The processes that torchrun started, or this one alone. Waits until all are there.

        `line_to` is the file descriptor of a last line, as `Connection` says.
        """
        size = torchrun.size()
        return cls(Connection(torchrun.rank(), size, line_to) if size > 1 else None)

    @classmethod
    def of_training(cls) -> World:
        """The processes that a trainer has joined by torch.distributed. All of them call this."""
        return cls(Joined())

    @property
    def first(self) -> bool:
        """Whether this is the process that reports: rank 0."""
        return self.rank == 0

    @property
    def bytes_sent(self) -> int:
        """By this process, for sums, counts and scalars, since `count_anew`."""
        return 0 if self._connection is None else self._connection.bytes_sent

    @property
    def bytes_of_prompts(self) -> int:
        """By this process, for values of prompts, responses and tokens, since `count_anew`."""
        return 0 if self._connection is None else self._connection.bytes_of_prompts

    def device(self, configured: str) -> str:
        """`cuda` is cuda:LOCAL_RANK where there are several processes."""
        if self.size == 1 or configured not in ("cuda", "xpu"):
            return configured
        return f"{configured}:{os.environ.get('LOCAL_RANK', 0)}"

    def share(self, count: int) -> slice:
        """Which of `count` things in a row are this process's: shares differ by at most one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    # What is sent

    def total(self, values: Tensor, *, of_prompts: bool = False) -> Tensor:
        """Σ over the processes, the same on each bit for bit.

        `of_prompts` where the length grows with the batch.
        """
        if self._connection is None:
            return values
        self._agree(None)
        own = values.detach().cpu().clone().contiguous()
        return self._connection.all_reduce(own, of_prompts=of_prompts)

    def totals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Σ over the processes of vectors by name, in float64, in buckets."""
        if self._connection is None:
            return dict(values)
        sums = {n: value.detach().cpu().double().reshape(-1).clone() for n, value in values.items()}
        self._agree(None)
        for flat in sums.values():
            for bucket in flat.split(_BUCKET):
                self._connection.all_reduce(bucket)
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
        if self._connection is None:
            return thing
        content = pickle.dumps(thing) if self.first else b""  # before any other waits for it
        self._agree(None)
        return pickle.loads(self._connection.told(content, 0))  # noqa: S301

    def same(self, known: Mapping[str, str]) -> None:
        """Raise `MeasurementError` where a process has something else than rank 0."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in known.items()}
        for name, expected in self.told(digests).items():
            if digests[name] != expected:
                remedy = "give every process the same files and options"
                raise MeasurementError(name, "is not that of rank 0", remedy)

    def count_anew(self) -> None:
        """Begin to count bytes: for a report of its own."""
        if self._connection is not None:
            self._connection.count_anew()

    # What is held once

    def in_one_copy(self, *, one_copy: bool = True) -> World:
        """The same processes, with or without one copy of what is as long as the parameters."""
        return World(self._connection, one_copy=one_copy)

    def is_of_one_machine(self) -> bool:
        """Whether every process can read memory that rank 0 shows."""
        if self.size == 1:
            return True
        if self.any(not one_copy.is_possible()):
            return False
        token = self.told(secrets.token_bytes(16))
        with self._shown(lambda: one_copy.with_content(token)) as path:
            return not self.any(not one_copy.has_content(path, token))

    def one(self, make: Callable[[], _T], *, moved: bool = False) -> _T:
        """What rank 0 makes, on every process, with its tensors in memory once; else what each makes.

        What a process writes into such a tensor, it alone sees. `moved`: nobody else has what is made.
        """
        if not self.one_copy:
            return make()
        with self._shown(lambda: one_copy.with_thing(make(), moved=moved)) as path:
            return one_copy.thing_in(path)

    def zeros(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> dict[str, Tensor]:
        """Zeros by name; in one copy what a process writes into them all read, after `wait`.

        In one copy they stand in memory, or in a file of `folder`. Raises `MeasurementError` where memory has no room,
        `OSError` where the folder has none.
        """
        if not self.one_copy:
            return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        size = one_copy.size_of(shapes, dtype)
        try:
            with self._shown(lambda: one_copy.nameless(folder, size)) as path:
                return one_copy.mapped(path, shapes, dtype)
        except OSError as error:
            if folder is not None:
                raise
            problem = f"cannot hold {size / 2**30:.2g} GiB more ({error.strerror or error})"
            remedy = "free some of it, or use a machine with more"
            raise MeasurementError("memory", problem, remedy) from error

    def made(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        make: Callable[[str], Tensor],
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        """`{name: make(name)}`; in one copy each process makes some of them."""
        if not self.one_copy:
            return {name: make(name) for name in shapes}
        found = self.zeros(shapes, dtype)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        for name in one_copy.shares(sizes, self.size)[self.rank]:
            found[name].copy_(make(name))
        self.wait()
        return found

    @contextlib.contextmanager
    def _shown(self, make: Callable[[], int]) -> Iterator[str]:
        """The path of a file that rank 0 makes (its descriptor), which is open until all are through the block."""
        file = make() if self.first else None
        try:
            path = self.told(None if file is None else one_copy.path_of(file))
            assert path is not None
            yield path
            self.wait()
        finally:
            if file is not None:
                os.close(file)

    def wait(self) -> None:
        """Until every process has come here."""
        if self._connection is not None:
            self._agree(None)

    # Who has failed

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A step of all processes, which all end alike.

        Where one fails, each raises the error of the first of them: a `ProbeError` as it is, with
        its rank in front unless that is 0, and the message of any other.
        """
        connection = self._connection
        try:
            yield
        except Exception as error:
            if connection is None or error is connection.lost or hasattr(error, _AGREED):
                raise
            self._agree(error)
        else:
            if connection is not None:
                self._agree(None)

    def at(self, stage: str) -> None:
        """Say where this process is, for whoever finds it dead."""
        if self._connection is not None:
            self._connection.at(stage)

    def close(self) -> None:
        """The end of all steps."""
        if self._connection is not None:
            self._connection.close()

    def _agree(self, error: Exception | None) -> None:
        """Raise the same error everywhere, if any process comes with one."""
        assert self._connection is not None
        failed = torch.zeros(self.size, dtype=torch.int64)
        failed[self.rank] = int(error is not None)
        failed = self._connection.all_reduce(failed)
        if not bool(failed.any()):
            return
        who = int(failed.argmax())
        portable = None if error is None else _portable(error, who)
        told: ProbeError = self._connection.told(portable, who)
        agreed = told if error is None or isinstance(error, ProbeError) else error
        setattr(agreed, _AGREED, True)
        try:
            raise agreed from error
        finally:
            del agreed, error, told  # a traceback holds this frame, and all that was measured


ALONE = World()


def _portable(error: Exception, rank: int) -> ProbeError:
    """What the other processes raise."""
    if not isinstance(error, ProbeError):
        what = f"ended with {type(error).__name__}: {error}"
        return MeasurementError(f"rank {rank}", what, "see its traceback")
    if rank == 0:
        return error
    return type(error)(f"rank {rank}: {error.where}", error.problem, error.remedy)
