"""ΔĤ(η) by importance weights, its prediction, what the noise can tell of the next step (MATH.md, realised change)."""

import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Array, Sheet, interval, ratio, se
from entropy_probe_checks.audit.slopes import Along, by_derivatives, coefficients


def write(sheet: Sheet, along: list[Along]) -> None:
    """What is along v per response and per token, if there is a step."""
    etas, reach = [0.0], 0.0
    if along:
        slope, curvature, *_ = along[sheet.config["true_delta_h"]["normalize"] == "per_token"]
        # η* = 2|slope/curvature|, where the curvature is decided; a tenth of it, with 2 SE in place of a smaller slope
        a, b = abs(slope.mean()), abs(curvature.mean())
        decided = b and b >= 2 * se(curvature)
        sheet.write("update", eta_star=2 * a / b if decided else None)
        reach = 0.2 * max(a, 2 * se(slope)) / b if decided else math.inf
        etas = _grid(sheet, reach)
    sheet.hold("etas", sheet.facts["etas"], etas)
    predicting = [] if sheet.restricted else along
    for k, eta in enumerate(sheet.facts["etas"]):
        _row(sheet, k, float(eta), predicting, reach)
    if predicting:
        _resolution(sheet, *predicting)


def _grid(sheet: Sheet, reach: float) -> list[float]:
    """0, lr and the configured η; or, with m the smaller of lr and the η at which exp(−η²·Var D_vS) is
    `min_ess_fraction`, ± m/10^(k/2) for k below 3 (`auto`) or 5 (`fine`); and ± the reach of the prediction, if that
    is smaller."""
    config, (lr, _) = sheet.config["true_delta_h"], learning_rate(sheet)
    if not isinstance(config["etas"], str):
        return sorted({0.0, lr, *map(float, config["etas"])})
    variance, end = float(sheet["e.d_logp"].sum(-1).var(ddof=1)), lr
    if variance > 0:
        end = min(lr, math.sqrt(-math.log(config["min_ess_fraction"]) / variance) or lr)
    steps = [end / 10 ** (k / 2) for k in range(3 if config["etas"] == "auto" else 5)]
    steps += [reach] if 0 < reach < steps[-1] else []
    return sorted({0.0, lr, *steps, *(-step for step in steps)})


def weights(log_w: Array, clip: float | None = None) -> tuple[Array, float]:
    """(ŵ = w/Σw, ESS/N with ESS = (Σw)²/Σw²) of w = exp(log w), cut to [−clip, clip]."""
    cut = log_w if clip is None else np.clip(log_w, -clip, clip)
    w = np.exp(cut - cut.max())
    return w / w.sum(), float(w.sum() ** 2 / (w**2).sum()) / w.size


def smoothed(log_w: Array) -> tuple[Array, float | None]:
    """(log w with the quantiles of the fitted tail in place of the largest, up to a constant; k̂), or as they are and
    `None` where nothing can be fitted: the generalised Pareto fit of Zhang and Stephens (2009), and the smoothing of
    Vehtari et al. (2024, arXiv:1507.02646, appendix C).

    The tail has ⌊min(N/5, 3√N)⌋ values, what it exceeds is the largest of the others.
    """
    n, fitted = len(log_w), log_w - log_w.max()
    size = n // 5 if n <= 225 else math.floor(3 * math.sqrt(n))
    order = np.argsort(fitted, kind="stable")
    tail, cut = order[n - size :], math.exp(fitted[order[n - size - 1]])
    excess, quarter = np.exp(fitted[tail]) - cut, int(size / 4 + 0.5) - 1
    if size < 5 or np.ptp(fitted[tail]) < np.finfo(float).tiny or excess[quarter] <= 0:
        return log_w, None
    # θ = k/σ by its mean over a grid, weighted by the profile likelihood
    grid = 30 + int(math.sqrt(size))
    spread = 1 - np.sqrt(grid / (np.arange(grid) + 0.5))
    theta = 1 / excess[-1] + spread / (3 * excess[quarter])
    k = np.log1p(-theta[:, None] * excess).mean(1)
    profile = size * (np.log(-theta / k) - k - 1)
    weights = np.exp(profile - profile.max())
    weights[weights < 10 * np.finfo(float).eps * weights.sum()] = 0.0
    mean = (theta * weights).sum() / weights.sum()
    k = float(np.log1p(-mean * excess).mean())
    sigma = -k / mean
    if not (math.isfinite(k) and sigma > 0):
        return log_w, None
    k = (size * k + 10 * 0.5) / (size + 10)
    log_q = np.log1p(-(np.arange(size) + 0.5) / size)  # q = 1 − p
    quantiles = cut + sigma * (np.expm1(-k * log_q) / k if k else -log_q)
    fitted[tail] = np.minimum(np.log(quantiles), 0.0)
    return fitted, k


def _row(sheet: Sheet, k: int, eta: float, along: list[Along], reach: float) -> None:
    """Ĥ⁺ − Ĥ, Ĥ = Σŵf/ΣŵT of f = −S (naive) or R (rb), with T = 1 per response; its prediction, and what is between."""
    row, config = f"entropy_change[{k}]", sheet.config["true_delta_h"]
    write, estimates = partial(sheet.write, row), partial(sheet.estimates, row)
    intervals = partial(sheet.intervals, row)
    t, by_token = sheet.lengths("e"), config["normalize"] == "per_token"
    s, s_q, r = (x.sum(-1) for x in sheet.of("e", "logp logq entropy"))
    s_after, r_after = (x.sum(-1) for x in sheet.of(f"after.{k}", "logp entropy"))
    clip, log_w = config["clip_log_weight"], s_after - s_q
    now, (w, ess), full_ess = weights(s - s_q, clip)[0], weights(log_w, clip), weights(log_w)[1]
    k_hat, smooth, t_after = None, log_w.ravel(), t
    if s.size >= 64 and full_ess < 0.95:
        smooth, k_hat = smoothed(smooth)
    clipped = 0 if clip is None else int((np.abs(log_w) > clip).sum())
    heavy, enough = (k_hat or 0.0) > config["max_pareto_k"], full_ess >= config["min_ess_fraction"]
    method, reliable = "snis", enough and not heavy and not clipped
    if config["fallback"] == "psis" and eta != 0 and not reliable and k_hat is not None:
        method, reliable, w = "psis", not heavy, weights(smooth)[0].reshape(w.shape)
    if f"fresh.{k}.logp" in sheet:
        method, reliable, now, w = "resample", True, s**0 / s.size, s**0 / s.size
        s_after, r_after = (x.sum(-1) for x in sheet.of(f"fresh.{k}", "logp entropy"))
        t_after = sheet[f"fresh.{k}.gen_lens"].reshape(t.shape).astype(np.float64)
    write(eta=eta, ess=ess * s.size, ess_fraction=ess, unclipped_ess_fraction=full_ess)
    low, middle, high = np.quantile(log_w, (0.0, 0.5, 1.0), method="lower")
    write(log_weight_min=low, log_weight_median=middle, log_weight_max=high)
    write(clip_fraction=clipped / s.size, pareto_k=k_hat)
    write(method=method, reliable=bool(reliable), restricted=sheet.restricted)

    def change(f: Array, f_after: Array, by_token: bool) -> Array:
        before, after = (of**by_token for of in (t, t_after))
        return ratio(w * f_after, w * after) - ratio(now * f, now * before)

    for ending, by in (("", by_token), ("_per_token", True)):
        rb, naive = change(r, r_after, by), change(-s, -s_after, by)
        intervals(**{f"delta_h{ending or '_rb'}": rb})
        if ending:
            estimates(delta_h_per_token_naive=naive)
        else:
            intervals(delta_h=naive)
            write(delta_h_rb_by_prompt=rb - rb.mean())
        if along:
            slope, curvature, *count = along[by]
            pd = _by_performance(sheet, k, *count)
            intervals(**{f"delta_h{ending}_pd": pd})
            realised = pd if method == "snis" and not clipped else rb
            own = expansion(sheet, eta, slope, curvature)
            off = of_units(sheet, realised, own) - own
            estimates(**{f"predicted{ending}": own, f"difference{ending}": off})
            if not ending:
                write(delta_h_pd_by_prompt=pd - pd.mean())
                write(ratio=realised.mean() / own.mean() if own.mean() else None)
    if along:
        write(in_range=bool(reliable and enough and abs(eta) <= reach))


def _by_performance(sheet: Sheet, k: int, t: Array, c: Array, c_t: Array) -> Array:
    """(M + D)/(L + E) − M/L by the performance difference at the k-th η; per response L is 1 and E is 0;

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t],  E the same of the length (H = H⁺ = 1),  w_{<t} = Π_{s<t} ρ_s
    """
    h, log_rho = sheet["e.entropy"], sheet[f"after.{k}.logp"] - sheet["e.logp"]
    before, step, r = np.exp(np.cumsum(log_rho, -1) - log_rho), np.expm1(log_rho), h.sum(-1)
    d = (before * (sheet[f"after.{k}.entropy"] - h + step * c)).sum(-1)
    e = (before * step * c_t).sum(-1)
    return ratio(r + d, t + e) - ratio(r, t)


def expansion(sheet: Sheet, eta: float, slope: Array, curvature: Array) -> Array:
    """η·slope + ½η²·curvature, of prompts, or of blocks of prompts where the slope is."""
    return eta * slope + eta**2 / 2 * of_units(sheet, curvature, slope)


def of_units(sheet: Sheet, of: Array, as_in: Array) -> Array:
    """Averaged in each block, where the other is of fewer blocks than prompts; with the mean over prompts."""
    if len(of) == len(as_in):
        return of
    blocks = sheet["e.unit_of_prompt"]
    averages = np.bincount(blocks, weights=of) / np.bincount(blocks)
    return averages - averages.mean() + of.mean()


def _resolution(sheet: Sheet, of_response: Along, of_tokens: Along) -> None:
    """2 SE of the predicted change at η = lr; B·(2 SE/predicted)² prompts; and the interval of a step with another
    update batch, predicted ± t·√(SE² + 2·spread²)."""
    write, lr = partial(sheet.write, "resolution"), learning_rate(sheet)[0]
    token, response = (expansion(sheet, lr, *of[:2]) for of in (of_tokens, of_response))
    mean, error, prompts = token.mean(), se(token), len(sheet["e.logp"])
    write(per_token=2 * error, per_response=2 * se(response))
    if mean:  # a whole number but for rounding is that or the next
        needed = prompts * (2 * error / mean) ** 2
        few, many = (math.ceil(needed * (1 + off)) for off in (-1e-9, 1e-9))
        told = sheet.reported.get("resolution.prompts_needed")
        write(prompts_needed=told if told in range(few, many + 1) else many)
    spread = sheet.again["update.spread_over_batches_per_token"][0]
    if sheet.facts["source"][1] == "sampled" and spread is not None:
        degrees = min(prompts, len(sheet[f"{sheet.u}.rewards"])) - 1
        write(next_step=interval(mean, math.hypot(error, math.sqrt(2) * spread), degrees))
    target = sheet.config["batch"]["target_se"]
    if target == "2se":
        target = lr * abs(sheet["target.terms"].mean()) / 2
    write(target_se=None if target is None else float(target))
    looks = []
    for first in sheet.facts.get("looks", []):  # the SE, had E had its first prompts alone
        arrays = {n: of[:first] for n, of in sheet.items() if n.startswith("e.")}
        part = Sheet(sheet.report, arrays | {"e.gen_lens": sheet.lengths("e")[:first]}, sheet.facts)
        of_part = by_derivatives(part, part.lengths("e"), *coefficients(part))
        looks.append({"num_prompts": first, "se": se(expansion(part, lr, *of_part))})
    write(looks=looks)
