"""ΔĤ(η) by importance weights, and how far the prediction is from it (MATH.md, realised change)."""

import math
from typing import Any

import numpy as np

from entropy_probe_checks.audit import tail
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along, both_coefficients
from entropy_probe_checks.audit.terms import Terms, around, estimate, ratio, terms


def write(sheet: Sheet, along: Along | None) -> None:
    for k, eta in enumerate(_grid(sheet, along)):
        sheet.write(f"entropy_change.{k}.eta", eta)
    for k, eta in enumerate(sheet.facts["etas"]):
        sheet.section(f"entropy_change.{k}", _row(sheet, k, float(eta), along))


def _grid(sheet: Sheet, along: Along | None) -> list[float]:
    """0, lr and the configured η; or `auto`: ± five, two a decade, down from the smaller of lr and the η at which
    exp(−η²·Var D_vS) is `min_ess_fraction`, and ± the reach of the prediction, where that is smaller."""
    if along is None:
        return [0.0]
    config, (lr, _) = sheet.config["true_delta_h"], learning_rate(sheet)
    if config["etas"] != "auto":
        return sorted({0.0, lr, *map(float, config["etas"])})
    variance, end = float(sheet["e.d_logp"].sum(-1).var(ddof=1)), lr
    if variance > 0:
        end = min(lr, math.sqrt(-math.log(config["min_ess_fraction"]) / variance) or lr)
    steps = [end / 10 ** (k / 2) for k in range(5)]
    if 0 < along.reach < steps[-1]:
        steps.append(along.reach)
    return sorted({0.0, lr, *steps, *(-step for step in steps)})


def weights(log_w: np.ndarray, clip: float | None = None) -> tuple[np.ndarray, float]:
    """(ŵ = w/Σw, ESS = (Σw)²/Σw²) of w = exp(log w), cut to [−clip, clip]."""
    cut = log_w if clip is None else np.clip(log_w, -clip, clip)
    w = np.exp(cut - cut.max())
    return w / w.sum(), float(w.sum() ** 2 / (w**2).sum())


def _row(sheet: Sheet, k: int, eta: float, along: Along | None) -> dict[str, Any]:
    """Ĥ = Σŵf/ΣŵT, T = 1 per response, of −S (naive) and R (rb), before and after."""
    config, t = sheet.config["true_delta_h"], sheet.lengths("e")
    s, s_q, r = (sheet[f"e.{name}"].sum(-1) for name in ("logp", "logq", "entropy"))
    s_after, r_after, t_after = *_after(sheet, f"after.{k}"), t
    clip, log_w = config["clip_log_weight"], s_after - s_q
    (now, _), (w, ess), (_, unclipped) = (
        weights(s - s_q, clip),
        weights(log_w, clip),
        weights(log_w),
    )
    clipped = 0 if clip is None else int((np.abs(log_w) > clip).sum())
    enough = unclipped / s.size >= config["min_ess_fraction"]
    k_hat, smooth = None, log_w.ravel()
    if s.size >= 64 and unclipped / s.size < 0.95:
        smooth, k_hat = tail.smoothed(smooth)
    heavy = k_hat is not None and k_hat > config["max_pareto_k"]
    method, reliable = "snis", enough and not heavy and not clipped
    if config["fallback"] == "psis" and eta != 0 and not reliable and k_hat is not None:
        method, reliable, w = "psis", not heavy, weights(smooth)[0].reshape(w.shape)
    if sheet.has(f"fresh.{k}.logp"):
        method, reliable, now, w = "resample", True, *np.full((2, *s.shape), 1 / s.size)
        s_after, r_after = _after(sheet, f"fresh.{k}")
        t_after = sheet[f"fresh.{k}.gen_lens"].reshape(t.shape).astype(np.float64)

    def change(f: np.ndarray, f_after: np.ndarray, by_token: bool) -> Terms:
        before, after = (of**by_token for of in (t, t_after))
        return ratio(w * terms(f_after), w * after) - ratio(now * terms(f), now * before)

    by_token = config["normalize"] == "per_token"
    rb, rb_token = change(r, r_after, by_token), change(r, r_after, True)
    pd = pd_token = None
    if along is not None and not sheet.restricted:
        whole, pd_token = by_performance(sheet, k)
        pd = pd_token if by_token else whole
    size, ordered = float(np.abs(log_w).max() + np.abs(s).mean()), np.sort(log_w.ravel())
    figures = {
        "eta": eta,
        "ess": ess,
        "ess_fraction": ess / s.size,
        "unclipped_ess_fraction": unclipped / s.size,
        "pareto_k": None if k_hat is None else Terms(k_hat, 1.0),
        "clip_fraction": clipped / s.size,
        "log_weight_min": Terms(ordered[0], size),
        "log_weight_median": Terms(ordered[(s.size - 1) // 2], size),
        "log_weight_max": Terms(ordered[-1], size),
        "method": method,
        "reliable": bool(reliable),
        "restricted": sheet.restricted,
        **estimate("delta_h", change(-s, -s_after, by_token), with_interval=True),
        **estimate("delta_h_rb", rb, with_interval=True),
        **estimate("delta_h_per_token", rb_token, with_interval=True),
        **estimate("delta_h_per_token_naive", change(-s, -s_after, True)),
        **estimate("delta_h_pd", pd, with_interval=True),
        **estimate("delta_h_per_token_pd", pd_token, with_interval=True),
        "delta_h_rb_by_prompt": rb.influence,
        "delta_h_pd_by_prompt": pd and pd.influence,
        "ratio": None,
        "in_range": None,
    }
    if along is None or sheet.restricted:
        names = [
            f"{name}{end}" for name in ("predicted", "difference") for end in ("", "_per_token")
        ]
        return figures | {f"{name}{se}": None for name in names for se in ("", "_se")}
    if method == "snis" and not clipped and pd:
        rb, rb_token = pd, pd_token
    pairs = ("", rb, along.asked), ("_per_token", rb_token, along.of_tokens)
    for ending, realised, pair in pairs:
        own = expansion(sheet, eta, *pair)
        off = of_units(sheet, realised, len(own.value)) - own
        figures |= estimate(f"predicted{ending}", own) | estimate(f"difference{ending}", off)
    if figures["predicted"].value:
        figures["ratio"] = rb.mean() / figures["predicted"]
    return figures | {"in_range": bool(reliable and enough and abs(eta) <= along.reach)}


def _after(sheet: Sheet, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    return sheet[f"{prefix}.logp"].sum(-1), sheet[f"{prefix}.entropy"].sum(-1)


def by_performance(sheet: Sheet, k: int) -> tuple[Terms, Terms]:
    """ΔH = mean D per response and Δh per token by the performance difference, at the k-th η:

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t],  E the same of the length (H = H⁺ = 1),  w_{<t} = Π_{s<t} ρ_s
    Δh = (M + D)/(L + E) − M/L, with M and L the entropy and the length of a response
    """
    h, h_after = terms(sheet["e.entropy"]), terms(sheet[f"after.{k}.entropy"])
    log_rho = sheet[f"after.{k}.logp"] - sheet["e.logp"]
    before = np.exp(np.cumsum(log_rho, -1) - log_rho)
    c, c_length = both_coefficients(sheet)
    d = (before * (h_after - h) + before * np.expm1(log_rho) * c).sum(-1)
    e = (before * np.expm1(log_rho) * c_length).sum(-1)
    r, t = h.sum(-1), sheet.lengths("e")
    return d.mean(1), ratio(r + d, t + e) - ratio(r, t)


def expansion(sheet: Sheet, eta: float, slope: Terms, curvature: Terms) -> Terms:
    """η·slope + ½η²·curvature, of prompts, or of blocks of prompts where the slope is."""
    return eta * slope + eta**2 / 2 * of_units(sheet, curvature, len(slope.value))


def of_units(sheet: Sheet, of: Terms, units: int) -> Terms:
    """Averaged in each block, where there are fewer blocks than prompts."""
    if len(of.value) == units:
        return of
    blocks = sheet["e.unit_of_prompt"]
    return around(of.mean(), np.bincount(blocks, weights=of.value) / np.bincount(blocks))
