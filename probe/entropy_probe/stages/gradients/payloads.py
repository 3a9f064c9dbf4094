"""What a prompt's gradients X_n and Y_n are made of: weights of responses, and coefficients of tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.advantages import x_weights
from entropy_probe.estimators.baselines import Among, chosen, rb_coefficients
from entropy_probe.estimators.policy import score_tokens, token_logp
from entropy_probe.estimators.update_weights import UpdateBatch, advantages, update_weights
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Read, Scores

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Payload:
    """What a prompt's gradient is made of: Σ_g w_ng ∇f_ng with constant `weights` w, where f = Σ_t log p_t
    or, with constant `coefficients` κ, f = Σ_t (h_t·H_t + κ_t·log p_t), h = `of_entropy`: 1, 0, or one for each."""

    weights: Float[Tensor, "B G"]
    coefficients: Float[Tensor, "B G T"] | None = None
    of_entropy: Float[Tensor, "B G T"] | float = 1.0

    def read(self, temperature: float) -> Read:
        def logp(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return (token_logp(logits, tokens, temperature),)

        def weighted(logits: Tensor, tokens: Tensor, beside: Tensor) -> tuple[Tensor, ...]:
            kappa, of_entropy = beside.to(logits.dtype).unbind(-1)
            if not isinstance(self.of_entropy, Tensor) and self.of_entropy == 0:
                return (kappa * token_logp(logits, tokens, temperature),)
            scored = score_tokens(logits, tokens, temperature, 1.0)
            return (of_entropy * scored.entropy + kappa * scored.logp,)

        return logp if self.coefficients is None else weighted

    def of_rows(self, rows: Int[Tensor, " R"]) -> Float[Tensor, "R T 2"] | None:
        """κ and h of the tokens of some responses."""
        if self.coefficients is None:
            return None
        kappa = self.coefficients.flatten(0, 1)[rows]
        if isinstance(self.of_entropy, Tensor):
            return torch.stack([kappa, self.of_entropy.flatten(0, 1)[rows]], -1)
        return torch.stack([kappa, torch.full_like(kappa, self.of_entropy)], -1)

    def of_prompts(self, prompts: Int[Tensor, " b"] | slice) -> Payload:
        """The same for some prompts only."""
        coefficients = None if self.coefficients is None else self.coefficients[prompts]
        of_entropy = self.of_entropy
        if isinstance(of_entropy, Tensor):
            of_entropy = of_entropy[prompts]
        return Payload(self.weights[prompts], coefficients, of_entropy)

    def size(self) -> Float[Tensor, " B"]:
        """Σ|weight| of a prompt's terms."""
        if self.coefficients is None:
            return self.weights.double().abs().sum(1)
        terms = self.coefficients.abs()
        if isinstance(self.of_entropy, Tensor):
            terms = terms + self.of_entropy.abs()
        return (self.weights.double().abs() * terms.double().sum(-1)).sum(1)

    def largest(self, n: int, g: int) -> float:
        """The largest |h_t| + |κ_t| of a response's tokens; 1 without coefficients."""
        if self.coefficients is None:
            return 1.0
        of_entropy = self.of_entropy
        own = of_entropy[n, g] if isinstance(of_entropy, Tensor) else of_entropy
        return float((self.coefficients[n, g].abs() + own).abs().max())

    def sums(
        self, logp: Float[Tensor, "R T"], entropy: Float[Tensor, "R T"], rows: Int[Tensor, " R"]
    ) -> Float[Tensor, " R"]:
        """f of some responses in float64, from log p and H; or a derivative of f, from theirs."""
        beside = self.of_rows(rows)
        if beside is None:
            return logp.double().sum(-1)
        kappa, of_entropy = beside[:, : logp.shape[-1]].to(logp.device).unbind(-1)
        return (of_entropy * entropy.double() + kappa * logp.double()).sum(-1)


def update_batch(
    rollouts: Rollouts,
    config: ProbeConfig,
    ends: Collection[int] = (),
    tokens: Mapping[str, Tensor] | None = None,
) -> UpdateBatch:
    """The batch as its trainer weighs it; `tokens` are log p, entropies and what else the recipe asks for, of each."""
    micro_batch = rollouts.micro_batches
    if micro_batch is None:
        rows, size = int(rollouts.present.sum()), config.whose_update.micro_batch_size
        order = rollouts.present.flatten().long().cumsum(0).clamp(min=1) - 1
        micro_batch = rollouts.per_prompt(order % (1 if size is None else -(-rows // size)))
    elif rollouts.in_step is not None:  # those of responses that the step does not take say nothing
        some = micro_batch[rollouts.in_step][0]
        micro_batch = torch.where(rollouts.in_step, micro_batch, some)
    micro_batch = micro_batch.unique(return_inverse=True)[1]
    last = [response[-1] if response else None for response in rollouts.responses]
    sampler = rollouts.logprobs
    return UpdateBatch(
        rewards=rollouts.rewards,
        lengths=rollouts.per_prompt(rollouts.gen_lens),
        truncated=rollouts.per_prompt(torch.tensor([token not in ends for token in last])),
        micro_batch=micro_batch,
        max_new_tokens=config.generation.max_new_tokens,
        taken=rollouts.in_step,
        advantages=None if rollouts.weighed else rollouts.advantages,
        weights=rollouts.advantages if rollouts.weighed else None,
        sampler=None if sampler is None else rollouts.per_prompt(sampler),
        **(tokens or {}),
    )


def response_advantages(rollouts: Rollouts, config: ProbeConfig) -> Float[Tensor, "B G"]:
    """A of every response: the file's own `advantages`, where it has them (the largest in size, where tokens have their
    own, or weights), else by the recipe from the rewards, before anything that tokens differ in."""
    if rollouts.advantages is not None:
        given = rollouts.advantages
        if given.dim() == 2:
            return given
        return given.gather(-1, given.abs().argmax(-1, keepdim=True))[..., 0]
    recipe = config.whose_update
    if recipe.kl_in == "reward":
        recipe = recipe.model_copy(update={"kl_coef": 0.0})
    return advantages(recipe, update_batch(rollouts, config))


def payloads(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig, among: Among | None = None
) -> tuple[Payload, Payload]:
    """Those of X and Y of a whole batch, where the recipe needs no more than its scores."""
    tokens = {"logp": scores.token_logp, "entropy": scores.rb_entropy}
    batch = update_batch(rollouts, config, tokens=tokens)
    return x_payload(rollouts, scores, config, among), y_payload(batch, config)


def x_payload(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig, among: Among | None = None
) -> Payload:
    """That of X, by the configured estimator of −∇H; `among` where these are not all prompts.

    naive   X_n = Σ_g c_ng ∇S_ng
    rb      X_n = −(1/G) Σ_g Σ_t (∇H_t + (R_{≥t} − b_t) ∇log p_t)
    """
    first_order, weights = config.first_order, x_weights(scores.seq_logp, rollouts.present)
    if first_order.estimator == "naive":
        return Payload(weights)
    kappa = rb_coefficients(
        scores.rb_entropy, scores.gen_lens, chosen(first_order.baseline), scores.features, among
    )
    present = rollouts.present.double()
    return Payload(-present / present.sum(1, keepdim=True), kappa)


def y_payload(batch: UpdateBatch, config: ProbeConfig) -> Payload:
    """That of Y of a whole batch: Y_n is B times what prompt n adds to the trainer's gradient, which is Ȳ."""
    found, prompts = update_weights(config.whose_update, batch), len(batch.rewards)
    if found.of_responses is not None:
        return Payload(prompts * found.of_responses)
    assert found.of_logp is not None
    weights = torch.full_like(batch.rewards, float(prompts))
    return Payload(weights, found.of_logp, 0.0 if found.of_entropy is None else found.of_entropy)


def per_token_payload(scores: Scores) -> Payload:
    """That of X for the entropy per token, whose mean over prompts estimates −∇(H/E[T]), naive:

        X_n = Σ_g c_ng ∇S_ng/T̄,   c of S − s̄T in place of S,   s̄ = ΣS/ΣT

    s̄ and T̄ are constants of it; what they add to the spread of a cross-fitted slope is lost in the noise of Y.
    """
    lengths = scores.gen_lens.double()
    excess = scores.seq_logp - scores.seq_logp.sum() / lengths.sum() * lengths
    return Payload(x_weights(excess) / lengths.mean())
