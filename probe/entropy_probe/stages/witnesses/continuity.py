"""Does everything move with η as it must: not at all at η = 0, logits and ΔĤ in proportion to η in true float64, what
is left of ΔĤ in proportion to η²; and from which η on the configured dtype can be trusted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import importance
from entropy_probe.estimators.slope import per_token_slope
from entropy_probe.estimators.taylor import (
    STENCIL,
    identity_error,
    loglog_slope,
    longest_run,
    order,
    radius,
    snis_terms,
    stencil_derivatives,
)
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.entropy_change import EntropyChange, change_at
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, rows_without_graph, score
from entropy_probe.stages.slopes import directional_derivatives
from entropy_probe.stages.update import norm

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ETA_MAIN = 1e-5
ETA_TINY = 1e-10
_ROWS = 8

# η of the Taylor tests: 10^k/max_i|D_vS_i|, where log p of the fastest response moves by 10^k. Below, float64 rounds
# away more than 1e-6 of a change; above, the weights leave 1.
_LOG_CHANGES = torch.arange(-8.0, -0.9, 0.5, dtype=torch.float64)
_LOGITS_UP_TO = -4.0  # four decades
# The five-point rule errs by (1e-3)⁴ in truncation and by 1e-16·|Ĥ|/1e-3 in rounding.
_STENCIL_CHANGE = 1e-3
# The same with a shorter step, which crosses fewer kinks, and with one as long as the orders' range, which without
# kinks is off by some (3e-2)⁴.
_NEAR_CHANGE, _FAR_CHANGE = 1e-5, 3e-2
_SMOOTH, _FAR_ERROR = 1e-7, 1e-4
_RESPONSES = 16
_FLOOR = 1e3 * sys.float_info.epsilon  # of Ĥ
# Of Ĥ, along the stencil: ΔĤ is rounded by some 1e-15·Ĥ, 1e-7 of terms as small as this.
_ROUNDING = 1e-8
_DECADES = 1.5
_SLOPE_RANGE, _ORDER_RANGE = 0.02, 0.1  # of min(η*, η**)
_TRUSTED = 0.1


@dataclass(frozen=True)
class ZeroCheck:
    """max|direct − functional(η = 0)| over logits in the configured precision, and whether they agree bit for bit."""

    max_abs: float
    bitwise: bool


@dataclass(frozen=True)
class Scaling:
    """(‖Δ(η_tiny)‖/‖Δ(η_main)‖)/(η_tiny/η_main) of parameters and of logits: 1 is perfect, NaN where nothing moved."""

    param_ratio: float
    logit_ratio: float


def _some_rows(rollouts: Rollouts, most: int) -> Tensor:
    """Up to 8 rows spread over the batch, and no more than `most`, cut to the longest of them."""
    rows = torch.linspace(0, len(rollouts.ids) - 1, min(_ROWS, most, len(rollouts.ids))).long()
    longest = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].max())
    return rollouts.ids[rows, :longest]


@torch.no_grad()
def zero_check(bound: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], most_rows: int = _ROWS) -> ZeroCheck:
    """Compare the module called directly with `functional_call` at θ + 0·v, on rows of the batch.

    At every position, or at some spread over the rows where their logits would be too many (`spread_over`).
    """
    ids = _some_rows(rollouts, most_rows).to(bound.device)
    keep = bound.spread_over(*ids.shape)
    direct = bound.direct_logits(ids, keep=keep)
    functional = bound.logits(ids, keep=keep, override=theta_plus_eta_v(bound.registry, v, 0.0, bound.dtype))
    return compared(direct, functional)


def compared(direct: Tensor, functional: Tensor) -> ZeroCheck:
    """Two sets of logits that must be the same."""
    return ZeroCheck(float((direct - functional).abs().max()), bool(torch.equal(direct, functional)))


@torch.no_grad()
def scaling(float64: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], most_rows: int = _ROWS) -> Scaling:
    """Tiny/main ratios at η = 1e-10 and 1e-5, on a float64 copy of the model; positions as in `zero_check`."""
    ids = _some_rows(rollouts, most_rows).to(float64.device)
    keep = float64.spread_over(*ids.shape)
    theta = {name: float64.registry.parameters[name].detach() for name in v}
    logits = float64.logits(ids, keep=keep)
    moved = {}
    for eta in (ETA_MAIN, ETA_TINY):
        override = theta_plus_eta_v(float64.registry, v, eta, torch.float64)
        moved[eta] = (
            norm({name: value - theta[name] for name, value in override.items()}),
            float((float64.logits(ids, keep=keep, override=override) - logits).norm()),
        )
    expected = ETA_TINY / ETA_MAIN
    ratios = (
        tiny / main / expected if main > 0 else float("nan")
        for tiny, main in zip(moved[ETA_TINY], moved[ETA_MAIN], strict=True)
    )
    return Scaling(*ratios)


@dataclass(frozen=True)
class Taylor:
    """Slopes in log-log against η, on a few responses in true float64; η runs from `eta_min` to `eta_max`.

    `logit_slope`      of ‖Δlogits‖ over the four lowest decades, 1; `logit_monotone`: it grows with η there; `None`
                       where no logit moves
    `delta_h_slope`    of |ΔĤ_RB|, 1, over η ≤ 0.02·radius
    `taylor_order`     of |ΔĤ_RB − η·slope|, 2, over η ≤ 0.1·radius
    `slope`            dΔĤ_RB/dη at 0 of this estimator on these responses, from a JVP
    `radius`           min(2|f′|/|f″|, 3|f″|/|f‴|) of f = ΔĤ_RB(η) on these responses
    `identity_error_*` |dΔĤ/dη by five points − from a JVP|/Σ|terms|
    `trusted_eta_min`  from it to `trusted_eta_max`, the longest such stretch, ΔĤ_RB in the configured dtype is within
                       10 % of that in float64; `None`: nowhere

    The two orders are `None` where fewer than 1.5 decades of η are left between rounding, 1e3·eps·Ĥ, and the end of
    their range; the errors where ΔĤ does not move. What comes from a JVP is `None` where an operation of the model has
    no forward-mode derivative.
    """

    eta_min: float
    eta_max: float
    logit_slope: float | None
    logit_monotone: bool | None
    delta_h_slope: float | None
    taylor_order: float | None
    slope: float | None
    radius: float
    identity_error_naive: float | None
    identity_error_rb: float | None
    identity_error_per_token: float | None
    trusted_eta_min: float | None
    trusted_eta_max: float | None


@torch.no_grad()
def taylor(
    float64: BoundModel,
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> Taylor:
    """The Taylor tests on about 16 responses (`scores` are those of all, as measured): the orders, and the identity

        dΔĤ/dη at 0 = Σŵ[(f − Ĥ)·D_vS + D_vf],   f = −S or R,   ŵ = 1/N at top_p = 1

    Both hold for the estimator on any fixed responses, without sampling noise. For the same reason the ranges come from
    this function of η, not from the population's η*. Log-weights are not clipped. Where the model has kinks within the
    range (ReLU, a router's choice), a difference with a longer step is off, and the orders are `None`; so are the
    errors where the shortest step crosses kinks too.
    """
    config = with_plain_weights(config)
    prompts = _some_prompts(rollouts)
    some = rollouts.of_prompts(prompts)
    at_theta = score(float64, some, config, {})
    if config.generation.top_p < 1.0:  # as it was measured: in float64 a token may fall out at the edge of the nucleus
        at_theta = at_theta.with_logq_of(scores, prompts)
    along = _Along(float64, some, v, config, at_theta)
    try:
        derivatives = directional_derivatives(float64, some, v, config)
        fastest = float(derivatives.d_seq_logp.abs().max())
    except NotImplementedError:
        derivatives, fastest = None, along.fastest_by_difference()
    theta = {name: float64.registry.parameters[name].detach() for name in v}
    # where v moves no log p at all, up to a change as large as θ
    largest = max(norm(theta), 1.0) / (0.1 * norm(v)) if norm(v) > 0 else 1.0
    unit = min(1 / fastest, largest) if fastest > 0 else largest
    etas, h = unit * 10**_LOG_CHANGES, unit * _STENCIL_CHANGE

    stencil = {k: along.change(k * h) for k in STENCIL}
    slope_by_difference, second, third = stencil_derivatives({k: c.rb.value for k, c in stencil.items()}, h)
    naive_by_difference, *_ = stencil_derivatives({k: c.naive.value for k, c in stencil.items()}, h)
    reach = radius(slope_by_difference, second, third)
    delta_h = along.delta_h(etas)
    weights = along.weights
    entropy = float((weights * at_theta.rb_sum).sum())
    floor, rounding = _FLOOR * entropy, _ROUNDING * entropy / h
    slope = taylor_order = identity_naive = identity_rb = identity_per_token = None
    smooth, size_of_terms = True, 0.0
    if derivatives is not None:
        d_seq_logp = derivatives.d_seq_logp
        naive_terms = snis_terms(weights, -at_theta.seq_logp, -d_seq_logp, d_seq_logp)
        rb_terms = snis_terms(weights, at_theta.rb_sum, derivatives.d_rb_sum, d_seq_logp)
        slope, size_of_terms = float(rb_terms.sum()), float(rb_terms.abs().sum())
        taylor_order = order(etas, delta_h - slope * etas, floor, _ORDER_RANGE * reach, _DECADES)
        identity_naive = identity_error(naive_by_difference, naive_terms, rounding)
        identity_rb = identity_error(slope_by_difference, rb_terms, rounding)
        errors = (identity_naive, identity_rb)
        near = _identity_errors(along, unit * _NEAR_CHANGE, naive_terms, rb_terms, entropy)
        far = _identity_errors(along, unit * _FAR_CHANGE, naive_terms, rb_terms, entropy)
        if _worst(errors) > _SMOOTH and _worst(near) < _worst(errors) / 10:
            # kinks in the shorter step too leave nothing to compare with; a wrong derivative is further off
            identity_naive, identity_rb = (None, None) if _SMOOTH < _worst(near) < _FAR_ERROR else near
            smooth = False
        elif _worst(errors) <= _SMOOTH and _worst(far) > _FAR_ERROR:
            smooth = False
        if smooth and identity_rb is not None and config.generation.top_p == 1.0:
            by_difference, *_ = stencil_derivatives({k: c.per_token.value for k, c in stencil.items()}, h)
            lengths = at_theta.gen_lens.double()
            expected = per_token_slope(at_theta.rb_sum, lengths, d_seq_logp, derivatives.d_rb_sum).value
            size = float(rb_terms.abs().sum()) / float(lengths.mean())
            identity_per_token = abs(by_difference - expected) / size if size > 0 else float("inf")
    decades, tiny = etas[::2], _LOG_CHANGES[::2] <= _LOGITS_UP_TO
    logits = _logit_changes(float64, rollouts, v, decades, rows_without_graph(rollouts, config.generation))
    moved = bool((logits != 0).any())
    trusted = torch.ones_like(etas, dtype=torch.bool)
    if bound.dtype is not torch.float64:
        there = _Along(bound, some, v, config, scores.of_prompts(prompts)).delta_h(etas)
        # ΔĤ may cross 0, and so few responses may give a slope near 0: a tenth of its terms is as good as any
        first_order = max(abs(slope_by_difference), _TRUSTED * size_of_terms) * etas
        trusted = longest_run((there - delta_h).abs() <= _TRUSTED * torch.maximum(delta_h.abs(), first_order))
    return Taylor(
        eta_min=float(etas[0]),
        eta_max=float(etas[-1]),
        logit_slope=loglog_slope(decades[tiny], logits[tiny]) if moved else None,
        logit_monotone=bool((logits[tiny].diff() > 0).all()) if moved else None,
        delta_h_slope=order(etas, delta_h, floor, _SLOPE_RANGE * reach, _DECADES) if smooth else None,
        taylor_order=taylor_order if smooth else None,
        slope=slope,
        radius=reach,
        identity_error_naive=identity_naive,
        identity_error_rb=identity_rb,
        identity_error_per_token=identity_per_token,
        trusted_eta_min=float(etas[trusted][0]) if bool(trusted.any()) else None,
        trusted_eta_max=float(etas[trusted][-1]) if bool(trusted.any()) else None,
    )


def _identity_errors(
    along: _Along, h: float, naive_terms: Tensor, rb_terms: Tensor, entropy: float
) -> tuple[float | None, float | None]:
    """The errors of the identity, naive and Rao-Blackwell, by a stencil of another step."""
    at = {k: along.change(k * h) for k in STENCIL}
    naive, *_ = stencil_derivatives({k: c.naive.value for k, c in at.items()}, h)
    rb, *_ = stencil_derivatives({k: c.rb.value for k, c in at.items()}, h)
    rounding = _ROUNDING * entropy / h
    return identity_error(naive, naive_terms, rounding), identity_error(rb, rb_terms, rounding)


def _worst(errors: tuple[float | None, float | None]) -> float:
    return max((error for error in errors if error is not None), default=0.0)


def with_plain_weights(config: ProbeConfig) -> ProbeConfig:
    """ΔH per response with the weights as they are: what is tested is the estimator, not what is done when it fails."""
    plain = {"clip_log_weight": None, "normalize": "per_sequence", "fallback": "none"}
    return config.model_copy(update={"true_delta_h": config.true_delta_h.model_copy(update=plain)})


def _some_prompts(rollouts: Rollouts) -> Int[Tensor, " b"]:
    """Prompts spread over the batch: two, or more where they have fewer than 8 responses."""
    count = min(rollouts.num_prompts, max(2, _RESPONSES // rollouts.num_responses))
    return torch.linspace(0, rollouts.num_prompts - 1, count).long()


@dataclass(frozen=True)
class _Along:
    """The responses, scored by one model anywhere along v."""

    model: BoundModel
    rollouts: Rollouts
    v: Mapping[str, Tensor]
    config: ProbeConfig
    at_theta: Scores

    @property
    def weights(self) -> Float[Tensor, "B G"]:
        return importance.snis_weights(self.at_theta.seq_logp - self.at_theta.seq_logq).normalised

    def scores(self, eta: float) -> Scores:
        override = theta_plus_eta_v(self.model.registry, self.v, eta, self.model.dtype)
        return score(self.model, self.rollouts, self.config, override)

    def change(self, eta: float) -> EntropyChange:
        return change_at(self.at_theta, self.scores(eta), eta, self.config)

    def delta_h(self, etas: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        return torch.tensor([self.change(eta).rb.value for eta in etas.tolist()], dtype=torch.float64)

    def fastest_by_difference(self) -> float:
        """max_i|D_vS_i|, roughly."""
        trial = 1e-7 / max(norm(self.v), 1.0)
        return float((self.scores(trial).seq_logp - self.at_theta.seq_logp).abs().max()) / trial


def _logit_changes(
    float64: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], etas: Float[Tensor, " K"], most_rows: int
) -> Float[Tensor, " K"]:
    """‖logits(θ + ηv) − logits(θ)‖ at 8 positions of each of up to 8 rows, for every η."""
    ids = _some_rows(rollouts, most_rows).to(float64.device)
    positions = torch.linspace(0, ids.shape[1] - 1, min(_ROWS, ids.shape[1]), device=float64.device).long()
    row, column = (i.flatten() for i in torch.meshgrid(torch.arange(len(ids)).to(ids), positions, indexing="ij"))

    def logits(eta: float) -> Tensor:
        override = theta_plus_eta_v(float64.registry, v, eta, float64.dtype)
        return float64.read_logits(ids, row, column, lambda logits, _: (logits,), override=override)[0]

    still = logits(0.0)
    return torch.tensor([float((logits(eta) - still).norm()) for eta in etas.tolist()], dtype=torch.float64)
