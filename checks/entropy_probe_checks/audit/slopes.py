"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe_checks.audit.batches import part, update
from entropy_probe_checks.audit.first_order import learning_rate, of_tensors
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, around, estimate, terms

NOTICED = 1e-6
"""Of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing."""
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0
"""Of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts."""


@dataclass(frozen=True)
class Along:
    """Slope and curvature by which ΔH is predicted, per response and per token, and as the configuration asks."""

    of_response: tuple[Terms, Terms]
    of_tokens: tuple[Terms, Terms]
    asked: tuple[Terms, Terms]
    plain: tuple[Terms, Terms]
    """The slopes per token and per response that are not cross-fitted."""

    @property
    def decided(self) -> bool:
        curvature = self.asked[1]
        return abs(curvature.mean().value) >= 2 * curvature.se.value and bool(
            curvature.mean().value
        )

    @property
    def reach(self) -> float:
        """A tenth of η*, with 2 SE in place of a slope that is smaller; infinite where curvature is not decided."""
        slope, curvature = self.asked
        most = max(abs(slope.mean().value), 2 * slope.se.value)
        return 0.2 * most / abs(curvature.mean().value) if self.decided else math.inf


def write(sheet: Sheet) -> Along:
    """Section `update`, and what the change is predicted by."""
    logp, h, d_logp, d_h = sheet.terms("e", "logp entropy d_logp d_entropy")
    s, r, d_s, d_r = (x.sum(-1) for x in (logp, h, d_logp, d_h))
    d2_s, d2_r = (x.sum(-1) for x in sheet.terms("e", "d2_logp d2_entropy"))
    lengths, rho, lr = sheet.lengths("e"), sheet["e.d_rounding"], learning_rate(sheet)[0]
    s_centred = s - (s.sum(1)[:, None] - s) / (s.value.shape[1] - 1)
    by = {"naive": (-s_centred * d_s).mean(1)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        c = coefficients(sheet, h.value, baseline)
        by[f"rb_{baseline}"] = (d_h + c * d_logp).sum(-1).mean(1)
    chosen, bent = by[f"rb_{in_use(sheet)}"], of_responses(sheet)[1].mean(1)
    of_token, bent_token = per_token(sheet)
    cross = cross_token = None
    if update(sheet) == "e":
        cross, cross_token = _cross(sheet, "u"), _cross(sheet, "crossed")
    pairs = (cross or chosen, bent), (cross_token or of_token, bent_token)
    asked = pairs[sheet.config["true_delta_h"]["normalize"] == "per_token"]
    along = Along(*pairs, asked, (of_token, chosen))
    figures = _norms(sheet) | {
        "baseline": in_use(sheet),
        "estimators": {name: {"value": x.mean(), "se": x.se} for name, x in by.items()},
        "eta_star": abs(2 * asked[0].mean() / asked[1].mean()) if along.decided else None,
    }
    for name, x in (
        ("delta_h1_per_lr_naive", by["naive"]),
        ("delta_h1_per_lr_rb", chosen),
        ("delta_h1_per_lr_cross", cross),
        ("delta_h1_per_lr_cross_per_token", cross_token),
        ("delta_h1_per_lr_per_token", of_token),
        ("curvature", bent),
        ("curvature_per_token", bent_token),
    ):
        figures |= estimate(name, x)
    # derivatives at 0 of Σŵ⁺R⁺: mean[D_vR + (R − R̄)·D_vS], and the second; and of Σŵ⁺R⁺/Σŵ⁺T
    over, mean_h = r - r.mean(), r.sum().value / lengths.sum()
    push = d2_s + d_s * d_s
    first, second = d_r + over * d_s, d2_r + 2 * d_r * d_s + over * push
    per_length = d_r + (r - mean_h * lengths) * d_s
    figures |= {
        "slope_of_change": first.mean(),
        "slope_of_change_size": (abs(d_r) + abs(over * d_s)).mean(),
        "slope_of_change_per_token": per_length.sum() / lengths.sum(),
        "curvature_of_change": second.mean() - 2 * d_s.mean() * first.mean(),
        "curvature_of_change_size": (abs(d2_r) + abs(2 * d_r * d_s) + abs(over * push)).mean(),
    }
    # what the rounding ρ of each token's D_v can do to a sum of coefficients · D_v
    c, c_length = both_coefficients(sheet)
    of_d_s = np.abs(s_centred.value)[..., None]
    naive = sheet.config["first_order"]["estimator"] == "naive"
    for name, weight, size in (
        ("slope_rounding", of_d_s if naive else 1 + np.abs(c.value), s.value.size),
        ("slope_rounding_per_token", 1 + np.abs((c - mean_h * c_length).value), lengths.sum()),
        ("slope_of_change_rounding", 1 + np.abs(over.value)[..., None], s.value.size),
    ):
        error = math.sqrt(((weight * rho) ** 2).sum()) / size
        figures[name] = Terms(error, error + rho.mean())
    for ending, x in (("", "x"), ("_per_token", "xt")):
        units = by_unit(sheet, f"u.y_d{x}")
        figures[f"slope_of_v0{ending}"] = -terms(sheet[f"e.{x}_v0"]).sum()
        figures[f"slope_by_unit{ending}"] = units
        figures[f"spread_over_batches{ending}"] = spread(units, lr)
    sheet.section("update", figures)
    return along


def _norms(sheet: Sheet) -> dict[str, Any]:
    """‖v‖, ‖v₀‖, ‖Ȳ‖ of what v moves, min(1, max_norm/(‖Ȳ‖ + 1e-6)), and v₀ᵀv/‖v‖²."""
    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    v, v0, y = (
        math.sqrt(math.fsum(squares))
        for squares in (
            sheet["sum.v_squared"],
            sheet["sum.v0_squared"],
            sheet["sum.y_bar_squared"][moved],
        )
    )
    most = part(sheet, "max_grad_norm")
    return {
        "norm": v,
        "norm_v0": v0,
        "grad_norm": y,
        "clip_factor": 1.0 if most is None else min(1.0, most / (y + 1e-6)),
        "momentum_share": Terms(math.fsum(sheet["sum.v0_v"]) / v**2, v0 / v) if v else 0.0,
    }


def by_unit(sheet: Sheet, name: str) -> Terms:
    """−X̄ᵀD·Y_u of every unit, weighted by its share of the prompts."""
    prompts = np.bincount(sheet[f"{update(sheet)}.unit_of_prompt"])
    return -terms(sheet[name]) * (prompts / prompts.sum())


def spread(units: Terms, lr: float) -> Terms | None:
    """The sd of lr·Σ_u over update batches: lr·√U·sd."""
    if len(units.value) < 2:
        return None
    sd = float(units.value.std(ddof=1))
    return Terms(lr * math.sqrt(len(units.value)) * sd, lr * units.size.sum())


def _cross(sheet: Sheet, prefix: str) -> Terms:
    """−X̄ᵀv₀ − U_cross of K_um = X_uᵀDY_m, the slope along v without its diagonal; of unit u, −X_uᵀv₀ − 2r_u."""
    x_v0 = terms(sheet[f"{prefix}.x_v0"])
    r = of_tensors(sheet, f"{prefix}.gram_d", list(range(len(sheet.facts["moved"])))).r
    return around(-x_v0.mean() - r.mean(), -x_v0.value - 2 * r.value)


def of_responses(sheet: Sheet) -> tuple[Terms, Terms, Terms, Terms]:
    """What every response says of ΔH and of the change of length ΔL at 0 [B, G]: D′, D″, E′, E″ of

    Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = sheet.terms("e", "d_logp d_entropy d2_logp d2_entropy")
    so_far = d.each(lambda x: np.cumsum(x, -1) - x)
    found = []
    for c, of_h in zip(both_coefficients(sheet), (1.0, 0.0), strict=True):
        first = of_h * d_h + c * d
        second = of_h * d2_h + c * (d2 + d * d) + 2 * so_far * first
        found += [first.sum(-1), second.sum(-1)]
    return tuple(found)


def per_token(sheet: Sheet) -> tuple[Terms, Terms]:
    """h′ = (D′ − hE′)/L and h″ = (D″ − hE″ − 2h′E′)/L of h = (M + D)/(L + E) at 0, with what a response says of them:
    the derivatives of [R + D − h·(T + E)]/(L + E)."""
    d, d2, e, e2 = of_responses(sheet)
    r, lengths = sheet["e.entropy"].sum(-1), sheet.lengths("e")
    mean = lengths.mean()
    h = r.mean() / mean
    slope = (d.mean() - h * e.mean()) / mean
    bent = (d2.mean() - h * e2.mean() - 2 * slope.value * e.mean()) / mean
    share = (r - h * lengths) / mean
    push = (d - h * e).value - slope.value * lengths - e.value.mean() * share
    pull = (
        (d2 - h * e2 - 2 * slope.value * e).value - bent.value * lengths - e2.value.mean() * share
    )
    pull -= 2 * e.value.mean() * push / mean
    return around(slope, push.mean(1) / mean), around(bent, pull.mean(1) / mean)


def in_use(sheet: Sheet) -> str:
    baseline = sheet.config["first_order"]["baseline"]
    return "hk_group" if baseline == "auto" else baseline


def both_coefficients(sheet: Sheet) -> tuple[Terms, Terms]:
    """c_t of the entropy, and of the length: the same where every step counts 1."""
    h = sheet["e.entropy"]
    return coefficients(sheet, h, in_use(sheet)), coefficients(
        sheet, np.ones_like(h), in_use(sheet)
    )


def coefficients(sheet: Sheet, h: np.ndarray, baseline: str) -> Terms:
    """c_t = R_{≥t} − b_t of every token [B, G, T], 0 past the end. b_t is 0 (none), H_t (hk), or H_t and what is
    expected of R_{>t}: the mean over other prompts' responses that have a step t (hk_ema), the same shrunk to from the
    own prompt's other responses (hk_group), or a ridge regression fitted on other folds of prompts (hk_ridge)."""
    there = np.arange(h.shape[2]) < sheet.lengths("e")[..., None]
    h = np.where(there, h, 0.0)
    onward = np.cumsum(h[..., ::-1], -1)[..., ::-1]
    later = onward - h
    b = {
        "none": lambda: 0 * h,
        "hk": lambda: h,
        "hk_ema": lambda: h + _others(later, there),
        "hk_group": lambda: h + np.stack([_shrunk(later, there, n) for n in range(len(h))]),
        "hk_ridge": lambda: h + _ridge(sheet["e.features"], later, there),
    }[baseline]()
    return terms(onward) - b * there


def _others(later: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean of R_{>t} at step t over the other prompts' responses that have it."""
    total, count = later.sum(1, keepdims=True), there.sum(1, keepdims=True)
    return (total.sum(0) - total) / np.maximum(count.sum(0) - count, 1)


def _ridge(phi: np.ndarray, later: np.ndarray, there: np.ndarray) -> np.ndarray:
    """R_{>t} by φᵀβ + its mean, φ standardised; β of the prompts of a fold is fitted on the other folds."""
    prompts, found = len(later), np.zeros(later.shape)
    folds = min(FOLDS, prompts)
    for fold in range(folds) if folds > 1 else ():
        inside = np.arange(prompts) % folds == fold
        x, y = phi[~inside][there[~inside]], later[~inside][there[~inside]]
        sd = x.std(0)
        sd[sd <= 1e-12 * np.sqrt((x**2).mean(0))] = np.inf
        z, of_fold = (
            np.clip((of - x.mean(0)) / sd, -DEVIATIONS, DEVIATIONS) for of in (x, phi[inside])
        )
        centre = z.mean(0)
        z = z - centre
        penalty = RIDGE * len(z) * np.eye(z.shape[1])
        beta = np.linalg.solve(z.T @ z + penalty, z.T @ (y - y.mean()))
        found[inside] = y.mean() + (of_fold - centre) @ beta
    return found


def _shrunk(later: np.ndarray, there: np.ndarray, n: int) -> np.ndarray:
    """Of prompt n [G, T]: nτ²/(nτ² + σ²) of the way from the other prompts' mean to that of its n other responses.

    σ² within and τ² between prompts are those of the others, by moments: with k responses of mean m that have a step,
    Σk(m − m̄)² over prompts and steps has expectation Σ(prompts − 1)·σ² + Σ(K − Σk²/K)·τ², K = Σk.
    """
    others = np.arange(len(later)) != n
    k = there[others].sum(1)
    m = later[others].sum(1) / np.maximum(k, 1)
    all_k = k.sum(0)
    mean, some = (k * m).sum(0) / np.maximum(all_k, 1), all_k > 0
    within = (((later[others] - m[:, None]) ** 2) * there[others]).sum()
    sigma2 = within / max(np.maximum(k - 1, 0).sum(), 1)
    between = (k * (m - mean) ** 2).sum() - ((k > 0).sum(0) - 1)[some].sum() * sigma2
    tau2 = between / max((all_k - (k**2).sum(0) / np.maximum(all_k, 1))[some].sum(), 1.0)
    if tau2 <= (NOTICED * np.abs(mean).max()) ** 2:
        tau2 = 0.0
    left = there[n].sum(0) - there[n]
    own = (later[n].sum(0) - later[n]) / np.maximum(left, 1)
    shrunk = left * tau2 / np.maximum(left * tau2 + sigma2, np.finfo(float).tiny)
    share = np.where(some, shrunk, left > 0)
    return share * own + (1 - share) * mean
