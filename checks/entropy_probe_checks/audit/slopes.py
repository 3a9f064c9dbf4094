"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from entropy_probe_checks.audit.first_order import gram, learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, around, norm, ratio, terms

# of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing
NOTICED = 1e-6
# of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0


@dataclass(frozen=True)
class Along:
    """Slope and curvature by which ΔH is predicted: per response, per token, and as the configuration asks; and the sd
    of the change per token over update batches."""

    of_response: tuple[Terms, Terms]
    of_tokens: tuple[Terms, Terms]
    asked: tuple[Terms, Terms]
    spread: Terms | None

    @property
    def eta_star(self) -> Terms | None:
        """2|slope/curvature|; none where the curvature is within 2 SE of 0."""
        slope, curvature = (x.mean() for x in self.asked)
        decided = curvature.value and abs(curvature.value) >= 2 * self.asked[1].se.value
        return abs(2 * slope / curvature) if decided else None

    @property
    def reach(self) -> float:
        """A tenth of η*, with 2 SE in place of a slope that is smaller."""
        slope, curvature = self.asked
        most = max(abs(slope.mean().value), 2 * slope.se.value)
        return 0.2 * most / abs(curvature.mean().value) if self.eta_star else math.inf


def write(sheet: Sheet) -> Along:
    """Section `update`, the parts of the slope, and what the change is predicted by."""
    write, estimates = partial(sheet.write, "update"), partial(sheet.estimates, "update")
    lr, t, rho = learning_rate(sheet)[0], sheet.lengths("e"), sheet["e.d_rounding"]
    of_tokens = sheet.terms("e", "logp entropy d_logp d_entropy d2_logp d2_entropy")
    s, r, d_s, d_r, d2_s, d2_r = (x.sum(-1) for x in of_tokens)
    group, ones = t.shape[1], np.ones(t.shape)
    centred = (s - s.mean(1)[:, None]) * (group / (group - 1))  # S − S̄ of the others
    by = {"naive": (-centred * d_s).mean(1)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        by[f"rb_{baseline}"] = of_responses(sheet, baseline)[0].mean(1)
    d, d2, *of_length = of_responses(sheet)
    slope, bent = d.mean(1), d2.mean(1)
    token, bent_token = of_ratio(r, t, d, d2, *of_length)
    cross = cross_token = None
    if sheet.u == "e":
        cross, cross_token = _cross(sheet, "u"), _cross(sheet, "crossed")
    configured = sheet.config["first_order"]["baseline"]
    write(baseline="hk_group" if configured == "auto" else configured)
    write(estimators={name: of.both for name, of in by.items()})
    estimates(delta_h1_per_lr_naive=by["naive"], delta_h1_per_lr_rb=slope)
    estimates(delta_h1_per_lr_per_token=token, delta_h1_per_lr_cross=cross)
    estimates(delta_h1_per_lr_cross_per_token=cross_token)
    estimates(curvature=bent, curvature_per_token=bent_token)
    # of Σŵ⁺R⁺ and Σŵ⁺R⁺/Σŵ⁺T: at 0 ŵ moves by D_vS and D²_vS + (D_vS)²
    d2_w, over = d2_s + d_s * d_s, r - r.mean()
    (change, change2), (change_token, _) = (
        of_ratio(r, x, d_r + r * d_s, d2_r + 2 * d_r * d_s + r * d2_w, x * d_s, x * d2_w)
        for x in (ones, t)
    )
    write(slope_of_change=change.mean(), curvature_of_change=change2.mean())
    write(slope_of_change_per_token=change_token.mean())
    write(slope_of_change_size=(abs(d_r) + abs(over * d_s)).mean())
    write(curvature_of_change_size=(abs(d2_r) + abs(2 * d_r * d_s) + abs(over * d2_w)).mean())
    # what the rounding ρ of each token's D_v can do to a sum of weights · D_v
    c, c_length = coefficients(sheet)
    naive = sheet.config["first_order"]["estimator"] == "naive"
    for name, weight, number in (
        ("slope_rounding", abs(centred)[..., None] if naive else 1 + abs(c), t.size),
        ("slope_rounding_per_token", 1 + abs(c - r.value.sum() / t.sum() * c_length), t.sum()),
        ("slope_of_change_rounding", 1 + abs(over)[..., None], t.size),
    ):
        error = norm((weight.value * rho) ** 2) / number
        write(**{name: Terms(error, error + rho.mean())})
    # −X̄ᵀD·Y_u of every unit, weighted by its share of the prompts; over update batches their sum has sd √U·sd_u
    prompts, spread = np.bincount(sheet[f"{sheet.u}.unit_of_prompt"]), None
    for ending, x in (("", "x"), ("_per_token", "xt")):
        units = -terms(sheet[f"u.y_d{x}"]) * (prompts / prompts.sum())
        spread = lr * len(prompts) * units.se if len(prompts) > 1 else None
        write(**{f"slope_of_v0{ending}": -terms(sheet[f"e.{x}_v0"]).sum()})
        write(**{f"slope_by_unit{ending}": units, f"spread_over_batches{ending}": spread})
    # ‖v‖, ‖v₀‖, ‖Ȳ‖ of what v moves
    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    v, v0, y = (sheet[f"sum.{name}_squared"] for name in ("v", "v0", "y_bar"))
    v, v0, y = norm(v), norm(v0), norm(y[moved])
    most = sheet.report["recipe"]["settings"]["max_grad_norm"]["value"]
    write(norm=v, norm_v0=v0, grad_norm=y)
    write(clip_factor=1.0 if most is None else min(1.0, most / (y + 1e-6)))
    write(momentum_share=Terms(math.fsum(sheet["sum.v0_v"]) / v**2, v0 / v) if v else 0.0)
    # of the slope, mean[D_vR] over the mean length or over 1, and what is left
    for ending, length, whole in (("", t, token), ("_per_response", ones, slope)):
        own = {f"of_entropies{ending}": lr * ratio(d_r, length)}
        own[f"of_visits{ending}"] = lr * whole - own[f"of_entropies{ending}"]
        sheet.estimates("predictors", **own)
    pairs = (cross or slope, bent), (cross_token or token, bent_token)
    asked = pairs[sheet.config["true_delta_h"]["normalize"] == "per_token"]
    along = Along(*pairs, asked, spread)
    write(eta_star=along.eta_star)
    return along


def _cross(sheet: Sheet, prefix: str) -> Terms:
    """−X̄ᵀv₀ − U_cross of K_um = X_uᵀDY_m, the slope along v without its diagonal; unit u says −X_uᵀv₀ − 2r_u."""
    x_v0 = terms(sheet[f"{prefix}.x_v0"])
    r, *_ = gram(sheet, f"{prefix}.gram_d", list(range(len(sheet.facts["moved"]))))
    return around(-x_v0.mean() - r.mean(), -x_v0.value - 2 * r.value)


def of_responses(sheet: Sheet, baseline: str = "") -> list[Terms]:
    """What a response says of ΔH and of the change of length ΔL at 0, D′, D″, E′, E″ [B, G]: derivatives of

    Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = sheet.terms("e", "d_logp d_entropy d2_logp d2_entropy")
    so_far, found = d.each(lambda x: np.cumsum(x, -1) - x), []
    for c, of_h in zip(coefficients(sheet, baseline), (1.0, 0.0), strict=True):
        once = of_h * d_h + c * d
        twice = of_h * d2_h + c * (d2 + d * d) + 2 * so_far * once
        found += [once.sum(-1), twice.sum(-1)]
    return found


def per_token(sheet: Sheet) -> tuple[Terms, Terms]:
    """Slope and curvature of the entropy per token."""
    return of_ratio(terms(sheet["e.entropy"].sum(-1)), sheet.lengths("e"), *of_responses(sheet))


def of_ratio(
    m: Terms, l: np.ndarray, m1: Terms, m2: Terms, l1: Terms, l2: Terms
) -> tuple[Terms, Terms]:
    """h′ = (M′ − hL′)/L and h″ = (M″ − hL″ − 2h′L′)/L of h = M/L, means of what responses have; a response says of them
    what the derivatives of its (M_i − h·L_i)/L are."""
    mean, h = l.mean(), m.value.mean() / l.mean()
    slope = (m1.mean() - h * l1.mean()) / mean
    bent = (m2.mean() - h * l2.mean() - 2 * slope.value * l1.mean()) / mean
    at_0 = (m.value - h * l) / mean
    once = ((m1 - h * l1).value - slope.value * l - l1.value.mean() * at_0) / mean
    twice = (m2 - h * l2 - 2 * slope.value * l1).value - bent.value * l
    twice = (twice - l2.value.mean() * at_0 - 2 * l1.value.mean() * once) / mean
    return around(slope, once.mean(1)), around(bent, twice.mean(1))


def coefficients(sheet: Sheet, baseline: str = "") -> tuple[Terms, Terms]:
    """c_t = R_{≥t} − b_t of every token [B, G, T], 0 past the end; and the same of the length, where every step counts 1.

    b_t is 0 (none), H_t (hk), or H_t and what is expected of R_{>t}: the mean over other prompts' responses that have a
    step t (hk_ema), the same shrunk to from the own prompt's other responses (hk_group), or a ridge regression fitted
    on other folds of prompts (hk_ridge).
    """
    there = np.arange(sheet["e.entropy"].shape[2]) < sheet.lengths("e")[..., None]
    found = []
    for h in (np.where(there, sheet["e.entropy"], 0.0), 1.0 * there):
        onward = np.cumsum(h[..., ::-1], -1)[..., ::-1]
        later = onward - h
        expected = {
            "none": lambda: -h,
            "hk": lambda: 0 * h,
            "hk_ema": lambda: _others(later, there),
            "hk_ridge": lambda: _ridge(sheet["e.features"], later, there),
        }.get(baseline or sheet.config["first_order"]["baseline"], lambda: _shrunk(later, there))
        found.append(terms(onward) - (h + expected()) * there)
    return tuple(found)


def _others(later: np.ndarray, there: np.ndarray) -> np.ndarray:
    total, count = later.sum(1, keepdims=True), there.sum(1, keepdims=True)
    return (total.sum(0) - total) / np.maximum(count.sum(0) - count, 1)


def _ridge(phi: np.ndarray, later: np.ndarray, there: np.ndarray) -> np.ndarray:
    """φᵀβ + the mean, φ standardised; β and the mean of the prompts of a fold are of the other folds."""
    fold, found = np.arange(len(later)) % FOLDS, np.zeros(later.shape)
    for own in range(min(FOLDS, len(later)) if len(later) > 1 else 0):
        x, y = (of[fold != own][there[fold != own]] for of in (phi, later))
        sd = x.std(0)
        sd[sd <= 1e-12 * np.sqrt((x**2).mean(0))] = np.inf
        z, of_fold = (
            np.clip((of - x.mean(0)) / sd, -DEVIATIONS, DEVIATIONS) for of in (x, phi[fold == own])
        )
        centred = z - z.mean(0)
        penalty = RIDGE * len(z) * np.eye(z.shape[1])
        beta = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean()))
        found[fold == own] = y.mean() + (of_fold - z.mean(0)) @ beta
    return found


def _shrunk(later: np.ndarray, there: np.ndarray) -> np.ndarray:
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
        shrunk = n * tau2 / np.maximum(n * tau2 + sigma2, np.finfo(float).tiny)
        share = np.where(some, shrunk, n > 0)
        found[own] = (later[own].sum(0) - later[own]) / np.maximum(n, 1) * share + (
            1 - share
        ) * mean
    return found
