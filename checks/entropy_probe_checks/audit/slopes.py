"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit.first_order import gram, learning_rate
from entropy_probe_checks.audit.sheet import Array, Sheet, both, ratio, se

# of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing
NOTICED = 1e-6
# of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0

Along = tuple[Array, Array, Array, Array, Array]
"""By what the change per response or per token is predicted: slope by unit and curvature by prompt; what a response
counts, 1 or its length; and the coefficients of its tokens in the change of entropy and of that count."""


def write(sheet: Sheet) -> list[Along]:
    """Section `update`, the parts of the slope; and what the change is predicted by, per response and per token."""
    write, estimates = partial(sheet.write, "update"), partial(sheet.estimates, "update")
    of_tokens = sheet.of("e", "logp entropy d_logp d_entropy d2_logp d2_entropy")
    s, r, d_s, d_r, d2_s, d2_r = (x.sum(-1) for x in of_tokens)
    group, config, rho = s.shape[1], sheet.config["first_order"], sheet["e.d_rounding"]
    centred = (s - s.mean(1, keepdims=True)) * group / (group - 1)  # S − S̄ of the others
    by, ones = {"naive": -(centred * d_s).mean(1)}, np.ones(s.shape)
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        c, _ = coefficients(sheet, baseline)
        by[f"rb_{baseline}"], _ = by_derivatives(sheet, ones, c, 0 * c)
    write(estimators={name: both(of) for name, of in by.items()})
    write(baseline="hk_group" if config["baseline"] == "auto" else config["baseline"])
    estimates(delta_h1_per_lr_naive=by["naive"])

    # of Σŵ⁺R⁺: at 0 ŵ moves by D_vS and D²_vS + (D_vS)²
    d2_w, over = d2_s + d_s**2, r - r.mean()
    terms, terms2 = (d_r, over * d_s), (d2_r, 2 * d_r * d_s, over * d2_w)
    twice = np.sum(terms2, 0).mean() - 2 * np.sum(terms, 0).mean() * d_s.mean()
    size, size2 = (np.abs(of).sum(0).mean() for of in (terms, terms2))
    write(curvature_of_change=twice, curvature_of_change_size=size2, slope_of_change_size=size)
    # the rounding ρ of each token's D_v in a mean of weights · D_v: √Σ(weight·ρ)²
    write(slope_of_change_rounding=np.linalg.norm((1 + abs(over)[..., None]) * rho) / s.size)

    (c, c_length), lr, found = coefficients(sheet), learning_rate(sheet)[0], []
    for ending, t, c_t in ("", ones, 0 * c), ("_per_token", sheet.lengths("e"), c_length):
        slope, bent = by_derivatives(sheet, t, c, c_t)
        estimates(**{f"delta_h1_per_lr{ending or '_rb'}": slope, f"curvature{ending}": bent})
        h, by_naive = r.sum() / t.sum(), config["estimator"] == "naive" and not ending
        weight = abs(centred)[..., None] if by_naive else 1 + abs(c - h * c_t)
        write(**{f"slope_rounding{ending}": np.linalg.norm(weight * rho) / t.sum()})
        write(**{f"slope_of_change{ending}": (d_r + (r - h * t) * d_s).sum() / t.sum()})
        # mean[D_vR] over the mean length or over 1, and what is left
        of, entropies = "" if ending else "_per_response", lr * ratio(d_r, t)
        parts = {f"of_entropies{of}": entropies, f"of_visits{of}": lr * slope - entropies}
        sheet.estimates("predictors", lr * abs(d_r).sum() / t.sum(), **parts)
        # −X̄ᵀD·Y_u of every unit, weighted by its share of the prompts; over update batches their sum has sd √U·sd_u
        x, prompts = "xt" if ending else "x", np.bincount(sheet[f"{sheet.u}.unit_of_prompt"])
        units, of_v0 = -sheet[f"u.y_d{x}"] * prompts / prompts.sum(), -sheet[f"e.{x}_v0"].sum()
        spread = lr * len(units) * se(units) if len(units) > 1 else None
        write(**{f"slope_of_v0{ending}": of_v0, f"slope_by_unit{ending}": units})
        write(**{f"spread_over_batches{ending}": spread})
        if sheet.u == "e":
            # without the diagonal of K_um = X_uᵀDY_m: −X̄ᵀv₀ − U_cross; by unit −X_uᵀv₀ − 2r_u + U_cross
            which, every = "crossed" if ending else "u", np.ones((1, len(sheet.facts["moved"])))
            (r_u,), _, _, size = gram(sheet, f"{which}.gram_d", every)
            slope = -sheet[f"{which}.x_v0"] - (2 * r_u - r_u.mean())
            estimates(size, **{f"delta_h1_per_lr_cross{ending}": slope})
        found.append((slope, bent, t, c, c_t))

    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    v, v0 = (math.sqrt(of.sum()) for of in sheet.of("sum", "v_squared v0_squared"))
    y = math.sqrt(sheet["sum.y_bar_squared"][moved].sum())
    most = sheet.report["recipe"]["settings"]["max_grad_norm"]["value"]
    write(norm=v, norm_v0=v0, momentum_share=sheet["sum.v0_v"].sum() / v**2 if v else 0.0)
    write(grad_norm=y, clip_factor=1.0 if most is None else min(1.0, most / (y + 1e-6)))
    return found


def by_derivatives(sheet: Sheet, t: Array, c: Array, c_t: Array) -> tuple[Array, Array]:
    """Slope and curvature of ΔH from derivatives at 0 of what each response says of it (per response t is 1, c_t is 0),

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)

    and E of the length. h′ = (D′ − hE′)/T and h″ = (D″ − hE″ − 2h′E′)/T of h = (R + D)/(T + E), means over responses;
    by prompt, with the derivatives of (R_i + D_i − h·(T_i + E_i))/(T + E) of its responses.
    """
    d, d_h, d2, d2_h = sheet.of("e", "d_logp d_entropy d2_logp d2_entropy")
    before, moves = np.cumsum(d, -1) - d, []
    for weight, of_h, of2_h in ((c, d_h, d2_h), (c_t, 0.0, 0.0)):
        once = of_h + weight * d
        twice = of2_h + weight * (d2 + d**2) + 2 * before * once
        moves += [once.sum(-1), twice.sum(-1)]
    d1, d2, e1, e2 = moves
    r, mean = sheet["e.entropy"].sum(-1), t.mean()
    h = r.mean() / mean
    h1 = (d1 - h * e1).mean() / mean
    h2 = (d2 - h * e2 - 2 * h1 * e1).mean() / mean
    at_0 = (r - h * t) / mean
    once = (d1 - h * e1 - h1 * t - e1.mean() * at_0) / mean
    twice = (d2 - h * e2 - 2 * h1 * e1 - h2 * t - e2.mean() * at_0 - 2 * e1.mean() * once) / mean
    return h1 + once.mean(1), h2 + twice.mean(1)


def coefficients(sheet: Sheet, baseline: str = "") -> list[Array]:
    """c_t = R_{≥t} − b_t of every token [B, G, T], 0 past the end; and that of the length, whose steps count 1 each.

    b_t is 0 (none), H_t (hk), or H_t and what is expected of R_{>t}: the mean over other prompts' responses that have a
    step t (hk_ema), the same shrunk to from the own prompt's other responses (hk_group), or a ridge regression fitted
    on other folds of prompts (hk_ridge).
    """
    baseline = baseline or sheet.config["first_order"]["baseline"]
    there, found = sheet.tokens("e"), []
    for h in (np.where(there, sheet["e.entropy"], 0.0), 1.0 * there):
        onward = np.cumsum(h[..., ::-1], -1)[..., ::-1]
        c = later = onward - h
        if baseline == "none":
            c = onward
        elif baseline == "hk_ema":
            total, count = later.sum(1, keepdims=True), there.sum(1, keepdims=True)
            c = later - (total.sum(0) - total) / np.maximum(count.sum(0) - count, 1)
        elif baseline == "hk_ridge":
            c = later - _ridge(sheet["e.features"], later, there)
        elif baseline != "hk":
            c = later - _shrunk(later, there)
        found.append(c * there)
    return found


def _ridge(phi: Array, later: Array, there: Array) -> Array:
    """φᵀβ + the mean, φ standardised; β and the mean of the prompts of a fold are of the other folds."""
    fold, found = np.arange(len(later)) % FOLDS, np.zeros(later.shape)
    for own in range(min(FOLDS, len(later)) if len(later) > 1 else 0):
        x, y = (of[fold != own][there[fold != own]] for of in (phi, later))
        sd = x.std(0)
        sd[sd <= 1e-12 * np.sqrt((x**2).mean(0))] = np.inf
        z, of_fold = ((of - x.mean(0)) / sd for of in (x, phi[fold == own]))
        z, of_fold = (np.clip(of, -DEVIATIONS, DEVIATIONS) for of in (z, of_fold))
        centred = z - z.mean(0)
        penalty = RIDGE * len(z) * np.eye(z.shape[1])
        beta = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean()))
        found[fold == own] = y.mean() + (of_fold - z.mean(0)) @ beta
    return found


def _shrunk(later: Array, there: Array) -> Array:
    """nτ²/(nτ² + σ²) of the way from the other prompts' mean to that of the own prompt's n other responses.

    σ² within and τ² between prompts are those of the others, by moments: with k responses of mean m that have a step,
    Σk(m − m̄)² over prompts and steps has expectation Σ(prompts − 1)·σ² + Σ(K − Σk²/K)·τ², K = Σk.
    """
    found = np.zeros(later.shape)
    for own in range(len(later)):
        others = np.arange(len(later)) != own
        k = there[others].sum(1)
        m = later[others].sum(1) / np.maximum(k, 1)
        sum_k = np.maximum(k.sum(0), 1)
        mean, some = (k * m).sum(0) / sum_k, k.sum(0) > 0
        within = ((later[others] - m[:, None]) ** 2 * there[others]).sum()
        sigma2 = within / max(np.maximum(k - 1, 0).sum(), 1)
        between = (k * (m - mean) ** 2).sum() - ((k > 0).sum(0) - 1)[some].sum() * sigma2
        tau2 = between / max((sum_k - (k**2).sum(0) / sum_k)[some].sum(), 1.0)
        tau2 = tau2 if tau2 > (NOTICED * np.abs(mean).max()) ** 2 else 0.0
        n = there[own].sum(0) - there[own]
        of_own = (later[own].sum(0) - later[own]) / np.maximum(n, 1)
        shrunk = n * tau2 / np.maximum(n * tau2 + sigma2, np.finfo(float).tiny)
        share = np.where(some, shrunk, n > 0)
        found[own] = share * of_own + (1 - share) * mean
    return found
