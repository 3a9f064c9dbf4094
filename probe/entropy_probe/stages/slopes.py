"""Slope and curvature of the entropy along v on the E batch, where they come from, and what they predict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import performance_difference, prediction
from entropy_probe.estimators.advantages import leave_one_out_mean
from entropy_probe.estimators.baselines import BASELINES, Baseline, chosen, rb_coefficients
from entropy_probe.estimators.slope import (
    PromptMean,
    curvature_of_change,
    naive_slope,
    per_token_slope,
    rb_slope,
)
from entropy_probe.estimators.taylor import snis_terms
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.derivatives import (
    FIVE_POINTS,
    JVP_CHANGE,
    SCORE_CHANGE,
    TWO_POINTS,
    Along,
    Derivatives,
    Second,
    derivatives_by_difference,
    directional_derivatives,
    largest,
    stencil_without_jumps,
    step_of,
)
from entropy_probe.stages.gradients.payloads import Payload, per_token_payload
from entropy_probe.stages.gradients.products import gram, norm
from entropy_probe.stages.gradients.unit_gradients import UnitGradients, unit_gradients
from entropy_probe.stages.made import Made
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.share import Share
from entropy_probe.stages.update import UpdateDirection

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_PARAMETER_CHANGE = 1e-4
_LOOKED_UP = 4  # prompts, to see how fast responses move
_MUCH_FASTER = (
    3.0  # the mean of D_v at ±h is off by (3e-5)² of the terms where one moves nine times as fast
)


@dataclass(frozen=True)
class Slopes:
    """Slope of the entropy along v by every estimator (`naive`, and Rao-Blackwell with each baseline), and with the
    `baseline` in use slope and curvature per response and per token, by prompt of the E batch.

    Of ΔĤ by normalised weights: the terms of its derivative at 0, that of it per token, and its second derivative with
    the size of its terms. D_v and D²_v at θ are those of this process's own tokens, as are the baseline's
    `coefficients`, of entropy and length; D_vS, D_vR, D²_vS and D²_vR those of all responses. What `rounding` leaves of
    X's slope, of the slope per token, of that of ΔĤ and of D²_vS; how many had a jump or a kink in the first step.
    """

    naive: PromptMean
    rb: dict[Baseline, PromptMean]
    baseline: Baseline
    slope: PromptMean
    curvature: PromptMean
    per_token: PromptMean
    per_token_curvature: PromptMean
    of_change: Float[Tensor, "2 B G"]
    of_change_per_token: float
    curvature_of_change: tuple[float, float]
    rounding: float
    rounding_per_token: float
    rounding_of_change: float
    coefficients: Float[Tensor, "2 b G t"]
    at_theta: Derivatives
    twice: Second
    d_seq_logp: Float[Tensor, "B G"]
    d_rb_sum: Float[Tensor, "B G"]
    d2_seq_logp: Float[Tensor, "B G"]
    d2_rb_sum: Float[Tensor, "B G"]
    d2_rounding: Float[Tensor, "B G"]
    num_kinked: int


def slopes_along(
    bound: BoundModel,
    float64: BoundModel,
    share: Share,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    progress: Progress | None = None,
) -> Slopes:
    """∇Hᵀv by every estimator, and vᵀ∇²Hv by a central difference of D_v in true float64.

        D²_v f ≈ [D_vf(h) − D_vf(−h)]/(2h)

    with h such that no response's log-probability moves by more than 1e-5, and less where a jump is in the way. Where
    an operation of the model has no forward-mode derivative, D_v itself is a difference of scores in float64, and both
    have five points.

    `scores` are those of the share's own prompts, and all others come together.
    """
    return slopes_of(share, scores, derived(bound, float64, share, v, config, progress), config)


def slopes_of(share: Share, scores: Scores, of: Derived, config: ProbeConfig) -> Slopes:
    """The slopes of a batch whose derivatives are known."""
    at_theta, twice, kinked = of.at_theta, of.twice, of.num_kinked
    baseline = chosen(config.first_order.baseline)
    tables = scores.rb_entropy, scores.gen_lens
    c = coefficients_of(share, scores, config)

    def rb(other: Baseline) -> PromptMean:
        own = other == baseline
        kappa = c[0] if own else rb_coefficients(*tables, other, scores.features, share.among)
        of_prompts = rb_slope(kappa, at_theta.d_logp, at_theta.d_entropy).per_prompt
        return PromptMean(share.whole(of_prompts))

    by_baseline: dict[Baseline, PromptMean] = {other: rb(other) for other in BASELINES}
    of_change = performance_difference.expansion(
        at_theta.d_logp, at_theta.d_entropy, twice.logp, twice.entropy, c
    )
    squares = share.whole(_rounding(at_theta, scores, config, c[0]).square().sum((1, 2)))
    of_responses = share.whole(at_theta.rounding.square().sum(-1))
    of_all = share.scores(scores)
    own = (at_theta.d_seq_logp, at_theta.d_rb_sum, twice.logp.sum(-1), twice.entropy.sum(-1))
    own = (*own, twice.rounding, *of_change.first, *of_change.second)
    together = share.whole(torch.stack(own, -1))
    d_seq_logp, d_rb_sum, d2_seq_logp, d2_rb_sum, d2_rounding, *terms = (
        column.contiguous() for column in together.unbind(-1)
    )
    of_change = performance_difference.Expansion(torch.stack(terms[:2]), torch.stack(terms[2:]))
    rb_sum, lengths = of_all.rb_sum, of_all.gen_lens.double()
    first, second = (d_seq_logp, d_rb_sum), (d2_seq_logp, d2_rb_sum)
    slope, bent = performance_difference.slopes_per_response(of_change)
    per_token, bent_token = performance_difference.slopes_per_token(of_change, rb_sum, lengths)
    even = torch.full_like(lengths, 1 / lengths.numel())
    h = rb_sum.sum() / lengths.sum()
    of_tokens = (1 + (c[0] - h * c[1]).abs()) * at_theta.rounding
    squares_of_tokens = share.whole(of_tokens.square().sum((1, 2)))
    of_weights = (1 + (rb_sum - rb_sum.mean()).abs()).square() * of_responses
    return Slopes(
        naive=naive_slope(of_all.seq_logp, d_seq_logp),
        rb=by_baseline,
        baseline=baseline,
        slope=slope,
        curvature=bent,
        per_token=per_token,
        per_token_curvature=bent_token,
        of_change=snis_terms(even, rb_sum, d_rb_sum, d_seq_logp),
        of_change_per_token=per_token_slope(rb_sum, lengths, *first).value,
        curvature_of_change=curvature_of_change(rb_sum, *first, *second),
        rounding=float(squares.sum().sqrt()) / lengths.numel(),
        rounding_per_token=float(squares_of_tokens.sum().sqrt() / lengths.sum()),
        rounding_of_change=float(of_weights.sum().sqrt()) / lengths.numel(),
        coefficients=c,
        at_theta=at_theta,
        twice=twice,
        d_seq_logp=d_seq_logp,
        d_rb_sum=d_rb_sum,
        d2_seq_logp=d2_seq_logp,
        d2_rb_sum=d2_rb_sum,
        d2_rounding=d2_rounding,
        num_kinked=int(share.world.total(torch.tensor(kinked))),
    )


def _rounding(
    at_theta: Derivatives, scores: Scores, config: ProbeConfig, kappa: Float[Tensor, "B G T"]
) -> Float[Tensor, "B G T"]:
    """What one rounding moves a token's terms of the slope by X's estimator by: |S − S̄|·δ, or (1 + |κ_t|)·δ."""
    if config.first_order.estimator == "naive":
        centred = scores.seq_logp - leave_one_out_mean(scores.seq_logp)
        return centred[..., None] * at_theta.rounding
    return (1 + kappa.abs()) * at_theta.rounding


@dataclass(frozen=True)
class Derived:
    """D_v at θ and D²_v of the own prompts' tokens, and how many of their responses had a jump in the way."""

    at_theta: Derivatives
    twice: Second
    num_kinked: int

    def followed_by(self, share: Share, then: tuple[Share, Derived], whole: Share) -> Derived:
        """Those of a batch, of which `share` was the first part, and `then` the rest."""
        rest, others = then
        return Derived(
            whole.joined((share, self.at_theta), (rest, others.at_theta)),
            whole.joined((share, self.twice), (rest, others.twice)),
            self.num_kinked + others.num_kinked,
        )


def derived(
    bound: BoundModel,
    float64: BoundModel,
    share: Share,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
    progress: Progress | None = None,
) -> Derived:
    """`stencil_without_jumps` of the own prompts.

    In float64 with D_v at θ as it is; in float32 D_v at θ is the `middle` of the two in float64 beside it.
    """
    known: dict[int, Derivatives] = {}
    beside = None if bound is float64 else _beside_theta(float64, share, v, config)
    if beside is None:
        at_theta, (along, of_all), change, points = _ways(bound, float64, share, v, config)
        h = step_of(share.world.largest(at_theta.fastest_sum), v, change)
        h = min(h, _longest(float64, v))
    else:
        h, known[1] = beside
        at_theta, points = None, TWO_POINTS
        along, of_all = (_exactly(float64, v, config, of) for of in (ALONE, share.world))
    done = itertools.count(1 + len(known))

    def counted(way: Along) -> Along:
        def derive(rollouts: Rollouts, eta: float, step: float) -> Derivatives:
            if progress is not None:
                progress("slopes", min(next(done), len(points)), 1 + len(points))
            return way(rollouts, eta, step)

        return derive

    found, twice, kinked = stencil_without_jumps(
        counted(along), share.own, at_theta, h, points, known, counted(of_all)
    )
    if (
        beside is not None
    ):  # as uncertain as X in the configured precision, which it is compared with
        of_bound = torch.finfo(bound.dtype).eps / torch.finfo(torch.float64).eps
        found = replace(found, rounding=of_bound * found.rounding)
    return Derived(replace(found, values=None), twice, kinked)


def _exactly(
    float64: BoundModel, v: Mapping[str, Tensor], config: ProbeConfig, world: World
) -> Along:
    def along(rollouts: Rollouts, eta: float, _: float) -> Derivatives:
        return directional_derivatives(float64, rollouts, v, config, eta, shared=True, world=world)

    return along


def _beside_theta(
    float64: BoundModel, share: Share, v: Mapping[str, Tensor], config: ProbeConfig
) -> tuple[float, Derivatives] | None:
    """h, and D_v at θ + hv; `None` where an operation of the model has no forward-mode derivative for any process.

    How fast the responses move is looked up on the longest of a few prompts, and corrected where another moves faster.
    """
    rollouts, world = share.own, share.world
    rows = _longest_rows(share)
    try:
        few = directional_derivatives(float64, rollouts, v, config, some=rows, world=world)
    except NotImplementedError:
        few = None
    if world.any(few is None):
        return None
    assert few is not None
    along, longest_step = _exactly(float64, v, config, world), _longest(float64, v)
    h = min(step_of(world.largest(few.fastest_sum), v, JVP_CHANGE / _MUCH_FASTER), longest_step)
    up = along(rollouts, h, h)
    fastest = world.largest(up.fastest_sum)
    if fastest * h > _MUCH_FASTER * JVP_CHANGE:
        h = min(step_of(fastest, v, JVP_CHANGE), longest_step)
        up = along(rollouts, h, h)
    return h, up


def _longest_rows(share: Share) -> Int[Tensor, " r"]:
    """Which own responses are the longest of the `_LOOKED_UP` prompts of the whole batch that have the longest."""
    lengths = share.rollouts.per_prompt(share.rollouts.gen_lens)
    of_prompts, responses = lengths.max(1)
    prompts = of_prompts.argsort(descending=True, stable=True)[:_LOOKED_UP]
    own = prompts[(prompts >= share.prompts.start) & (prompts < share.prompts.stop)]
    return (own - share.prompts.start) * lengths.shape[1] + responses[own]


def spread_per_token(
    bound: BoundModel,
    float64: BoundModel,
    share: Share,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> float:
    """The standard deviation over prompts of the terms of the slope per token, SE·√B: one forward-mode pass."""
    at_theta, *_ = _ways(bound, float64, share, v, config)
    baseline = chosen(config.first_order.baseline)
    if baseline == "hk_ridge" and scores.features is None:
        baseline = "hk_group"
    c = performance_difference.coefficients(
        scores.rb_entropy, scores.gen_lens, baseline, scores.features, share.among
    )
    nothing = torch.zeros_like(at_theta.d_logp)
    along = at_theta.d_logp, at_theta.d_entropy, nothing, nothing
    first = performance_difference.expansion(*along, c).first
    first = share.whole(first.movedim(0, -1)).movedim(-1, 0)
    of_all = share.scores(scores)
    expansion = performance_difference.Expansion(first, torch.zeros_like(first))
    slope, _ = performance_difference.slopes_per_token(
        expansion, of_all.rb_sum, of_all.gen_lens.double()
    )
    return slope.se * math.sqrt(share.rollouts.num_prompts)


def _longest(float64: BoundModel, v: Mapping[str, Tensor]) -> float:
    """The step that moves the parameters by a ten-thousandth: where log p hardly moves along v, a step that is measured
    by it alone leaves the range in which the curvature is one number."""
    size = norm({name: float64.registry.parameters[name].detach() for name in v})
    return _PARAMETER_CHANGE * size / norm(v) if size > 0 and norm(v) > 0 else math.inf


def _ways(
    bound: BoundModel,
    float64: BoundModel,
    share: Share,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> tuple[Derivatives, tuple[Along, Along], float, tuple[int, ...]]:
    """D_v at θ; how D_v in float64 is found elsewhere, by one process and by all; how far, and at which points.

    In forward mode, unless an operation of the model has none for any process. The grouped product of experts has none;
    the float64 copy, which takes them one by one, then serves at θ too: scores some way apart would lie on either side
    of a router's choices.
    """
    rollouts, world = share.own, share.world
    for model in (bound,) if bound is float64 else (bound, float64):
        try:
            at_theta = directional_derivatives(model, rollouts, v, config, shared=True, world=world)
        except NotImplementedError:
            at_theta = None
        if not world.any(at_theta is None):
            assert at_theta is not None
            ways = _exactly(float64, v, config, ALONE), _exactly(float64, v, config, world)
            return at_theta, ways, JVP_CHANGE, TWO_POINTS
    trial = 1e-7 / max(norm(v), 1.0)
    override = theta_plus_eta_v(float64.registry, v, trial, float64.dtype)
    moved = score(float64, rollouts, config, override)
    still = score(float64, rollouts, config)
    fastest = world.largest(largest(moved.seq_logp - still.seq_logp)) / trial

    def by_difference(rollouts: Rollouts, eta: float, step: float) -> Derivatives:
        return derivatives_by_difference(float64, rollouts, v, config, step, eta)

    at_theta = by_difference(rollouts, 0.0, step_of(fastest, v, SCORE_CHANGE))
    return at_theta, (by_difference, by_difference), SCORE_CHANGE, FIVE_POINTS


@dataclass(frozen=True)
class SlopeSources:
    """−X̄ᵀv₀, and −X̄ᵀD·Y_u weighted by the share that unit u of the U batch has in Ȳ: they add up to −X̄ᵀv."""

    of_v0: float
    by_unit: Float[Tensor, " U"]

    @property
    def spread(self) -> float | None:
        """The standard deviation of the slope over U batches of as many units, from that over the units of this."""
        units = len(self.by_unit)
        return (units * float(self.by_unit.var())) ** 0.5 if units > 1 else None


def gradient_per_token(
    bound: BoundModel, share: Share, scores: Scores, along: Slopes, config: ProbeConfig
) -> Mapping[str, Float[Tensor, " D"]]:
    """X̄ with −X̄ᵀv = `along.per_token.value`: −(1/(N·L)) Σ (∇H_t + (c_t − h·cᴸ_t) ∇log p_t) over all tokens of E.

    c and cᴸ are the baseline's coefficients of entropy and length, h = ΣR/ΣT, L = ΣT/N. One backward pass of the batch,
    which keeps no more than one gradient.
    """
    payload = whole_per_token_payload(share, scores, along.coefficients)
    return unit_gradients(bound, share.in_one_unit, config, payload).mean_x()


def whole_per_token_payload(
    share: Share, scores: Scores, coefficients: Float[Tensor, "2 b G t"]
) -> Payload:
    """That of `gradient_per_token`."""
    of_all = share.scores(scores)
    h, mean_t = of_all.rb_sum.sum() / of_all.gen_lens.sum(), of_all.gen_lens.double().mean()
    of_entropy, of_length = coefficients
    weights = torch.full_like(scores.rb_sum, -1.0 / (share.rollouts.num_responses * float(mean_t)))
    return Payload(weights, of_entropy - h * of_length)


def coefficients_of(share: Share, scores: Scores, config: ProbeConfig) -> Float[Tensor, "2 b G t"]:
    """Those of the baseline in use, of entropy and length, for the share's own prompts."""
    baseline = chosen(config.first_order.baseline)
    tables = scores.rb_entropy, scores.gen_lens
    return performance_difference.coefficients(*tables, baseline, scores.features, share.among)


def slope_sources(
    of_all: Mapping[str, Tensor], u: UnitGradients, direction: UpdateDirection
) -> SlopeSources:
    """Where the slope along v = v₀ + D·Ȳ comes from, with X̄ of the E batch."""
    mean_x = Made(direction.v, lambda name: of_all[name][None])
    v0 = Made(direction.v0, lambda name: direction.v0[name].reshape(1, -1))
    share = u.sizes.double() / u.sizes.sum()
    by_unit = u.of_units(gram(mean_x, u.y, direction.diagonal)[0])
    return SlopeSources(-float(gram(mean_x, v0)), -share * by_unit)


def cross_fitted_slope(units: UnitGradients, direction: UpdateDirection) -> PromptMean:
    """−X̄ᵀv₀ − U_cross[P → D]: the slope along v without the diagonal X_nᵀDY_n that one batch for both sides adds.

    Its per-unit terms are −X_uᵀv₀ − (2r_u − U_cross): their mean is the value, their spread the SE to first order.
    """
    x = {name: units.x[name] for name in direction.v}
    v0 = Made(direction.v0, lambda name: direction.v0[name].reshape(1, -1))
    products = units.products(direction.diagonal, direction.v)
    found = units.gathered(
        {"momentum": gram(x, v0), "products": torch.stack(list(products.values())).sum(0)}
    )
    moments = units.moments(found["products"])
    return PromptMean(-found["momentum"][:, 0] - (2 * moments.row_means - moments.u_cross))


@dataclass(frozen=True)
class Predictors:
    """The slope and the curvature by which ΔH is predicted, per response and per token; which of the two was asked for
    (`true_delta_h.normalize`); and the slope cross-fitted, where one batch serves as both, with the gradients that were
    `crossed` for that per token."""

    of_response: tuple[PromptMean, PromptMean]
    of_tokens: tuple[PromptMean, PromptMean]
    per_token: bool
    cross: PromptMean | None
    crossed: UnitGradients | None = None

    @property
    def asked(self) -> tuple[PromptMean, PromptMean]:
        return self.of_tokens if self.per_token else self.of_response

    @property
    def reach(self) -> float:
        """The largest η at which they are taken for the change."""
        return prediction.reach(*self.asked)


def units_per_token(
    bound: BoundModel, share: Share, scores: Scores, config: ProbeConfig, units: UnitGradients
) -> UnitGradients:
    """The units of the U batch with X of the entropy per token: one more backward pass."""
    payload = per_token_payload(scores).of_prompts(share.prompts)
    return units.with_x_of(unit_gradients(bound, share, config, payload))


def predictors(
    bound: BoundModel,
    share: Share,
    scores: Scores,
    config: ProbeConfig,
    units: UnitGradients,
    direction: UpdateDirection,
    along: Slopes,
    *,
    same_batch: bool,
) -> Predictors:
    """`share`, `scores` (of all responses) and `units` are those of the U batch.

    With one batch the slopes are cross-fitted ones; that per token needs one more backward pass.
    """
    of_response = along.slope, along.curvature
    of_tokens = along.per_token, along.per_token_curvature
    cross = crossed = None
    if same_batch:
        cross = cross_fitted_slope(units, direction)
        crossed = units_per_token(bound, share, scores, config, units)
        of_response = cross, along.curvature
        of_tokens = cross_fitted_slope(crossed, direction), along.per_token_curvature
    per_token = config.true_delta_h.normalize == "per_token"
    return Predictors(of_response, of_tokens, per_token, cross, crossed)


def update_section(
    direction: UpdateDirection,
    along: Slopes,
    predicting: Predictors,
    sources: tuple[SlopeSources, SlopeSources],
    agreement: r.StepAgreement,
    lr: float,
    logged: float | None = None,
) -> r.UpdateSection:
    """v, and the slope and curvature along it, with its sources per response and per token; `logged` is the last norm
    of a gradient that the trainer wrote down."""
    rb, cross, of_tokens = along.slope, predicting.cross, predicting.of_tokens[0]
    estimators = {"naive": along.naive} | {f"rb_{name}": of for name, of in along.rb.items()}
    of_response, of_token = sources
    spreads = [None if of.spread is None else lr * of.spread for of in sources]
    return r.UpdateSection(
        lr=lr,
        norm=direction.norm,
        norm_v0=norm(direction.v0),
        grad_norm=direction.grad_norm,
        clip_factor=direction.clip_factor,
        grad_norm_logged=logged,
        momentum_share=direction.momentum_share,
        delta_h1_per_lr_naive=along.naive.value,
        delta_h1_per_lr_naive_se=along.naive.se,
        delta_h1_per_lr_rb=rb.value,
        delta_h1_per_lr_rb_se=rb.se,
        delta_h1_per_lr_cross=None if cross is None else cross.value,
        delta_h1_per_lr_cross_se=None if cross is None else cross.se,
        delta_h1_per_lr_cross_per_token=None if cross is None else of_tokens.value,
        delta_h1_per_lr_cross_per_token_se=None if cross is None else of_tokens.se,
        estimators={n: r.Estimate(value=of.value, se=of.se) for n, of in estimators.items()},
        slope_of_v0=of_response.of_v0,
        slope_by_unit=of_response.by_unit.tolist(),
        slope_of_v0_per_token=of_token.of_v0,
        slope_by_unit_per_token=of_token.by_unit.tolist(),
        slope_rounding=along.rounding,
        slope_rounding_per_token=along.rounding_per_token,
        num_kinked=along.num_kinked,
        spread_over_batches=spreads[0],
        spread_over_batches_per_token=spreads[1],
        delta_h1_per_lr_per_token=along.per_token.value,
        delta_h1_per_lr_per_token_se=along.per_token.se,
        baseline=along.baseline,
        slope_of_change=float(along.of_change.sum()),
        slope_of_change_size=float(along.of_change.abs().sum()),
        slope_of_change_rounding=along.rounding_of_change,
        slope_of_change_per_token=along.of_change_per_token,
        curvature_of_change=along.curvature_of_change[0],
        curvature_of_change_size=along.curvature_of_change[1],
        curvature=along.curvature.value,
        curvature_se=along.curvature.se,
        curvature_per_token=along.per_token_curvature.value,
        curvature_per_token_se=along.per_token_curvature.se,
        eta_star=prediction.eta_star(*predicting.asked),
        **agreement.model_dump(),
    )
