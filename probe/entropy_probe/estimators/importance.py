"""Self-normalised importance sampling of an entropy at θ⁺ on responses that were sampled at θ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Weights:
    """Normalised weights ŵ [B, G] that sum to 1, ESS = (Σw)²/Σw², and the share of log-weights that were clipped."""

    normalised: Float[Tensor, "B G"]
    ess: float
    clip_fraction: float


def snis_weights(log_weights: Float[Tensor, "B G"], clip: float | None = None) -> Weights:
    """ŵ = w/Σw with log w = S(θ⁺) − log q, clipped to [−c, c] only if `clip` is given.

    ESS and ŵ do not change when a constant is added to all log-weights. Equal log-weights give ŵ = 1/N and ESS = N.
    """
    clipped = log_weights if clip is None else log_weights.clamp(-clip, clip)
    w = (clipped - clipped.max()).exp()
    total = w.sum()
    return Weights(
        normalised=w / total,
        ess=float(total.square() / w.square().sum()),
        clip_fraction=float((clipped != log_weights).double().mean()),
    )


@dataclass(frozen=True)
class Change:
    """ΔĤ = Ĥ(θ⁺) − Ĥ(θ), with Ĥ(θ) `before`; its standard error, and the influence φ of every response on it [B, G]."""

    before: float
    value: float
    se: float
    influence: Float[Tensor, "B G"]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """ΔĤ ± t_{B−1}·SE."""
        half = float(stdtrit(len(self.influence) - 1, 0.5 + level / 2)) * self.se
        return self.value - half, self.value + half


def cluster_se(influence: Float[Tensor, "B G"]) -> float:
    """√(B/(B−1)·Σ_prompts(Σ_g φ)²)/N: responses of one prompt are not independent. Intervals use t_{B−1}."""
    size_b = influence.shape[0]
    return (
        math.sqrt(size_b / (size_b - 1) * float(influence.sum(1).square().sum()))
        / influence.numel()
    )


def entropy_change(
    before: Float[Tensor, "B G"],
    after: Float[Tensor, "B G"],
    weights_before: Float[Tensor, "B G"],
    weights_after: Float[Tensor, "B G"],
    units: Float[Tensor, "B G"] | tuple[Tensor, Tensor] | None = None,
) -> Change:
    """ΔĤ of a payload f per response (−S for the naive estimate, R for Rao-Blackwell), in nats.

        Ĥ⁺ = Σŵ⁺f⁺ / Σŵ⁺T,   Ĥ = Σŵf / Σŵ T,   φ = N·[ŵ⁺(f⁺ − Ĥ⁺T)/Σŵ⁺T − ŵ(f − ĤT)/Σŵ T]

    `units` T are what the entropy is of: the lengths give it per token (those at θ and at θ⁺, where the responses are
    not the same); without them T = 1, per response. ŵ are the weights at θ: 1/N each at top_p = 1, where responses come
    from π itself. At top_p < 1 they are π/q within the nucleus, so that both terms are of the same restricted policy.
    Equal arguments give exactly 0.
    """
    units_before, units_after = units if isinstance(units, tuple) else (units, units)
    mean_after, of_after = _mean_and_influence(weights_after, after, units_after)
    mean_before, of_before = _mean_and_influence(weights_before, before, units_before)
    influence = of_after - of_before
    return Change(
        float(mean_before), float(mean_after - mean_before), cluster_se(influence), influence
    )


def _mean_and_influence(
    weights: Tensor, payload: Tensor, units: Tensor | None
) -> tuple[Tensor, Tensor]:
    if units is None:
        mean = (weights * payload).sum()
        return mean, weights.numel() * weights * (payload - mean)
    total = (weights * units).sum()
    mean = (weights * payload).sum() / total
    return mean, weights.numel() * weights * (payload - mean * units) / total


def mean_and_se(values: Float[Tensor, "B G"]) -> tuple[float, float]:
    """Mean over all responses, and sd of the prompt means/√B."""
    prompt_means = values.double().mean(1)
    return float(prompt_means.mean()), float(prompt_means.std()) / math.sqrt(len(prompt_means))


def ratio_and_se(values: Float[Tensor, "B G"], units: Int[Tensor, "B G"]) -> tuple[float, float]:
    """Σf/ΣT and its cluster-robust standard error."""
    ratio = values.double().sum() / units.sum()
    return float(ratio), cluster_se((values - ratio * units) / units.double().mean())


def ratio_by_prompt(values: Float[Tensor, "B G"], units: Int[Tensor, "B G"]) -> Float[Tensor, " B"]:
    """What each prompt says of Σf/ΣT: the ratio plus its influence. The mean is the ratio, and sd/√B its SE."""
    ratio = values.double().sum() / units.sum()
    return ratio + ((values - ratio * units) / units.double().mean()).mean(1)


def surprise(
    seq_logq: Float[Tensor, "B G"],
    rb_sum_q: Float[Tensor, "B G"],
    logit_var: Float[Tensor, "B G T"],
    temperature: float,
) -> tuple[float, float]:
    """Mean over responses of Σ_t(−log q_t − H(q_t)), and its standard error under q.

    A martingale: under q the terms of all tokens have mean 0 and are uncorrelated, and their variances are known,
    Var_q(log q) = Var_q(z)/temperature². `logit_var` is Var_q(z), zero past the end of a response.
    """
    error = math.sqrt(float(logit_var.sum()) / temperature**2) / seq_logq.numel()
    return float((-seq_logq - rb_sum_q).mean()), error


def pareto_k(log_weights: Float[Tensor, "B G"], ess: float) -> float | None:
    """k̂ of the generalised Pareto tail (arviz-stats); `None` where N < 64 or ESS/N ≥ 0.95, where it means nothing, and
    where the largest weights are equal, so that there is no tail to fit."""
    size = log_weights.numel()
    return None if size < 64 or ess / size >= 0.95 else _psis(log_weights)[1]


def smoothed(log_weights: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """log w with its largest values replaced by the quantiles of the fitted Pareto tail (PSIS, Vehtari et al. 2024);
    up to a constant."""
    return _psis(log_weights)[0]


def _psis(log_weights: Tensor) -> tuple[Tensor, float | None]:
    """Smoothed log-weights and k̂; as they are and `None` where no tail can be fitted."""
    from arviz_stats.base.array import array_stats

    # psislw takes log-likelihoods, whose negatives are the log-weights; it divides by zero where the tail has ties
    with np.errstate(all="ignore"):
        smoothed, k = array_stats.psislw(-log_weights.double().flatten().cpu().numpy())
    if not np.isfinite(smoothed).all():
        return log_weights, None
    return torch.from_numpy(smoothed).reshape(log_weights.shape), float(k) if np.isfinite(
        k
    ) else None
