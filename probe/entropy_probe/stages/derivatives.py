"""Directional derivatives D_v of log p and H_t at every token, in forward mode or by differences of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import batches_by_length, rows_without_graph, score, score_rows

if TYPE_CHECKING:
    from jaxtyping import Float

TWO_POINTS, FIVE_POINTS = (-1, 1), (-2, -1, 1, 2)


@dataclass(frozen=True)
class Derivatives:
    """D_v log p and D_v H_t per token [B, G, T], zero past the end of a response."""

    d_logp: Float[Tensor, "B G T"]
    d_entropy: Float[Tensor, "B G T"]

    @property
    def d_seq_logp(self) -> Float[Tensor, "B G"]:
        return self.d_logp.sum(-1)

    @property
    def d_rb_sum(self) -> Float[Tensor, "B G"]:
        return self.d_entropy.sum(-1)


@torch.no_grad()
def directional_derivatives(
    bound: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    eta: float = 0.0,
) -> Derivatives:
    """d/dη of log p and H_t at θ + ηv, in one forward-mode pass (a JVP), by the true derivative of the function.

    Raises `NotImplementedError` where an operation of the model has no forward-mode derivative.
    """
    shape = (len(rollouts.gen_lens), rollouts.max_gen_len)
    d_logp, d_entropy = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    point = theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
    for rows in batches_by_length(rollouts, rows_without_graph(rollouts, config.generation)):
        with forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(value, v[name].to(device=value.device, dtype=bound.dtype))
                for name, value in point.items()
            }
            scored = score_rows(bound, rollouts, rows, config, override=dual, true_derivative=True)
            for whole, part in ((d_logp, scored.logp), (d_entropy, scored.entropy)):
                tangent = forward_ad.unpack_dual(part).tangent
                if tangent is not None:
                    whole[rows, : part.shape[1]] = tangent.double().cpu()
    return Derivatives(rollouts.per_prompt(d_logp), rollouts.per_prompt(d_entropy))


def derivatives_by_difference(
    float64: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    h: float,
    eta: float = 0.0,
) -> Derivatives:
    """D_v log p and D_v H_t at θ + ηv as five-point differences of scores in true float64."""
    at = {}
    for k in FIVE_POINTS:
        override = theta_plus_eta_v(float64.registry, v, eta + k * h, float64.dtype)
        at[k] = score(float64, rollouts, config, override)
    return Derivatives(
        stencil_derivative({k: s.token_logp for k, s in at.items()}, h),
        stencil_derivative({k: s.rb_entropy for k, s in at.items()}, h),
    )


def step_of(fastest: float, v: Mapping[str, Tensor], change: float) -> float:
    """h with fastest·h = change, where `fastest` is the largest |D_vS| of a response."""
    return change / fastest if fastest > 0 else change / max(norm(v), 1.0)


def stencil_derivative(values: Mapping[int, Tensor], h: float) -> Tensor:
    """[f(h) − f(−h)]/(2h), or [8(f(h) − f(−h)) − (f(2h) − f(−2h))]/(12h), from f at the given multiples of h."""
    if 2 not in values:
        return (values[1] - values[-1]) / (2 * h)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
