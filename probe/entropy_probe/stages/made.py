"""Tensors by name that are made where they are used, where all of them at once would be much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from entropy_probe.processes.world import ALONE, World

FEW = 1 << 26
"""Numbers of one vector as long as the trained parameters, up to which it is held: 0.5 GiB in float64."""


class Made(Mapping[str, Tensor]):
    """`{name: make(name)}` with nothing held: a tensor is made again, the same, whenever it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def held_or_made(
    shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor], world: World = ALONE
) -> Mapping[str, Tensor]:
    """`{name: make(name)}` in float64, held where all of them have at most `FEW` numbers, else `Made`.

    Processes of one copy hold them once: all of them call this.
    """
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return world.made(shapes, make) if numbers <= FEW else Made(shapes, make)
