"""What a prompt's gradients X_n and Y_n are made of: weights of responses, and coefficients of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import FirstOrderConfig, ProbeConfig
from entropy_probe.estimators.advantages import advantages, x_weights, y_weights
from entropy_probe.estimators.baselines import Among, rb_coefficients
from entropy_probe.estimators.policy import score_tokens, token_logp
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Read, Scores

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Payload:
    """What a prompt's gradient is made of: Σ_g w_ng ∇f_ng with constant `weights` w, where f = Σ_t log p_t
    or, with constant `coefficients` κ, f = Σ_t (H_t + κ_t·log p_t)."""

    weights: Float[Tensor, "B G"]
    coefficients: Float[Tensor, "B G T"] | None = None

    def read(self, temperature: float) -> Read:
        def logp(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return (token_logp(logits, tokens, temperature),)

        def entropy_and_logp(logits: Tensor, tokens: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
            scored = score_tokens(logits, tokens, temperature, 1.0)
            return (scored.entropy + coefficients.to(logits.dtype) * scored.logp,)

        return logp if self.coefficients is None else entropy_and_logp

    def of_rows(self, rows: Int[Tensor, " R"]) -> Float[Tensor, "R T"] | None:
        """κ of some responses."""
        return None if self.coefficients is None else self.coefficients.flatten(0, 1)[rows]

    def of_prompts(self, prompts: Int[Tensor, " b"] | slice) -> Payload:
        """The same for some prompts only."""
        coefficients = None if self.coefficients is None else self.coefficients[prompts]
        return Payload(self.weights[prompts], coefficients)

    def sums(
        self, logp: Float[Tensor, "R T"], entropy: Float[Tensor, "R T"], rows: Int[Tensor, " R"]
    ) -> Float[Tensor, " R"]:
        """f of some responses in float64, from log p and H; or a derivative of f, from theirs."""
        kappa = self.of_rows(rows)
        if kappa is None:
            return logp.double().sum(-1)
        kappa = kappa[:, : logp.shape[-1]].to(logp.device)
        return (entropy.double() + kappa * logp.double()).sum(-1)


def response_advantages(rollouts: Rollouts, config: FirstOrderConfig) -> Float[Tensor, "B G"]:
    """The file's own `advantages`, where it has them, else the configured rule on the rewards."""
    if rollouts.advantages is not None:
        return rollouts.advantages
    return advantages(rollouts.rewards, config.advantage)


def response_weights(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig
) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"]]:
    """(c, a) with X_n = Σ_g c_ng ∇S_ng (the naive estimator) and Y_n = Σ_g a_ng ∇S_ng."""
    rule, limit = config.first_order.loss, config.generation.max_new_tokens
    advantage = response_advantages(rollouts, config.first_order)
    return x_weights(scores.seq_logp), y_weights(advantage, scores.gen_lens, rule, limit)


def payloads(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig, among: Among | None = None
) -> tuple[Payload, Payload]:
    """Those of X, by the configured estimator of −∇H, and of Y; `among` where these are not all prompts.

    naive   X_n = Σ_g c_ng ∇S_ng
    rb      X_n = −(1/G) Σ_g Σ_t (∇H_t + (R_{≥t} − b_t) ∇log p_t)
    """
    weights_x, weights_y = response_weights(rollouts, scores, config)
    first_order, y = config.first_order, Payload(weights_y)
    if first_order.estimator == "naive":
        return Payload(weights_x), y
    kappa = rb_coefficients(scores.rb_entropy, scores.gen_lens, first_order.baseline, scores.features, among)
    return Payload(torch.full_like(weights_x, -1.0 / rollouts.num_responses), kappa), y


def per_token_payload(scores: Scores) -> Payload:
    """That of X for the entropy per token, whose mean over prompts estimates −∇(H/E[T]), naive:

        X_n = Σ_g c_ng ∇S_ng/T̄,   c of S − s̄T in place of S,   s̄ = ΣS/ΣT

    s̄ and T̄ are constants of it; what they add to the spread of a cross-fitted slope is lost in the noise of Y.
    """
    lengths = scores.gen_lens.double()
    excess = scores.seq_logp - scores.seq_logp.sum() / lengths.sum() * lengths
    return Payload(x_weights(excess) / lengths.mean())
