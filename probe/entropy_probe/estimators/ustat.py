"""The cross-prompt U-statistic of one batch, from the matrix K_nm = X_nᵀ P Y_m of its units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.special import stdtrit
from torch import Tensor

from entropy_probe.report import UStatistic

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class CrossMoments:
    """What the U-statistic needs of K: X̄ᵀPȲ, the diagonal sum, the row means r_u; U units."""

    u_cross: float
    bars_dot: float
    diag_sum: float
    row_means: Float[Tensor, " U"]
    num_units: int


def cross_moments(gram: Float[Tensor, "U U"]) -> CrossMoments:
    """Moments of K_nm = X_nᵀPY_m, summed in float64.

        U_cross  = Σ_{n≠m} K_nm / (U(U−1))      = U/(U−1)·bars_dot − diag_sum/(U(U−1))
        bars_dot = Σ_nm K_nm / U²,   diag_sum = Σ_n K_nn
        r_n      = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn] / (U−1),   mean(r) = U_cross

    U_cross is summed from the off-diagonal entries themselves: as a difference of `bars_dot` and `diag_sum` it would
    lose the digits in which the two agree. Needs U ≥ 2.
    """
    gram = gram.double()
    num_units = gram.shape[0]
    off_diagonal = gram.clone().fill_diagonal_(0.0)
    row_means = 0.5 * (off_diagonal.sum(1) + off_diagonal.sum(0)) / (num_units - 1)
    return CrossMoments(
        u_cross=float(off_diagonal.sum()) / (num_units * (num_units - 1)),
        bars_dot=float(gram.sum()) / num_units**2,
        diag_sum=float(gram.diagonal().sum()),
        row_means=row_means,
        num_units=num_units,
    )


def cross_moments_of_sums(sums: Float[Tensor, "U 3"]) -> CrossMoments:
    """`cross_moments` where only (Σ_m K_nm, Σ_m K_mn, K_nn) of each unit n is known; needs U ≥ 2.

    The diagonal is taken away from each row and not from the whole: U_cross loses the digits of its own row alone.
    """
    rows, columns, diagonal = sums.double().unbind(1)
    num_units = len(sums)
    row_means = 0.5 * ((rows - diagonal) + (columns - diagonal)) / (num_units - 1)
    return CrossMoments(
        u_cross=float(row_means.sum()) / num_units,
        bars_dot=float(rows.sum()) / num_units**2,
        diag_sum=float(diagonal.sum()),
        row_means=row_means,
        num_units=num_units,
    )


def u_statistic(moments: CrossMoments, gram: Float[Tensor, "U U"] | None) -> UStatistic:
    """Plug-in, jackknife and unbiased variance of U_cross. The last needs every K_nm: `None` without `gram`.

        Q = Σ_u (r_u − r̄)²
        ζ̂₁ plug-in   = Q/(U−1),                     se_plugin    = √(4ζ̂₁/U)
        U_{−u}       = (U·U_cross − 2r_u)/(U−2),    se_jackknife = √((U−1)/U·Σ(U_{−u} − mean)²)
        ζ̂₁ jackknife = U/4·se_jackknife²;           se_jackknife/se_plugin = (U−1)/(U−2) exactly

    Where the signal is weak both overstate the variance, by up to 2(U−2)/(U−1) and 2(U−1)/(U−2).
    """
    r = moments.row_means
    units = moments.num_units
    zeta1_plugin = float((r - r.mean()).square().sum()) / (units - 1)
    zeta1_jackknife = se_jackknife = None
    if units >= 3:
        if gram is None:
            own = 2 * (units - 1) * r
            total = own.sum() / 2
        else:
            k = gram.double()
            own = k.sum(1) + k.sum(0) - 2 * k.diagonal()
            total = k.sum() - k.diagonal().sum()
        leave_one_out = (total - own) / ((units - 1) * (units - 2))
        variance = (
            (units - 1) / units * float((leave_one_out - leave_one_out.mean()).square().sum())
        )
        zeta1_jackknife, se_jackknife = units / 4 * variance, math.sqrt(variance)
    return UStatistic(
        u_cross=moments.u_cross,
        zeta1_plugin=zeta1_plugin,
        zeta1_jackknife=zeta1_jackknife,
        se_plugin=math.sqrt(4 * zeta1_plugin / units),
        se_jackknife=se_jackknife,
        var_unbiased=None if units < 5 or gram is None else unbiased_variance(moments, gram),
    )


def interval(statistic: UStatistic, num_units: int, level: float = 0.95) -> tuple[float, float]:
    """U_cross ± t_{U−1}·se_plugin."""
    half = float(stdtrit(num_units - 1, 0.5 + level / 2)) * statistic.se_plugin
    return statistic.u_cross - half, statistic.u_cross + half


def unbiased_variance(moments: CrossMoments, gram: Float[Tensor, "U U"]) -> float:
    """Unbiased estimate of Var(U_cross) from h_ij = ½(K_ij + K_ji); may be negative. Needs U ≥ 5.

    W = mean_{i<j}(h_ij − U_cross)²,   A = Q(U−1)/(U−2)
    V = [4(U−2)(A−W)/(U−4) + 2W] / [U(U−1) + 4(U−2)/(U−4) − 2]
    """
    units = moments.num_units
    kernel = 0.5 * (gram + gram.T).double()
    above = torch.triu_indices(units, units, offset=1, device=kernel.device)
    w = float((kernel[above[0], above[1]] - moments.u_cross).square().mean())
    q = float((moments.row_means - moments.row_means.mean()).square().sum())
    a = q * (units - 1) / (units - 2)
    slope = 4 * (units - 2) / (units - 4)
    return (slope * (a - w) + 2 * w) / (units * (units - 1) + slope - 2)
