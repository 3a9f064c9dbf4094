"""Baselines of the Rao-Blackwell entropy gradient: entropies of every step → the coefficients of ∇log p_t.

    ∇H = E[Σ_t ∇H_t + Σ_t c_t ∇log p_t],   c_t = R_{≥t} − b_t,   R_{≥t} = Σ_{k≥t} H_k

b_t may depend on the prefix and on other prompts only: E[b_t ∇log p_t | prefix] is 0 then, and the estimate unbiased.

| baseline | b_t |
|---|---|
| `none` | 0 |
| `hk` | H_t |
| `hk_ema` | H_t + mean of R_{>t} over the responses of the other prompts that have a step t; 0 where none has |
| `hk_ridge` | H_t + β₀ + φ_tᵀβ, fitted to R_{>t} on the other folds of prompts |

The mean leaves out responses that ended before t: the one it is a baseline of did not. With one prompt there are no
others, and `hk_ema` and `hk_ridge` are `hk`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_probe.errors import MeasurementError

Baseline = Literal["none", "hk", "hk_ema", "hk_ridge"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

FOLDS = 5
"""Prompt n is in fold n mod min(FOLDS, B)."""

RIDGE = 1e-2
"""The fit minimises Σ(R_{>t} − β₀ − φ_tᵀβ)² + RIDGE·rows·|β|² over standardised φ: directions in which φ varies by less
than a tenth of a standard deviation are shrunk. Four of the seven φ nearly repeat each other."""

MAX_DEVIATIONS = 10.0
"""Standardised φ are cut to ± this: one huge logit variance bends neither the fit nor what is predicted from it."""


def rb_coefficients(
    entropy: Float[Tensor, "B G T"],
    lengths: Int[Tensor, "B G"],
    baseline: Baseline,
    features: Float[Tensor, "B G T F"] | None = None,
) -> Float[Tensor, "B G T"]:
    """c_t = R_{≥t} − b_t in float64, without gradient, zero past the end of a response, whatever stands there.

    `features` are φ of `token_stats.baseline_features`. Raises `MeasurementError` for `hk_ridge` without them.
    """
    present = torch.arange(entropy.shape[-1], device=lengths.device) < lengths[..., None]
    entropy = entropy.detach().double().masked_fill(~present, 0.0)
    from_here = entropy.flip(-1).cumsum(-1).flip(-1)
    if baseline == "none":
        return from_here
    later = from_here - entropy
    if baseline == "hk":
        return later
    if baseline == "hk_ema":
        return later - _mean_of_others(later, present) * present
    if features is None:
        raise MeasurementError(baseline, "no features were given", "give those of token_stats.baseline_features")
    return later - _ridge_of_others(later, present, features.detach().double())


def _mean_of_others(later: Float[Tensor, "B G T"], present: Bool[Tensor, "B G T"]) -> Float[Tensor, "B 1 T"]:
    others = 1.0 - torch.eye(len(later), dtype=later.dtype, device=later.device)
    return (others @ later.sum(1) / (others @ present.double().sum(1)).clamp(min=1.0))[:, None]


def _ridge_of_others(
    later: Float[Tensor, "B G T"], present: Bool[Tensor, "B G T"], features: Float[Tensor, "B G T F"]
) -> Float[Tensor, "B G T"]:
    phi, target = features[present], later[present]
    folds = min(FOLDS, len(later))
    fold = (torch.arange(len(later), device=later.device) % folds)[:, None, None].expand_as(present)[present]
    predicted = torch.zeros_like(target)
    for k in range(folds):
        own = fold == k
        if not own.all():
            predicted[own] = _ridge(phi[~own], target[~own], phi[own])
    return torch.zeros_like(later).masked_scatter(present, predicted)


def _ridge(
    phi: Float[Tensor, "R F"], target: Float[Tensor, " R"], phi_new: Float[Tensor, "N F"]
) -> Float[Tensor, " N"]:
    """β₀ + φᵀβ at `phi_new`; β₀ is not penalised. A feature that is constant (to rounding) in the fit counts for 0."""
    deviation, mean = torch.std_mean(phi, 0, correction=0)
    scale = deviation.masked_fill(deviation <= 1e-12 * phi.abs().amax(0), float("inf"))
    z, z_new = (((x - mean) / scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS) for x in (phi, phi_new))
    centre, level = z.mean(0), target.mean()
    z = z - centre
    penalty = RIDGE * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    beta = torch.linalg.solve(z.T @ z + penalty, z.T @ (target - level))
    return level + (z_new - centre) @ beta
