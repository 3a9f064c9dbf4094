"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, directional derivatives)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from entropy_probe_checks.audit.batches import part, update
from entropy_probe_checks.audit.first_order import learning_rate, of_tensors
from entropy_probe_checks.audit.sheet import Sheet

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
    """By what ΔH is predicted, and the change of log p of every response, D_vS."""

    slope: Slope
    curvature: Slope
    d_s: np.ndarray

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
    d2_s, d2_r = sheet["e.d2_seq_logp"], sheet["e.d2_rb_sum"]
    lengths = sheet["e.gen_lens"].reshape(s.shape).astype(np.float64)
    others = (s.sum(1, keepdims=True) - s) / (s.shape[1] - 1)
    by = {"naive": _slope(-(s - others) * d_s)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge"):
        c = coefficients(sheet, baseline)
        terms = d_entropy + c * d_logp
        size = np.abs(d_entropy).sum(-1).mean() + np.abs(c * d_logp).sum(-1).mean()
        by[f"rb_{baseline}"] = _slope(terms.sum(-1), size)
    chosen = by[f"rb_{config['first_order']['baseline']}"]
    per_token, bent_token = _per_token(r, lengths, d_s, d_r, d2_s, d2_r)
    w = d2_s + d_s**2
    left_out = (r.sum() - r) / (r.size - 1)
    terms = d2_r + 2 * d_r * d_s + (r - left_out) * w
    size = np.abs(d2_r).mean() + 2 * np.abs(d_r * d_s).mean() + np.abs((r - left_out) * w).mean()
    bent = _slope(terms, size)
    cross = None
    is_per_token = config["true_delta_h"]["normalize"] == "per_token"
    slope = per_token if is_per_token else chosen
    if update(sheet) == "e":
        cross, slope = _cross(sheet, "u"), _cross(sheet, "crossed")
    along = Along(slope, bent_token if is_per_token else bent, d_s)

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
        "estimators": (
            {n: {"value": of.value, "se": of.se} for n, of in by.items()},
            {n: of.size for n, of in by.items()},
        ),
    }
    for name, of in (
        ("delta_h1_per_lr_naive", by["naive"]),
        ("delta_h1_per_lr_rb", chosen),
        ("delta_h1_per_lr_cross", cross),
        ("delta_h1_per_lr_per_token", per_token),
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
    momentum = sheet["e.x_v0"]
    figures["slope_of_v0"] = (-math.fsum(momentum), float(np.abs(momentum).sum()))
    weights = np.bincount(sheet[f"{update(sheet)}.unit_of_prompt"])
    by_unit = -(weights / weights.sum()) * sheet["u.y_dx"]
    figures["slope_by_unit"] = (list(by_unit), float(np.abs(by_unit).sum()))
    lr, units = learning_rate(sheet)[0], len(by_unit)
    spread = lr * math.sqrt(units * by_unit.var(ddof=1)) if units > 1 else None
    figures["spread_over_batches"] = (spread, lr * float(np.abs(by_unit).sum()))
    # d/dη of Σŵ⁺R⁺ at 0: mean[D_vR + (R − R̄)·D_vS], and its second derivative
    centred = r - r.mean()
    first = (d_r.sum() + (centred * d_s).sum()) / r.size
    first_size = (np.abs(d_r).sum() + np.abs(centred * d_s).sum()) / r.size
    figures["slope_of_change"] = (float(first), float(first_size))
    figures["slope_of_change_size"] = (float(first_size), None)
    second = (d2_r + 2 * d_r * d_s + centred * w).mean()
    second -= d_s.mean() * 2 * (d_r.mean() + (centred * d_s).mean())
    second_size = (np.abs(d2_r) + 2 * np.abs(d_r * d_s) + np.abs(centred * w)).mean()
    figures["curvature_of_change"] = (float(second), float(second_size) + bent.size)
    figures["curvature_of_change_size"] = (float(second_size), None)
    for name, (again, size) in figures.items():
        sheet.write(f"update.{name}", again, size)
    return along


def _slope(of_responses: np.ndarray, size: float | None = None) -> Slope:
    terms = np.array([math.fsum(own) / len(own) for own in of_responses])
    return Slope(terms, float(np.abs(of_responses).mean()) if size is None else float(size))


def _cross(sheet: Sheet, prefix: str) -> Slope:
    """−X_uᵀv₀ − (2r_u − U_cross) of K = X_uᵀDY_m: the slope along v without its diagonal."""
    x_v0, tensors = sheet[f"{prefix}.x_v0"], range(len(sheet.facts["moved"]))
    k = of_tensors(sheet, f"{prefix}.gram_d", list(tensors))
    terms = -x_v0 - (2 * k.r - k.u_cross)
    return Slope(terms, float(np.abs(x_v0).mean()) + k.size)


def _per_token(
    r: np.ndarray,
    lengths: np.ndarray,
    d_s: np.ndarray,
    d_r: np.ndarray,
    d2_s: np.ndarray,
    d2_r: np.ndarray,
) -> tuple[Slope, Slope]:
    """Slope and curvature of h = E[R]/E[T]. With M = E[R] and L = E[T], M′ = E[D_vR + R·D_vS], L′ = E[T·D_vS],
    M″ = E[D²_vR + 2D_vR·D_vS + R·W], L″ = E[T·W], W = D²_vS + (D_vS)²:

        h′ = (M′ − hL′)/L,     h″ = (M″ − hL″ − 2h′L′)/L

    The L′ of h″ is Cov(T, D_vS). Terms of the prompts: the value and the influence of each, by the chain rule.
    """
    w, mean = d2_s + d_s**2, lengths.mean()
    h = r.mean() / mean
    over = r - h * lengths
    first = (d_r + over * d_s).mean() / mean
    l1 = (lengths * d_s).mean()
    push = (d_r + over * d_s) / mean - first * lengths / mean - l1 / mean * over / mean
    slope = Slope(first + push.mean(1), float((np.abs(d_r) + np.abs(over * d_s)).mean() / mean))
    longer = lengths - mean
    terms = d2_r + 2 * d_r * d_s + over * w - 2 * first * longer * d_s
    second = terms.mean() / mean
    pull = terms - terms.mean()
    pull = pull - (lengths * w).mean() * over / mean
    pull = pull - 2 * (longer * d_s).mean() * push
    pull = pull - longer * (second - 2 * first * d_s.mean())
    size = (np.abs(d2_r) + 2 * np.abs(d_r * d_s) + np.abs(over * w)).mean() / mean
    size += (2 * np.abs(first * longer * d_s)).mean() / mean
    return slope, Slope(second + (pull / mean).mean(1), float(size))


def coefficients(sheet: Sheet, baseline: str) -> np.ndarray:
    """c_t = R_{≥t} − b_t of every token, 0 past the end: b is 0, H_t, H_t and the mean of R_{>t} over other prompts'
    responses that have a step t, or H_t and a ridge regression of R_{>t} fitted on other folds of prompts."""
    entropy, lengths = sheet["e.entropy"], sheet["e.gen_lens"]
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
