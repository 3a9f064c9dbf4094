"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from entropy_probe_checks.audit.baselines import coefficients
from entropy_probe_checks.audit.first_order import ALL, gram, learning_rate
from entropy_probe_checks.audit.sheet import Sheet, both, ratio, se

Pair = tuple[np.ndarray, np.ndarray]
"""Slope and curvature, by prompt (the slope by unit, where it is cross-fitted)."""


class Along(NamedTuple):
    """By what ΔH is predicted: per response, per token, and as the configuration asks; up to which η; the sd of the
    change per token over update batches; and the coefficients of entropy and length."""

    of_response: Pair
    of_tokens: Pair
    asked: Pair
    reach: float
    spread: float | None
    c: list[np.ndarray]


def write(sheet: Sheet) -> Along:
    """Section `update`, the parts of the slope, and what the change is predicted by."""
    write, estimates = partial(sheet.write, "update"), partial(sheet.estimates, "update")
    lr, t, rho = learning_rate(sheet)[0], sheet.lengths("e"), sheet["e.d_rounding"]
    of_tokens = sheet.of("e", "logp entropy d_logp d_entropy d2_logp d2_entropy")
    s, r, d_s, d_r, d2_s, d2_r = (x.sum(-1) for x in of_tokens)
    group, ones = t.shape[1], np.ones(t.shape)
    centred = (s - s.mean(1, keepdims=True)) * group / (group - 1)  # S − S̄ of the others
    by = {"naive": -(centred * d_s).mean(1)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        by[f"rb_{baseline}"] = of_responses(sheet, coefficients(sheet, baseline))[0].mean(1)
    c, c_length = coefficients(sheet)
    d, d2, e, e2 = of_responses(sheet, [c, c_length])
    slope, bent, (token, bent_token) = d.mean(1), d2.mean(1), of_ratio(r, t, d, d2, e, e2)
    used, used_token, cross, cross_token, size, size_token = slope, token, None, None, 0.0, 0.0
    if sheet.u == "e":
        (cross, size), (cross_token, size_token) = _cross(sheet, "u"), _cross(sheet, "crossed")
        used, used_token = cross, cross_token
    configured = sheet.config["first_order"]["baseline"]
    write(baseline="hk_group" if configured == "auto" else configured)
    write(estimators={name: both(of) for name, of in by.items()})
    estimates(delta_h1_per_lr_naive=by["naive"], delta_h1_per_lr_rb=slope)
    estimates(delta_h1_per_lr_per_token=token)
    estimates(size, delta_h1_per_lr_cross=cross)
    estimates(size_token, delta_h1_per_lr_cross_per_token=cross_token)
    estimates(curvature=bent, curvature_per_token=bent_token)

    # of Σŵ⁺R⁺ and Σŵ⁺R⁺/Σŵ⁺T: at 0 ŵ moves by D_vS and D²_vS + (D_vS)²
    d2_w, over = d2_s + d_s**2, r - r.mean()
    (change, change2), (change_token, _) = (
        of_ratio(r, x, d_r + r * d_s, d2_r + 2 * d_r * d_s + r * d2_w, x * d_s, x * d2_w)
        for x in (ones, t)
    )
    write(slope_of_change=change.mean(), slope_of_change_per_token=change_token.mean())
    write(slope_of_change_size=(abs(d_r) + abs(over * d_s)).mean())
    write(curvature_of_change=change2.mean())
    write(curvature_of_change_size=(abs(d2_r) + abs(2 * d_r * d_s) + abs(over * d2_w)).mean())
    # what the rounding ρ of each token's D_v can do to a sum of weights · D_v
    naive, h = sheet.config["first_order"]["estimator"] == "naive", r.sum() / t.sum()
    for name, weight, number in (
        ("slope_rounding", abs(centred)[..., None] if naive else 1 + abs(c), t.size),
        ("slope_rounding_per_token", 1 + abs(c - h * c_length), t.sum()),
        ("slope_of_change_rounding", 1 + abs(over)[..., None], t.size),
    ):
        write(**{name: math.sqrt(((weight * rho) ** 2).sum()) / number})
    # −X̄ᵀD·Y_u of every unit, weighted by its share of the prompts; over update batches their sum has sd √U·sd_u
    prompts, spread = np.bincount(sheet[f"{sheet.u}.unit_of_prompt"]), None
    for ending, x in (("", "x"), ("_per_token", "xt")):
        units, of_v0 = -sheet[f"u.y_d{x}"] * prompts / prompts.sum(), -sheet[f"e.{x}_v0"].sum()
        spread = lr * math.sqrt(len(units)) * units.std(ddof=1) if len(units) > 1 else None
        write(**{f"slope_of_v0{ending}": of_v0, f"slope_by_unit{ending}": units})
        write(**{f"spread_over_batches{ending}": spread})
    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    squares = sheet.of("sum", "v_squared v0_squared y_bar_squared")
    squares[2] = squares[2][moved]
    v, v0, y = (math.sqrt(of.sum()) for of in squares)
    most = sheet.report["recipe"]["settings"]["max_grad_norm"]["value"]
    write(norm=v, norm_v0=v0, momentum_share=sheet["sum.v0_v"].sum() / v**2 if v else 0.0)
    write(grad_norm=y, clip_factor=1.0 if most is None else min(1.0, most / (y + 1e-6)))
    # of the slope, mean[D_vR] over the mean length or over 1, and what is left
    for ending, length, whole in (("", t, token), ("_per_response", ones, slope)):
        own = lr * ratio(d_r, length)
        left = {f"of_entropies{ending}": own, f"of_visits{ending}": lr * whole - own}
        sheet.estimates("predictors", lr * abs(d_r).sum() / length.sum(), **left)

    pairs = (used, bent), (used_token, bent_token)
    asked = pairs[sheet.config["true_delta_h"]["normalize"] == "per_token"]
    # η* = 2|slope/curvature|, where the curvature is decided; a tenth of it, with 2 SE in place of a smaller slope
    (a, b), (se_a, se_b) = [abs(x.mean()) for x in asked], map(se, asked)
    decided = b and b >= 2 * se_b
    write(eta_star=2 * a / b if decided else None)
    reach = 0.2 * max(a, 2 * se_a) / b if decided else math.inf
    return Along(*pairs, asked, reach, spread, [c, c_length])


def _cross(sheet: Sheet, prefix: str) -> tuple[np.ndarray, float]:
    """−X̄ᵀv₀ − U_cross of K_um = X_uᵀDY_m, the slope along v without its diagonal; by unit −X_uᵀv₀ − 2r_u + U_cross."""
    r, _, _, size = gram(sheet, f"{prefix}.gram_d", ALL)
    return -sheet[f"{prefix}.x_v0"] - (2 * r - r.mean()), size


def of_responses(sheet: Sheet, coefficients: list[np.ndarray]) -> list[np.ndarray]:
    """What a response says of ΔH and of the change of length ΔL at 0, D′, D″, E′, E″ [B, G]: derivatives of

    Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = sheet.of("e", "d_logp d_entropy d2_logp d2_entropy")
    before, found = np.cumsum(d, -1) - d, []
    for c, of_h in zip(coefficients, (1.0, 0.0), strict=True):
        once = of_h * d_h + c * d
        twice = of_h * d2_h + c * (d2 + d**2) + 2 * before * once
        found += [once.sum(-1), twice.sum(-1)]
    return found


def of_ratio(m: np.ndarray, l: np.ndarray, *moves: np.ndarray) -> Pair:
    """h′ = (M′ − hL′)/L and h″ = (M″ − hL″ − 2h′L′)/L of h = M/L, means over responses that move by M′, M″, L′, L″; by
    prompt, with the derivatives of (M_i − h·L_i)/L of its responses."""
    (m1, m2, l1, l2), mean, h = moves, l.mean(), m.mean() / l.mean()
    h1 = (m1 - h * l1).mean() / mean
    h2 = (m2 - h * l2 - 2 * h1 * l1).mean() / mean
    at_0 = (m - h * l) / mean
    once = (m1 - h * l1 - h1 * l - l1.mean() * at_0) / mean
    twice = (m2 - h * l2 - 2 * h1 * l1 - h2 * l - l2.mean() * at_0 - 2 * l1.mean() * once) / mean
    return h1 + once.mean(1), h2 + twice.mean(1)
