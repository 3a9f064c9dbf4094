"""ΔĤ(η) by importance weights, its prediction, what the noise can tell of the next step (MATH.md, realised change)."""

import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit import slopes, tail
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along
from entropy_probe_checks.audit.terms import Terms, around, interval, ratio, terms


def write(sheet: Sheet, along: Along | None) -> None:
    for k, eta in enumerate(_grid(sheet, along)):
        sheet.write(f"entropy_change.{k}", eta=eta)
    for k, eta in enumerate(sheet.facts["etas"]):
        _row(sheet, k, float(eta), along)
    if along is None or sheet.restricted:
        sheet.nothing("resolution")
    else:
        _resolution(sheet, along)


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
    """(ŵ = w/Σw, ESS/N with ESS = (Σw)²/Σw²) of w = exp(log w), cut to [−clip, clip]."""
    cut = log_w if clip is None else np.clip(log_w, -clip, clip)
    w = np.exp(cut - cut.max())
    return w / w.sum(), float(w.sum() ** 2 / (w**2).sum()) / w.size


def _row(sheet: Sheet, k: int, eta: float, along: Along | None) -> None:
    """Ĥ⁺ − Ĥ, Ĥ = Σŵf/ΣŵT of f = −S (naive) or R (rb), with T = 1 per response; its prediction, and what is between."""
    row, config = f"entropy_change.{k}", sheet.config["true_delta_h"]
    write, estimates = partial(sheet.write, row), partial(sheet.estimates, row)
    t, by_token = sheet.lengths("e"), config["normalize"] == "per_token"
    s, s_q, r = (sheet[f"e.{name}"].sum(-1) for name in ("logp", "logq", "entropy"))
    s_after, r_after = (sheet[f"after.{k}.{name}"].sum(-1) for name in ("logp", "entropy"))
    clip, log_w = config["clip_log_weight"], s_after - s_q
    (now, _), (w, ess), (_, whole_ess) = (
        weights(s - s_q, clip),
        weights(log_w, clip),
        weights(log_w),
    )
    k_hat, smooth, t_after = None, log_w.ravel(), t
    if s.size >= 64 and whole_ess < 0.95:
        smooth, k_hat = tail.smoothed(smooth)
    clipped = 0 if clip is None else int((np.abs(log_w) > clip).sum())
    heavy, enough = (k_hat or 0.0) > config["max_pareto_k"], whole_ess >= config["min_ess_fraction"]
    method, reliable = "snis", enough and not heavy and not clipped
    if config["fallback"] == "psis" and eta != 0 and not reliable and k_hat is not None:
        method, reliable, w = "psis", not heavy, weights(smooth)[0].reshape(w.shape)
    if f"fresh.{k}.logp" in sheet:
        method, reliable, now, w = "resample", True, s**0 / s.size, s**0 / s.size
        s_after, r_after = (sheet[f"fresh.{k}.{name}"].sum(-1) for name in ("logp", "entropy"))
        t_after = sheet[f"fresh.{k}.gen_lens"].reshape(t.shape).astype(np.float64)
    size, ordered = np.abs(log_w).max() + np.abs(s).mean(), np.sort(log_w.ravel())
    write(eta=eta, ess=ess * s.size, ess_fraction=ess, unclipped_ess_fraction=whole_ess)
    write(clip_fraction=clipped / s.size, pareto_k=None if k_hat is None else Terms(k_hat, 1.0))
    for name, place in (("min", 0), ("median", (s.size - 1) // 2), ("max", -1)):
        write(**{f"log_weight_{name}": Terms(ordered[place], size)})
    write(method=method, reliable=bool(reliable), restricted=sheet.restricted)

    def change(f: np.ndarray, f_after: np.ndarray, by_token: bool) -> Terms:
        before, after = (of**by_token for of in (t, t_after))
        return ratio(w * terms(f_after), w * after) - ratio(now * terms(f), now * before)

    rb, rb_token, pd, pd_token = change(r, r_after, by_token), change(r, r_after, True), None, None
    if along is not None and not sheet.restricted:
        pd, pd_token = by_performance(sheet, k)
        pd = pd_token if by_token else pd
    estimates(delta_h=change(-s, -s_after, by_token), delta_h_rb=rb, delta_h_pd=pd)
    estimates(delta_h_per_token=rb_token, delta_h_per_token_pd=pd_token)
    estimates(delta_h_per_token_naive=change(-s, -s_after, True))
    write(delta_h_rb_by_prompt=rb - rb.mean(), delta_h_pd_by_prompt=pd and pd - pd.mean())
    if pd and method == "snis" and not clipped:
        rb, rb_token = pd, pd_token
    if along is None or sheet.restricted:
        names = ("predicted", "difference", "predicted_per_token", "difference_per_token")
        estimates(**dict.fromkeys(names))
        write(ratio=None, in_range=None)
        return
    for ending, realised, pair in (
        ("", rb, along.asked),
        ("_per_token", rb_token, along.of_tokens),
    ):
        predicted = expansion(sheet, eta, *pair)
        off = of_units(sheet, realised, len(predicted.value)) - predicted
        estimates(**{f"predicted{ending}": predicted, f"difference{ending}": off})
        if not ending:
            some = predicted.mean().value != 0
            write(ratio=rb.mean() / predicted.mean() if some else None)
    write(in_range=bool(reliable and enough and abs(eta) <= along.reach))


def by_performance(sheet: Sheet, k: int) -> tuple[Terms, Terms]:
    """ΔH = mean D per response and Δh = (M + D)/(L + E) − M/L per token by the performance difference, at the k-th η,

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t],  E the same of the length (H = H⁺ = 1),  w_{<t} = Π_{s<t} ρ_s
    """
    h, h_after = terms(sheet["e.entropy"]), terms(sheet[f"after.{k}.entropy"])
    log_rho = sheet[f"after.{k}.logp"] - sheet["e.logp"]
    before = np.exp(np.cumsum(log_rho, -1) - log_rho)
    c, c_length = slopes.coefficients(sheet)
    d = (before * (h_after - h) + before * np.expm1(log_rho) * c).sum(-1)
    e = (before * np.expm1(log_rho) * c_length).sum(-1)
    r, lengths = h.sum(-1), sheet.lengths("e")
    return d.mean(1), ratio(r + d, lengths + e) - ratio(r, lengths)


def expansion(sheet: Sheet, eta: float, slope: Terms, curvature: Terms) -> Terms:
    """η·slope + ½η²·curvature, of prompts, or of blocks of prompts where the slope is."""
    return eta * slope + eta**2 / 2 * of_units(sheet, curvature, len(slope.value))


def of_units(sheet: Sheet, of: Terms, units: int) -> Terms:
    """Averaged in each block, where there are fewer blocks than prompts."""
    if len(of.value) == units:
        return of
    blocks = sheet["e.unit_of_prompt"]
    return around(of.mean(), np.bincount(blocks, weights=of.value) / np.bincount(blocks))


def _resolution(sheet: Sheet, along: Along) -> None:
    """2 SE of the predicted change at η = lr; B·(2 SE/predicted)² prompts; and the interval

    predicted ± t·√(SE² + 2·spread²) of a step with another update batch.
    """
    write, lr, prompts = (
        partial(sheet.write, "resolution"),
        learning_rate(sheet)[0],
        len(sheet["e.logp"]),
    )
    token, response = (expansion(sheet, lr, *of) for of in (along.of_tokens, along.of_response))
    mean, se, size = token.mean().value, token.se.value, token.size.mean()
    write(per_token=2 * token.se, per_response=2 * response.se)
    write(prompts_needed=math.ceil(prompts * (2 * se / mean) ** 2) if mean else None)
    spread, next_step = along.spread, None
    if sheet.facts["source"][1] == "sampled" and spread:
        degrees = min(prompts, len(sheet[f"{sheet.u}.rewards"])) - 1
        both = math.hypot(se, math.sqrt(2) * spread.value)
        next_step = interval(Terms(mean, size + spread.size), both, degrees)
    target = sheet.config["batch"]["target_se"]
    if target == "2se":
        target = lr * abs(float(sheet["target.terms"].mean())) / 2
    write(next_step=next_step, target_se=None if target is None else Terms(float(target), size))
    looks = []
    for first in sheet.facts.get("looks", []):  # the SE, had E had its first prompts alone
        lengths = sheet.lengths("e")[:first].ravel()
        arrays = {n: of[:first] for n, of in sheet.arrays.items() if n.startswith("e.")}
        part = Sheet(sheet.report, arrays | {"e.gen_lens": lengths}, sheet.facts)
        looked = expansion(part, lr, *slopes.per_token(part)).se.value
        looks.append({"num_prompts": first, "se": Terms(looked, size)})
    write(looks=looks)
