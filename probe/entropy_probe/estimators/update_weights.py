"""The weights with which a batch enters its trainer's gradient, by the parts of a recipe (`config/recipe.py`):

Y = Σ_{n,g,t} a_ngt ∇log p_ngt + c_ngt ∇H_ngt,     a = w·(m·ρ·A − β·κ),   c = entropy_coef·w′
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import Recipe
from entropy_probe.estimators.advantages import leave_one_out_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class UpdateBatch:
    """The batch of one step of the optimizer. Scores are those of its tokens, where the recipe asks for them.

    G is the largest of the groups: what a smaller one lacks has no tokens. `advantages` replace the rule, where they
    are given, and `weights` all of a. `taken`: the responses of a rollout that the step takes; all.
    """

    rewards: Float[Tensor, "B G"]
    lengths: Int[Tensor, "B G"]
    truncated: Bool[Tensor, "B G"]
    micro_batch: Int[Tensor, "B G"]
    max_new_tokens: int
    taken: Bool[Tensor, "B G"] | None = None
    advantages: Tensor | None = None
    weights: Float[Tensor, "B G T"] | None = None
    logp: Float[Tensor, "B G T"] | None = None
    entropy: Float[Tensor, "B G T"] | None = None
    reference: Float[Tensor, "B G T"] | None = None
    sampler: Float[Tensor, "B G T"] | None = None

    @property
    def present(self) -> Bool[Tensor, "B G"]:
        """Whether there is such a response."""
        return self.lengths > 0

    def inside(self, like: Tensor) -> Bool[Tensor, "B G T"]:
        """Whether a token is one of a response, and not padding."""
        return torch.arange(like.shape[-1]) < self.lengths[..., None]


@dataclass(frozen=True)
class Weights:
    """a [B, G] of all tokens of a response; or a and c [B, G, T] of each, where `by_token` they differ."""

    of_responses: Float[Tensor, "B G"] | None = None
    of_logp: Float[Tensor, "B G T"] | None = None
    of_entropy: Float[Tensor, "B G T"] | None = None


def update_weights(recipe: Recipe, batch: UpdateBatch) -> Weights:
    """a and c, so that Y is the sum over the batch: the negated gradient of the trainer's loss, before clipping."""
    if batch.weights is not None:
        acts = high_entropy(recipe, batch)
        return Weights(of_logp=batch.weights, of_entropy=_entropy_weights(recipe, batch, acts))
    w = normaliser(recipe, batch)
    a = batch.advantages if batch.advantages is not None else advantages(recipe, batch)
    a = a * recipe.factor
    if a.dim() == 2 and not recipe.by_token:
        ratio = _ratio(recipe, batch)[..., 0]  # of responses, if of anything
        return Weights(of_responses=w * a * ratio * _of_responses(recipe, batch))
    of_tokens = _first(batch.logp, batch.entropy, a)
    inside = batch.inside(of_tokens)
    a = (a if a.dim() == 3 else a[..., None]).expand_as(of_tokens).double()
    slope = _penalty(recipe, batch) if recipe.kl_coef > 0 and recipe.kl_in != "reward" else None
    if slope is not None and recipe.kl_in == "return":
        slope = torch.where(inside, slope, 0.0)
        a, slope = a - recipe.kl_coef * _from_here_on(slope), None
    if recipe.whiten:
        a = whitened(a, inside)
    acts = high_entropy(recipe, batch)
    a = a * _ratio(recipe, batch) * acts * _of_responses(recipe, batch)[..., None]
    counts = inside & (counted(recipe, batch) > 0)[..., None]
    if slope is not None:
        a = a - recipe.kl_coef * slope
    a = torch.where(counts, w[..., None] * a, 0.0)
    return Weights(of_logp=a, of_entropy=_entropy_weights(recipe, batch, acts))


def advantages(recipe: Recipe, batch: UpdateBatch) -> Float[Tensor, "B G"]:
    """A of every response: (r − baseline)/(deviation + eps)."""
    r = batch.rewards
    if recipe.kl_coef > 0 and recipe.kl_in == "reward":
        slope = _penalty(recipe, batch)
        counts = batch.inside(slope)
        if recipe.mask_truncated:
            counts = counts & ~batch.truncated[..., None]
        r = r - recipe.kl_coef * torch.where(counts, slope, 0.0).sum(-1)
    group, present = r.shape[1], batch.present
    centre = torch.zeros_like(r)
    if recipe.baseline == "mean":
        centre = _means(r, present)
    elif recipe.baseline == "leave_one_out":
        centre = leave_one_out_mean(r, present)
    a = torch.where(present, r - centre, 0.0)
    if recipe.scale == "none":
        return a
    if recipe.scale == "group":
        deviation = deviations(r, present, recipe.ddof)
    elif recipe.scale == "leave_one_out":
        others = present[:, None, :] & ~torch.eye(group, dtype=torch.bool)
        of_others = r[:, None, :].expand(-1, group, -1)
        deviation = deviations(of_others, others, recipe.ddof)[..., 0]
    else:
        if recipe.scale == "advantages":
            a = torch.where(present, a - a[present].mean(), 0.0)
        over = r if recipe.scale == "batch" else a
        deviation = deviations(over.flatten(), present.flatten(), recipe.ddof).expand_as(r)
    scaled = a / (deviation + recipe.eps)
    return torch.where(deviation > 0, scaled, a) if recipe.undivided_at_zero else scaled


def deviations(
    values: Float[Tensor, "... K"], present: Bool[Tensor, "... K"], ddof: int
) -> Float[Tensor, "... 1"]:
    """Standard deviation over the last axis, of those that are present; 0 of equal values, and of a single one."""
    squares = torch.where(present, values - _means(values, present), 0.0).square()
    count = present.sum(-1, keepdim=True) - ddof
    variance = squares.sum(-1, keepdim=True) / count.clamp(min=1)
    # the mean of equal values is not always one of them, in floating point
    return torch.where((count > 0) & (_spread(values, present) > 0), variance, 0.0).sqrt()


def _spread(
    values: Float[Tensor, "... K"], present: Bool[Tensor, "... K"]
) -> Float[Tensor, "... 1"]:
    """Largest less smallest over the last axis, of those that are present."""
    largest, least = _range(values, present)
    return largest - least


def _range(
    values: Float[Tensor, "... K"], present: Bool[Tensor, "... K"]
) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """The largest and the smallest over the last axis, of those that are present."""
    largest = torch.where(present, values, -torch.inf).amax(-1, keepdim=True)
    return largest, torch.where(present, values, torch.inf).amin(-1, keepdim=True)


def _means(
    values: Float[Tensor, "... K"], present: Bool[Tensor, "... K"]
) -> Float[Tensor, "... 1"]:
    """Mean over the last axis, of those that are present; of equal values exactly theirs."""
    total = torch.where(present, values, 0.0).sum(-1, keepdim=True)
    largest, least = _range(values, present)
    return (total / present.sum(-1, keepdim=True)).clamp(least, largest)


def counted(recipe: Recipe, batch: UpdateBatch) -> Int[Tensor, "B G"]:
    """The tokens of each response that count in a normaliser; those of others are 0."""
    return batch.lengths * _of_responses(recipe, batch).long()


def normaliser(recipe: Recipe, batch: UpdateBatch) -> Float[Tensor, "B G"]:
    """w of a response's tokens."""
    tokens = counted(recipe, batch).double()
    of_all = int(batch.present.sum())
    rows = of_all if batch.taken is None else int(batch.taken.sum())
    kind = recipe.normaliser
    if kind == "longest":
        return 1 / tokens.amax(1, keepdim=True).clamp(min=1).expand_as(tokens) / rows
    if kind == "prompt_tokens":
        mean = _means(tokens, batch.present)
        return torch.where(mean > 0, 1 / mean, 0.0).expand_as(tokens) / rows
    if kind == "sequence_mean":
        return 1 / tokens.clamp(min=1) / rows
    if kind == "batch_tokens":
        return torch.ones_like(tokens) / tokens.sum().clamp(min=1)
    if kind == "rollout_tokens":
        whole = counted(recipe, replace(batch, taken=None)).double()
        return torch.ones_like(tokens) / whole.sum().clamp(min=1) * (of_all / rows)
    if kind == "micro_batch_tokens":
        return of_micro_batches(tokens, batch.micro_batch)
    constant = 1 if kind == "sum" else recipe.constant or batch.max_new_tokens
    return torch.ones_like(tokens) / constant / rows


def of_micro_batches(
    tokens: Float[Tensor, "B G"], micro_batch: Int[Tensor, "B G"]
) -> Float[Tensor, "B G"]:
    """1/(tokens of its micro-batch)/M, of M micro-batches."""
    count = int(micro_batch.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, micro_batch.flatten(), tokens.flatten().double())
    return 1 / sums.clamp(min=1)[micro_batch] / count


def whitened(a: Float[Tensor, "B G T"], inside: Bool[Tensor, "B G T"]) -> Float[Tensor, "B G T"]:
    """(a − mean)/√(var + 1e-8) over all tokens."""
    values = a[inside]
    centred = a - values.mean()
    return centred / (values.var(correction=0) + 1e-8).sqrt()


def high_entropy(recipe: Recipe, batch: UpdateBatch) -> Tensor:
    """1 at the tokens whose entropy is among the largest of their micro-batch; 1 where there is no such mask."""
    if recipe.top_entropy_quantile >= 1.0:
        return torch.ones(1, 1, 1, dtype=torch.float64)
    entropy = _needed(batch.entropy)
    counts = batch.inside(entropy) & (counted(recipe, batch) > 0)[..., None]
    chosen = torch.zeros_like(entropy, dtype=torch.float64)
    for k in range(int(batch.micro_batch.max()) + 1):
        own = counts & (batch.micro_batch == k)[..., None]
        if bool(own.any()):
            least = torch.quantile(entropy[own].double(), 1 - recipe.top_entropy_quantile)
            chosen += (own & (entropy >= least)).double()
    return chosen


def _entropy_weights(
    recipe: Recipe, batch: UpdateBatch, acts: Tensor
) -> Float[Tensor, "B G T"] | None:
    """c, where the recipe has an entropy term."""
    if recipe.entropy_coef == 0:
        return None
    counts = batch.inside(_needed(batch.entropy)) & (counted(recipe, batch) > 0)[..., None]
    return recipe.entropy_coef * torch.where(counts, acts * _of_entropy(recipe, batch, acts), 0.0)


def _of_entropy(recipe: Recipe, batch: UpdateBatch, acts: Tensor) -> Float[Tensor, "B G T"]:
    """w′ of the entropy of a token: the same as that of log p, or 1/(tokens of the micro-batch that count)/M."""
    entropy = _needed(batch.entropy)
    if recipe.entropy_normaliser == "same":
        return normaliser(recipe, batch)[..., None].expand_as(entropy)
    counts = batch.inside(entropy) & (counted(recipe, batch) > 0)[..., None]
    tokens = (counts * acts).double().sum(-1)
    return (of_micro_batches(tokens, batch.micro_batch) * (tokens > 0))[..., None] * counts


def _of_responses(recipe: Recipe, batch: UpdateBatch) -> Float[Tensor, "B G"]:
    """1 for what takes part: not truncated, where that is masked, and not of a prompt that says nothing."""
    takes_part = batch.present.to(batch.rewards.dtype)
    if batch.taken is not None:
        takes_part = takes_part * batch.taken
    if recipe.mask_truncated:
        takes_part = takes_part * ~batch.truncated
    if recipe.drop == "zero_std":
        takes_part = takes_part * (_spread(batch.rewards, batch.present) > 0)
    elif recipe.drop == "zero_advantage":
        a = batch.advantages if batch.advantages is not None else advantages(recipe, batch)
        a = a if a.dim() == 2 else a.abs().amax(-1)
        takes_part = takes_part * (a.abs() > 1e-12 * batch.rewards.abs().amax(1, keepdim=True))
    return takes_part


def _penalty(recipe: Recipe, batch: UpdateBatch) -> Float[Tensor, "B G T"]:
    """κ, with Δ = log p − log p_ref: d/d log p of the KL estimate in a loss; in a reward or a return the estimate."""
    delta = _needed(batch.logp).double() - _needed(batch.reference)
    if recipe.kl_in != "loss":
        estimates = {"k1": delta, "k2": delta.square() / 2, "k3": torch.expm1(-delta) + delta}
        return estimates.get(recipe.kl, estimates["k3"])
    slopes = {"k1": torch.ones_like(delta), "k2": delta, "k3": -torch.expm1(-delta)}
    return slopes.get(recipe.kl, delta)


def _ratio(recipe: Recipe, batch: UpdateBatch) -> Tensor:
    """ρ: π of the scores over π as the sampler reported it."""
    if recipe.importance == "none" or batch.sampler is None:
        return torch.ones(1, 1, 1, dtype=torch.float64)
    logp = _needed(batch.logp).double()
    log_ratio = torch.where(batch.inside(logp), logp - batch.sampler, 0.0)
    level, cut = recipe.importance.split("_")
    ratio = (log_ratio.sum(-1, keepdim=True) if level == "sequence" else log_ratio).exp()
    cap = recipe.importance_cap
    return ratio.clamp(max=cap) if cut == "truncate" else ratio * (ratio <= cap)


def _from_here_on(values: Float[Tensor, "B G T"]) -> Float[Tensor, "B G T"]:
    return values.flip(-1).cumsum(-1).flip(-1)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


def _needed(scores: Tensor | None) -> Tensor:
    assert scores is not None, "the recipe needs scores of tokens"
    return scores
