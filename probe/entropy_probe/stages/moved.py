"""θ + ηv for a pass of all processes, which hold it once where they hold one model together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.processes.world import World


def moved(
    bound: BoundModel, v: Mapping[str, Tensor], eta: float, world: World
) -> Mapping[str, Tensor]:
    """`theta_plus_eta_v`; of a `world` of one copy every process makes some of it, and all call this."""

    def of(name: str) -> Tensor:
        return theta_plus_eta_v(bound.registry, {name: v[name]}, eta, bound.dtype)[name]

    if not world.one_copy:
        return theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
    return world.made({name: value.shape for name, value in v.items()}, of, bound.dtype)
