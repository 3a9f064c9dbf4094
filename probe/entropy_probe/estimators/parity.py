"""Does the sampler agree with teacher forcing: log-probabilities that an inference engine reported, against log q."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.report import SamplerParitySection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def sampler_parity(
    scored: Float[Tensor, "B G T"], reported: Float[Tensor, "B G T"], inside: Bool[Tensor, "B G T"]
) -> SamplerParitySection:
    """Compare log q by teacher forcing (`scored`) with what the sampler reported, where `inside` is true.

    Δ = reported − scored,   ratio ρ = exp(−Δ) = q/reported
    kl = mean Δ                    (k1 estimate of KL(sampler ‖ q), unbiased, noisy)
    k3 = mean(ρ − 1 + Δ)           (the same, never negative)
    pearson                        of the probabilities exp(scored), exp(reported); `None` if either is constant
    share_outside                  share of tokens with ρ outside [0.9, 1.1]
    """
    q, p = scored[inside].double(), reported[inside].double()
    difference = p - q
    ratio = (-difference).exp()
    a, b = q.exp() - q.exp().mean(), p.exp() - p.exp().mean()
    norms = float(a.norm()), float(b.norm())
    constant = min(norms) <= 1e-12 * math.sqrt(
        q.numel()
    )  # probabilities are of order 1: this is their rounding
    return SamplerParitySection(
        num_tokens=q.numel(),
        mean_abs_difference=float(difference.abs().mean()),
        max_abs_difference=float(difference.abs().max()),
        kl=float(difference.mean()),
        k3=float((torch.expm1(-difference) + difference).mean()),
        pearson=None if constant else float((a * b).sum()) / (norms[0] * norms[1]),
        ratio_min=float(ratio.min()),
        ratio_mean=float(ratio.mean()),
        ratio_max=float(ratio.max()),
        share_outside=float(((ratio < 0.9) | (ratio > 1.1)).double().mean()),
    )
