"""The policy π = softmax(logits/temperature), what was sampled from it (q), and the entropies of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NUCLEUS_EDGE = 1e-6
"""Mass by which the edge of the nucleus may be off: a float32 cumulative sum over a vocabulary of 2e5 is off by at most
about 2e-7 in the samplers that draw responses, and a sampled token must never get log q = −∞ for that."""

# Entries of a row that are ranked at first, and where the nucleus does not end among them; then all are. A language
# model's nucleus rarely holds more than the first (`benchmarks/test_nucleus.py`).
_PREFIXES = (64, 4096)
_BLOCK = 256
# exp(x) is exactly 0 below it, in float64 too: a logit of −∞ can be moved there, and 0·(−∞) never arises.
NOTHING = -1e4


@dataclass(frozen=True)
class TokenScores:
    """log π and log q of the given tokens, and the entropies of π and of q at their positions, in nats."""

    logp: Float[Tensor, "*batch"]
    logq: Float[Tensor, "*batch"]
    entropy: Float[Tensor, "*batch"]
    entropy_q: Float[Tensor, "*batch"]


def score_tokens(
    logits: Float[Tensor, "*batch V"],
    tokens: Int[Tensor, "*batch"],
    temperature: float,
    top_p: float,
    dtype: torch.dtype | None = None,
) -> TokenScores:
    """Score `tokens` under the logits that predict them.

        logp = log_softmax(logits/temperature);   token_logp = logp[token];   entropy = −Σ exp(logp)·logp
        logq = logp − logsumexp(logp over the nucleus) inside the nucleus, −∞ outside;   entropy_q = −Σ q·log q
        q = π at top_p = 1, where nothing is sorted

    Computed in `dtype` (that of the logits by default) with d = (logits − max)/temperature and s = Σ e^d:

        token_logp = d[token] − log s,     entropy = log s − Σ d·e^d / s

    so that one copy of the logits and one of e^d are all that is held. Differentiable in the logits, in reverse and in
    forward mode. Logits of −∞ are tokens of probability zero; they add nothing to an entropy.
    """
    wide = logits.to(dtype or logits.dtype)
    top = wide.detach().amax(-1, keepdim=True)
    d = wide - top
    del wide
    d = d if temperature == 1.0 else d.div_(temperature)
    token_d = d.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    in_place = not d.requires_grad
    d = d.clamp_(min=NOTHING) if in_place else d.clamp(min=NOTHING)
    exp_d = d.exp()
    sum_all = exp_d.sum(-1)
    log_sum = sum_all.log()
    logp = token_d - log_sum
    if top_p >= 1.0:
        weighted = exp_d.mul_(d) if in_place else exp_d * d
        entropy = log_sum - weighted.sum(-1) / sum_all
        return TokenScores(logp, logp, entropy, entropy)
    rounding = float32_rounding(top.squeeze(-1), temperature)
    lowest = _lowest_inside(d.detach(), log_sum.detach(), top_p, NUCLEUS_EDGE, rounding)
    inside_exp = exp_d.masked_fill(d < lowest, 0.0)
    weighted = exp_d.mul_(d) if in_place else exp_d * d
    entropy = log_sum - weighted.sum(-1) / sum_all
    sum_inside = inside_exp.sum(-1)
    log_sum_inside = sum_inside.log()
    logq = (token_d - log_sum_inside).masked_fill(
        token_d.clamp(min=NOTHING) < lowest.squeeze(-1), float("-inf")
    )
    weighted = inside_exp.mul_(d) if in_place else inside_exp * d
    return TokenScores(logp, logq, entropy, log_sum_inside - weighted.sum(-1) / sum_inside)


def scores_along(
    logits: Float[Tensor, "N V"],
    tangent: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    temperature: float,
) -> tuple[Float[Tensor, " N"], ...]:
    """log p of the tokens, the entropy, and the derivatives of both along `tangent`, with sums in float64.

    With d and s as in `score_tokens`, ḋ = tangent and ⟨x⟩ = Σ e^d x/s:

        D log p = (ḋ[token] − ⟨ḋ⟩)/temperature,     D H = (⟨d⟩⟨ḋ⟩ − ⟨d ḋ⟩)/temperature

    which forward mode finds through every operation of `score_tokens`, each with its own copy of the logits.
    """
    d, moved = logits - logits.amax(-1, keepdim=True), tangent
    d = d if temperature == 1.0 else d.div_(temperature)
    if not bool((d.amin(-1) > NOTHING).all()):  # rare, and to fill takes as long as all the rest
        moved = moved.masked_fill(d.clamp_(min=NOTHING) <= NOTHING, 0.0)
    own, own_moved = (of.gather(-1, tokens[:, None])[:, 0] for of in (d, moved))
    e = d.exp()
    total, weighted = added(e, torch.float64), d.mul_(e)
    mean, mean_moved = (added(of, torch.float64) / total for of in (weighted, e.mul_(moved)))
    both = added(weighted.mul_(moved), torch.float64) / total
    log_sum = total.log()
    d_logp, d_entropy = own_moved - mean_moved, mean * mean_moved - both
    return own - log_sum, log_sum - mean, d_logp / temperature, d_entropy / temperature


def added(values: Float[Tensor, "*batch V"], dtype: torch.dtype | None) -> Tensor:
    """Σ over the vocabulary in a wider `dtype`: of 256 values as they are, and of such sums in the wider one.

    A copy of all values in float64 takes six times as long as their sum in float32.
    """
    if dtype is None or dtype is values.dtype:
        return values.sum(-1)
    whole = values.shape[-1] // _BLOCK * _BLOCK
    blocks = values[..., :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    return blocks.sum(-1, dtype=dtype) + values[..., whole:].sum(-1, dtype=dtype)


def token_logp(
    logits: Float[Tensor, "*batch V"], tokens: Int[Tensor, "*batch"], temperature: float
) -> Float[Tensor, "*batch"]:
    """log π of the given tokens alone, in the dtype of the logits: `log_softmax(logits/temperature)[token]`.

    Its gradient is one pass over the logits, softmax − one-hot: what per-prompt gradients of S need, at a third of the
    cost of `score_tokens` with a graph.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), tokens.flatten(), reduction="none").reshape(
        tokens.shape
    )


def nucleus(
    logp: Float[Tensor, "*batch V"],
    top_p: float,
    *,
    edge: float = NUCLEUS_EDGE,
    rounding: Float[Tensor, "*batch"] | None = None,
) -> Bool[Tensor, "*batch V"]:
    """Mask of the nucleus: `mass of the tokens that are more probable < top_p + edge`.

    The token that crosses `top_p` stays, as in generation (docs/derivations.md, departure 7). Tokens of equal
    probability are in it together: which of them an engine keeps depends on how it sorts. At top_p ≥ 1 all are in it.
    `rounding` widens the edge and what counts as equal: by how much a sampler's log-probabilities may be off.
    """
    if top_p >= 1.0:
        return torch.ones_like(logp, dtype=torch.bool)
    none = torch.zeros_like(logp[..., 0])
    return logp >= _lowest_inside(logp, none, top_p, edge, none if rounding is None else rounding)


def float32_rounding(top: Float[Tensor, "*batch"], temperature: float) -> Float[Tensor, "*batch"]:
    """How far float32 rounding of logits/temperature moves a difference of two of them, for tokens that count.

    Each quotient is off by up to 2⁻²⁴ of its size, and a token more than 16 nats below the top has less than 2e-7 of
    the mass. A sampler that divides in float32 makes ties of logits that differ by less, and keeps any of them.
    """
    return 2.0**-23 * (top.abs() / temperature + 16.0)


def _lowest_inside(
    logits: Float[Tensor, "*batch V"],
    log_sum: Float[Tensor, "*batch"],
    top_p: float,
    edge: float,
    rounding: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch 1"]:
    """The smallest value that is inside the nucleus of exp(logits − log_sum).

    Read from the largest entries where the nucleus ends among them, else from the sorted row: the same numbers are
    added in the same order.
    """
    rows, log_sums = logits.reshape(-1, logits.shape[-1]), log_sum.reshape(-1)
    vocabulary = rows.shape[-1]
    limits = top_p + edge + rounding.reshape(-1).double()
    lowest = torch.empty_like(log_sums, dtype=rows.dtype)
    largest = (rows.amax(-1) - log_sums).double().exp()
    is_open = torch.ones_like(limits, dtype=torch.bool)
    for size in (*(prefix for prefix in _PREFIXES if 4 * prefix <= vocabulary), vocabulary):
        # `size` entries hold at most `size` times the largest: often it is plain that they are too few
        chosen = (is_open & ((size * largest >= limits) | (size == vocabulary))).nonzero()[:, 0]
        if len(chosen):
            some = rows if len(chosen) == len(rows) else rows[chosen]
            ranked = (
                some.topk(size, dim=-1).values
                if size < vocabulary
                else some.sort(descending=True).values
            )
            lowest[chosen], is_open[chosen] = _edge_of(ranked, log_sums[chosen], limits[chosen])
    return (lowest - rounding.reshape(-1)).reshape(*log_sum.shape, 1)


def _edge_of(
    ranked: Float[Tensor, "N K"], log_sum: Float[Tensor, " N"], mass_limit: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """(the last entry whose predecessors hold less than `mass_limit`, whether that is the last of all)."""
    mass = (ranked - log_sum[:, None]).double().exp()
    inside = (mass.cumsum(-1) - mass < mass_limit[:, None]).sum(-1).clamp(min=1)
    return ranked.gather(1, inside[:, None] - 1)[:, 0], inside == ranked.shape[1]
