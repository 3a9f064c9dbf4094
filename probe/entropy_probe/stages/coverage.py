"""Which trainable parameters X and Y reach: a parameter without a gradient is missing from every dot product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.model.registry import Registry
from entropy_probe.processes.world import ALONE
from entropy_probe.stages.gradients import UnitGradients

FRESH_LORA = "its partner is zero: the adapter has not learned anything yet, so this factor has no gradient"
_PARTNERS = (("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A"))


@dataclass(frozen=True)
class Coverage:
    """Share of the registry's tensors with a non-zero gradient from X and from Y; the others, explained where known."""

    num_tensors: int
    num_parameters: int
    x_coverage: float
    y_coverage: float
    uncovered: list[str]
    explained: dict[str, str]


def gradient_coverage(registry: Registry, units: UnitGradients) -> Coverage:
    """Count tensors with any non-zero entry in X and in Y over all units."""
    trainable = registry.trainable
    world = ALONE if units.share is None else units.share.world
    reached_x, reached_y = (
        {name for name, count in zip(side, counts.tolist(), strict=True) if count}
        for side in (units.x, units.y)
        for counts in [world.total(torch.tensor([int(t.count_nonzero()) for t in side.values()]))]
    )
    uncovered = [name for name in trainable if name not in reached_x or name not in reached_y]
    explained = {name: FRESH_LORA for name in uncovered if _partner_is_zero(name, registry.parameters)}
    return Coverage(
        num_tensors=len(trainable),
        num_parameters=sum(p.numel() for p in trainable.values()),
        x_coverage=len(reached_x) / len(trainable),
        y_coverage=len(reached_y) / len(trainable),
        uncovered=uncovered,
        explained=explained,
    )


def _partner_is_zero(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the other factor of a low-rank product, which multiplies this one's gradient, is still at zero."""
    for factor, other in _PARTNERS:
        partner = parameters.get(name.replace(factor, other)) if factor in name else None
        if partner is not None and not bool(partner.detach().count_nonzero()):
            return True
    return False
