"""The policy π = softmax(logits/temperature), what was sampled from it (q), and the entropy of π."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Mass by which the edge of the nucleus may be off: a float32 cumulative sum over a vocabulary of 2e5 is off by at
# most about 2e-7 in the samplers that draw responses, and a sampled token must never get log q = −∞ for that.
_NUCLEUS_EDGE = 1e-6


@dataclass(frozen=True)
class TokenScores:
    """log π and log q of the given tokens, and the entropy of π at their positions; [N, T] each."""

    logp: Float[Tensor, "N T"]
    logq: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]


def score_tokens(
    logits: Float[Tensor, "N T V"], tokens: Int[Tensor, "N T"], temperature: float, top_p: float
) -> TokenScores:
    """Score `tokens` under the logits that predict them.

        logp = log_softmax(logits/temperature);   token_logp = logp[token];   entropy = −Σ exp(logp)·logp
        logq = logp − logsumexp(logp over the nucleus) inside the nucleus, −∞ outside (= logp at top_p = 1)

    Differentiable in the logits, in reverse and in forward mode. Computed in the dtype of the logits. Logits of −∞ are
    tokens of probability zero; they add nothing to the entropy.
    """
    logp = torch.log_softmax(logits / temperature, dim=-1)
    token_logp = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    finite_logp = logp.masked_fill(torch.isneginf(logp), 0.0)
    entropy = -(logp.exp() * finite_logp).sum(-1)
    if top_p >= 1.0:
        return TokenScores(token_logp, token_logp, entropy)
    inside = nucleus(logp, top_p)
    log_mass = logp.masked_fill(~inside, float("-inf")).logsumexp(-1)
    token_inside = inside.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    token_logq = (token_logp - log_mass).masked_fill(~token_inside, float("-inf"))
    return TokenScores(token_logp, token_logq, entropy)


def nucleus(logp: Float[Tensor, "*batch V"], top_p: float) -> Tensor:
    """Boolean mask of the nucleus: a token is in it if the tokens above it hold less than `top_p` of the mass.

    The token that crosses `top_p` stays, as in generation (docs/derivations.md, departure 7).
    """
    sorted_logp, order = logp.sort(dim=-1, descending=True, stable=True)
    mass = sorted_logp.exp()
    mass_above = mass.cumsum(-1, dtype=torch.float64) - mass
    return torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, mass_above < top_p + _NUCLEUS_EDGE)
