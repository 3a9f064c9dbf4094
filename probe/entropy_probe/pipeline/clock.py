"""The seconds of each stage, its peak of memory, and its beginning and end as progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from entropy_probe import memory
from entropy_probe.processes.world import World
from entropy_probe.stages.responses.rollouts import Progress

# Stages that every process goes through; the others are rank 0's.
_OF_ALL = (
    *("load", "integrity", "rollouts", "memory limit", "scores", "gradients"),
    *("first order", "update", "slopes", "entropy change", "witnesses"),
)


@dataclass(frozen=True)
class Clock:
    """`with clock(stage):` adds up what the stage takes, in `seconds` and in what it `held`."""

    world: World
    device: torch.device
    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    held: dict[str, memory.Held] = field(default_factory=dict)

    def continued(self, device: torch.device, progress: Progress | None) -> Clock:
        """Another one that begins with what this one has added up."""
        return replace(
            self,
            device=device,
            progress=progress,
            seconds=dict(self.seconds),
            held=dict(self.held),
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.world.at(stage)
        if self.progress is not None:
            self.progress(stage, 0, 1)
        start, peak = time.perf_counter(), memory.Peak(self.device)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            if (held := peak.held()) is not None:
                before = self.held.get(stage)
                self.held[stage] = held if before is None else before.then(held)
        if self.progress is not None:
            self.progress(stage, 1, 1)

    def most_of_all(self) -> None:
        """The memory of each stage so far, in place of this process's own that of the one that held most."""
        rows = torch.zeros(self.world.size, len(_OF_ALL), 2, dtype=torch.long)
        for i, stage in enumerate(_OF_ALL):
            if stage in self.held:
                own = self.held[stage]
                rows[self.world.rank, i] = torch.tensor([own.at_start, own.peak])
        most = self.world.total(rows).amax(0).tolist()
        for stage, row in zip(_OF_ALL, most, strict=True):
            if row[1]:
                self.held[stage] = memory.Held(*row)
