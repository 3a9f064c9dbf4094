"""The checkpoint's second moments beside the gradients of the same tensors on this batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.moments import exchange_evidence
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.processes.world import ALONE, World

if TYPE_CHECKING:
    from jaxtyping import Float

_ENTRIES = 4096
_CLEAR = 5.0


@dataclass(frozen=True)
class MomentsMatch:
    """Pairs of tensors of one shape, by the evidence that their second moments were exchanged (in standard errors).

    `worst` is the largest, of `pair`; `None` where no two tensors have one shape, or no gradient is there. Of the
    `num_pairs`, in `num_undecided` an exchange would not be seen (evidence against it below 5); `undecided` names the
    tensors of these pairs, the smallest first.
    """

    worst: float | None
    pair: tuple[str, str] | None
    num_pairs: int
    num_undecided: int
    undecided: list[str]


def moments_match(
    adam: Mapping[str, AdamState], y: Mapping[str, Float[Tensor, "U D"]], world: World = ALONE
) -> MomentsMatch:
    """mean_u Y_u² against `exp_avg_sq`, entry by entry, of up to 4096 entries of each tensor; of several processes each
    has some u."""
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    num_units = int(world.total(torch.tensor(len(next(iter(y.values()), ())))))
    moved = world.total(torch.tensor([bool((y[name] != 0).any()) for name in adam], dtype=torch.int64))
    for (name, state), has_moved in zip(adam.items(), moved.tolist(), strict=True):
        if state.step > 0 and has_moved:
            by_shape[tuple(state.exp_avg_sq.shape)].append(name)
    worst, pair, found = None, None, []
    undecided: dict[str, int] = {}
    for names in by_shape.values():
        if len(names) < 2:
            continue
        size = y[names[0]].shape[1]
        some = torch.linspace(0, size - 1, min(size, _ENTRIES)).long()
        sums = torch.stack([y[name][:, some].double().square().sum(0).cpu() for name in names])
        squares = world.total(sums) / num_units
        moments = torch.stack(
            [adam[name].exp_avg_sq.flatten()[some.to(adam[name].exp_avg_sq.device)] for name in names]
        )
        evidence = exchange_evidence(squares, moments.double().cpu())
        first, second = torch.triu_indices(len(names), len(names), offset=1)
        of_pairs = evidence[first, second]
        found.append(of_pairs)
        for i, j in zip(first[of_pairs > -_CLEAR].tolist(), second[of_pairs > -_CLEAR].tolist(), strict=True):
            undecided |= {names[i]: size, names[j]: size}
        k = int(of_pairs.argmax())
        if worst is None or float(of_pairs[k]) > worst:
            worst, pair = float(of_pairs[k]), (names[int(first[k])], names[int(second[k])])
    everything = torch.cat(found) if found else torch.zeros(0)
    smallest_first = sorted(undecided, key=lambda name: (undecided[name], name))
    return MomentsMatch(worst, pair, len(everything), int((everything > -_CLEAR).sum()), smallest_first)
