"""Slope and curvature of the entropy along v, from D_v of every token (MATH.md, slope and curvature)."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from entropy_probe_checks.audit.batches import part, update
from entropy_probe_checks.audit.first_order import gram, learning_rate, row_means
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, around, norm, ratio, terms

NOTICED = 1e-6
"""Of `hk_group`: prompts that differ by a smaller share of R_{>t} differ by nothing."""
FOLDS, RIDGE, DEVIATIONS = 5, 1e-2, 10.0
"""Of `hk_ridge`: prompt n is in fold n mod 5; the penalty for each row; how far a standardised feature counts."""


@dataclass(frozen=True)
class Along:
    """Slope and curvature by which ΔH is predicted: per response, per token, and as the configuration asks."""

    of_response: tuple[Terms, Terms]
    of_tokens: tuple[Terms, Terms]
    asked: tuple[Terms, Terms]

    @property
    def eta_star(self) -> Terms | None:
        """2|slope/curvature|; none where the curvature is within 2 SE of 0."""
        slope, curvature = (x.mean() for x in self.asked)
        undecided = abs(curvature.value) < 2 * self.asked[1].se.value or not curvature.value
        return None if undecided else abs(2 * slope / curvature)

    @property
    def reach(self) -> float:
        """A tenth of η*, with 2 SE in place of a slope that is smaller."""
        slope, curvature = self.asked
        most = max(abs(slope.mean().value), 2 * slope.se.value)
        return 0.2 * most / abs(curvature.mean().value) if self.eta_star else math.inf


def write(sheet: Sheet) -> Along:
    """Section `update`, the parts of the slope, and what the change is predicted by."""
    write, estimate = partial(sheet.write, "update"), sheet.estimate
    lr, lengths, rho = learning_rate(sheet)[0], sheet.lengths("e"), sheet["e.d_rounding"]
    per_response = sheet.terms("e", "logp entropy d_logp d_entropy d2_logp d2_entropy")
    s, r, d_s, d_r, d2_s, d2_r = (x.sum(-1) for x in per_response)
    group = s.value.shape[1]
    centred = (s - s.mean(1)[:, None]) * (group / (group - 1))  # S − S̄ of the others
    by = {"naive": (-centred * d_s).mean(1)}
    for baseline in ("none", "hk", "hk_ema", "hk_ridge", "hk_group"):
        by[f"rb_{baseline}"] = of_responses(sheet, baseline)[0].mean(1)
    slope, bent = (x.mean(1) for x in of_responses(sheet, in_use(sheet))[:2])
    of_tokens, cross, cross_tokens = per_token(sheet), None, None
    if update(sheet) == "e":
        cross, cross_tokens = _cross(sheet, "u"), _cross(sheet, "crossed")
    pairs = (cross or slope, bent), (cross_tokens or of_tokens[0], of_tokens[1])
    along = Along(*pairs, pairs[sheet.config["true_delta_h"]["normalize"] == "per_token"])
    write(estimators={name: x.both for name, x in by.items()}, baseline=in_use(sheet))
    estimate("update.delta_h1_per_lr_naive", by["naive"])
    estimate("update.delta_h1_per_lr_rb", slope)
    estimate("update.delta_h1_per_lr_per_token", of_tokens[0])
    estimate("update.delta_h1_per_lr_cross", cross)
    estimate("update.delta_h1_per_lr_cross_per_token", cross_tokens)
    estimate("update.curvature", bent)
    estimate("update.curvature_per_token", of_tokens[1])
    write(eta_star=along.eta_star)
    _norms(sheet)

    # derivatives at 0 of Σŵ⁺R⁺: mean[D_vR + (R − R̄)·D_vS], and the second; and of Σŵ⁺R⁺/Σŵ⁺T
    over, h, push = r - r.mean(), r.value.sum() / lengths.sum(), d2_s + d_s * d_s
    first, second = d_r + over * d_s, d2_r + 2 * d_r * d_s + over * push
    of_second = second.mean() - 2 * d_s.mean() * first.mean()
    write(slope_of_change=first.mean(), curvature_of_change=of_second)
    write(slope_of_change_size=(abs(d_r) + abs(over * d_s)).mean())
    write(curvature_of_change_size=(abs(d2_r) + abs(2 * d_r * d_s) + abs(over * push)).mean())
    per_length = d_r + (r - h * lengths) * d_s
    write(slope_of_change_per_token=per_length.sum() / lengths.sum())
    # what the rounding ρ of each token's D_v can do to a sum of coefficients · D_v
    c, c_length = both_coefficients(sheet, in_use(sheet))
    is_naive = sheet.config["first_order"]["estimator"] == "naive"
    for name, weight, number in (
        ("slope_rounding", abs(centred)[..., None] if is_naive else 1 + abs(c), lengths.size),
        ("slope_rounding_per_token", 1 + abs(c - h * c_length), lengths.sum()),
        ("slope_of_change_rounding", 1 + abs(over)[..., None], lengths.size),
    ):
        error = norm((weight.value * rho).ravel() ** 2) / number
        write(**{name: Terms(error, error + rho.mean())})
    for ending, x in (("", "x"), ("_per_token", "xt")):
        units, of_v0 = by_unit(sheet, f"u.y_d{x}"), -terms(sheet[f"e.{x}_v0"]).sum()
        write(**{f"slope_of_v0{ending}": of_v0, f"slope_by_unit{ending}": units.even})
        write(**{f"spread_over_batches{ending}": spread(units, lr)})
    # of the slope, mean[D_vR] over the mean length or over 1, and what is left
    for ending, t, whole in (("", lengths, of_tokens[0]), ("_per_response", lengths**0, slope)):
        of_entropies = ratio(d_r, t)
        estimate(f"predictors.of_entropies{ending}", lr * of_entropies)
        estimate(f"predictors.of_visits{ending}", lr * (whole - of_entropies))
    return along


def _norms(sheet: Sheet) -> None:
    """‖v‖, ‖v₀‖, v₀ᵀv/‖v‖², ‖Ȳ‖ of what v moves, min(1, max_grad_norm/(‖Ȳ‖ + 1e-6))."""
    moved = [sheet.facts["names"].index(name) for name in sheet.facts["moved"]]
    v, v0, y = (
        norm(sheet["sum.v_squared"]),
        norm(sheet["sum.v0_squared"]),
        norm(sheet["sum.y_bar_squared"][moved]),
    )
    most = part(sheet, "max_grad_norm")
    sheet.write("update", norm=v, norm_v0=v0, grad_norm=y)
    sheet.write("update", clip_factor=1.0 if most is None else min(1.0, most / (y + 1e-6)))
    share = Terms(math.fsum(sheet["sum.v0_v"]) / v**2, v0 / v) if v else 0.0
    sheet.write("update", momentum_share=share)


def by_unit(sheet: Sheet, name: str) -> Terms:
    """−X̄ᵀD·Y_u of every unit, weighted by its share of the prompts."""
    unit_of_prompt = sheet[f"{update(sheet)}.unit_of_prompt"]
    return -terms(sheet[name]) * (np.bincount(unit_of_prompt) / len(unit_of_prompt))


def spread(units: Terms, lr: float) -> Terms | None:
    """The sd of lr·Σ_u over update batches: lr·U·SE of the mean over units."""
    number = len(units.value)
    return lr * number * units.se if number > 1 else None


def _cross(sheet: Sheet, prefix: str) -> Terms:
    """−X̄ᵀv₀ − U_cross of K_um = X_uᵀDY_m, the slope along v without its diagonal; unit u says −X_uᵀv₀ − 2r_u."""
    x_v0 = terms(sheet[f"{prefix}.x_v0"])
    r = row_means(*gram(sheet, f"{prefix}.gram_d", list(range(len(sheet.facts["moved"])))))
    return around(-x_v0.mean() - r.mean(), -x_v0.value - 2 * r.value)


def of_responses(sheet: Sheet, baseline: str) -> tuple[Terms, Terms, Terms, Terms]:
    """What a response says of ΔH and of the change of length ΔL at 0, D′, D″, E′, E″ [B, G]: derivatives of

    Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t], where log w_{<t} = Σ_{k<t} log ρ_k: with d = D_v log p_t,
    D′ = Σ_t D_vH_t + c_t·d,  D″ = Σ_t D²_vH_t + c_t·(D²_v log p_t + d²) + 2·(Σ_{k<t} d_k)·(D_vH_t + c_t·d)
    """
    d, d_h, d2, d2_h = sheet.terms("e", "d_logp d_entropy d2_logp d2_entropy")
    so_far, found = d.each(lambda x: np.cumsum(x, -1) - x), []
    for c, of_h in zip(both_coefficients(sheet, baseline), (1.0, 0.0), strict=True):
        first = of_h * d_h + c * d
        second = of_h * d2_h + c * (d2 + d * d) + 2 * so_far * first
        found += [first.sum(-1), second.sum(-1)]
    return tuple(found)


def per_token(sheet: Sheet) -> tuple[Terms, Terms]:
    """h′ = (D′ − hE′)/L and h″ = (D″ − hE″ − 2h′E′)/L of h = (M + D)/(L + E) at 0; a response says of them what the
    derivatives of [R + D − h·(T + E)]/(L + E) are."""
    d, d2, e, e2 = of_responses(sheet, in_use(sheet))
    r, lengths = sheet["e.entropy"].sum(-1), sheet.lengths("e")
    mean, h = lengths.mean(), r.mean() / lengths.mean()
    slope = (d.mean() - h * e.mean()) / mean
    bent = (d2.mean() - h * e2.mean() - 2 * slope.value * e.mean()) / mean
    at_0 = (r - h * lengths) / mean
    once = ((d - h * e).value - slope.value * lengths - e.value.mean() * at_0) / mean
    twice = (d2 - h * e2 - 2 * slope.value * e).value - bent.value * lengths
    twice = (twice - e2.value.mean() * at_0 - 2 * e.value.mean() * once) / mean
    return around(slope, once.mean(1)), around(bent, twice.mean(1))


def in_use(sheet: Sheet) -> str:
    baseline = sheet.config["first_order"]["baseline"]
    return "hk_group" if baseline == "auto" else baseline


def both_coefficients(sheet: Sheet, baseline: str) -> tuple[Terms, Terms]:
    """c_t of the entropy, and of the length: the same where every step counts 1."""
    h = sheet["e.entropy"]
    return coefficients(sheet, h, baseline), coefficients(sheet, np.ones_like(h), baseline)


def coefficients(sheet: Sheet, h: np.ndarray, baseline: str) -> Terms:
    """c_t = R_{≥t} − b_t of every token [B, G, T], 0 past the end. b_t is 0 (none), H_t (hk), or H_t and what is
    expected of R_{>t}: the mean over other prompts' responses that have a step t (hk_ema), the same shrunk to from the
    own prompt's other responses (hk_group), or a ridge regression fitted on other folds of prompts (hk_ridge)."""
    there = np.arange(h.shape[2]) < sheet.lengths("e")[..., None]
    h = np.where(there, h, 0.0)
    onward = np.cumsum(h[..., ::-1], -1)[..., ::-1]
    expected = {
        "none": lambda *_: -h,
        "hk": lambda *_: 0 * h,
        "hk_ema": _others,
        "hk_group": _shrunk,
    }
    ridge = partial(_ridge, sheet["e.features"])
    b = h + expected.get(baseline, ridge)(onward - h, there)
    return terms(onward) - b * there


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
