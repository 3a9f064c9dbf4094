"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from entropy_probe_checks.audit.baselines import coefficients
from entropy_probe_checks.audit.estimate import both, ratio
from entropy_probe_checks.audit.first_order import gram, learning_rate
from entropy_probe_checks.audit.sheet import Sheet

Two = tuple[np.ndarray, np.ndarray]
"""A first and a second derivative."""


class Along(NamedTuple):
    """By what the change per response or per token is predicted: slope by unit, curvature by prompt; what a response
    counts, 1 or its length; coefficients of its tokens in the change of entropy and of that count; and the sd of the
    change over update batches."""

    slope: np.ndarray
    curvature: np.ndarray
    t: np.ndarray
    c: np.ndarray
    c_t: np.ndarray
    spread: float | None


def write(sheet: Sheet) -> list[Along]:
    """Section `update`, the parts of the slope; and what the change is predicted by, per response and per token."""
    write, estimates = partial(sheet.write, "update"), partial(sheet.estimates, "update")
    of_tokens = sheet.of("e", "logp entropy d_logp d_entropy d2_logp d2_entropy")
    s, r, d_s, d_r, d2_s, d2_r = (x.sum(-1) for x in of_tokens)
    group, config = s.shape[1], sheet.config["first_order"]
    centred = (s - s.mean(1, keepdims=True)) * group / (group - 1)  # S − S̄ of the others
    by = {"naive": -(centred * d_s).mean(1)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        c, _ = coefficients(sheet, baseline)
        by[f"rb_{baseline}"], _ = by_derivatives(sheet, np.ones(s.shape), c, 0 * c)
    write(estimators={name: both(of) for name, of in by.items()})
    write(baseline="hk_group" if config["baseline"] == "auto" else config["baseline"])
    estimates(delta_h1_per_lr_naive=by["naive"])

    # of Σŵ⁺R⁺: at 0 ŵ moves by D_vS and D²_vS + (D_vS)²
    d2_w, over = d2_s + d_s**2, r - r.mean()
    weighted = d_r + r * d_s, d2_r + 2 * d_r * d_s + r * d2_w
    write(curvature_of_change=of_ratio(r, np.ones(s.shape), weighted, (d_s, d2_w))[1].mean())
    write(slope_of_change_size=(abs(d_r) + abs(over * d_s)).mean())
    write(curvature_of_change_size=(abs(d2_r) + abs(2 * d_r * d_s) + abs(over * d2_w)).mean())

    def rounding(name: str, weight: np.ndarray, number: float) -> None:
        """What the rounding ρ of each token's D_v can do to a mean of weights · D_v."""
        write(**{name: math.sqrt(((weight * sheet["e.d_rounding"]) ** 2).sum()) / number})

    rounding("slope_of_change_rounding", 1 + abs(over)[..., None], s.size)
    (c, c_length), found = coefficients(sheet), []
    for ending, t, c_t in (
        ("", np.ones(s.shape), 0 * c),
        ("_per_token", sheet.lengths("e"), c_length),
    ):
        slope, bent = by_derivatives(sheet, t, c, c_t)
        change, _ = of_ratio(r, t, weighted, (t * d_s, t * d2_w))
        estimates(**{f"delta_h1_per_lr{ending or '_rb'}": slope, f"curvature{ending}": bent})
        write(**{f"slope_of_change{ending}": change.mean()})
        by_naive = config["estimator"] == "naive" and not ending
        weight = abs(centred)[..., None] if by_naive else 1 + abs(c - r.sum() / t.sum() * c_t)
        rounding(f"slope_rounding{ending}", weight, t.sum())
        # mean[D_vR] over the mean length or over 1, and what is left
        lr, entropies = learning_rate(sheet)[0], ratio(d_r, t)
        of = "" if ending else "_per_response"
        parts = {f"of_entropies{of}": lr * entropies, f"of_visits{of}": lr * (slope - entropies)}
        sheet.estimates("predictors", lr * abs(d_r).sum() / t.sum(), **parts)
        # −X̄ᵀD·Y_u of every unit, weighted by its share of the prompts; over update batches their sum has sd √U·sd_u
        x, spread = "xt" if ending else "x", None
        prompts = np.bincount(sheet[f"{sheet.u}.unit_of_prompt"])
        units, of_v0 = -sheet[f"u.y_d{x}"] * prompts / prompts.sum(), -sheet[f"e.{x}_v0"].sum()
        if len(units) > 1:
            spread = lr * math.sqrt(len(units)) * units.std(ddof=1)
        write(**{f"slope_of_v0{ending}": of_v0, f"slope_by_unit{ending}": units})
        write(**{f"spread_over_batches{ending}": spread})
        if sheet.u == "e":
            slope, size = _cross(sheet, "crossed" if ending else "u")
            estimates(size, **{f"delta_h1_per_lr_cross{ending}": slope})
        found.append(Along(slope, bent, t, c, c_t, spread))

    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    squares = sheet.of("sum", "v_squared v0_squared y_bar_squared")
    squares[2] = squares[2][moved]
    v, v0, y = (math.sqrt(of.sum()) for of in squares)
    most = sheet.report["recipe"]["settings"]["max_grad_norm"]["value"]
    write(norm=v, norm_v0=v0, momentum_share=sheet["sum.v0_v"].sum() / v**2 if v else 0.0)
    write(grad_norm=y, clip_factor=1.0 if most is None else min(1.0, most / (y + 1e-6)))
    return found


def _cross(sheet: Sheet, prefix: str) -> tuple[np.ndarray, float]:
    """−X̄ᵀv₀ − U_cross of K_um = X_uᵀDY_m, the slope along v without its diagonal; by unit −X_uᵀv₀ − 2r_u + U_cross."""
    every = np.ones((1, len(sheet.facts["moved"])))
    (r,), _, _, size = gram(sheet, f"{prefix}.gram_d", every)
    return -sheet[f"{prefix}.x_v0"] - (2 * r - r.mean()), size


def by_derivatives(sheet: Sheet, t: np.ndarray, c: np.ndarray, c_t: np.ndarray) -> Two:
    """Slope and curvature of ΔH (per response: t is 1, c_t is 0) from derivatives at 0 of what each response says of it,

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = sheet.of("e", "d_logp d_entropy d2_logp d2_entropy")
    before, moves = np.cumsum(d, -1) - d, []
    for weight, once_h, twice_h in ((c, d_h, d2_h), (c_t, 0.0, 0.0)):
        once = once_h + weight * d
        twice = twice_h + weight * (d2 + d**2) + 2 * before * once
        moves.append((once.sum(-1), twice.sum(-1)))
    return of_ratio(sheet["e.entropy"].sum(-1), t, *moves)


def of_ratio(m: np.ndarray, l: np.ndarray, of_m: Two, of_l: Two) -> Two:
    """h′ = (M′ − hL′)/L and h″ = (M″ − hL″ − 2h′L′)/L of h = M/L, means over responses that move by M′, M″, L′, L″; by
    prompt, with the derivatives of (M_i − h·L_i)/L of its responses."""
    (m1, m2), (l1, l2), mean, h = of_m, of_l, l.mean(), m.mean() / l.mean()
    h1 = (m1 - h * l1).mean() / mean
    h2 = (m2 - h * l2 - 2 * h1 * l1).mean() / mean
    at_0 = (m - h * l) / mean
    once = (m1 - h * l1 - h1 * l - l1.mean() * at_0) / mean
    twice = (m2 - h * l2 - 2 * h1 * l1 - h2 * l - l2.mean() * at_0 - 2 * l1.mean() * once) / mean
    return h1 + once.mean(1), h2 + twice.mean(1)
