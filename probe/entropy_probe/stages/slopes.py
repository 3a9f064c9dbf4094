"""Directional derivatives D_v of log p and H_t at every token, and from them slope and curvature of the entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.baselines import BASELINES, Baseline, rb_coefficients
from entropy_probe.estimators.slope import (
    PromptMean,
    curvature,
    curvature_of_change,
    naive_slope,
    per_token_curvature,
    per_token_slope,
    rb_slope,
)
from entropy_probe.estimators.taylor import snis_terms
from entropy_probe.estimators.ustat import cross_moments, cross_moments_of_sums
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.processes.world import ALONE
from entropy_probe.stages.gradients import UnitGradients, gram, own_dots, per_token_payload, unit_gradients
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, rows_without_graph, score, score_rows
from entropy_probe.stages.share import Share
from entropy_probe.stages.update import UpdateDirection, norm

if TYPE_CHECKING:
    from jaxtyping import Float

# Largest change of a response's log-probability along a stencil, and its points. Of D_v, which is exact: a central
# difference errs by (1e-5)² in truncation and 1e-16/1e-5 in rounding, both below 1e-9 of the terms; a long step crosses
# the kinks of a ReLU. Of scores, twice in a row: five points and a longer step, as 1e-16·|S| is divided by it twice.
_JVP_CHANGE, _TWO_POINTS = 1e-5, (-1, 1)
_SCORE_CHANGE, _FIVE_POINTS = 1e-3, (-2, -1, 1, 2)


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
    bound: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], config: ProbeConfig, eta: float = 0.0
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


def _largest(values: Tensor) -> float:
    """max|values|, 0 of none."""
    return float(values.abs().max()) if values.numel() else 0.0


def step_of(fastest: float, v: Mapping[str, Tensor], change: float) -> float:
    """h with fastest·h = change, where `fastest` is the largest |D_vS| of a response."""
    return change / fastest if fastest > 0 else change / max(norm(v), 1.0)


def stencil_derivative(values: Mapping[int, Tensor], h: float) -> Tensor:
    """[f(h) − f(−h)]/(2h), or [8(f(h) − f(−h)) − (f(2h) − f(−2h))]/(12h), from f at the given multiples of h."""
    if 2 not in values:
        return (values[1] - values[-1]) / (2 * h)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


def _derivatives_by_difference(
    float64: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], config: ProbeConfig, h: float, eta: float
) -> Derivatives:
    """D_v log p and D_v H_t at θ + ηv as five-point differences of scores in true float64."""
    at = {}
    for k in _FIVE_POINTS:
        override = theta_plus_eta_v(float64.registry, v, eta + k * h, float64.dtype)
        at[k] = score(float64, rollouts, config, override)
    return Derivatives(
        stencil_derivative({k: s.token_logp for k, s in at.items()}, h),
        stencil_derivative({k: s.rb_entropy for k, s in at.items()}, h),
    )


@dataclass(frozen=True)
class Slopes:
    """Slope of the entropy along v by every estimator (`naive`, and Rao-Blackwell with each baseline) and curvature,
    per prompt of the E batch; the terms of dΔĤ_RB/dη at 0, and d²ΔĤ_RB/dη² with its size; D_v at θ (of several
    processes each has that of its own prompts); D_vS, D²_vS and D²_vR of all responses."""

    naive: PromptMean
    rb: dict[Baseline, PromptMean]
    per_token: PromptMean
    curvature: PromptMean
    per_token_curvature: PromptMean
    of_change: Float[Tensor, "2 B G"]
    curvature_of_change: tuple[float, float]
    at_theta: Derivatives
    d_seq_logp: Float[Tensor, "B G"]
    d2_seq_logp: Float[Tensor, "B G"]
    d2_rb_sum: Float[Tensor, "B G"]


def slopes_along(
    bound: BoundModel,
    float64: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    progress: Progress | None = None,
    share: Share | None = None,
) -> Slopes:
    """∇Hᵀv by every estimator, and vᵀ∇²Hv by a central difference of D_v in true float64.

        D²_v f ≈ [D_vf(h) − D_vf(−h)]/(2h)

    with h such that no response's log-probability moves by more than 1e-5. Where an operation of the model has no
    forward-mode derivative, D_v itself is a difference of scores in float64, and both have five points.

    With a `share` of the batch, `rollouts` and `scores` are those of its own prompts, and all others come together.
    """
    world = ALONE if share is None else share.world
    try:
        at_theta = directional_derivatives(bound, rollouts, v, config)
    except NotImplementedError:
        at_theta = None
    if not world.any(at_theta is None):
        derivatives = partial(directional_derivatives, float64, rollouts, v, config)
        change, points = _JVP_CHANGE, _TWO_POINTS
    else:
        trial = 1e-7 / max(norm(v), 1.0)
        moved = score(float64, rollouts, config, theta_plus_eta_v(float64.registry, v, trial, float64.dtype))
        still = score(float64, rollouts, config)
        change, points = _SCORE_CHANGE, _FIVE_POINTS
        step = step_of(world.largest(_largest(moved.seq_logp - still.seq_logp)) / trial, v, change)
        derivatives = partial(_derivatives_by_difference, float64, rollouts, v, config, step)
        at_theta = derivatives(0.0)
    assert at_theta is not None
    h = step_of(world.largest(_largest(at_theta.d_seq_logp)), v, change)
    at: dict[int, Derivatives] = {}
    for k in points:
        if progress is not None:
            progress("slopes", 1 + len(at), 1 + len(points))
        at[k] = derivatives(k * h)

    d2_seq_logp = stencil_derivative({k: d.d_seq_logp for k, d in at.items()}, h)
    d2_rb_sum = stencil_derivative({k: d.d_rb_sum for k, d in at.items()}, h)

    def rb(baseline: Baseline) -> PromptMean:
        among = None if share is None else share.among
        kappa = rb_coefficients(scores.rb_entropy, scores.gen_lens, baseline, scores.features, among)
        return rb_slope(kappa, at_theta.d_logp, at_theta.d_entropy)

    by_baseline: dict[Baseline, PromptMean] = {baseline: rb(baseline) for baseline in BASELINES}
    first = at_theta.d_seq_logp, at_theta.d_rb_sum
    if share is not None and share.several:
        scores = share.scores(scores)
        together = torch.stack([*first, d2_seq_logp, d2_rb_sum], -1)
        d_seq_logp, d_rb_sum, d2_seq_logp, d2_rb_sum = share.whole(together).unbind(-1)
        first = d_seq_logp, d_rb_sum
        by_baseline = {name: PromptMean(share.whole(slope.per_prompt)) for name, slope in by_baseline.items()}
    lengths = scores.gen_lens.double()
    bent = curvature(scores.rb_sum, *first, d2_seq_logp, d2_rb_sum)
    return Slopes(
        naive=naive_slope(scores.seq_logp, first[0]),
        rb=by_baseline,
        per_token=per_token_slope(scores.rb_sum, lengths, *first),
        curvature=bent,
        curvature_of_change=curvature_of_change(bent.value, scores.rb_sum, *first, d2_seq_logp, d2_rb_sum),
        per_token_curvature=per_token_curvature(scores.rb_sum, lengths, *first, d2_seq_logp, d2_rb_sum),
        of_change=snis_terms(torch.full_like(lengths, 1 / lengths.numel()), scores.rb_sum, first[1], first[0]),
        at_theta=at_theta,
        d_seq_logp=first[0],
        d2_seq_logp=d2_seq_logp,
        d2_rb_sum=d2_rb_sum,
    )


@dataclass(frozen=True)
class SlopeSources:
    """−X̄ᵀv₀, and −X̄ᵀD·Y_u weighted by the share that unit u of the U batch has in Ȳ: they add up to −X̄ᵀv."""

    of_v0: float
    by_unit: Float[Tensor, " U"]


def slope_sources(e: UnitGradients, u: UnitGradients, direction: UpdateDirection) -> SlopeSources:
    """Where the slope along v = v₀ + D·Ȳ comes from, with X̄ of the E batch."""
    of_all = e.mean_x()
    mean_x = {name: of_all[name][None] for name in direction.v}
    v0 = {name: value.reshape(1, -1) for name, value in direction.v0.items()}
    share = u.sizes.double() / u.sizes.sum()
    by_unit = u.of_units(gram(mean_x, u.y, direction.diagonal)[0])
    return SlopeSources(-float(gram(mean_x, v0)), -share * by_unit)


def cross_fitted_slope(units: UnitGradients, direction: UpdateDirection) -> PromptMean:
    """−X̄ᵀv₀ − U_cross[P → D]: the slope along v without the diagonal X_nᵀDY_n that one batch for both sides adds.

    Its per-unit terms are −X_uᵀv₀ − (2r_u − U_cross): their mean is the value, their spread the SE to first order.
    """
    x = {name: units.x[name] for name in direction.v}
    momentum = gram(x, {name: value.reshape(1, -1) for name, value in direction.v0.items()})[:, 0]
    if units.several:
        sums = own_dots(units, direction.diagonal, direction.v)
        together = torch.cat([momentum[:, None], torch.stack(list(sums.values())).sum(0)], 1)
        momentum, sums = units.of_units(together).tensor_split([1], dim=1)
        momentum, moments = momentum[:, 0], cross_moments_of_sums(sums)
    else:
        moments = cross_moments(gram(x, units.y, direction.diagonal))
    return PromptMean(-momentum - (2 * moments.row_means - moments.u_cross))


def predictors(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    config: ProbeConfig,
    units: UnitGradients,
    direction: UpdateDirection,
    along: Slopes,
    cross: PromptMean | None,
    share: Share | None = None,
) -> tuple[PromptMean, PromptMean]:
    """The slope and the curvature by which ΔH is predicted, per response or per token as `true_delta_h.normalize` says.

    With one batch (`cross` is not `None`) the slope is the cross-fitted one; per token it needs one more backward pass.
    """
    if config.true_delta_h.normalize == "per_sequence":
        return cross or along.rb[config.first_order.baseline], along.curvature
    if cross is None:
        return along.per_token, along.per_token_curvature
    payload = per_token_payload(scores)
    if share is not None and share.several:
        payload = payload.of_prompts(torch.arange(rollouts.num_prompts)[share.prompts])
    of_tokens = unit_gradients(bound, rollouts, config, payload, share=share)
    return cross_fitted_slope(replace(units, x=of_tokens.x, sums_x=of_tokens.sums_x), direction), (
        along.per_token_curvature
    )
