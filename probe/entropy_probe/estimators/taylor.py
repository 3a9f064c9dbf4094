"""A function of η that vanishes at 0, against its Taylor series: derivatives from a stencil, and orders in log-log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

STENCIL = (-2, -1, 1, 2)


def stencil_derivatives(f: Mapping[int, float], h: float) -> tuple[float, float, float]:
    """(f′, f″, f‴) at 0, where f(0) = 0, from f at the multiples of h in `STENCIL`; errors h⁴, h⁴, h².

    f′ = (8a₁ − a₂)/12h,   f″ = (16s₁ − s₂)/12h²,   f‴ = (a₂ − 2a₁)/2h³,   a_k = f(kh) − f(−kh), s_k = f(kh) + f(−kh)
    """
    a1, a2, s1, s2 = f[1] - f[-1], f[2] - f[-2], f[1] + f[-1], f[2] + f[-2]
    return (8 * a1 - a2) / (12 * h), (16 * s1 - s2) / (12 * h**2), (a2 - 2 * a1) / (2 * h**3)


def radius(first: float, second: float, third: float) -> float:
    """min(η*, η**), η* = 2|f′|/|f″| and η** = 3|f″|/|f‴|: where a term of the series is as large as the one before it.

    Up to a share x of it, ηf′ is off from f by a share x and ½η²f″ from f − ηf′ by a share x, and orders by as much. η*
    alone says nothing where f″ happens to vanish. 0 where f′ or f″ is zero, NaN where one is not finite.
    """
    if not math.isfinite(first + second + third):
        return math.nan
    ratios = ((2 * abs(first), abs(second)), (3 * abs(second), abs(third)))
    return min(
        above / below if below > 0 else (math.inf if above > 0 else 0.0) for above, below in ratios
    )


def loglog_slope(etas: Float[Tensor, " K"], values: Float[Tensor, " K"]) -> float:
    """Least-squares slope of log|f| against log η; NaN where an f is 0 or not finite."""
    x, y = etas.log(), values.abs().log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum()) if bool(y.isfinite().all()) else math.nan


def order(
    etas: Float[Tensor, " K"],
    values: Float[Tensor, " K"],
    floor: float,
    eta_max: float,
    decades: float,
    mirrored: Float[Tensor, " K"] | None = None,
) -> float | None:
    """`loglog_slope` over the η ≤ eta_max above every one at which |f| ≤ floor, and below the first jump; `None` where
    that leaves fewer decades.

    `mirrored` is ±f(−η), as like f(η) as the next order allows: a jump is seen where it is not (`smooth_up_to`). NaN
    where an f is not finite, or eta_max is NaN.
    """
    if math.isnan(eta_max) or not bool(values.isfinite().all()):
        return math.nan
    below = etas <= eta_max
    chosen = below & _from_which_on((values.abs() > floor) | ~below)
    if mirrored is not None:
        like = (values - mirrored).abs() <= SYMMETRIC * torch.maximum(values.abs(), mirrored.abs())
        chosen = chosen & (etas <= smooth_up_to(etas[chosen], like[chosen], decades))
    return loglog_slope(etas[chosen], values[chosen]) if spans(etas[chosen], decades) else None


SYMMETRIC = 0.5
"""Up to a tenth of its radius a series is off by a tenth where the next order is left out, and its value at −η by a
fifth from that at η; a jump or a kink on one side is all of the difference."""


def smooth_up_to(etas: Float[Tensor, " K"], symmetric: Bool[Tensor, " K"], decades: float) -> float:
    """The largest η below the first, from the smallest on, at which a function is not `symmetric`: a jump or a kink at
    some η shows from there on.

    Infinite where there is none, and where so many decades do not lie below it: what is not symmetric at once is noise,
    or has a wrong derivative, of which nothing is left out.
    """
    below = etas[_up_to_which(symmetric)]
    return float(below[-1]) if len(below) < len(etas) and spans(below, decades) else math.inf


def spans(etas: Float[Tensor, " K"], decades: float) -> bool:
    """Whether the ascending η cover so many decades."""
    return len(etas) > 1 and float((etas[-1] / etas[0]).log10()) >= decades - 1e-9


def _from_which_on(holds: Bool[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """True at k where it holds at k and at all that follow."""
    return _up_to_which(holds.flip(0)).flip(0)


def _up_to_which(holds: Bool[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """True at k where it holds at k and at all before."""
    return holds.long().cumprod(0).bool()


def longest_run(holds: Bool[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """True on the longest stretch on which it holds; of equally long ones, the last."""
    starts = (~holds).long().cumsum(0)  # one number for each stretch
    lengths = torch.bincount(starts[holds]) if bool(holds.any()) else starts.new_zeros(1)
    longest = len(lengths) - 1 - int(lengths.flip(0).argmax())
    return holds & (starts == longest)


def snis_terms(
    weights: Float[Tensor, "B G"],
    payload: Float[Tensor, "B G"],
    d_payload: Float[Tensor, "B G"],
    d_seq_logp: Float[Tensor, "B G"],
) -> Float[Tensor, "2 B G"]:
    """ŵ(f − Ĥ)·D_vS and ŵ·D_vf, which add up to dĤ/dη at 0 of Ĥ(η) = Σŵf, log w = S(θ + ηv) − log q, Ĥ = Σŵf.

    ŵ = 1/N where the responses come from π, and the bar is that of all N responses, their own included: another one
    gives the same expectation and another number.
    """
    return torch.stack(
        [weights * (payload - (weights * payload).sum()) * d_seq_logp, weights * d_payload]
    )


def identity_error(
    by_difference: float, terms: Float[Tensor, "2 B G"], rounding: float
) -> float | None:
    """|by_difference − Σterms|/Σ|terms|, infinite where all terms are 0; `None` where neither exceeds `rounding`."""
    size = float(terms.abs().sum())
    if max(size, abs(by_difference)) <= rounding:
        return None
    return abs(by_difference - float(terms.sum())) / size if size > 0 else math.inf
