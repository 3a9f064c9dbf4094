"""The realised entropy change ΔH(η) on the same responses, and what slope and curvature predict for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import importance
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, score


@dataclass(frozen=True)
class EntropyChange:
    """ΔĤ(η) by self-normalised importance sampling, naive and Rao-Blackwell, with the diagnostics of its weights."""

    eta: float
    naive: importance.Change
    rb: importance.Change
    ess: float
    ess_fraction: float
    pareto_k: float | None
    clip_fraction: float
    restricted: bool


def grid(config: ProbeConfig, lr: float) -> list[float]:
    """The configured η, or `auto`: 0 and ±lr/100, ±lr/10, ±lr. η = 0 and lr are always in it."""
    etas = config.true_delta_h.etas
    chosen = [0.0, lr, *(etas if etas != "auto" else (s * lr / k for k in (1, 10, 100) for s in (-1, 1)))]
    return sorted(set(chosen))


def change_at(scores: Scores, scores_after: Scores, eta: float, config: ProbeConfig) -> EntropyChange:
    """log w = S(θ⁺) − log q, then ΔĤ of −S and of R."""
    log_weights = scores_after.seq_logp - scores.seq_logq
    weights = importance.snis_weights(log_weights, config.true_delta_h.clip_log_weight)
    weights_before = importance.snis_weights(scores.seq_logp - scores.seq_logq).normalised
    return EntropyChange(
        eta=eta,
        naive=importance.entropy_change(-scores.seq_logp, -scores_after.seq_logp, weights_before, weights.normalised),
        rb=importance.entropy_change(scores.rb_sum, scores_after.rb_sum, weights_before, weights.normalised),
        ess=weights.ess,
        ess_fraction=weights.ess / log_weights.numel(),
        pareto_k=importance.pareto_k(log_weights, weights.ess),
        clip_fraction=weights.clip_fraction,
        restricted=config.generation.top_p < 1.0,
    )


def sweep(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    etas: Sequence[float],
    config: ProbeConfig,
    progress: Progress | None = None,
) -> list[EntropyChange]:
    """ΔĤ at θ + ηv for every η: one scoring pass each, with only the parameters in v replaced, one copy at a time."""
    changes = []
    for done, eta in enumerate(etas, start=1):
        override = theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
        changes.append(change_at(scores, score(bound, rollouts, config, override), eta, config))
        if progress is not None:
            progress("entropy change", done, len(etas))
    return changes


def predicted(eta: float, slope: PromptMean, curvature: PromptMean) -> tuple[float, float]:
    """(η·∇Hᵀv + ½η²·vᵀ∇²Hv, its SE). Per-prompt terms are added first, so that the SE knows that both share prompts;
    where the slope has one term per block of prompts, the two variances are added."""
    value = eta * slope.value + 0.5 * eta**2 * curvature.value
    if len(slope.per_prompt) != len(curvature.per_prompt):
        return value, math.hypot(eta * slope.se, 0.5 * eta**2 * curvature.se)
    return value, PromptMean(eta * slope.per_prompt + 0.5 * eta**2 * curvature.per_prompt).se


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
    entropy = float(scores.rb_sum.mean())
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
