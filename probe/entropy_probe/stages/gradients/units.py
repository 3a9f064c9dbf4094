"""What a unit of the U-statistic is: a prompt, or a block of prompts where gradients of all do not fit."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.memory import available_bytes
from entropy_probe.model import disk
from entropy_probe.model.forward import BoundModel
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.share import Share, Units

# Gradients of single prompts that are held beside those of the units.
_WITNESSED = 8


def units_of_prompts(rollouts: Rollouts) -> Units:
    """Every prompt a unit of its own."""
    return Units("exact", torch.arange(rollouts.num_prompts))


def units_of(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Units:
    """The units of a batch; the same however many processes there are."""
    mode, num_units = units_within_memory(bound, rollouts, config)
    return Units(mode, torch.arange(rollouts.num_prompts) * num_units // rollouts.num_prompts)


def units_within_memory(
    bound: BoundModel, rollouts: Rollouts, config: ProbeConfig
) -> tuple[str, int]:
    """(mode, number of units): every prompt a unit in `exact` mode where the gradients fit into
    `first_order.max_gradient_gib`, else as many blocks as fit, and two at least; `num_blocks` of them in `block` mode.

    Held at once are X and Y of the U batch, X of the E batch, and X and Y of two prompts in two ways,
    for the witness.
    """
    first_order, size_b = config.first_order, rollouts.num_prompts
    room = (_allowed(config) / _bytes_of_one(bound) - _WITNESSED) / 3
    if first_order.mode == "exact" and size_b <= room:
        return "exact", size_b
    if first_order.mode == "exact":
        return "block", max(int(room), 2)
    return "block", min(first_order.num_blocks, size_b)


def _allowed(config: ProbeConfig) -> float:
    return config.first_order.max_gradient_gib * 2**30


@dataclass(frozen=True)
class Rows:
    """Where gradients of units stand: in memory, or in files of `folder` (`None`: the system's temporary one)."""

    on_disk: bool = False
    folder: Path | None = None

    @classmethod
    def of(cls, bound: BoundModel, units: int, config: ProbeConfig, world: World = ALONE) -> Rows:
        """On disk where those of so many units are more than `first_order.max_gradient_gib` and more than half of the
        memory that is free; the numbers are the same. Where processes hold them once, rank 0 decides."""
        found = cls._found(bound, units, config)
        return world.told(found) if world.one_copy else found

    @classmethod
    def _found(cls, bound: BoundModel, units: int, config: ProbeConfig) -> Rows:
        needed, free = bytes_of_units(bound, units), available_bytes(torch.device("cpu"))
        if needed <= _allowed(config) or free is None or needed <= free / 2:
            return cls()
        folder = config.offload_folder
        return cls(True, None if folder is None else Path(folder).expanduser())

    def require_room(self, needed: int) -> None:
        """Raise `MeasurementError` where the disk, if it is needed, has less than so many bytes left."""
        if not self.on_disk:
            return
        where = self.folder or Path(tempfile.gettempdir())
        try:
            left = shutil.disk_usage(where).free
        except OSError as error:
            raise self._unusable(f"cannot be used ({error.strerror or error})") from error
        if needed > left:
            found = (
                f"has {left / 2**30:.2g} GiB left, gradients of the units take {needed / 2**30:.2g}"
            )
            raise self._unusable(
                f"{found}, more than first_order.max_gradient_gib and half of the free memory"
            )

    def zeros(self, rows: int, numbers: int, dtype: torch.dtype) -> Tensor:
        """`torch.zeros(rows, numbers)`. Raises `MeasurementError` where the disk is full by now."""
        if not self.on_disk:
            return torch.zeros(rows, numbers, dtype=dtype)
        try:
            return disk.zeros((rows, numbers), dtype, self.folder)
        except OSError as error:
            raise self._full(rows * numbers * dtype.itemsize, error) from error

    def zeros_of_all(
        self, rows: int, like: Mapping[str, Tensor], dtype: torch.dtype, world: World
    ) -> dict[str, Tensor]:
        """The same by name, of the size of the tensors `like`, where all processes see them."""
        shapes = {name: (rows, tensor.numel()) for name, tensor in like.items()}
        folder = (self.folder or Path(tempfile.gettempdir())) if self.on_disk else None
        try:
            return world.zeros(shapes, dtype, folder)
        except OSError as error:
            size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            raise self._full(size, error) from error

    def _full(self, size: int, error: OSError) -> MeasurementError:
        problem = (
            f"cannot hold {size / 2**30:.2g} GiB more of gradients ({error.strerror or error})"
        )
        return self._unusable(problem)

    def _unusable(self, problem: str) -> MeasurementError:
        where = f"offload_folder {self.folder or tempfile.gettempdir()}"
        return MeasurementError(where, problem, "give a folder on a disk with more room")


def pairs_fit(bound: BoundModel, share: Share, config: ProbeConfig) -> bool:
    """Whether Y of all units may go round the processes, U·D numbers, so that all X_nᵀPY_m are known."""
    sent = len(share.units.sizes) * _bytes_of_one(bound)
    return share.several and sent <= config.first_order.max_pairs_gib * 2**30


def bytes_of_units(bound: BoundModel, units: int) -> int:
    """What the gradients of so many units take, with those of the witness."""
    return int((3 * units + _WITNESSED) * _bytes_of_one(bound))


def _bytes_of_one(bound: BoundModel) -> float:
    trainable = sum(p.numel() for p in bound.registry.trainable.values())
    return trainable * torch.finfo(bound.dtype).bits / 8
