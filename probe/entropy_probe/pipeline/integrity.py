"""Nothing that was measured has been changed: the live module, and the probe's own copies of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from entropy_probe.model.registry import checksum, unwrap
from entropy_probe.pipeline.measured import Models
from entropy_probe.processes.world import World
from entropy_probe.report import IntegritySection


@dataclass(frozen=True)
class Watched:
    """The live module and the copies, with their checksums before they are used."""

    live: nn.Module
    before: str
    copies: dict[nn.Module, str]
    models: Models

    @classmethod
    def of(cls, live: nn.Module, before: str, models: Models) -> Watched:
        """`before` is the live module's checksum; `models` are bound to it or to copies of it."""
        own_copies = {models.bound.module, models.float64.module} - {unwrap(live)}
        return cls(live, before, {copy: checksum(copy) for copy in own_copies}, models)

    def modified_elsewhere(self, world: World) -> tuple[int, int]:
        """In the processes but rank 0: how many copies, and how many live modules, are not as they were."""
        found = [0, 0]
        if not world.first:
            found = [self._modified_copies(), int(checksum(self.live) != self.before)]
        copies, live = world.total(torch.tensor(found)).tolist()
        return copies, live

    def section(self, elsewhere: tuple[int, int]) -> IntegritySection:
        """Of rank 0, with what was modified `elsewhere`."""
        copies, live = elsewhere
        overridden = self.models.bound.overridden | self.models.float64.overridden
        buffers = self.models.bound.registry.buffer_names
        return IntegritySection(
            checksum_before=self.before,
            checksum_after="changed by another process" if live else checksum(self.live),
            copies_modified=copies + self._modified_copies(),
            buffers_overridden=sorted(overridden & buffers),
        )

    def _modified_copies(self) -> int:
        return sum(checksum(copy) != before for copy, before in self.copies.items())
