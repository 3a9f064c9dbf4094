"""The realised entropy change ΔH(η) on the same responses, and what slope and curvature predict for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import importance
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, score

_POINTS_PER_DECADE, _POINTS = 2, 5
_FIRST_ORDER = 0.99


@dataclass(frozen=True)
class EntropyChange:
    """ΔĤ(η) by self-normalised importance sampling, naive and Rao-Blackwell, with the diagnostics of its weights.

    `naive` and `rb` are per response or per token, as `true_delta_h.normalize` says; `per_token` is Rao-Blackwell.
    `method` is `snis`, or the fallback that was taken: `psis` (smoothed weights) or `resample` (fresh responses).
    """

    eta: float
    naive: importance.Change
    rb: importance.Change
    per_token: importance.Change
    ess: float
    ess_fraction: float
    pareto_k: float | None
    clip_fraction: float
    log_weights: tuple[float, float, float]
    method: str
    restricted: bool


def grid(config: ProbeConfig, lr: float, d_seq_logp: Tensor | None = None) -> list[float]:
    """The configured η, or `auto`: ± two a decade down from the smaller of lr and the η at which ESS/N is expected to
    fall to `min_ess_fraction`. η = 0 and lr are always in it.

        ESS/N ≈ exp(−η²·Var D_vS)       (log-weights are normal and small: their variance is η²·Var D_vS)
    """
    etas = config.true_delta_h.etas
    if etas != "auto":
        return sorted({0.0, lr, *etas})
    end = lr
    if d_seq_logp is not None and float(d_seq_logp.var()) > 0:
        end = min(lr, math.sqrt(-math.log(config.true_delta_h.min_ess_fraction) / float(d_seq_logp.var())) or lr)
    steps = (end * 10 ** (-k / _POINTS_PER_DECADE) for k in range(_POINTS))
    return sorted({0.0, lr, *(sign * step for step in steps for sign in (-1.0, 1.0))})


def change_at(scores: Scores, scores_after: Scores, eta: float, config: ProbeConfig) -> EntropyChange:
    """log w = S(θ⁺) − log q, then ΔĤ of −S and of R; with smoothed weights where `fallback: psis` applies."""
    log_weights = scores_after.seq_logp - scores.seq_logq
    weights = importance.snis_weights(log_weights, config.true_delta_h.clip_log_weight)
    pareto_k, method = importance.pareto_k(log_weights, weights.ess), "snis"
    normalised = weights.normalised
    ess_fraction = weights.ess / log_weights.numel()
    wanted = config.true_delta_h.fallback == "psis" and eta != 0 and pareto_k is not None  # there is a tail to smooth
    if wanted and out_of_bounds(ess_fraction, pareto_k, config):
        normalised, method = importance.snis_weights(importance.smoothed(log_weights)).normalised, "psis"
    clip = config.true_delta_h.clip_log_weight
    weights_before = importance.snis_weights(scores.seq_logp - scores.seq_logq, clip).normalised
    lengths = scores.gen_lens.double()
    units = lengths if config.true_delta_h.normalize == "per_token" else None
    change = partial(importance.entropy_change, weights_before=weights_before, weights_after=normalised)
    return EntropyChange(
        eta=eta,
        naive=change(-scores.seq_logp, -scores_after.seq_logp, units=units),
        rb=change(scores.rb_sum, scores_after.rb_sum, units=units),
        per_token=change(scores.rb_sum, scores_after.rb_sum, units=lengths),
        ess=weights.ess,
        ess_fraction=ess_fraction,
        pareto_k=pareto_k,
        clip_fraction=weights.clip_fraction,
        log_weights=(float(log_weights.min()), float(log_weights.median()), float(log_weights.max())),
        method=method,
        restricted=config.generation.top_p < 1.0,
    )


def out_of_bounds(ess_fraction: float, pareto_k: float | None, config: ProbeConfig) -> bool:
    """Whether the weights are not to be believed: too few responses carry them, or their tail is too heavy."""
    limits = config.true_delta_h
    return ess_fraction < limits.min_ess_fraction or (pareto_k is not None and pareto_k > limits.max_pareto_k)


def sweep(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    etas: Sequence[float],
    config: ProbeConfig,
    progress: Progress | None = None,
    resample: Callable[[Mapping[str, Tensor]], Rollouts] | None = None,
) -> list[EntropyChange]:
    """ΔĤ at θ + ηv for every η: one scoring pass each, with only the parameters in v replaced, one copy at a time.

    Where the weights are out of bounds and the fallback is `resample`, fresh responses of the same prompts are drawn
    at θ + ηv by `resample` and scored there.
    """
    changes = []
    for done, eta in enumerate(etas, start=1):
        override = theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
        change = change_at(scores, score(bound, rollouts, config, override), eta, config)
        # below top_p = 1 fresh responses would measure another entropy than the weighted ones do
        wanted = config.true_delta_h.fallback == "resample" and not change.restricted and eta != 0
        if resample is not None and wanted and out_of_bounds(change.ess_fraction, change.pareto_k, config):
            change = _resampled(change, scores, score(bound, resample(override), config, override), config)
        changes.append(change)
        del override
        if progress is not None:
            progress("entropy change", done, len(etas))
    return changes


def _resampled(change: EntropyChange, scores: Scores, fresh: Scores, config: ProbeConfig) -> EntropyChange:
    """Mean over fresh responses at θ⁺ minus mean over those at θ, of the same prompts: no importance weights."""
    even = torch.full_like(scores.seq_logp, 1.0 / scores.seq_logp.numel())
    before, after = (s.gen_lens.double() for s in (scores, fresh))

    def difference(at_theta: Tensor, at_step: Tensor, *, per_token: bool) -> importance.Change:
        units = (before, after) if per_token else None
        return importance.entropy_change(at_theta, at_step, even, even, units)

    per_token = config.true_delta_h.normalize == "per_token"
    return replace(
        change,
        naive=difference(-scores.seq_logp, -fresh.seq_logp, per_token=per_token),
        rb=difference(scores.rb_sum, fresh.rb_sum, per_token=per_token),
        per_token=difference(scores.rb_sum, fresh.rb_sum, per_token=True),
        method="resample",
    )


@dataclass(frozen=True)
class Prediction:
    """What slope and curvature say for one η, realised minus predicted with the SE of that difference (both are
    measured on the same prompts), and whether η is where it means something."""

    value: float
    se: float
    difference: float
    difference_se: float
    in_range: bool


def predict(change: EntropyChange, slope: PromptMean, curvature: PromptMean | None, config: ProbeConfig) -> Prediction:
    """η·∇Hᵀv + ½η²·vᵀ∇²Hv beside the realised Rao-Blackwell change; without curvature, η·∇Hᵀv.

    Terms of a prompt are added before the spread over prompts is taken, so that the SE knows what they share; where the
    slope has one term per block of prompts, variances are added. In range: the weights are within bounds, and
    |η| ≤ η*/10, so that what lies beyond second order is a small part of what is predicted; without curvature, ESS/N is
    at least 0.99, so that first order is nearly all there is.
    """
    eta, size_b = change.eta, len(change.rb.influence)
    terms = [eta * slope.per_prompt] + ([] if curvature is None else [0.5 * eta**2 * curvature.per_prompt])
    realised = PromptMean(change.rb.influence.mean(1))
    value = sum(float(term.mean()) for term in terms)
    if all(len(term) == size_b for term in terms):
        predicted = PromptMean(torch.stack(terms).sum(0))
        se, difference_se = predicted.se, PromptMean(realised.per_prompt - predicted.per_prompt).se
    else:
        se = math.hypot(*(PromptMean(term).se for term in terms))
        difference_se = math.hypot(se, change.rb.se)
    in_range = change.method == "resample" or not out_of_bounds(change.ess_fraction, change.pareto_k, config)
    if curvature is None:
        in_range = in_range and change.ess_fraction >= _FIRST_ORDER
    elif (end := eta_star(slope, curvature)) is not None:
        in_range = in_range and abs(eta) <= end / 10
    return Prediction(value, se, change.rb.value - value, difference_se, in_range)


def eta_star(slope: PromptMean, curvature: PromptMean) -> float | None:
    """2|∇Hᵀv|/|vᵀ∇²Hv|, where first order ends; `None` where |curvature| < 2 SE."""
    decided = curvature.value != 0.0 and abs(curvature.value) >= 2 * curvature.se
    return 2 * abs(slope.value) / abs(curvature.value) if decided else None


def entropy_change_two_batch_vector(
    bound: BoundModel,
    rollouts: Rollouts,
    *,
    update_vector_named: Mapping[str, Tensor],
    etas: Sequence[float],
    config: ProbeConfig | None = None,
) -> dict[str, Any]:
    """The notes' verb: `{H_orig, H_upd_list, etas, deltaH_true_list, snis_diagnostics}` (Rao-Blackwell, nats).

    No optimizer step: θ + ηv by functional override on the E batch, with v from the U batch.
    """
    config = config or ProbeConfig()
    scores = score(bound, rollouts, config)
    changes = sweep(bound, rollouts, scores, update_vector_named, etas, config)
    per_token = config.true_delta_h.normalize == "per_token"
    entropy = float(scores.rb_sum.sum() / (scores.gen_lens.sum() if per_token else scores.gen_lens.numel()))
    return {
        "H_orig": entropy,
        "H_upd_list": [entropy + change.rb.value for change in changes],
        "etas": list(etas),
        "deltaH_true_list": [change.rb.value for change in changes],
        "snis_diagnostics": [
            {"ESS": c.ess, "ess_fraction": c.ess_fraction, "pareto_k": c.pareto_k, "clip_fraction": c.clip_fraction}
            for c in changes
        ],
    }
