"""Projections of the entropy gradient, s_k = X_kᵀPȲ and X_kᵀv, in several ways that must agree, at every run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.derivatives import Derivatives, directional_derivatives
from entropy_probe.stages.gradients.payloads import Payload
from entropy_probe.stages.gradients.products import gram, norm
from entropy_probe.stages.gradients.unit_gradients import UnitGradients, unit_gradients
from entropy_probe.stages.made import Made, held_or_made
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import batches_by_length
from entropy_probe.stages.share import Share, Units
from entropy_probe.stages.witnesses.shortened import shortened
from entropy_probe.stages.witnesses.witness import FEWER_ROWS, largest, terms, unless_lacking

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_PROMPTS = 2
# Σ_k s_k against the gradient's own product: rounding in float32 is far below, a missing path through the model above.
_EULER = 1e-3
_ROUNDINGS = 1e5


@dataclass(frozen=True)
class ProjectionAgreement:
    """Largest difference between X_uᵀw and what gives it another way, s_u, relative to ‖X_u‖·‖w‖, to which a hundred
    thousand times what rounding leaves of s_u is added: X_u itself is rounding where its terms cancel.

    `jvp` and `alpha`: w = PȲ for a few units, relative to ‖X_u‖_P·‖Ȳ‖_P with ‖a‖_P = √(aᵀPa); s_u by a JVP and by the
    α-trick, `None` where an operation of the model lacks that derivative. `v`: w = v for every unit, s_u by the D_v of
    the run, `None` where it has none. `alpha` is on rows that are `shortened`, and so is the X_u beside it, which is
    captured once more where one of them is; the others are on whole rows.
    """

    projections_jvp: float | None
    projections_alpha: float | None
    projections_v: float | None


def projection_agreement(
    bound: BoundModel,
    share: Share,
    of_x: Payload,
    config: ProbeConfig,
    units: UnitGradients,
    precond: Mapping[str, Tensor],
    ascent: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    along_v: Derivatives | None,
    *,
    second_order: bool = True,
) -> ProjectionAgreement:
    """On the two prompts (or one block) of the E batch with the largest weights in X, and along v on all; `units` are
    that batch's, `ascent` is Ȳ of the U batch. Without `second_order` there is no α-trick.

    Of several processes each has its own payloads and D_v, all compare along v, and rank 0 alone goes the other ways.
    """
    own, unit_of = share.own_units, share.units.of_prompt
    of_all = Payload(share.whole(of_x.weights))
    chosen = largest(of_all, share.units, _PROMPTS if share.units.mode == "exact" else 1)
    prompts = torch.isin(unit_of, chosen).nonzero()[:, 0]
    here = (chosen >= own.start) & (chosen < own.stop)
    x = Made(precond, lambda name: units.x[name][chosen[here] - own.start])
    y = Made(precond, lambda name: ascent[name].reshape(1, -1))
    found = torch.zeros(2, len(chosen), dtype=torch.float64)
    found[:, here] = _captured(x, y, precond)
    captured, squares = share.world.total(found)
    size_y = gram(y, y, precond)[0, 0]
    shapes = {name: along.shape for name, along in v.items()}
    direction = held_or_made(
        shapes, lambda name: precond[name] * ascent[name].reshape(shapes[name]), share.world
    )
    kappa = None if of_x.coefficients is None else share.tokens(of_x.coefficients, prompts)
    few, payload = share.rollouts.of_prompts(prompts), Payload(of_all.weights[prompts], kappa)
    off_along_v = None
    if along_v is not None:
        off_along_v = share.world.largest(_along_v(of_x, units, share, v, along_v))
    if not share.world.first:
        return ProjectionAgreement(None, None, off_along_v)

    local = Units(share.units.mode, torch.searchsorted(chosen, unit_of[prompts]))
    along = unless_lacking(lambda: directional_derivatives(bound, few, direction, config))
    of_whole = _Captured(captured, (squares * size_y).sqrt(), payload, along, local.of_prompt)
    by_derivative = None if along is None else of_whole.off(projections_of(payload, along))
    if not second_order:
        return ProjectionAgreement(by_derivative, None, off_along_v)
    short = shortened(few)
    beside = of_whole
    if short is not few:
        if kappa is not None:
            payload = replace(payload, coefficients=kappa[..., : short.max_gen_len])
        some = unit_gradients(bound, Share.of(short, local), config, payload)
        captured, squares = _captured({name: some.x[name] for name in precond}, y, precond)
        if along is not None:
            along = directional_derivatives(bound, short, direction, config)
        beside = _Captured(captured, (squares * size_y).sqrt(), payload, along, local.of_prompt)
    by_reverse = unless_lacking(lambda: by_alpha(bound, short, payload, direction, config))
    return ProjectionAgreement(
        by_derivative, None if by_reverse is None else beside.off(by_reverse), off_along_v
    )


def _captured(
    x: Mapping[str, Tensor], y: Mapping[str, Tensor], precond: Mapping[str, Tensor]
) -> Float[Tensor, "2 u"]:
    """X_uᵀPȲ and X_uᵀPX_u."""
    return torch.stack([gram(x, y, precond)[:, 0], gram(x, x, precond).diagonal()])


@dataclass(frozen=True)
class _Captured:
    """X_uᵀPȲ of some units and its scale, with what says how far rounding reaches: what X is made of, and D along PȲ,
    where the model has it."""

    projections: Float[Tensor, " u"]
    scale: Float[Tensor, " u"]
    payload: Payload
    along: Derivatives | None
    unit_of: Int[Tensor, " b"]

    def off(self, of_prompts: Float[Tensor, " b"]) -> float:
        """The largest difference of the means of these from the projections."""
        floor = torch.zeros_like(self.scale)
        if self.along is not None:
            floor = rounding_of(self.payload, self.along, self.unit_of)
        found = means_over_units(of_prompts, self.unit_of)
        return _largest_difference(found, self.projections, self.scale, floor)


def _along_v(
    of_x: Payload,
    units: UnitGradients,
    share: Share,
    v: Mapping[str, Tensor],
    along_v: Derivatives,
) -> float:
    unit_of = share.units.of_prompt[share.prompts] - share.own_units.start
    if not len(unit_of):
        return 0.0
    x = {name: units.x[name] for name in v}
    w = {name: value.reshape(1, -1) for name, value in v.items()}
    captured = gram(x, w)[:, 0]
    norms = [norm({n: rows[u] for n, rows in x.items()}) for u in range(len(captured))]
    scale = (torch.tensor(norms) * norm(w)).double()
    by_derivative = means_over_units(projections_of(of_x, along_v), unit_of)
    return _largest_difference(by_derivative, captured, scale, rounding_of(of_x, along_v, unit_of))


def _largest_difference(one: Tensor, other: Tensor, scale: Tensor, floor: Tensor) -> float:
    """|one − other|/(scale + 100 000·floor), 0 where it is a vanishing part of one rounding."""
    off = (one - other).abs()
    vanishes = off <= sys.float_info.epsilon * floor
    return float(torch.where(vanishes, 0.0, off / (scale + _ROUNDINGS * floor)).max())


def means_over_units(
    values: Float[Tensor, " B"], unit_of: Int[Tensor, " B"]
) -> Float[Tensor, " U"]:
    """The mean over the prompts of every unit; NaN for a unit that has none here."""
    sums = torch.zeros(int(unit_of.max()) + 1, dtype=values.dtype).index_add_(0, unit_of, values)
    return sums / torch.bincount(unit_of)


def projections_of(payload: Payload, along: Derivatives) -> Float[Tensor, " B"]:
    """Σ_g w_ng D f_ng of every prompt, from D log p and D H."""
    d_logp, d_entropy = (d.flatten(0, 1) for d in (along.d_logp, along.d_entropy))
    derivative = payload.sums(d_logp, d_entropy, torch.arange(len(d_logp)))
    return (payload.weights * derivative.reshape(payload.weights.shape)).sum(1)


def rounding_of(
    payload: Payload, along: Derivatives, unit_of: Int[Tensor, " B"]
) -> Float[Tensor, " U"]:
    """What rounding leaves of the mean of `projections_of` over the prompts of a unit: √Σ(w_ng·(1 + |κ_t|)·δ_t)²."""
    of_tokens = along.rounding
    if payload.coefficients is not None:
        kappa = payload.coefficients[..., : of_tokens.shape[-1]]
        of_tokens = (1 + kappa.abs()) * of_tokens
    squares = (payload.weights.double().square() * of_tokens.square().sum(-1)).sum(1)
    counts = torch.bincount(unit_of)
    return (means_over_units(squares, unit_of) / counts).sqrt()


def by_alpha(
    bound: BoundModel,
    rollouts: Rollouts,
    payload: Payload,
    direction: Mapping[str, Tensor],
    config: ProbeConfig,
) -> Float[Tensor, " B"]:
    """s_k = ∂/∂α_k ⟨∇_θ Σ_k α_k Σ_g w_kg f_kg, direction⟩ at α = 1, the derivative of a gradient: reverse mode twice.

    What is differentiated is linear in α, so Σ_k s_k must be its value (Euler). Where it is not, the backward pass of
    an operation left no graph: `NotImplementedError`. No gradient at all is a `MeasurementError`.
    """
    alpha = torch.ones(rollouts.num_prompts, dtype=torch.float64, requires_grad=True)
    parameters = [bound.registry.parameters[name] for name in direction]
    towards = [
        direction[name].to(p.device, bound.dtype)
        for name, p in zip(direction, parameters, strict=True)
    ]
    projections, sizes = (
        torch.zeros(len(alpha), dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    for rows in batches_by_length(rollouts, max(1, config.generation.tf_batch_size // FEWER_ROWS)):
        f = terms(bound, rollouts, rows, payload, config, true=True)
        factors = alpha[rows // rollouts.num_responses] * payload.weights.reshape(-1)[rows]
        loss = (factors.to(bound.device) * f).sum()
        with bound.recording():
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(gradients, towards, strict=True) if g is not None]
        if not pairs:
            raise MeasurementError(
                "gradients", "no parameter gets a gradient from log p", "give trainable parameters"
            )
        if any(g.requires_grad for g, _ in pairs):
            reached, along = zip(*((g, d) for g, d in pairs if g.requires_grad), strict=True)
            projections += torch.autograd.grad(reached, alpha, along)[0]
        parts = torch.stack([(g.detach().double() * d.double()).sum().cpu() for g, d in pairs])
        sizes += torch.stack([parts.sum(), parts.abs().sum()])
    if (projections.sum() - sizes[0]).abs() > _EULER * sizes[
        1
    ]:  # not so where a number is not a number: that is a fault
        raise NotImplementedError("the backward pass of an operation left no graph")
    return projections
