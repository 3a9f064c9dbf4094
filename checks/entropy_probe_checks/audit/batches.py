"""What the batches hold: counts, rewards, advantages, fingerprints; the entropy at θ; the sampler's own scores."""

import hashlib
import json
import math
from functools import partial
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, ratio, terms

LOGIT_VAR = 5
"""The place of Var_q(logit) among the features of a token."""


def write(sheet: Sheet) -> None:
    _batch(sheet, "batch", "e", 0)
    _batch(sheet, "update_batch", update(sheet), 1)
    _entropy(sheet)
    _predictors(sheet)
    if "e.sampler_logprobs" in sheet:
        _parity(sheet)
    else:
        sheet.nothing("sampler_parity")


def update(sheet: Sheet) -> str:
    """What the arrays of the U batch begin with: those of E, where one batch serves as both."""
    return "u" if "u.ids" in sheet else "e"


def part(sheet: Sheet, name: str) -> Any:
    """A part of the recipe."""
    return sheet.report["recipe"]["settings"][name]["value"]


def advantages(sheet: Sheet, which: str) -> np.ndarray:
    """A = (r − baseline)/(sd + eps), as the recipe says, and 0 of a response that a smaller group lacks; or the file's
    own, of tokens the largest in size."""
    r, there = sheet[f"{which}.rewards"], sheet.lengths(which) > 0
    if f"{which}.given_advantages" in sheet:
        given = sheet[f"{which}.given_advantages"].reshape(*r.shape, -1)
        return np.take_along_axis(given, np.abs(given).argmax(2)[..., None], 2)[..., 0]

    def among(kind: str, n: int, g: int) -> np.ndarray:
        """What a baseline or a deviation is taken of."""
        own = r[n][there[n]]
        groups = {"none": own[:0], "mean": own, "group": own, "leave_one_out": np.delete(own, g)}
        return groups[kind] if kind in groups else (a if kind == "advantages" else r)[there]

    baseline, scale, ddof = (part(sheet, name) for name in ("baseline", "scale", "ddof"))
    a, places = np.zeros(r.shape), np.argwhere(there)
    for n, g in places:
        of = among(baseline, n, g)
        a[n, g] = r[n, g] - (of.mean() if len(of) else 0.0)
    if scale == "advantages":
        a = np.where(there, a - a[there].mean(), 0.0)
    scaled = a.copy()
    for n, g in places if scale != "none" else ():
        of = among(scale, n, g)
        sd = of.std(ddof=ddof) if len(of) > ddof and np.ptp(of) else 0.0
        if sd or not part(sheet, "undivided_at_zero"):
            scaled[n, g] = a[n, g] / (sd + part(sheet, "eps"))
    return scaled


def _batch(sheet: Sheet, section: str, which: str, place: int) -> None:
    write, facts, generation = (
        partial(sheet.write, section),
        sheet.facts,
        sheet.config["generation"],
    )
    rewards, there = sheet[f"{which}.rewards"], sheet.lengths(which) > 0
    starts, lengths = sheet[f"{which}.prompt_lens"].tolist(), sheet[f"{which}.gen_lens"].tolist()
    rows = list(zip(sheet[f"{which}.ids"].tolist(), starts, lengths, strict=True))
    texts = [row[start : start + length] for row, start, length in rows if length]
    write(num_prompts=len(rewards), num_responses=rewards.shape[1], total_responses=len(texts))
    write(num_tokens=sum(lengths), same_batch=update(sheet) == "e")
    for name in ("source", "missing_gold", "given", "reward", "found"):
        write(**{name: facts[name][place]})
    write(prompts_are_builtin=facts["builtin"][place])
    sheet.estimate(f"{section}.mean_reward", ratio(rewards, there))
    a = advantages(sheet, which)
    used = sheet[f"{which}.advantages"]
    sheet.compare(f"{which}.advantages", used, Terms(a, np.abs(a).max() + 0 * a))
    idle = np.abs(a).max(1) <= 1e-12 * np.abs(rewards).max(1)
    write(zero_advantage_fraction=float(idle.mean()))
    eos, unended = set(facts["eos"]), None
    if facts["source"][place] == "sampled" and not generation["stop"]:
        full = generation["max_new_tokens"]
        unended = sum(text[-1] not in eos and len(text) < full for text in texts)
    write(early_eos=sum(not eos.isdisjoint(text[:-1]) for text in texts), unended=unended)
    # of every row with where its response begins, of the rewards, and of advantages that were given
    given, from_file = (
        f"{which}.given_advantages",
        "weights" if facts["weighed"][place] else "given",
    )
    whole = [[start, *row[: start + length]] for row, start, length in rows]
    own = sheet[given].tolist() if given in sheet else None
    write(
        fingerprint=_sha((whole, rewards.tolist(), own)), advantages=from_file if own else "recipe"
    )
    write(prompts_fingerprint=_sha([row[:n] for row, n, _ in rows[:: rewards.shape[1]]]))


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _entropy(sheet: Sheet) -> None:
    """naive −S, rb R, and R of q, per response; R/T per token; and −log q − R of q, which has mean 0 under q."""
    write, lengths = partial(sheet.write, "entropy"), sheet.lengths("e")
    logp, logq, h, h_q = sheet.terms("e", "logp logq entropy entropy_q")
    s, r, r_q, per_token = logp.sum(-1), h.sum(-1), h_q.sum(-1), ratio(h.sum(-1), lengths)
    write(naive=(-s.mean(1)).both, rb=r.mean(1).both, rb_q=r_q.mean(1).both)
    write(rb_by_prompt=r.mean(1), per_token=per_token.both, per_token_by_prompt=per_token)
    write(surprises=int((logp.value < math.log(0.5)).sum()))
    surprise, variance = (-logq.sum(-1) - r_q).mean(), sheet["e.features"][..., LOGIT_VAR].sum()
    se = math.sqrt(variance) / sheet.config["generation"]["temperature"] / lengths.size
    write(surprise={"value": surprise, "se": Terms(se, surprise.size)})


def _predictors(sheet: Sheet) -> None:
    """Those of the change that need no gradient, on U: −Cov(log p, A), −mean[A(1 − p)(H + log p)] and
    −mean[A(S − Σ_i p_i S_i)] with S = p(H + log p), over the tokens of the step."""
    which = update(sheet)
    l, h, mean_s = sheet.terms(which, "logp entropy mean_s")
    chosen = np.arange(l.value.shape[2]) < sheet.lengths(which)[..., None]
    if f"{which}.in_step" in sheet:
        chosen &= sheet[f"{which}.in_step"].astype(bool)[..., None]
    given = f"{which}.given_advantages"
    a = sheet[given] if given in sheet else advantages(sheet, which)
    a = terms((a if a.ndim == 3 else a[..., None]) * chosen)
    p, off_l, off_a = (np.exp(l.value), *(of.value - of.value[chosen].mean() for of in (l, a)))
    for name, of in (
        ("cov_logp_advantage", Terms(off_l * off_a * chosen, abs(a.value * l.value))),
        ("steer", a * (1 - p) * (h + l)),
        ("wang", a * (p * (h + l) - mean_s)),
    ):
        sheet.estimate(f"predictors.{name}", -ratio(of, chosen))


def _parity(sheet: Sheet) -> None:
    """Δ = reported − scored of every token, ρ = e^{−Δ}: kl mean Δ, k3 mean(ρ − 1 + Δ)."""
    write, lengths = partial(sheet.write, "sampler_parity"), sheet["e.gen_lens"]
    scored, reported = (
        np.concatenate([row[:n] for row, n in zip(rows, lengths, strict=True)])
        for rows in (sheet["e.logq"].reshape(len(lengths), -1), sheet["e.sampler_logprobs"])
    )
    delta, size = reported - scored, float((np.abs(reported) + np.abs(scored)).mean())
    rho, p, q = np.exp(-delta), np.exp(reported), np.exp(scored)
    figures = {
        "mean_abs_difference": np.abs(delta).mean(),
        "max_abs_difference": np.abs(delta).max(),
        "kl": delta.mean(),
        "k3": (np.expm1(-delta) + delta).mean(),
        "ratio_min": rho.min(),
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
    }
    write(**{name: Terms(value, size) for name, value in figures.items()})
    write(num_tokens=len(delta), share_outside=float(((rho < 0.9) | (rho > 1.1)).mean()))
    varied = min(p.std(), q.std()) > 1e-12
    write(pearson=Terms(np.corrcoef(q, p)[0, 1], 1.0) if varied else None)
