"""The entropy at θ by every estimator (MATH.md, the entropy of responses)."""

from __future__ import annotations

import math

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

LOGIT_VAR = 5
"""Its place among the features of a token."""


def write(sheet: Sheet) -> None:
    """naive −S, rb R, per response: the mean over all, and the spread of the prompts' means over √B."""
    s, r, r_q = (sheet[f"e.{name}"].sum(-1) for name in ("logp", "entropy", "entropy_q"))
    lengths = sheet["e.gen_lens"].reshape(s.shape).astype(np.float64)
    for name, values in (("naive", -s), ("rb", r), ("rb_q", r_q)):
        sheet.write(f"entropy.{name}", mean_over_prompts(values), float(np.abs(values).mean()))
    sheet.write("entropy.rb_by_prompt", [float(own.mean()) for own in r], float(r.mean()))
    per_token = r.sum() / lengths.sum()
    excess = (r - per_token * lengths) / lengths.mean()
    again = {"value": float(per_token), "se": cluster_se(excess)}
    sheet.write("entropy.per_token", again, float(np.abs(r).sum() / lengths.sum()))
    by_prompt = [per_token + float(own.mean()) for own in excess]
    sheet.write("entropy.per_token_by_prompt", by_prompt, float(np.abs(r).sum() / lengths.sum()))
    sheet.write("entropy.surprises", int((sheet["e.logp"] < math.log(0.5)).sum()))
    temperature = sheet.report["config"]["generation"]["temperature"]
    surprise = -sheet["e.logq"].sum(-1) - r_q
    spread = math.sqrt(sheet["e.features"][..., LOGIT_VAR].sum()) / temperature / surprise.size
    again = {"value": float(surprise.mean()), "se": spread}
    sheet.write("entropy.surprise", again, float(np.abs(r_q).mean() + np.abs(s).mean()))


def mean_over_prompts(values: np.ndarray) -> dict[str, float]:
    """{value: Σ_ng f/(BG), se: sd_n(f̄_n)/√B}."""
    means = [math.fsum(own) / len(own) for own in values]
    centre = math.fsum(means) / len(means)
    variance = math.fsum((m - centre) ** 2 for m in means) / (len(means) - 1)
    return {"value": centre, "se": math.sqrt(variance / len(means))}


def cluster_se(influence: np.ndarray) -> float:
    """√(B/(B−1)·Σ_n(Σ_g φ_ng)²)/N."""
    prompts = len(influence)
    squares = math.fsum(float(own.sum()) ** 2 for own in influence)
    return math.sqrt(prompts / (prompts - 1) * squares) / influence.size
