"""Teacher forcing: log p, log q and entropy of π at every generated token, at θ or at θ+ηv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError, RolloutsError
from entropy_probe.estimators.policy import TokenScores, score_tokens
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.precision import maybe_cast_logits_fp32
from entropy_probe.stages.rollouts import Rollouts


@dataclass(frozen=True)
class Scores:
    """Per token [B, G, T], zero past the end of a response; sums over a response in float64 [B, G]."""

    token_logp: Float[Tensor, "B G T"]
    token_logq: Float[Tensor, "B G T"]
    rb_entropy: Float[Tensor, "B G T"]
    gen_lens: Int[Tensor, "B G"]

    @property
    def seq_logp(self) -> Float[Tensor, "B G"]:
        return self.token_logp.double().sum(-1)

    @property
    def seq_logq(self) -> Float[Tensor, "B G"]:
        return self.token_logq.double().sum(-1)

    @property
    def rb_sum(self) -> Float[Tensor, "B G"]:
        return self.rb_entropy.double().sum(-1)


def score_rows(
    bound: BoundModel,
    rollouts: Rollouts,
    rows: Int[Tensor, " R"],
    config: ProbeConfig,
    *,
    override: Mapping[str, Tensor] | None = None,
    true_derivative: bool = False,
) -> TokenScores:
    """Scores [R, T] of some rows; T is their longest response, entries past a response's end are zero.

    The logits at position i−1 score the token at position i. One function for θ and θ+ηv, with and without a graph.
    """
    device = bound.device
    prompt_lens, gen_lens = rollouts.prompt_lens[rows], rollouts.gen_lens[rows]
    last = int((prompt_lens + gen_lens).max())
    first = int(prompt_lens.min()) - 1
    ids = rollouts.ids[rows, :last].to(device)
    logits = bound.logits(ids, keep=slice(first, last - 1), override=override, true_derivative=true_derivative)
    logits = logits.double() if config.precision.entropy_fp64 else maybe_cast_logits_fp32(logits)
    scored = score_tokens(logits, ids[:, first + 1 :], config.generation.temperature, config.generation.top_p)
    steps = torch.arange(int(gen_lens.max()))
    inside = (steps[None, :] < gen_lens[:, None]).to(device)
    columns = (prompt_lens[:, None] - 1 - first + steps[None, :]).clamp(max=scored.logp.shape[1] - 1).to(device)

    def generated(values: Tensor) -> Tensor:
        return torch.where(inside, values.gather(1, columns), 0.0)

    logq = generated(scored.logq) if config.generation.top_p < 1.0 else generated(scored.logp)
    return TokenScores(generated(scored.logp), logq, generated(scored.entropy))


def batches_by_length(rollouts: Rollouts, size: int) -> Iterator[Tensor]:
    """Row indices in batches of similar total length."""
    order = torch.argsort(rollouts.prompt_lens + rollouts.gen_lens, stable=True)
    yield from order.split(size)


@torch.no_grad()
def score(
    bound: BoundModel, rollouts: Rollouts, config: ProbeConfig, override: Mapping[str, Tensor] | None = None
) -> Scores:
    """Score every response at θ, or with the parameters in `override` replaced."""
    shape = (len(rollouts.gen_lens), rollouts.max_gen_len)
    logp, logq, entropy = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for rows in batches_by_length(rollouts, config.generation.tf_batch_size):
        scored = score_rows(bound, rollouts, rows, config, override=override)
        for whole, part in ((logp, scored.logp), (logq, scored.logq), (entropy, scored.entropy)):
            whole[rows, : part.shape[1]] = part.double().cpu()
    finite = torch.isfinite(logp) & torch.isfinite(entropy)
    if not bool(finite.all()):
        row = int((~finite).any(1).nonzero()[0])
        raise MeasurementError(
            f"{rollouts.source}: prompt {row // rollouts.num_responses + 1}",
            f"the model's log-probabilities are not finite {'at θ' if override is None else 'at θ + ηv'}",
            "use an earlier checkpoint" if override is None else "give smaller true_delta_h.etas",
        )
    if override is None and torch.isneginf(logq).any():
        row = int(torch.isneginf(logq).any(1).nonzero()[0])
        raise RolloutsError(
            f"{rollouts.source}: prompt {row // rollouts.num_responses + 1}",
            f"a response holds a token outside the nucleus of top_p {config.generation.top_p:g}",
            "give the temperature and top_p with which the responses were sampled",
        )
    return Scores(*map(rollouts.per_prompt, (logp, logq, entropy, rollouts.gen_lens)))
