"""Which trainable parameters X and Y reach: a parameter without a gradient is missing from every dot product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from entropy_probe.model.registry import Registry
from entropy_probe.processes.world import ALONE, World
from entropy_probe.report import RegistrySection
from entropy_probe.stages.gradients.unit_gradients import UnitGradients

FRESH_LORA = "its partner is zero: the adapter has not learned anything yet, so this factor has no gradient"
_PARTNERS = (("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A"))


def gradient_coverage(
    registry: Registry,
    units: UnitGradients,
    taken_as_frozen: Iterable[str] = (),
    world: World = ALONE,
) -> RegistrySection:
    """Count tensors with any non-zero entry in X and in Y over all units."""
    trainable = registry.trainable
    reached_x, reached_y = (_reached(side, world) for side in (units.x, units.y))
    uncovered = [name for name in trainable if name not in reached_x or name not in reached_y]
    fresh = [name for name in uncovered if _partner_is_zero(name, registry.parameters)]
    return RegistrySection(
        num_tensors=len(trainable),
        num_parameters=sum(p.numel() for p in trainable.values()),
        x_coverage=len(reached_x) / len(trainable),
        y_coverage=len(reached_y) / len(trainable),
        uncovered=uncovered,
        explained=dict.fromkeys(fresh, FRESH_LORA),
        taken_as_frozen=list(taken_as_frozen),
    )


def _reached(side: Mapping[str, Tensor], world: World) -> set[str]:
    """Names of tensors with a non-zero entry, in the units of any process."""
    counts = world.total(torch.tensor([int(t.count_nonzero()) for t in side.values()]))
    return {name for name, count in zip(side, counts.tolist(), strict=True) if count}


def _partner_is_zero(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the other factor of a low-rank product, which multiplies this one's gradient, is still at zero."""
    for factor, other in _PARTNERS:
        partner = parameters.get(name.replace(factor, other)) if factor in name else None
        if partner is not None and not bool(partner.detach().count_nonzero()):
            return True
    return False
