"""Do Adam's second moments belong to the tensors that hold them? Gradients of the same tensor look like them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

# Entries of a tensor share rows and columns: their correlation is less sure than that of as many independent ones.
_SHARED = 0.04
_FEWEST = 8


def log_correlations(
    squares: Float[Tensor, "K n"], moments: Float[Tensor, "K n"]
) -> tuple[Tensor, Tensor]:
    """(atanh r_ij, n_ij): r_ij is the correlation of log squares_i and log moments_j over the n_ij entries at which
    both are positive; 0 where these are fewer than 8 or constant."""
    has_a, has_b = (squares > 0).double(), (moments > 0).double()
    a, b = (torch.where(x > 0, x.double(), 1.0).log() for x in (squares, moments))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    a, b = a * has_a, b * has_b
    count = has_a @ has_b.T
    size = count.clamp(min=1)
    mean_a, mean_b = a @ has_b.T / size, has_a @ b.T / size
    var_a = (a.square() @ has_b.T / size - mean_a.square()).clamp(min=0)
    var_b = (has_a @ b.square().T / size - mean_b.square()).clamp(min=0)
    scale = (var_a * var_b).sqrt()
    known = (count >= _FEWEST) & (scale > 1e-12)
    r = torch.where(known, (a @ b.T / size - mean_a * mean_b) / torch.where(known, scale, 1.0), 0.0)
    return r.clamp(-0.999, 0.999).atanh(), count


def exchange_evidence(
    squares: Float[Tensor, "K n"], moments: Float[Tensor, "K n"]
) -> Float[Tensor, "K K"]:
    """How much better tensors i and j would fit each other's second moments than their own, in standard errors:

        ½(z_ij + z_ji − z_ii − z_jj)/√(1/(n−3) + 0.04²),   z_ij = atanh corr(log squares_i, log moments_j)

    `squares` are gradients squared (their mean over prompts), of tensors of one shape. Clearly negative where each has
    its own, clearly positive where the two were exchanged, near 0 where nothing can be said; the diagonal is 0.
    """
    z, count = log_correlations(squares, moments)
    own = z.diagonal()
    gain = 0.5 * (z + z.T - own[:, None] - own[None, :])
    fewest = torch.minimum(count, count.T).clamp(min=_FEWEST)
    return gain / (1 / (fewest - 3) + _SHARED**2).sqrt()
