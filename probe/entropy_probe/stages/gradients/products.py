"""Products of gradients by name, X_uᵀPY_v, a few columns at a time and summed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.made import held_or_made

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Numbers of the rows of all units that are held in float64 at once, of one side of a product: 32 MiB.
IN_FLOAT64 = 1 << 22


def gram(
    left: Mapping[str, Float[Tensor, "U D"]],
    right: Mapping[str, Float[Tensor, "V D"]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> Float[Tensor, "U V"]:
    """Σ_names left_u · P ⊙ right_v in float64; P enters each product exactly once (P = 1 without `precond`)."""
    return torch.stack(list(grams(left, right, precond).values())).sum(0)


def grams(
    left: Mapping[str, Float[Tensor, "U D"]],
    right: Mapping[str, Float[Tensor, "V D"]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> dict[str, Float[Tensor, "U V"]]:
    """The terms of `gram`, by name."""
    return {
        name: _gram(a, right[name], None if precond is None else precond[name])
        for name, a in left.items()
    }


def _gram(a: Tensor, b: Tensor, precond: Tensor | None) -> Tensor:
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    p = None if precond is None else precond.reshape(-1)
    for part in columns(a if len(a) > len(b) else b):
        scaled = b[:, part].double()
        if p is not None:
            scaled = scaled * p[part].double()
        total += a[:, part].double() @ scaled.T
    return total


def dots(
    rows: Mapping[str, Float[Tensor, "U D"]],
    vector: Mapping[str, Float[Tensor, ...]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> dict[str, Float[Tensor, " U"]]:
    """row_u · P ⊙ vector in float64, by name."""
    as_rows = {name: values.reshape(1, -1) for name, values in vector.items()}
    return {name: product[:, 0] for name, product in grams(rows, as_rows, precond).items()}


def row_dots(
    left: Float[Tensor, "U D"], right: Float[Tensor, "U D"], precond: Float[Tensor, " D"]
) -> Float[Tensor, " U"]:
    """left_u · P ⊙ right_u in float64: the diagonal of `gram`."""
    total = torch.zeros(len(left), dtype=torch.float64)
    for part in columns(left):
        total += (left[:, part].double() * precond[part].double() * right[:, part].double()).sum(1)
    return total


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all tensors, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def prompt_mean(
    units: Mapping[str, Float[Tensor, "U D"]], sizes: Int[Tensor, " U"], world: World = ALONE
) -> Mapping[str, Float[Tensor, " D"]]:
    """Mean over prompts, in float64: units weighted by the number of their prompts."""
    share = sizes.double() / sizes.sum()
    shapes = {name: rows.shape[1:] for name, rows in units.items()}
    return held_or_made(shapes, lambda name: weighted_sum(share, units[name]), world)


def weighted_sum(weights: Float[Tensor, " U"], rows: Float[Tensor, "U D"]) -> Float[Tensor, " D"]:
    """Σ_u weights_u·rows_u in float64."""
    parts = [(weights[:, None] * rows[:, part].double()).sum(0) for part in columns(rows)]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float64)


def columns(rows: Tensor, num_rows: int | None = None) -> Iterator[slice]:
    """A few columns at a time; the same in every process, where `num_rows` is the number of all their rows."""
    size = max(1, IN_FLOAT64 // max(len(rows) if num_rows is None else num_rows, 1))
    return (slice(start, start + size) for start in range(0, rows.shape[1], size))
