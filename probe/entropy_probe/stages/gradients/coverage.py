"""Which trainable parameters X and Y reach: a parameter without a gradient is missing from every dot product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.model.registry import Registry
from entropy_probe.processes.world import ALONE, World
from entropy_probe.report import RegistrySection
from entropy_probe.stages.gradients.unit_gradients import UnitGradients
from entropy_probe.stages.responses.rollouts import Rollouts

if TYPE_CHECKING:
    from jaxtyping import Float

FRESH_LORA = (
    "its partner is zero: the adapter has not learned anything yet, so this factor has no gradient"
)
SAME_RESPONSES = (
    "within every prompt all responses are the same, and their weights in Y add up to zero: "
    "what is left is rounding"
)
_PARTNERS = (("lora_A", "lora_B"), ("lora_embedding_B", "lora_embedding_A"))


def gradient_coverage(
    registry: Registry,
    units: UnitGradients,
    taken_as_frozen: Iterable[str] = (),
    world: World = ALONE,
    *,
    y_cancels: bool = False,
) -> RegistrySection:
    """Count tensors with any non-zero entry in X and in Y over all units; `y_cancels` is what `cancels` says."""
    trainable = registry.trainable
    reached_x, reached_y = (_reached(side, world) for side in (units.x, units.y))
    uncovered = [name for name in trainable if name not in reached_x or name not in reached_y]
    fresh = [name for name in uncovered if _partner_is_zero(name, registry.parameters)]
    same = [name for name in uncovered if y_cancels and (name in reached_x or not reached_x)]
    return RegistrySection(
        num_tensors=len(trainable),
        num_parameters=sum(p.numel() for p in trainable.values()),
        x_coverage=len(reached_x) / len(trainable),
        y_coverage=len(reached_y) / len(trainable),
        uncovered=uncovered,
        explained=dict.fromkeys(same, SAME_RESPONSES) | dict.fromkeys(fresh, FRESH_LORA),
        taken_as_frozen=list(taken_as_frozen),
    )


def cancels(rollouts: Rollouts, advantages: Float[Tensor, "B G"]) -> bool:
    """Whether Y is zero in exact arithmetic: one response for each prompt, with advantages that add up to nothing."""
    group = rollouts.num_responses
    for n, own in enumerate(advantages.split(1)):
        responses = {tuple(r) for r in rollouts.responses[n * group : (n + 1) * group] if r}
        if len(responses) > 1 or own.sum().abs() > 1e-12 * own.abs().sum():
            return False
    return True


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
