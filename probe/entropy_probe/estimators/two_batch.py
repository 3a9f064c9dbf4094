"""The first-order term of two independent batches: X from E, Y from U."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class TwoBatchMoments:
    """X̄_EᵀPȲ_U, its projections s_k = X_kᵀPȲ_U and t_m = X̄_EᵀPY_m, s²_int, and standard errors given U and in all."""

    bars_dot: float
    projections: Float[Tensor, " E"]
    update_projections: Float[Tensor, " U"]
    interaction: float | None
    conditional_se: float
    total_se: float | None


def two_batch_moments_of_sums(
    s: Float[Tensor, " E"], t: Float[Tensor, " U"], sizes_e: Int[Tensor, " E"]
) -> TwoBatchMoments:
    """`two_batch_moments` where only s_k = X_kᵀPȲ_U and t_m = X̄_EᵀPY_m are known.

    s²_int needs every X_kᵀPY_m. Without it the interaction is counted twice: `total_se` is too large, by up to √2.
    """
    mean = float((sizes_e.double() / sizes_e.sum()) @ s)
    var_s = float(s.var()) / len(s)
    total = math.sqrt(var_s + float(t.var()) / len(t)) if len(t) > 1 else None
    return TwoBatchMoments(mean, s, t, None, math.sqrt(var_s), total)


def two_batch_moments(
    gram: Float[Tensor, "E U"], sizes_e: Int[Tensor, " E"], sizes_u: Int[Tensor, " U"]
) -> TwoBatchMoments:
    """Moments of K_km = X_kᵀPY_m with k in E, m in U; a unit is a prompt, or a block weighted by its `sizes`. Needs two
    of E; what a single unit of U does not tell is `None`.

        bars_dot = mean(K),  s_k = mean_m K_km,  t_m = mean_k K_km        (no diagonal to remove)
        Var(· | U) = s²(s_k)/B_E
        Var        = s²(s_k)/B_E + s²(t_m)/B_U − s²_int/(B_E·B_U),   not below ¼·s²_int/(B_E·B_U)
        s²_int     = Σ(K_km − s_k − t_m + mean)²/((B_E−1)(B_U−1))

    Both s²(s_k)/B_E and s²(t_m)/B_U hold the interaction s²_int/(B_E·B_U): subtracting it once leaves it counted once.
    Where prompts do not differ on average it is the whole variance, and one estimate in six would come out negative:
    the floor is a quarter of it. Intervals then cover 98 %, and the SE is 1.05 to 1.09 of the truth; with all of it for
    the floor, or the larger of the first two terms, 1.17 to 1.26 (`tests/test_oracle.py::test_two_batches`). So the SE
    in all may come out below the one given U.
    """
    gram = gram.double()
    size_e, size_u = gram.shape
    weights_e, weights_u = (sizes.double() / sizes.sum() for sizes in (sizes_e, sizes_u))
    s, t = gram @ weights_u, weights_e @ gram
    mean = weights_e @ s
    var_s = float(s.var()) / size_e
    if size_u == 1:
        return TwoBatchMoments(float(mean), s, t, None, math.sqrt(var_s), None)
    var_t = float(t.var()) / size_u
    residual = gram - s[:, None] - t[None, :] + mean
    interaction = float(residual.square().sum()) / ((size_e - 1) * (size_u - 1))
    of_both = interaction / (size_e * size_u)
    total = max(var_s + var_t - of_both, of_both / 4)
    return TwoBatchMoments(float(mean), s, t, interaction, math.sqrt(var_s), math.sqrt(total))
