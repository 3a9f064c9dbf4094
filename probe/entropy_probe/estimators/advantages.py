"""The weights with which the responses of a prompt enter X, and prompts that add nothing to Y."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def leave_one_out_mean(
    values: Float[Tensor, "B G"], present: Bool[Tensor, "B G"] | None = None
) -> Float[Tensor, "B G"]:
    """Mean over the other responses of the same prompt, of those that are `present` (all are); 0 where none is.

    Of equal values exactly theirs, so that nothing is left once it is taken off.
    """
    present = torch.ones_like(values, dtype=torch.bool) if present is None else present
    least = torch.where(present, values, torch.inf).amin(1, keepdim=True)
    largest = torch.where(present, values, -torch.inf).amax(1, keepdim=True)
    values = torch.where(present, values, 0.0)
    others = present.sum(1, keepdim=True) - 1
    mean = (values.sum(1, keepdim=True) - values) / others.clamp(min=1)
    return torch.where(others > 0, mean.clamp(least, largest), 0.0)


def x_weights(
    seq_logp: Float[Tensor, "B G"], present: Bool[Tensor, "B G"] | None = None
) -> Float[Tensor, "B G"]:
    """Weights c with X_n = Σ_g c_ng ∇S_ng:  c = (S − mean of the other responses)/G, a constant of the derivative;
    0 of what is not `present` (all are). Needs two responses of each prompt."""
    present = torch.ones_like(seq_logp, dtype=torch.bool) if present is None else present
    centred = (seq_logp - leave_one_out_mean(seq_logp, present)).detach()
    return torch.where(present, centred, 0.0) / present.sum(1, keepdim=True)


def zero_advantage(
    advantage: Float[Tensor, "B G"], rewards: Float[Tensor, "B G"]
) -> Bool[Tensor, " B"]:
    """Prompts that add nothing to the update: all advantages are zero, to the rounding of the mean reward."""
    return (advantage.abs() <= 1e-12 * rewards.abs().amax(1, keepdim=True)).all(1)
