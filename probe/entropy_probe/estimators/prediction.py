"""What slope and curvature of the entropy predict for a step, and how far the realised change is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.importance import Change
from entropy_probe.estimators.slope import PromptMean

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Prediction:
    """η·slope + ½η²·curvature with its SE; and realised minus predicted with the SE of that difference, which is less
    than two independent ones would give, as both are measured on the same prompts."""

    value: float
    se: float
    difference: float
    difference_se: float


def predicted_change(
    eta: float, slope: PromptMean, curvature: PromptMean, unit_of: Int[Tensor, " B"]
) -> PromptMean:
    """η·slope + ½η²·curvature, with a term for each prompt; for each block of prompts (`unit_of`), where the slope has
    one for each."""
    bent = curvature.per_prompt
    if len(slope.per_prompt) != len(bent):
        bent = unit_means(bent, unit_of)
    return PromptMean(eta * slope.per_prompt + 0.5 * eta**2 * bent)


def predict(
    eta: float,
    realised: Change,
    slope: PromptMean,
    curvature: PromptMean,
    unit_of: Int[Tensor, " B"],
) -> Prediction:
    """Terms of a unit are added before the spread over units is taken, so that the SE knows what they share."""
    predicted = predicted_change(eta, slope, curvature, unit_of)
    of_prompts = realised.influence.mean(1)
    if len(predicted.per_prompt) != len(of_prompts):
        of_prompts = unit_means(of_prompts, unit_of)
    value = eta * slope.value + 0.5 * eta**2 * curvature.value
    difference = PromptMean(of_prompts - predicted.per_prompt)
    return Prediction(value, predicted.se, realised.value - value, difference.se)


def unit_means(per_prompt: Float[Tensor, " B"], unit_of: Int[Tensor, " B"]) -> Float[Tensor, " U"]:
    """Mean over the prompts of each unit."""
    sizes = torch.bincount(unit_of)
    return torch.zeros(len(sizes), dtype=per_prompt.dtype).index_add(0, unit_of, per_prompt) / sizes


def eta_star(slope: PromptMean, curvature: PromptMean) -> float | None:
    """2|∇Hᵀv|/|vᵀ∇²Hv|, where first order ends; `None` where |curvature| < 2 SE."""
    return 2 * abs(slope.value) / abs(curvature.value) if _decided(curvature) else None


def reach(slope: PromptMean, curvature: PromptMean) -> float:
    """How far slope and curvature are taken for the change: a tenth of η*, infinite where curvature is not decided.

    Where the slope is within 2 SE of 0 those 2 SE stand for it: that it happens to vanish says nothing about the third
    order, which is what the prediction leaves out.
    """
    size = max(abs(slope.value), 2 * slope.se)
    return 0.1 * 2 * size / abs(curvature.value) if _decided(curvature) else math.inf


def _decided(curvature: PromptMean) -> bool:
    return curvature.value != 0.0 and abs(curvature.value) >= 2 * curvature.se
