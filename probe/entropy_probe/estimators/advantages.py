"""Advantages, and the weights with which the responses of a prompt enter X and Y."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

AdvantageRule = Literal["centered", "grpo", "raw"]
LossRule = Literal["lmax", "sequence_mean", "token_mean", "constant"]


def advantages(rewards: Float[Tensor, "B G"], rule: AdvantageRule) -> Float[Tensor, "B G"]:
    """`centered` r − mean_g r; `grpo` (r − mean_g r)/(std_g with ddof 1 + 1e-4), as TRL does; `raw` r."""
    if rule == "raw":
        return rewards
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + 1e-4) if rule == "grpo" else centered


def leave_one_out_mean(values: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Mean over the other G−1 responses of the same prompt. Needs G ≥ 2."""
    return (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)


def x_weights(seq_logp: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Weights c with X_n = Σ_g c_ng ∇S_ng:  c = (S − mean of the other responses)/G, a constant of the derivative."""
    return (seq_logp - leave_one_out_mean(seq_logp)).detach() / seq_logp.shape[1]


def y_weights(
    advantage: Float[Tensor, "B G"],
    lengths: Int[Tensor, "B G"],
    rule: LossRule,
    max_new_tokens: int,
) -> Float[Tensor, "B G"]:
    """Weights a with Y_n = Σ_g a_ng ∇S_ng, 1/G times: `lmax` A/max_g T; `sequence_mean` A/T; `token_mean` A·G/Σ_g T;
    `constant` A/max_new_tokens."""
    group = advantage.shape[1]
    if rule == "lmax":
        divisor = lengths.double().amax(1, keepdim=True)
    elif rule == "sequence_mean":
        divisor = lengths.double()
    elif rule == "token_mean":
        divisor = lengths.double().sum(1, keepdim=True) / group
    else:
        divisor = max_new_tokens
    return advantage / divisor / group


def zero_advantage(
    advantage: Float[Tensor, "B G"], rewards: Float[Tensor, "B G"]
) -> Bool[Tensor, " B"]:
    """Prompts that add nothing to the update: all advantages are zero, to the rounding of the mean reward."""
    return (advantage.abs() <= 1e-12 * rewards.abs().amax(1, keepdim=True)).all(1)
