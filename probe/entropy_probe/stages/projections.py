"""Projections s_k = X_kᵀPȲ of a few prompts in three ways that must agree, on the user's own model at every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients import Payload, UnitGradients, gram
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import batches_by_length, score_rows
from entropy_probe.stages.slopes import directional_derivatives
from entropy_probe.stages.witness import FEWER_ROWS, lacks_derivative, largest, units_of_prompts

_PROMPTS = 4
# Σ_k s_k against the gradient's own product: rounding in float32 is far below, a missing path through the model above.
_EULER = 1e-3


@dataclass(frozen=True)
class ProjectionAgreement:
    """Largest |s_k − X_kᵀPȲ|/(‖X_k‖_P·‖Ȳ‖_P) of a prompt, with s_k by a JVP and by the α-trick, X_k the per-prompt
    gradients of the run and ‖a‖_P = √(aᵀPa); `None` where an operation of the model lacks that derivative."""

    projections_jvp: float | None
    projections_alpha: float | None


def projection_agreement(
    bound: BoundModel,
    rollouts: Rollouts,
    of_x: Payload,
    config: ProbeConfig,
    units: UnitGradients,
    precond: Mapping[str, Tensor],
    ascent: Mapping[str, Tensor],
) -> ProjectionAgreement:
    """On the (at most four) prompts of the E batch with the largest weights in X; `units` are that batch's, `ascent` is
    Ȳ of the U batch. Where units are blocks, X of these prompts is computed anew."""
    prompts = largest(of_x, _PROMPTS)
    x = units_of_prompts(bound, rollouts, config, units, prompts, of_x).x
    x = {name: x[name] for name in precond}
    y = {name: ascent[name].reshape(1, -1) for name in precond}
    captured = gram(x, y, precond)[:, 0]
    scale = (gram(x, x, precond).diagonal() * gram(y, y, precond)[0, 0]).sqrt()
    direction = {name: p * ascent[name].reshape(p.shape) for name, p in precond.items()}
    few, payload, found = rollouts.of_prompts(prompts), of_x.of_prompts(prompts), []
    for way in (by_jvp, by_alpha):
        try:
            off = (way(bound, few, payload, direction, config) - captured).abs()
            found.append(float(torch.where(off == 0, 0.0, off / scale).max()))
        except RuntimeError as error:
            if not lacks_derivative(error):
                raise
            found.append(None)
    return ProjectionAgreement(*found)


def by_jvp(
    bound: BoundModel, rollouts: Rollouts, payload: Payload, direction: Mapping[str, Tensor], config: ProbeConfig
) -> Float[Tensor, " B"]:
    """s_k = Σ_g w_kg D f_kg with D the derivative along `direction` (PȲ), in one forward-mode pass."""
    along = directional_derivatives(bound, rollouts, direction, config)
    d_logp, d_entropy = (d.flatten(0, 1) for d in (along.d_logp, along.d_entropy))
    derivative = payload.sums(d_logp, d_entropy, torch.arange(len(d_logp)))
    return (payload.weights * rollouts.per_prompt(derivative)).sum(1)


def by_alpha(
    bound: BoundModel, rollouts: Rollouts, payload: Payload, direction: Mapping[str, Tensor], config: ProbeConfig
) -> Float[Tensor, " B"]:
    """s_k = ∂/∂α_k ⟨∇_θ Σ_k α_k Σ_g w_kg f_kg, direction⟩ at α = 1, the derivative of a gradient: reverse mode twice.

    What is differentiated is linear in α, so Σ_k s_k must be its value (Euler). Where it is not, the backward pass of
    an operation left no graph: `NotImplementedError`. No gradient at all is a `MeasurementError`.
    """
    alpha = torch.ones(rollouts.num_prompts, dtype=torch.float64, requires_grad=True)
    parameters = [bound.registry.parameters[name] for name in direction]
    towards = [direction[name].to(p.device, bound.dtype) for name, p in zip(direction, parameters, strict=True)]
    projections, sizes = torch.zeros(len(alpha), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows in batches_by_length(rollouts, max(1, config.generation.tf_batch_size // FEWER_ROWS)):
        scored = score_rows(bound, rollouts, rows, config, true_derivative=True)
        factors = alpha[rows // rollouts.num_responses] * payload.weights.reshape(-1)[rows]
        loss = (factors.to(bound.device) * payload.sums(scored.logp, scored.entropy, rows)).sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(gradients, towards, strict=True) if g is not None]
        if not pairs:
            raise MeasurementError("gradients", "no parameter gets a gradient from log p", "give trainable parameters")
        if any(g.requires_grad for g, _ in pairs):
            reached, along = zip(*((g, d) for g, d in pairs if g.requires_grad), strict=True)
            projections += torch.autograd.grad(reached, alpha, along)[0]
        terms = torch.stack([(g.detach().double() * d.double()).sum().cpu() for g, d in pairs])
        sizes += torch.stack([terms.sum(), terms.abs().sum()])
    if not (projections.sum() - sizes[0]).abs() <= _EULER * sizes[1]:
        raise NotImplementedError("the backward pass of an operation left no graph")
    return projections
