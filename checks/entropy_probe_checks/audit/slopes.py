"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, directional derivatives)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from entropy_probe_checks.audit.batches import part, update
from entropy_probe_checks.audit.first_order import learning_rate, of_tensors
from entropy_probe_checks.audit.sheet import Sheet

NOTICED = 1e-6
"""Of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing."""
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0
"""Of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts."""


@dataclass(frozen=True)
class Slope:
    """Terms of the prompts: the value is their mean, the SE their spread over √B. `size` is that of what was added."""

    terms: np.ndarray
    size: float

    @property
    def value(self) -> float:
        return math.fsum(self.terms) / len(self.terms)

    @property
    def se(self) -> float:
        squares = math.fsum((term - self.value) ** 2 for term in self.terms)
        return math.sqrt(squares / (len(self.terms) - 1) / len(self.terms))


@dataclass(frozen=True)
class Along:
    """Slope and curvature by which ΔH is predicted, per response and per token, and which of the two was asked for; the
    change of log p of every response, D_vS; and the slopes per token and per response that are not cross-fitted."""

    of_response: tuple[Slope, Slope]
    of_tokens: tuple[Slope, Slope]
    is_per_token: bool
    d_s: np.ndarray
    plain: tuple[Slope, Slope]

    @property
    def slope(self) -> Slope:
        return (self.of_tokens if self.is_per_token else self.of_response)[0]

    @property
    def curvature(self) -> Slope:
        return (self.of_tokens if self.is_per_token else self.of_response)[1]

    @property
    def decided(self) -> bool:
        return self.curvature.value != 0 and abs(self.curvature.value) >= 2 * self.curvature.se

    @property
    def reach(self) -> float:
        """A tenth of η*, with 2 SE in place of a slope that is smaller; infinite where curvature is not decided."""
        slope = max(abs(self.slope.value), 2 * self.slope.se)
        return 0.2 * slope / abs(self.curvature.value) if self.decided else math.inf


def write(sheet: Sheet) -> Along:
    """Section `update`, and what the change is predicted by."""
    config = sheet.report["config"]
    logp, entropy, d_logp, d_entropy = (
        sheet[f"e.{name}"] for name in ("logp", "entropy", "d_logp", "d_entropy")
    )
    s, r, d_s, d_r = (of.sum(-1) for of in (logp, entropy, d_logp, d_entropy))
    d2_s, d2_r = sheet["e.d2_logp"].sum(-1), sheet["e.d2_entropy"].sum(-1)
    lengths = sheet["e.gen_lens"].reshape(s.shape).astype(np.float64)
    others = (s.sum(1, keepdims=True) - s) / (s.shape[1] - 1)
    size = ((np.abs(s) + np.abs(others)) * np.abs(d_s)).mean()
    by = {"naive": _slope(-(s - others) * d_s, size)}
    onward = coefficients(sheet, entropy, "none")
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        c = coefficients(sheet, entropy, baseline)
        terms = d_entropy + c * d_logp
        # a coefficient is a difference of entropies that are still to come
        of_coefficients = (np.abs(c) + onward) * np.abs(d_logp)
        size = np.abs(d_entropy).sum(-1).mean() + of_coefficients.sum(-1).mean()
        by[f"rb_{baseline}"] = _slope(terms.sum(-1), size)
    baseline = in_use(sheet)
    chosen = by[f"rb_{baseline}"]
    h = r.sum() / lengths.sum()
    over, uncentred = r - h * lengths, np.abs(r) + h * lengths
    slope_token = (
        (over * d_s + d_r).sum() / lengths.sum(),
        (uncentred * np.abs(d_s) + np.abs(d_r)).sum(),
    )
    w = d2_s + d_s**2
    terms = _terms(sheet)
    bent = _slope(terms.second[0], terms.size_second[0])
    of_token, bent_token = _per_token(r, lengths, terms)
    cross, pair = None, (chosen, of_token)
    if update(sheet) == "e":
        cross = _cross(sheet, "u")
        pair = cross, _cross(sheet, "crossed")
    is_per_token = config["true_delta_h"]["normalize"] == "per_token"
    along = Along((pair[0], bent), (pair[1], bent_token), is_per_token, d_s, (of_token, chosen))

    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    norm = {n: math.sqrt(math.fsum(sheet[f"sum.{n}_squared"])) for n in ("v", "v0")}
    size, most = (
        math.sqrt(math.fsum(sheet["sum.y_bar_squared"][moved])),
        part(sheet, "max_grad_norm"),
    )
    shared = math.fsum(sheet["sum.v0_v"]) / norm["v"] ** 2 if norm["v"] else 0.0
    figures = {
        "norm": (norm["v"], None),
        "norm_v0": (norm["v0"], None),
        "grad_norm": (size, None),
        "clip_factor": (1.0 if most is None else min(1.0, most / (size + 1e-6)), None),
        "momentum_share": (shared, norm["v0"] / norm["v"] if norm["v"] else None),
        "baseline": (baseline, None),
        "estimators": (
            {n: {"value": of.value, "se": of.se} for n, of in by.items()},
            {n: of.size for n, of in by.items()},
        ),
    }
    for name, of in (
        ("delta_h1_per_lr_naive", by["naive"]),
        ("delta_h1_per_lr_rb", chosen),
        ("delta_h1_per_lr_cross", cross),
        ("delta_h1_per_lr_cross_per_token", None if cross is None else pair[1]),
        ("delta_h1_per_lr_per_token", of_token),
        ("curvature", bent),
        ("curvature_per_token", bent_token),
    ):
        figures[name] = (None, None) if of is None else (of.value, of.size)
        figures[f"{name}_se"] = (None, None) if of is None else (of.se, of.size)
    star = None
    if along.decided:
        star = 2 * abs(along.slope.value) / abs(along.curvature.value)
    star_size = None
    if star is not None:  # what rounding of both can do to their ratio
        star_size = star + 2 * along.slope.size / abs(along.curvature.value)
        star_size *= max(1.0, along.curvature.size / abs(along.curvature.value))
    figures["eta_star"] = (star, star_size)
    lr = learning_rate(sheet)[0]
    for ending, x in (("", "x"), ("_per_token", "xt")):
        momentum, units = sheet[f"e.{x}_v0"], by_unit(sheet, f"u.y_d{x}")
        size = float(np.abs(units).sum())
        figures[f"slope_of_v0{ending}"] = (-math.fsum(momentum), float(np.abs(momentum).sum()))
        figures[f"slope_by_unit{ending}"] = (list(units), size)
        spread = lr * math.sqrt(len(units) * units.var(ddof=1)) if len(units) > 1 else None
        figures[f"spread_over_batches{ending}"] = (spread, lr * size)
    rounding = sheet["e.d_rounding"]
    if config["first_order"]["estimator"] == "naive":
        rounding = np.abs(s - others)[..., None] * rounding
    else:
        rounding = (1 + np.abs(coefficients(sheet, entropy, baseline))) * rounding
    of_all = math.sqrt(math.fsum((rounding**2).sum((1, 2)))) / s.size
    figures["slope_rounding"] = (of_all, of_all + float(sheet["e.d_rounding"].mean()))
    c, c_length = both_coefficients(sheet)
    rounding = (1 + np.abs(c - h * c_length)) * sheet["e.d_rounding"]
    of_all = math.sqrt(math.fsum((rounding**2).sum((1, 2)))) / lengths.sum()
    figures["slope_rounding_per_token"] = (
        float(of_all),
        float(of_all + sheet["e.d_rounding"].mean()),
    )
    # d/dη of Σŵ⁺R⁺ at 0: mean[D_vR + (R − R̄)·D_vS], and its second derivative
    centred = r - r.mean()
    first = (d_r.sum() + (centred * d_s).sum()) / r.size
    first_size = (np.abs(d_r).sum() + np.abs(centred * d_s).sum()) / r.size
    uncentred = np.abs(r) + abs(r.mean())
    terms = float((np.abs(d_r) + uncentred * np.abs(d_s)).mean())
    figures["slope_of_change"] = (float(first), terms)
    of_tokens = (1 + np.abs(centred))[..., None] * sheet["e.d_rounding"]
    figures["slope_of_change_rounding"] = (
        math.sqrt(math.fsum((of_tokens**2).sum((1, 2)))) / r.size,
        None,
    )
    figures["slope_of_change_size"] = (float(first_size), terms)
    value, of_value = slope_token
    figures["slope_of_change_per_token"] = (float(value), float(of_value / lengths.sum()))
    second = (d2_r + 2 * d_r * d_s + centred * w).mean()
    second -= d_s.mean() * 2 * (d_r.mean() + (centred * d_s).mean())
    second_size = (np.abs(d2_r) + 2 * np.abs(d_r * d_s) + np.abs(centred * w)).mean()
    terms = float((np.abs(d2_r) + 2 * np.abs(d_r * d_s) + uncentred * np.abs(w)).mean())
    figures["curvature_of_change"] = (float(second), terms)
    figures["curvature_of_change_size"] = (float(second_size), terms)
    for name, (again, size) in figures.items():
        sheet.write(f"update.{name}", again, size)
    return along


def by_unit(sheet: Sheet, name: str) -> np.ndarray:
    """−X̄ᵀD·Y_u of every unit, weighted by its share of the prompts."""
    weights = np.bincount(sheet[f"{update(sheet)}.unit_of_prompt"])
    return -(weights / weights.sum()) * sheet[name]


def per_token(sheet: Sheet) -> tuple[Slope, Slope]:
    """Slope and curvature of the entropy per token."""
    r = sheet["e.entropy"].sum(-1)
    return _per_token(r, sheet["e.gen_lens"].reshape(r.shape).astype(np.float64), _terms(sheet))


def _slope(of_responses: np.ndarray, size: float | None = None) -> Slope:
    terms = np.array([math.fsum(own) / len(own) for own in of_responses])
    return Slope(terms, float(np.abs(of_responses).mean()) if size is None else float(size))


def _cross(sheet: Sheet, prefix: str) -> Slope:
    """−X_uᵀv₀ − (2r_u − U_cross) of K = X_uᵀDY_m: the slope along v without its diagonal."""
    x_v0, tensors = sheet[f"{prefix}.x_v0"], range(len(sheet.facts["moved"]))
    k = of_tensors(sheet, f"{prefix}.gram_d", list(tensors))
    terms = -x_v0 - (2 * k.r - k.u_cross)
    return Slope(terms, float(np.abs(x_v0).mean()) + k.size)


@dataclass(frozen=True)
class Terms:
    """First and second derivative at 0 of what every response says of ΔH and ΔL [2, B, G]. The sizes of what is added,
    [2] each, know that c is a difference of larger numbers."""

    first: np.ndarray
    second: np.ndarray
    size_first: np.ndarray
    size_second: np.ndarray


def _terms(sheet: Sheet) -> Terms:
    """Of Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,

    Σ_t D_vH_t + c_t·d   and   Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = (sheet[f"e.{n}"] for n in ("d_logp", "d_entropy", "d2_logp", "d2_entropy"))
    so_far = np.cumsum(d, -1) - d
    found: list[list[np.ndarray]] = [[], []]
    sizes: list[list[float]] = [[], []]
    pairs = zip(both_coefficients(sheet), both_coefficients(sheet, "none"), (1.0, 0.0), strict=True)
    for c, whole, of_h in pairs:
        first = (of_h * d_h + c * d).sum(-1)
        second = (of_h * d2_h + c * (d2 + d**2) + 2 * so_far * (of_h * d_h + c * d)).sum(-1)
        found[0].append(first)
        found[1].append(second)
        once = of_h * np.abs(d_h) + whole * np.abs(d)
        twice = of_h * np.abs(d2_h) + whole * (np.abs(d2) + d**2) + 2 * np.abs(so_far) * once
        sizes[0].append(float(once.sum(-1).mean()))
        sizes[1].append(float(twice.sum(-1).mean()))
    return Terms(*(np.stack(of) for of in found), *(np.array(of) for of in sizes))


def in_use(sheet: Sheet) -> str:
    baseline = sheet.report["config"]["first_order"]["baseline"]
    return "hk_group" if baseline == "auto" else baseline


def both_coefficients(sheet: Sheet, baseline: str = "") -> tuple[np.ndarray, np.ndarray]:
    """c_t of the entropy, and of the length: the same where every step counts 1."""
    entropy = sheet["e.entropy"]
    used = baseline or in_use(sheet)
    of_entropy, of_length = (
        coefficients(sheet, of, used) for of in (entropy, np.ones_like(entropy))
    )
    return of_entropy, of_length


def _per_token(r: np.ndarray, lengths: np.ndarray, of: Terms) -> tuple[Slope, Slope]:
    """Derivatives of Δh = (ΔM − hΔL)/(L + ΔL) at 0, and of the influence that each response has on it,

    [D − hE − Δh(T + E) − ΔL(R − hT)/L]/(L + ΔL), D and E its terms of entropy and length, means removed.
    """
    mean = lengths.mean()
    h = r.mean() / mean
    d, e = of.first
    d2, e2 = of.second
    slope = (d - h * e).mean() / mean
    bent = ((d2 - h * e2).mean() - 2 * slope * e.mean()) / mean
    push = (d - h * e - slope * lengths - e.mean() * (r - h * lengths) / mean) / mean
    pull = d2 - h * e2 - bent * lengths - 2 * slope * e - e2.mean() * (r - h * lengths) / mean
    pull = pull / mean - 2 * push * e.mean() / mean
    size, size2 = ((of[0] + h * of[1]) / mean for of in (of.size_first, of.size_second))
    size2 += 2 * abs(slope) * of.size_first[1] / mean
    first, second = (
        Slope(value + (own - own.mean()).mean(1), float(of_size))
        for value, own, of_size in ((slope, push, size), (bent, pull, size2))
    )
    return first, second


def coefficients(sheet: Sheet, entropy: np.ndarray, baseline: str) -> np.ndarray:
    """c_t = R_{≥t} − b_t of every token, 0 past the end: b is 0, H_t, H_t and the mean of R_{>t} over other prompts'
    responses that have a step t, the same shrunk to from the own prompt's other responses, or H_t and a ridge
    regression of R_{>t} fitted on other folds of prompts."""
    lengths = sheet["e.gen_lens"]
    prompts, group, steps = entropy.shape
    present = np.arange(steps) < lengths.reshape(prompts, group, 1)
    entropy = np.where(present, entropy, 0.0)
    onward = np.cumsum(entropy[..., ::-1], -1)[..., ::-1]
    later = onward - entropy
    if baseline == "none":
        return onward
    if baseline == "hk":
        return later
    found = later.copy()
    if baseline == "hk_ema":
        for n in range(prompts):
            others = np.arange(prompts) != n
            counts = present[others].sum((0, 1))
            means = later[others].sum((0, 1)) / np.maximum(counts, 1)
            found[n] -= means * present[n]
        return found
    if baseline == "hk_group":
        for n in range(prompts):
            found[n] -= _shrunk(later, present, n) * present[n]
        return found
    folds, phi = min(FOLDS, prompts), sheet["e.features"]
    for fold in range(folds) if folds > 1 else ():
        inside = np.arange(prompts) % folds == fold
        x, y = phi[~inside][present[~inside]], later[~inside][present[~inside]]
        centre, square = x.mean(0), (x**2).mean(0)
        deviation = np.sqrt(((x - centre) ** 2).mean(0))
        deviation[deviation <= 1e-12 * np.sqrt(square)] = np.inf

        def scaled(values: np.ndarray, centre=centre, deviation=deviation) -> np.ndarray:
            return np.clip((values - centre) / deviation, -DEVIATIONS, DEVIATIONS)

        z, level = scaled(x), y.mean()
        middle = z.mean(0)
        z = z - middle
        penalty = RIDGE * len(z) * np.eye(z.shape[1])
        beta = np.linalg.solve(z.T @ z + penalty, z.T @ (y - level))
        fitted = level + (scaled(phi[inside]) - middle) @ beta
        found[inside] -= np.where(present[inside], fitted, 0.0)
    return found


def _shrunk(later: np.ndarray, present: np.ndarray, n: int) -> np.ndarray:
    """Of prompt n [G, T]: nτ²/(nτ² + σ²) of the way from the other prompts' mean to that of its n other responses.

    σ² within and τ² between prompts are those of the others, by moments: with k responses of mean m that have a step,
    Σk(m − m̄)² over prompts and steps has expectation Σ(prompts − 1)·σ² + Σ(K − Σk²/K)·τ², K = Σk.
    """
    others = [m for m in range(len(later)) if m != n]
    counts = present[others].sum(1).astype(np.float64)
    means = later[others].sum(1) / np.maximum(counts, 1)
    together = counts.sum(0)
    mean = (counts * means).sum(0) / np.maximum(together, 1)
    freedom = np.maximum(counts - 1, 0).sum()
    sigma2 = (((later[others] - means[:, None]) ** 2) * present[others]).sum() / max(freedom, 1.0)
    some = together > 0
    excess = (counts * (means - mean) ** 2).sum()
    excess -= ((counts > 0).sum(0) - 1)[some].sum() * sigma2
    spread = (together[some] - (counts**2).sum(0)[some] / together[some]).sum()
    tau2 = excess / max(spread, 1.0)
    if tau2 <= (NOTICED * np.abs(mean).max()) ** 2:
        tau2 = 0.0
    found = np.zeros(later.shape[1:])
    for g in range(later.shape[1]):
        left = present[n].sum(0) - present[n, g]
        own = (later[n].sum(0) - later[n, g]) / np.maximum(left, 1)
        share = np.where(left > 0, 1.0, 0.0)
        if len(others):
            pull = left * tau2
            shrunk = pull / np.maximum(pull + sigma2, np.finfo(float).tiny)
            share = np.where(some, shrunk, share)
        found[g] = share * own + (1 - share) * mean
    return found
