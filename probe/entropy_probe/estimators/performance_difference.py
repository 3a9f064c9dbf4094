"""The realised change of the entropy by the performance-difference identity: exact for every step, token by token.

    H(θ⁺) − H(θ) = E_θ[Σ_t w_{<t}·(H_t⁺ − H_t) + Σ_t w_{<t}·(ρ_t − 1)·c_t],   ρ_t = p_t⁺/p_t,   w_{<t} = Π_{k<t} ρ_k

with c_t = R_{≥t} − b_t of `baselines.rb_coefficients` at θ. It weights by the prefix alone, and what comes later enters
with a baseline: at η = 0 every response gives exactly 0, and the derivative there is the Rao-Blackwell slope with the
same baseline, term by term. So what is realised minus what slope and curvature predict has no noise of first or second
order. The same with 1 in place of H_t gives the change ΔL of the mean length, and both together the entropy per token:

    ΔM, ΔL the means over responses,   h = ΣR/ΣT,  L = mean T:   Δh = (ΔM − h·ΔL)/(L + ΔL)

All tensors are float64, zero past the end of a response; the leading axis of 2 is (entropy, length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.baselines import Among, Baseline, rb_coefficients
from entropy_probe.estimators.importance import Change, cluster_se
from entropy_probe.estimators.slope import PromptMean

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def coefficients(
    entropy: Float[Tensor, "B G T"],
    lengths: Int[Tensor, "B G"],
    baseline: Baseline,
    features: Float[Tensor, "B G T F"] | None = None,
    among: Among | None = None,
) -> Float[Tensor, "2 B G T"]:
    """c_t of the entropy, and of the length: the same with every H_t = 1."""
    of = (entropy, torch.ones_like(entropy))
    return torch.stack([rb_coefficients(each, lengths, baseline, features, among) for each in of])


def change_terms(
    logp: Float[Tensor, "B G T"],
    entropy: Float[Tensor, "B G T"],
    logp_after: Float[Tensor, "B G T"],
    entropy_after: Float[Tensor, "B G T"],
    c: Float[Tensor, "2 B G T"],
) -> Float[Tensor, "2 B G"]:
    """What every response says of ΔH and of ΔL: Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], and the last alone."""
    moved = logp_after.double() - logp.double()
    before = (moved.cumsum(-1) - moved).exp()
    by_tokens = (before * torch.expm1(moved) * c).sum(-1)
    of_entropy = (before * (entropy_after.double() - entropy.double())).sum(-1)
    return by_tokens + torch.stack([of_entropy, torch.zeros_like(of_entropy)])


@dataclass(frozen=True)
class Expansion:
    """First and second derivative of `change_terms` along η at 0, [2, B, G] each."""

    first: Float[Tensor, "2 B G"]
    second: Float[Tensor, "2 B G"]


def expansion(
    d_logp: Float[Tensor, "B G T"],
    d_entropy: Float[Tensor, "B G T"],
    d2_logp: Float[Tensor, "B G T"],
    d2_entropy: Float[Tensor, "B G T"],
    c: Float[Tensor, "2 B G T"],
) -> Expansion:
    """With d = D_v log p_t and s = Σ_{k<t} D_v log p_k:

    first    Σ_t D_vH_t + c_t·d
    second   Σ_t D²_vH_t + 2s·D_vH_t + c_t·(D²_v log p_t + d² + 2s·d)
    """
    before = d_logp.cumsum(-1) - d_logp
    first = (c * d_logp).sum(-1)
    second = (c * (d2_logp + d_logp.square() + 2 * before * d_logp)).sum(-1)
    first[0] += d_entropy.sum(-1)
    second[0] += (d2_entropy + 2 * before * d_entropy).sum(-1)
    return Expansion(first, second)


def change_per_response(terms: Float[Tensor, "2 B G"], rb_sum: Float[Tensor, "B G"]) -> Change:
    """ΔH: the mean, whose influence is what is left of each term."""
    value = terms[0].mean()
    influence = terms[0] - value
    return Change(float(rb_sum.mean()), float(value), cluster_se(influence), influence)


def change_per_token(
    terms: Float[Tensor, "2 B G"], rb_sum: Float[Tensor, "B G"], lengths: Float[Tensor, "B G"]
) -> Change:
    """Δh = (ΔM − h·ΔL)/(L + ΔL). With D and E the terms of entropy and length, the influence of a response is

    φ = [D − hE − Δh·(T + E) − ΔL·(R − hT)/L]/(L + ΔL), less its mean
    """
    h, mean_t = rb_sum.sum() / lengths.sum(), lengths.mean()
    longer = terms[1].mean()
    excess = terms[0] - h * terms[1]
    value = excess.mean() / (mean_t + longer)
    influence = excess - value * (lengths + terms[1]) - longer * (rb_sum - h * lengths) / mean_t
    influence = (influence - influence.mean()) / (mean_t + longer)
    return Change(float(h), float(value), cluster_se(influence), influence)


def slopes_per_response(of: Expansion) -> tuple[PromptMean, PromptMean]:
    """∇Hᵀv and vᵀ∇²Hv."""
    return PromptMean(of.first[0].mean(1)), PromptMean(of.second[0].mean(1))


def slopes_per_token(
    of: Expansion, rb_sum: Float[Tensor, "B G"], lengths: Float[Tensor, "B G"]
) -> tuple[PromptMean, PromptMean]:
    """First and second derivative of Δh at 0, each with that of its influence:

        h′ = (M′ − hL′)/L,   h″ = (M″ − hL″ − 2h′L′)/L

    The terms of the prompts are the value plus their influence.
    """
    h, mean_t = rb_sum.sum() / lengths.sum(), lengths.mean()
    (_, longer), (_, longer2) = (terms.mean((1, 2)) for terms in (of.first, of.second))
    excess, excess2 = (terms[0] - h * terms[1] for terms in (of.first, of.second))
    first = excess.mean() / mean_t
    second = (excess2.mean() - 2 * first * longer) / mean_t
    of_h = (rb_sum - h * lengths) / mean_t
    first_influence = excess - first * lengths - longer * of_h
    second_influence = excess2 - second * lengths - 2 * first * of.first[1] - longer2 * of_h
    second_influence = second_influence - 2 * longer * first_influence / mean_t

    def mean(value: Tensor, influence: Tensor) -> PromptMean:
        return PromptMean(value + (influence - influence.mean()).mean(1) / mean_t)

    return mean(first, first_influence), mean(second, second_influence)
