"""The weights with which the responses of a prompt enter X, and prompts that add nothing to Y."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def leave_one_out_mean(values: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Mean over the other G−1 responses of the same prompt. Needs G ≥ 2."""
    return (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)


def x_weights(seq_logp: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Weights c with X_n = Σ_g c_ng ∇S_ng:  c = (S − mean of the other responses)/G, a constant of the derivative."""
    return (seq_logp - leave_one_out_mean(seq_logp)).detach() / seq_logp.shape[1]


def zero_advantage(
    advantage: Float[Tensor, "B G"], rewards: Float[Tensor, "B G"]
) -> Bool[Tensor, " B"]:
    """Prompts that add nothing to the update: all advantages are zero, to the rounding of the mean reward."""
    return (advantage.abs() <= 1e-12 * rewards.abs().amax(1, keepdim=True)).all(1)
