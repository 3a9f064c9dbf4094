"""Slope and curvature of the entropy along a direction v, from derivatives of log p and H_t at every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from entropy_probe.estimators.advantages import leave_one_out_mean

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class PromptMean:
    """A mean over prompts: its per-prompt terms [B]; SE = sd/√B."""

    per_prompt: Float[Tensor, " B"]

    @property
    def value(self) -> float:
        return float(self.per_prompt.mean())

    @property
    def se(self) -> float:
        return float(self.per_prompt.std()) / math.sqrt(len(self.per_prompt))


def naive_slope(seq_logp: Float[Tensor, "B G"], d_seq_logp: Float[Tensor, "B G"]) -> PromptMean:
    """∇Hᵀv = −mean_{n,g}(S_ng − S̄_{n,−g})·D_vS_ng."""
    return PromptMean(-((seq_logp - leave_one_out_mean(seq_logp)) * d_seq_logp).mean(1))


def rb_slope(
    coefficients: Float[Tensor, "B G T"],
    d_logp: Float[Tensor, "B G T"],
    d_entropy: Float[Tensor, "B G T"],
) -> PromptMean:
    """∇Hᵀv = mean_i[Σ_t D_vH_t + Σ_t c_t·D_v log p_t], c_t = R_{≥t} − b_t of `baselines.rb_coefficients`.

    Entries past the end of a response are zero in all three.
    """
    return PromptMean((d_entropy + coefficients * d_logp).sum(-1).mean(1))


def per_token_slope(
    rb_sum: Float[Tensor, "B G"],
    lengths: Float[Tensor, "B G"],
    d_seq_logp: Float[Tensor, "B G"],
    d_rb_sum: Float[Tensor, "B G"],
) -> PromptMean:
    """Derivative at 0 of ΔĤ per token by normalised weights, (1/ΣT)·[Σ_i (R_i − h̄T_i)·D_vS_i + Σ_i D_vR_i], h̄ = ΣR/ΣT.

    The terms of the prompts are the value plus their influence on it, which knows that h̄ and ΣT are estimates too:

        φ_i = N·[(R_i − h̄T_i)·(D_vS_i − ΣT·D_vS/ΣT) + D_vR_i − value·T_i]/ΣT
    """
    total, excess = lengths.sum(), rb_sum - rb_sum.sum() / lengths.sum() * lengths
    value = (excess * d_seq_logp + d_rb_sum).sum() / total
    centered = d_seq_logp - (lengths * d_seq_logp).sum() / total
    influence = lengths.numel() * (excess * centered + d_rb_sum - value * lengths) / total
    return PromptMean(value + influence.mean(1))


def curvature_of_change(
    rb_sum: Float[Tensor, "B G"],
    d_seq_logp: Float[Tensor, "B G"],
    d_rb_sum: Float[Tensor, "B G"],
    d2_seq_logp: Float[Tensor, "B G"],
    d2_rb_sum: Float[Tensor, "B G"],
) -> tuple[float, float]:
    """(second derivative at 0 of ΔĤ(η) = Σŵ⁺R⁺ on these responses, the size of its terms):

        f″ = mean[D²_vR + 2·D_vR·D_vS + (R − R̄)·W] − 2·mean(D_vS)·mean[D_vR + (R − R̄)·D_vS],   W = D²_vS + (D_vS)²

    The last term is there because the sum of the weights, by which ΔĤ divides, moves with η by mean(D_vS).
    """
    second, centered = d2_seq_logp + d_seq_logp.square(), rb_sum - rb_sum.mean()
    terms = d2_rb_sum + 2 * d_rb_sum * d_seq_logp + centered * second
    by_weights = 2 * d_seq_logp.mean() * (d_rb_sum + centered * d_seq_logp).mean()
    size = (d2_rb_sum.abs() + 2 * (d_rb_sum * d_seq_logp).abs() + (centered * second).abs()).mean()
    return float(terms.mean() - by_weights), float(size)
