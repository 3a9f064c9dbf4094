"""Predictors of the change that need no gradient, on U, and the two parts of the slope along v, on E.

−Cov(log p, A);  −mean[A(1 − p)(H + log p)];  −mean[A(S − Σ_i p_i S_i)], S = p(H + log p), over the tokens of the step
"""

from __future__ import annotations

import math

import numpy as np

from entropy_probe_checks.audit.batches import advantages, update
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along, Slope


def write(sheet: Sheet, along: Along | None) -> None:
    """Section `predictors`."""
    for name, (value, se, size) in (_of_batch(sheet) | _of_slope(sheet, along)).items():
        sheet.write(f"predictors.{name}", value, size)
        sheet.write(f"predictors.{name}_se", se, size)


Figure = tuple[float | None, float | None, float | None]
"""Value, standard error, and the size of the terms."""


def _of_batch(sheet: Sheet) -> dict[str, Figure]:
    """With the tokens in a row, and the prompt of each beside it."""
    which = update(sheet)
    logp, entropy, mean_s = (sheet[f"{which}.{name}"] for name in ("logp", "entropy", "mean_s"))
    lengths = sheet[f"{which}.gen_lens"].reshape(logp.shape[:2])
    chosen = np.arange(logp.shape[2]) < lengths[..., None]
    if sheet.has(f"{which}.in_step"):
        chosen &= sheet[f"{which}.in_step"].astype(bool)[..., None]
    a = advantages(sheet, which)
    if sheet.has(f"{which}.given_advantages"):
        a = sheet[f"{which}.given_advantages"]
    a = a if a.ndim == 3 else a[..., None] * np.ones_like(logp)
    prompt = np.nonzero(chosen)[0]
    l, h, s, a = (of[chosen] for of in (logp, entropy, mean_s, a))
    p = np.exp(l)
    products = (l - l.mean()) * (a - a.mean())
    found: dict[str, Figure] = {}
    for name, terms, size in (
        ("cov_logp_advantage", products, np.abs(a) * np.abs(l)),
        ("steer", a * (1 - p) * (h + l), np.abs(a) * (np.abs(h) + np.abs(l))),
        ("wang", a * (p * (h + l) - s), np.abs(a) * (p * (np.abs(h) + np.abs(l)) + np.abs(s))),
    ):
        prompts, mean = len(logp), float(terms.mean())
        off = np.bincount(prompt, terms - mean, prompts)
        squares = math.fsum(off**2)
        se = math.sqrt(prompts / (prompts - 1) * squares) / len(l) if prompts > 1 else None
        found[name] = (-mean, se, float(size.mean()))
    return found


def _of_slope(sheet: Sheet, along: Along | None) -> dict[str, Figure]:
    """lr·mean[D_vR] over the mean length or over 1, and what is left of the slope; SEs of the spread over prompts."""
    names = ("of_entropies", "of_visits")
    if along is None:
        nothing: Figure = (None, None, None)
        return {f"{n}{end}": nothing for n in names for end in ("", "_per_response")}
    lr, _ = learning_rate(sheet)
    d_r = sheet["e.d_entropy"].sum(-1)
    lengths = sheet["e.gen_lens"].reshape(d_r.shape).astype(np.float64)
    found: dict[str, Figure] = {}
    for end, t, slope in (
        ("", lengths, along.plain[0]),
        ("_per_response", np.ones_like(lengths), along.plain[1]),
    ):
        ratio = d_r.sum() / t.sum()
        # influence of a ratio: what a response has beyond its share, over the mean
        own = ratio + ((d_r - ratio * t) / t.mean()).mean(1)
        size = float(np.abs(d_r).sum() / t.sum())
        entropies, visits = Slope(own, size), Slope(slope.terms - own, size + slope.size)
        for name, of in zip(names, (entropies, visits), strict=True):
            found[name + end] = (lr * of.value, lr * of.se, lr * of.size)
    return found
