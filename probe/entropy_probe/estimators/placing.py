"""Where a sampled token stands among all: what the probability integral transform of a response is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.policy import added, float32_rounding, nucleus
from entropy_probe.estimators.token_stats import rows_in_chunk

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def mass_before(
    logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    temperature: float,
    top_p: float,
) -> Float[Tensor, "N 2"]:
    """q of all tokens that come before the sampled one y, in two orders:

        Σ_x q(x) [q(x) > q(y), or q(x) = q(y) and x < y]      the likelier first
        Σ_x q(x) [r(x) < r(y)]                                as the sampler halves the vocabulary (`halving_ranks`)

    If y was drawn from q and u is uniform, mass + u·q(y) is uniform too: that of one token by itself, whatever the
    tokens before it were (Rosenblatt, 1952; Smith, 1985, for discrete y). What was drawn at another temperature or
    from another nucleus shows in the first order; noise that two responses share shows in both, and in the second one
    even where their distributions have nothing in common.
    """
    rows = rows_in_chunk(logits)
    parts = zip(logits.detach().split(rows), tokens.split(rows), strict=True)
    return torch.cat([_of_rows(z, y[:, None], temperature, top_p) for z, y in parts])


def _of_rows(z: Tensor, y: Tensor, temperature: float, top_p: float) -> Tensor:
    scaled = z.to(torch.promote_types(z.dtype, torch.float32))
    scaled = scaled if temperature == 1.0 else scaled / temperature
    q = torch.softmax(scaled, -1)
    if top_p < 1.0:
        rounding = float32_rounding(z.amax(-1), temperature)
        inside = nucleus(torch.log_softmax(scaled, -1), top_p, rounding=rounding)
        q = q.masked_fill_(~inside, 0.0)
        q /= q.sum(-1, keepdim=True)
    own = scaled.gather(-1, y)
    likelier = _ones(torch.gt, scaled, own, q)
    at_least = added(_ones(torch.ge, scaled, own, q), torch.float64)
    if bool((at_least - added(likelier, torch.float64) > 1).any()):  # others are as likely
        likelier += (scaled == own) & (torch.arange(q.shape[-1], device=q.device) < y)
    ranks = halving_ranks(q.shape[-1]).to(q)  # whole numbers far below 2^24
    masses = [added(likelier.mul_(q), torch.float64)]
    masses += [added(_ones(torch.lt, ranks, ranks[y], q).mul_(q), torch.float64)]
    return torch.stack(masses, -1)


def _ones(compare: Callable[..., Tensor], one: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """1 where the comparison holds, else 0, as a factor of `like`: in one pass, where booleans would take three."""
    return compare(one, other, out=torch.empty_like(like))


@cache
def halving_ranks(vocabulary: int) -> Int[Tensor, " V"]:
    """r(x): ids laid on one another in halves, until one is left; the last fold decides first.

    For a vocabulary of 2^k it is the number with the bits of x in reverse. `drawing.draw` chooses a token by
    inverting sums in this order, digit by digit.
    """
    place, ranks = torch.arange(vocabulary), torch.zeros(vocabulary, dtype=torch.long)
    size, digit = vocabulary, 1
    while size > 1:
        half = (size + 1) // 2
        upper = place >= half
        ranks += digit * upper
        place -= half * upper
        size, digit = half, 2 * digit
    return ranks
