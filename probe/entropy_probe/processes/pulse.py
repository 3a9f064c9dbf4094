"""Which of several processes lives: each raises a number in a common store, twice a second."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Any

from entropy_probe.errors import DistributedError

BEAT = 0.5
REMEDY = "see what it wrote, and whether its memory sufficed; then start again"
# Seconds that processes may start apart: they import torch from a disk that they share.
_ARRIVE = 300.0


class Pulse:
    """A thread that raises a number in the store, and the numbers of the others.

    Beside its number stands what it says of this process.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float) -> None:
        self.rank, self.size, self.stage = rank, size, "start"
        self._timeout = timeout
        self._store, own = store.clone(), store.clone()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._says = f"pid {os.getpid()} on {socket.gethostname()}"
        self._number = 0
        self.say()
        self._arrive()
        name = "entropy-probe pulse"
        self._thread = threading.Thread(target=self._run, args=(own,), daemon=True, name=name)
        self._thread.start()

    def say(self, store: Any | None = None) -> None:
        """Raise the number, and say where this process is."""
        self._number += 1
        with contextlib.suppress(RuntimeError):  # the store went with torchrun
            said = f"{self._number}|{self._says}|{self.stage}"
            (store or self._store).set(f"pulse/{self.rank}", said)

    def _run(self, store: Any) -> None:
        while not self._ended.wait(BEAT):
            self.say(store)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _arrive(self) -> None:
        """Wait until every process has a pulse.

        torchrun ends the run where one dies before it has.
        """
        end = time.monotonic() + _ARRIVE
        for rank in range(self.size):
            while not self._store.check([f"pulse/{rank}"]):
                if time.monotonic() > end:
                    problem = f"did not start within {_ARRIVE:g} s"
                    raise DistributedError(f"rank {rank}", problem, REMEDY)
                time.sleep(0.05)

    def wait(self, done: Any) -> None:
        """Wait until `done()`.

        Raises `DistributedError` when another process has been without a pulse for too long.
        """
        pause, look = 2e-5, time.monotonic() + BEAT
        while not done():
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)
            if time.monotonic() > look:
                dead = self._without(self._timeout)
                if dead is not None:
                    problem = f"has sent no sign of life for {self._timeout:g} s"
                    raise DistributedError(dead, problem, REMEDY)
                look = time.monotonic() + BEAT

    def stopped(self, seconds: float) -> str | None:
        """Who has no pulse, looking for at most so long and a beat."""
        self._seen.clear()
        end = time.monotonic() + seconds + BEAT
        while time.monotonic() < end:
            dead = self._without(seconds)
            if dead is not None:
                return dead
            time.sleep(BEAT / 5)
        return None

    def _without(self, seconds: float) -> str | None:
        """The first process whose number has not changed for so long, and what it last said."""
        for rank in range(self.size):
            if rank == self.rank:
                continue
            try:
                said = self._store.get(f"pulse/{rank}")
            except RuntimeError:  # the store is gone
                said = self._seen.get(rank, (b"0||", 0.0))[0]
            if self._seen.get(rank, (None, 0.0))[0] != said:
                self._seen[rank] = said, time.monotonic()
            elif time.monotonic() - self._seen[rank][1] > seconds:
                _, where, stage = said.decode().split("|", 2)
                return f"rank {rank} ({where}; stage: {stage})"
        return None
