"""Baselines of the Rao-Blackwell entropy gradient: entropies of every step → the coefficients of ∇log p_t.

    ∇H = E[Σ_t ∇H_t + Σ_t c_t ∇log p_t],   c_t = R_{≥t} − b_t,   R_{≥t} = Σ_{k≥t} H_k

b_t may depend on the prefix and on other prompts only: E[b_t ∇log p_t | prefix] is 0 then, and the estimate unbiased.

| baseline | b_t |
|---|---|
| `none` | 0 |
| `hk` | H_t |
| `hk_ema` | H_t + mean of R_{>t} over the responses of the other prompts that have a step t; 0 where none has |
| `hk_ridge` | H_t + β₀ + φ_tᵀβ, fitted to R_{>t} on the other folds of prompts |
| `hk_group` | H_t + mean of R_{>t} over the own prompt's other responses that have a step t, drawn towards `hk_ema`'s |

Means leave out responses that ended before t: the one they are a baseline of did not. With one prompt there are no
others: `hk_ema` and `hk_ridge` are `hk`, and `hk_group` shrinks nothing.

`hk_group` shrinks as a random-effects model does, n·τ²/(n·τ² + σ²) of the way to the mean of n own responses, with the
variance σ² of R_{>t} within prompts and τ² between them, over all steps of the other prompts (DerSimonian and Laird's
estimate by moments; τ² = 0 where it would be negative).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from entropy_probe.errors import MeasurementError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Baseline = Literal["none", "hk", "hk_ema", "hk_ridge", "hk_group"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


def chosen(baseline: Baseline | Literal["auto"]) -> Baseline:
    """The baseline that `auto` stands for: of those here the one with the least noise on most policies that were tried
    (docs/derivations.md). The choice looks at nothing that is measured."""
    return "hk_group" if baseline == "auto" else baseline


NOTICED = 1e-6
"""Of R_{>t}, that is: prompts that differ by less, as scores of one text may in float32, differ by nothing."""

FOLDS = 5
"""Prompt n is in fold n mod min(FOLDS, B)."""

RIDGE = 1e-2
"""The fit minimises Σ(R_{>t} − β₀ − φ_tᵀβ)² + RIDGE·rows·|β|² over standardised φ: directions in which φ varies by less
than a tenth of a standard deviation are shrunk. Four of the seven φ nearly repeat each other."""

MAX_DEVIATIONS = 10.0
"""Standardised φ are cut to ± this: one huge logit variance bends neither the fit nor what is predicted from it."""


@dataclass(frozen=True)
class Among:
    """Where the given prompts stand in a batch: `first` others before them, `num_prompts` in all, of which the longest
    response has `longest` tokens. `total` adds up what holders of parts of the batch give it."""

    first: int
    num_prompts: int
    longest: int
    total: Callable[[Tensor], Tensor]


def _alone(entropy: Tensor) -> Among:
    return Among(0, len(entropy), entropy.shape[-1], lambda values: values)


def rb_coefficients(
    entropy: Float[Tensor, "B G T"],
    lengths: Int[Tensor, "B G"],
    baseline: Baseline,
    features: Float[Tensor, "B G T F"] | None = None,
    among: Among | None = None,
) -> Float[Tensor, "B G T"]:
    """c_t = R_{≥t} − b_t in float64, without gradient, zero past the end of a response, whatever stands there.

    `features` are φ of `token_stats.baseline_features`. `among`: the others, where these are not all prompts. Raises
    `MeasurementError` for `hk_ridge` without features.
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
        return later - _mean_of_others(later, present, among or _alone(entropy)) * present
    if baseline == "hk_group":
        return later - _group_and_others(later, present, among or _alone(entropy)) * present
    if features is None:
        raise MeasurementError(
            baseline, "no features were given", "give those of token_stats.baseline_features"
        )
    return later - _ridge_of_others(
        later, present, features.detach().double(), among or _alone(entropy)
    )


def _mean_of_others(
    later: Float[Tensor, "B G T"], present: Bool[Tensor, "B G T"], among: Among
) -> Float[Tensor, "B 1 T"]:
    sums, counts = _of_others(torch.stack([later.sum(1), present.double().sum(1)]), among)
    sums, counts = sums[..., : later.shape[-1]], counts[..., : later.shape[-1]]
    return (sums / counts.clamp(min=1.0))[:, None]


def _of_others(own: Float[Tensor, "K B T"], among: Among) -> Float[Tensor, "K B L"]:
    """Σ over the other prompts, up to the longest response of all.

    Those before a prompt and those after it are added, since a sum of all less a large own one loses small others.
    """
    own = torch.nn.functional.pad(own, (0, among.longest - own.shape[-1]))
    here, nothing = own.sum(1), torch.zeros_like(own[:, :1])
    before = torch.cat([nothing, own[:, :-1].cumsum(1)], 1)[:, : own.shape[1]]
    after = torch.cat([nothing, own.flip(1)[:, :-1].cumsum(1)], 1)[:, : own.shape[1]].flip(1)
    return before + after + (among.total(here) - here)[:, None]


def _group_and_others(
    later: Float[Tensor, "B G T"], present: Bool[Tensor, "B G T"], among: Among
) -> Float[Tensor, "B G T"]:
    """a·(mean of the own others) + (1 − a)·(mean of other prompts), a = nτ²/(nτ² + σ²) with σ² and τ² of the others."""
    steps = later.shape[-1]
    # Sums of squares would lose what lies around a large centre. Any will do; the mean of 1/m² times the means m lies
    # among the small ones, which one large m would hide.
    own = torch.stack([later.sum(1), present.double().sum(1)])
    inverse = 1.0 / ((own[0] / own[1].clamp(min=1.0)).square() + torch.finfo(torch.float64).tiny)
    own = (own * inverse).sum(1)
    sums, weights = among.total(torch.nn.functional.pad(own, (0, among.longest - steps)))
    centres = sums / torch.where(weights > 0, weights, 1.0)
    centre = centres[:steps]
    later = (later - centre) * present
    sums, counts = later.sum(1), present.double().sum(1)
    means = sums / counts.clamp(min=1.0)
    within = ((later - means[:, None]) * present).square().sum(1)
    of_prompts = [sums, counts, sums * means, counts.square(), (counts > 0).double(), within]
    own = torch.stack([*of_prompts, (counts - 1).clamp(min=0.0)])
    sums, counts, squares, sizes, prompts, within, freedom = _of_others(own, among)
    mean = sums / counts.clamp(min=1.0)
    sigma2 = within.sum(1) / freedom.sum(1).clamp(min=1.0)
    between = (squares - sums * mean).sum(1)
    between = between - (prompts - 1).clamp(min=0.0).sum(1) * sigma2
    effective = (counts - sizes / counts.clamp(min=1.0)).sum(1)
    tau2 = between / effective.clamp(min=1.0)
    size = ((centres + mean) * (counts > 0)).amax(1)
    tau2 = tau2 * (tau2 > (NOTICED * size).square())

    mean, counts = mean[:, None, :steps], counts[:, None, :steps]
    left = present.double().sum(1, keepdim=True) - present.double()
    of_group = (later.sum(1, keepdim=True) - later) / left.clamp(min=1.0)
    sigma2, tau2 = sigma2[:, None, None], tau2[:, None, None]
    weight = left * tau2 / (left * tau2 + sigma2).clamp(min=torch.finfo(torch.float64).tiny)
    weight = torch.where(counts > 0, weight, (left > 0).double())
    found = centre + weight * of_group + (1.0 - weight) * mean
    return found * ((counts > 0) | (left > 0))


def _ridge_of_others(
    later: Float[Tensor, "B G T"],
    present: Bool[Tensor, "B G T"],
    features: Float[Tensor, "B G T F"],
    among: Among,
) -> Float[Tensor, "B G T"]:
    """β₀ + φᵀβ of a fit for each fold; β₀ is not penalised. A feature that is constant (to rounding) in the fit counts
    for 0."""
    folds = min(FOLDS, among.num_prompts)
    if folds == 1:
        return torch.zeros_like(later)
    phi, target, device = features[present], later[present], later.device
    prompts = among.first + torch.arange(len(later), device=device)
    fold = (prompts % folds)[:, None, None].expand_as(present)[present]
    every = range(folds)
    others = [(fold != k).nonzero()[:, 0] for k in every]

    def total(of_fold: Callable[[int], Tensor]) -> Tensor:
        return among.total(torch.stack([of_fold(k) for k in every]))

    def of_others(k: int) -> Tensor:
        rows = phi[others[k]]
        return torch.cat([rows.sum(0), rows.square().sum(0)])

    size = total(lambda k: torch.tensor(float(len(others[k])), dtype=phi.dtype, device=device))
    size = size[:, None]
    mean, square = (total(of_others) / size).tensor_split(2, dim=1)
    deviation = (total(lambda k: (phi[others[k]] - mean[k]).square().sum(0)) / size).sqrt()
    scale = deviation.masked_fill(deviation <= 1e-12 * square.sqrt(), float("inf"))

    def standardised(rows: Tensor, k: int) -> Tensor:
        return ((phi[rows] - mean[k]) / scale[k]).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)

    def sums_of(k: int) -> Tensor:
        rows = others[k]
        return torch.cat([standardised(rows, k).sum(0), target[rows].sum()[None]])

    sums = total(sums_of) / size
    centre, level = sums[:, :-1], sums[:, -1]

    def products(k: int) -> Tensor:
        z = standardised(others[k], k) - centre[k]
        return torch.cat([z.T @ z, (z.T @ (target[others[k]] - level[k]))[:, None]], 1)

    fitted, predicted = total(products), torch.zeros_like(target)
    none = torch.eye(phi.shape[1], dtype=phi.dtype, device=device)
    betas = torch.linalg.solve(
        fitted[:, :, :-1] + RIDGE * size[:, :, None] * none, fitted[:, :, -1]
    )
    for k in every:
        own = (fold == k).nonzero()[:, 0]
        predicted[own] = level[k] + (standardised(own, k) - centre[k]) @ betas[k]
    return torch.zeros_like(later).masked_scatter(present, predicted)
