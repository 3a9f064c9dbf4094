"""The Taylor tests: orders of convergence in η, and the derivative of ΔĤ against differences of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import importance
from entropy_probe.estimators.slope import per_token_slope
from entropy_probe.estimators.taylor import (
    STENCIL,
    SYMMETRIC,
    identity_error,
    loglog_slope,
    longest_run,
    order,
    radius,
    smooth_up_to,
    snis_terms,
    stencil_derivatives,
)
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.report import TaylorTests
from entropy_probe.stages.derivatives import Derivatives, directional_derivatives
from entropy_probe.stages.entropy_change import EntropyChange, change_at
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import (
    Scores,
    rows_spread_over,
    rows_without_graph,
    score,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# η of the Taylor tests: 10^k/max_i|D_vS_i|, where log p of the fastest response moves by 10^k. Below, float64 rounds
# away more than 1e-6 of a change; above, the weights leave 1.
_LOG_CHANGES = torch.arange(-8.5, -0.9, 0.75, dtype=torch.float64)
_LOWEST_THERE = -6.5  # in float32, which knows no smaller change
_OF_LOGITS = torch.arange(
    -8.0, -3.9, 1.0, dtype=torch.float64
)  # the same of the logits, four decades
# The five-point rule errs by (1e-3)⁴ in truncation and by 1e-16·|Ĥ|/1e-3 in rounding.
_STENCIL_CHANGE = 1e-3
# The same with a shorter step, which crosses fewer kinks, and with one as long as the orders' range, which without
# kinks is off by some (2e-2)⁴.
_NEAR_CHANGE, _FAR_CHANGE = 1e-5, 2e-2
_SMOOTH, _FAR_ERROR = 1e-7, 1e-4
_RESPONSES = 4
_FLOOR = 1e3 * sys.float_info.epsilon  # of `_Along.terms`
# Of the same, along the stencil: ΔĤ is rounded by some 1e-15 of it, 1e-7 of terms as small as this.
_ROUNDING = 1e-8
_DECADES = 1.5
_POSITIONS = 8  # of a row, whose logits are compared
_KINDS = ("naive", "rb", "per_token")
_SLOPE_RANGE, _ORDER_RANGE = 0.02, 0.1  # of min(η*, η**)
_TRUSTED = 0.1


@torch.no_grad()
def taylor(
    float64: BoundModel,
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> tuple[TaylorTests, dict[str, Tensor]]:
    """The Taylor tests, and evidence: what they were made of.

    On up to four responses (`scores` are those of all, as measured): the orders, and the identity

        dΔĤ/dη at 0 = Σŵ[(f − Ĥ)·D_vS + D_vf],   f = −S or R,   ŵ = 1/N at top_p = 1

    Both hold for the estimator on any fixed responses, without sampling noise. For the same reason the ranges come from
    this function of η, not from the population's η*. Log-weights are not clipped. Where the model has kinks or jumps
    within the range (ReLU, a router's choice), a difference with a longer step is off, and the orders are `None`; so
    are the errors where the shortest step crosses kinks too. One that no stencil crosses shows in f(η) beside f(−η), of
    which it lies on one side: orders are those of the η below it (`smooth_up_to`).
    """
    config = with_plain_weights(config)
    prompts, each = _some_prompts(rollouts)
    some, scores = rollouts.of_prompts(prompts, each), scores.of_prompts(prompts, each)
    at_theta = score(float64, some, config, {})
    if (
        config.generation.top_p < 1.0
    ):  # as it was measured: in float64 a token may fall out at the edge of the nucleus
        at_theta = at_theta.with_logq_of(scores)
    derivatives, unit = _derivatives_and_unit(_Along(float64, some, v, config, at_theta))
    logit = 1.0 if derivatives is None else float(derivatives.logit.max())
    along = _Along(float64, some, v, config, at_theta, logit)
    etas, h = unit * 10**_LOG_CHANGES, unit * _STENCIL_CHANGE

    stencil = along.stencil(h)
    slope_by_difference, second, third = _by_difference(stencil, "rb", h)
    reach = radius(slope_by_difference, second, third)
    delta_h, opposite = along.delta_h(etas), along.delta_h(-etas)
    floor = _FLOOR * along.terms
    taylor_order, identity = None, _Identity()
    if derivatives is not None:
        identity = _identity(along, derivatives, stencil, unit)
        assert identity.slope is not None
        left, mirrored = delta_h - identity.slope * etas, opposite + identity.slope * etas
        taylor_order = order(etas, left, floor, _ORDER_RANGE * reach, _DECADES, mirrored)
    smooth, delta_h_slope = identity.smooth, None
    if smooth:
        delta_h_slope = order(etas, delta_h, floor, _SLOPE_RANGE * reach, _DECADES, -opposite)
    of_logits = unit * 10**_OF_LOGITS
    moved, asymmetry = _moved_logits(along, rollouts, of_logits)
    logit_slope, logit_monotone = _of_logits(moved, asymmetry, of_logits)
    evidence = _evidence(along, derivatives, stencil, identity)
    evidence |= {"etas": etas, "delta_h": delta_h, "opposite": opposite}
    evidence |= {"logits": moved, "asymmetry": asymmetry, "logit": torch.tensor(along.logit)}
    trusted = torch.ones_like(etas, dtype=torch.bool)
    if bound.dtype is not torch.float64:
        still = score(bound, some, config, {})
        if config.generation.top_p < 1.0:
            still = still.with_logq_of(scores)
        etas = etas[_LOG_CHANGES > _LOWEST_THERE]
        delta_h = delta_h[-len(etas) :]
        there = _Along(bound, some, v, config, still).delta_h(etas)
        # ΔĤ may cross 0, and so few responses may give a slope near 0: a tenth of its terms is as good as any
        first_order = max(abs(slope_by_difference), _TRUSTED * identity.size_of_terms) * etas
        close = (there - delta_h).abs() <= _TRUSTED * torch.maximum(delta_h.abs(), first_order)
        trusted = longest_run(close)
        evidence["delta_h_there"] = there
    resolved = etas[trusted].tolist()
    tests = TaylorTests(
        taylor_eta_min=float(evidence["etas"][0]),
        taylor_eta_max=float(evidence["etas"][-1]),
        logit_slope=logit_slope,
        logit_monotone=logit_monotone,
        delta_h_slope=delta_h_slope,
        taylor_order=taylor_order if smooth else None,
        taylor_slope=identity.slope,
        taylor_radius=reach,
        identity_error_naive=identity.naive,
        identity_error_rb=identity.rb,
        identity_error_per_token=identity.per_token,
        trusted_eta_min=resolved[0] if resolved else None,
        trusted_eta_max=resolved[-1] if resolved else None,
    )
    return tests, evidence


def _derivatives_and_unit(along: _Along) -> tuple[Derivatives | None, float]:
    """D_v, where the model has forward-mode derivatives; and the η at which log p of the fastest response moves by
    about 1."""
    model, v = along.model, along.v
    try:
        derivatives = directional_derivatives(model, along.rollouts, v, along.config)
        fastest = derivatives.fastest
    except NotImplementedError:
        derivatives, fastest = None, along.fastest_by_difference()
    theta = {name: model.registry.parameters[name].detach() for name in v}
    # where v moves no log p at all, up to a change as large as θ
    largest = max(norm(theta), 1.0) / (0.1 * norm(v)) if norm(v) > 0 else 1.0
    return derivatives, min(1 / fastest, largest) if fastest > 0 else largest


def _by_difference(
    stencil: Mapping[int, EntropyChange], which: str, h: float
) -> tuple[float, float, float]:
    """The first three derivatives at 0 of one of the changes, by the five-point rule."""
    return stencil_derivatives({k: getattr(c, which).value for k, c in stencil.items()}, h)


@dataclass(frozen=True)
class _Identity:
    """dΔĤ_RB/dη from a JVP with the size of its terms, the errors of differences against it, and whether no kink lies
    within the range of the orders."""

    slope: float | None = None
    size_of_terms: float = 0.0
    naive: float | None = None
    rb: float | None = None
    per_token: float | None = None
    smooth: bool = True
    near: Mapping[int, EntropyChange] = field(default_factory=dict)
    far: Mapping[int, EntropyChange] = field(default_factory=dict)


def _identity(
    along: _Along, derivatives: Derivatives, stencil: Mapping[int, EntropyChange], unit: float
) -> _Identity:
    scores, weights, d_seq_logp = along.at_theta, along.weights, derivatives.d_seq_logp
    naive_terms = snis_terms(weights, -scores.seq_logp, -d_seq_logp, d_seq_logp)
    rb_terms = snis_terms(weights, scores.rb_sum, derivatives.d_rb_sum, d_seq_logp)
    size, h = float(rb_terms.abs().sum()), unit * _STENCIL_CHANGE

    def errors(at: Mapping[int, EntropyChange], h: float) -> tuple[float | None, float | None]:
        rounding = _ROUNDING * along.terms / h
        naive, rb = (_by_difference(at, which, h)[0] for which in ("naive", "rb"))
        return identity_error(naive, naive_terms, rounding), identity_error(rb, rb_terms, rounding)

    naive, rb = errors(stencil, h)
    worst, smooth = _worst((naive, rb)), True
    at_near: Mapping[int, EntropyChange] = {}
    at_far: Mapping[int, EntropyChange] = {}
    if worst > _SMOOTH:
        at_near = along.stencil(unit * _NEAR_CHANGE)
        near = errors(at_near, unit * _NEAR_CHANGE)
        if _worst(near) < worst / 10:
            # kinks in the shorter step too leave nothing to compare with; a wrong derivative is further off
            naive, rb = (None, None) if _SMOOTH < _worst(near) < _FAR_ERROR else near
            smooth = False
    else:
        at_far = along.stencil(unit * _FAR_CHANGE)
        far = _worst(errors(at_far, unit * _FAR_CHANGE))
        smooth = not (worst <= _SMOOTH and far > _FAR_ERROR)
    per_token = None
    if smooth and rb is not None and along.config.generation.top_p == 1.0:
        found, *_ = _by_difference(stencil, "per_token", h)
        per_token = _per_token_error(found, scores, derivatives, size)
    return _Identity(float(rb_terms.sum()), size, naive, rb, per_token, smooth, at_near, at_far)


def _evidence(
    along: _Along,
    derivatives: Derivatives | None,
    stencil: Mapping[int, EntropyChange],
    identity: _Identity,
) -> dict[str, Tensor]:
    """Scores of the responses at θ, their derivatives, and the changes at the points of every stencil."""
    scores = along.at_theta
    found = {
        "weights": along.weights,
        "seq_logp": scores.seq_logp,
        "rb_sum": scores.rb_sum,
        "gen_lens": scores.gen_lens,
    }
    if derivatives is not None:
        found["d_seq_logp"], found["d_rb_sum"] = derivatives.d_seq_logp, derivatives.d_rb_sum
    for name, at in (("stencil", stencil), ("near", identity.near), ("far", identity.far)):
        if at:
            kinds = ([getattr(at[k], kind).value for k in STENCIL] for kind in _KINDS)
            found[name] = torch.tensor(list(kinds), dtype=torch.float64)
    return found


def _per_token_error(
    by_difference: float, scores: Scores, derivatives: Derivatives, size_of_terms: float
) -> float:
    lengths = scores.gen_lens.double()
    derivative = per_token_slope(
        scores.rb_sum, lengths, derivatives.d_seq_logp, derivatives.d_rb_sum
    ).value
    size = size_of_terms / float(lengths.mean())
    return abs(by_difference - derivative) / size if size > 0 else float("inf")


def _worst(errors: tuple[float | None, float | None]) -> float:
    return max((error for error in errors if error is not None), default=0.0)


def _moved_logits(
    along: _Along, rollouts: Rollouts, etas: Float[Tensor, " K"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """‖Δlogits‖ at every η; and ‖Δlogits(η) + Δlogits(−η)‖, second order where the logits are smooth."""
    most_rows = rows_without_graph(rollouts, along.config.generation)
    return _logit_changes(along.model, rollouts, along.v, etas, most_rows)


def _of_logits(
    moved: Float[Tensor, " k"], asymmetry: Float[Tensor, " k"], etas: Float[Tensor, " K"]
) -> tuple[float | None, bool | None]:
    """The log-log slope of ‖Δlogits‖ against η, and whether it grows with η, below the first jump; `None` where no
    logit moves."""
    if not bool((moved != 0).any()):
        return None, None
    smooth = etas <= smooth_up_to(etas, asymmetry <= SYMMETRIC * moved, _DECADES)
    slope = loglog_slope(etas[smooth], moved[smooth])
    return slope, bool((moved[smooth].diff() > 0).all())


def with_plain_weights(config: ProbeConfig) -> ProbeConfig:
    """ΔH per response with the weights as they are: what is tested is the estimator, not what is done when it fails."""
    plain = {"clip_log_weight": None, "normalize": "per_sequence", "fallback": "none"}
    return config.model_copy(update={"true_delta_h": config.true_delta_h.model_copy(update=plain)})


def _some_prompts(rollouts: Rollouts) -> tuple[Int[Tensor, " b"], int]:
    """Four prompts spread over the batch, and one response of each; of fewer prompts more responses."""
    count = min(rollouts.num_prompts, _RESPONSES)
    each = min(rollouts.num_responses, -(-_RESPONSES // count))
    return torch.linspace(0, rollouts.num_prompts - 1, count).long(), each


@dataclass(frozen=True)
class _Along:
    """The responses, scored by one model anywhere along v."""

    model: BoundModel
    rollouts: Rollouts
    v: Mapping[str, Tensor]
    config: ProbeConfig
    at_theta: Scores
    logit: float = 1.0
    """The largest |z| of the logits behind them."""

    @property
    def weights(self) -> Float[Tensor, "B G"]:
        return importance.snis_weights(self.at_theta.seq_logp - self.at_theta.seq_logq).normalised

    @property
    def entropy(self) -> float:
        """Ĥ_RB at θ."""
        return float((self.weights * self.at_theta.rb_sum).sum())

    @property
    def terms(self) -> float:
        """ΔĤ is rounded by some ten eps of it: Ĥ itself, or what rounding does to the terms of Σŵ[(R − Ĥ)·δS + δR].

        A logit is off by eps·|z|, log p of a token by as much, and H_t by eps + eps·|z|·H_t; N responses of T tokens,
        each on its own, by √(T/N) of it: where a policy is all but certain, that is far more than eps·Ĥ.
        """
        lengths = self.at_theta.gen_lens.double()
        each = math.sqrt(float(lengths.mean()) / lengths.numel())
        return max(self.entropy, each * (1 + self.logit * self.entropy) / 10)

    def scores(self, eta: float) -> Scores:
        override = theta_plus_eta_v(self.model.registry, self.v, eta, self.model.dtype)
        return score(self.model, self.rollouts, self.config, override)

    def change(self, eta: float) -> EntropyChange:
        return change_at(self.at_theta, self.scores(eta), eta, self.config)

    def delta_h(self, etas: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        return torch.tensor(
            [self.change(eta).rb.value for eta in etas.tolist()], dtype=torch.float64
        )

    def stencil(self, h: float) -> dict[int, EntropyChange]:
        """The changes at the points of the five-point rule."""
        return {k: self.change(k * h) for k in STENCIL}

    def fastest_by_difference(self) -> float:
        """max_i|D_vS_i|, roughly."""
        trial = 1e-7 / max(norm(self.v), 1.0)
        return float((self.scores(trial).seq_logp - self.at_theta.seq_logp).abs().max()) / trial


def _logit_changes(
    float64: BoundModel,
    rollouts: Rollouts,
    v: Mapping[str, Tensor],
    etas: Float[Tensor, " K"],
    most_rows: int,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """‖z(η) − z(0)‖ and ‖z(η) + z(−η) − 2z(0)‖ of the logits z at 8 positions of up to 4 rows, for every η."""
    ids = rows_spread_over(rollouts, most_rows).to(float64.device)
    positions = torch.linspace(
        0, ids.shape[1] - 1, min(_POSITIONS, ids.shape[1]), device=float64.device
    ).long()
    row, column = (
        i.flatten()
        for i in torch.meshgrid(torch.arange(len(ids)).to(ids), positions, indexing="ij")
    )

    def logits(eta: float) -> Tensor:
        override = theta_plus_eta_v(float64.registry, v, eta, float64.dtype)
        return float64.read_logits(
            ids, row, column, lambda logits, _: (logits,), override=override
        )[0]

    still, moved, asymmetry = logits(0.0), [], []
    for eta in etas.tolist():
        up, down = logits(eta) - still, logits(-eta) - still
        moved.append(float(up.norm()))
        asymmetry.append(float((up + down).norm()))
    return tuple(torch.tensor(values, dtype=torch.float64) for values in (moved, asymmetry))  # pyright: ignore[reportReturnType]
