"""What the batches hold: counts, rewards, advantages, fingerprints; the entropy at θ; the sampler's own scores."""

import hashlib
import json
import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, ratio, terms

LOGIT_VAR = 5  # the place of Var_q(logit) among the features of a token


def write(sheet: Sheet) -> None:
    for place, (section, which) in enumerate((("batch", "e"), ("update_batch", sheet.u))):
        _batch(sheet, section, which, place)
    _entropy(sheet)
    _predictors(sheet)
    if "e.sampler_logprobs" in sheet:
        _parity(sheet)
    else:
        sheet.nothing("sampler_parity")


def advantages(sheet: Sheet, which: str) -> np.ndarray:
    """A = (r − baseline)/(sd + eps), as the recipe says, and 0 of a response that a smaller group lacks; or the file's
    own, of tokens the largest in size."""
    r, there = sheet[f"{which}.rewards"], sheet.lengths(which) > 0
    if f"{which}.given_advantages" in sheet:
        given = sheet[f"{which}.given_advantages"].reshape(*r.shape, -1)
        return np.take_along_axis(given, np.abs(given).argmax(2)[..., None], 2)[..., 0]
    recipe = {name: of["value"] for name, of in sheet.report["recipe"]["settings"].items()}

    def among(kind: str, n: int, g: int) -> np.ndarray:
        """What a baseline or a deviation is taken of."""
        own = r[n][there[n]]
        groups = {"none": own[:0], "mean": own, "group": own, "leave_one_out": np.delete(own, g)}
        return groups[kind] if kind in groups else (a if kind == "advantages" else r)[there]

    a, places = np.zeros(r.shape), np.argwhere(there)
    for n, g in places:
        of = among(recipe["baseline"], n, g)
        a[n, g] = r[n, g] - (of.mean() if len(of) else 0.0)
    if recipe["scale"] == "advantages":
        a = np.where(there, a - a[there].mean(), 0.0)
    scaled = a.copy()
    for n, g in places if recipe["scale"] != "none" else ():
        of, ddof = among(recipe["scale"], n, g), recipe["ddof"]
        sd = of.std(ddof=ddof) if len(of) > ddof and np.ptp(of) else 0.0
        if sd or not recipe["undivided_at_zero"]:
            scaled[n, g] = a[n, g] / (sd + recipe["eps"])
    return scaled


def _batch(sheet: Sheet, section: str, which: str, place: int) -> None:
    write, facts, generation = (
        partial(sheet.write, section),
        sheet.facts,
        sheet.config["generation"],
    )
    rewards, group = sheet[f"{which}.rewards"], sheet[f"{which}.rewards"].shape[1]
    ids, starts, lengths = (
        sheet[f"{which}.{n}"].tolist() for n in ("ids", "prompt_lens", "gen_lens")
    )
    # [where the response begins, tokens of prompt and response]
    rows = [[n, *row[: n + t]] for row, n, t in zip(ids, starts, lengths, strict=True)]
    texts = [row[1 + row[0] :] for row in rows if len(row) > 1 + row[0]]
    write(num_prompts=len(rewards), num_responses=group, total_responses=len(texts))
    write(num_tokens=sum(map(len, texts)), same_batch=sheet.u == "e")
    for name in ("source", "missing_gold", "given", "reward", "found"):
        write(**{name: facts[name][place]})
    write(prompts_are_builtin=facts["builtin"][place])
    sheet.estimates(section, mean_reward=ratio(rewards, sheet.lengths(which) > 0))
    a, used = advantages(sheet, which), sheet[f"{which}.advantages"]
    sheet.compare(f"{which}.advantages", used, Terms(a, np.abs(a).max() + 0 * a))
    idle = np.abs(a).max(1) <= 1e-12 * np.abs(rewards).max(1)
    write(zero_advantage_fraction=float(idle.mean()))
    eos, unended, full = set(facts["eos"]), None, generation["max_new_tokens"]
    if facts["source"][place] == "sampled" and not generation["stop"]:
        unended = sum(text[-1] not in eos and len(text) < full for text in texts)
    write(early_eos=sum(not eos.isdisjoint(text[:-1]) for text in texts), unended=unended)
    name, source, given = f"{which}.given_advantages", "recipe", None
    if name in sheet:
        source, given = "weights" if facts["weighed"][place] else "given", sheet[name].tolist()
    write(advantages=source)
    for name, content in (
        ("fingerprint", (rows, rewards.tolist(), given)),
        ("prompts_fingerprint", [row[1 : 1 + row[0]] for row in rows[::group]]),
    ):
        write(**{name: hashlib.sha256(json.dumps(content).encode()).hexdigest()})


def _entropy(sheet: Sheet) -> None:
    """naive −S, rb R, and R of q, per response; R/T per token; and −log q − R of q, which has mean 0 under q."""
    write, lengths = partial(sheet.write, "entropy"), sheet.lengths("e")
    logp, logq, h, h_q = sheet.terms("e", "logp logq entropy entropy_q")
    r, r_q, per_token = h.sum(-1), h_q.sum(-1), ratio(h.sum(-1), lengths)
    write(naive=(-logp.sum(-1).mean(1)).both, rb=r.mean(1).both, rb_q=r_q.mean(1).both)
    write(rb_by_prompt=r.mean(1), per_token=per_token.both, per_token_by_prompt=per_token)
    write(surprises=int((logp.value < math.log(0.5)).sum()))
    surprise, variance = (-logq.sum(-1) - r_q).mean(), sheet["e.features"][..., LOGIT_VAR].sum()
    se = math.sqrt(variance) / sheet.config["generation"]["temperature"] / lengths.size
    write(surprise={"value": surprise, "se": Terms(se, surprise.size)})


def _predictors(sheet: Sheet) -> None:
    """Those of the change that need no gradient, on U: −Cov(log p, A), −mean[A(1 − p)(H + log p)] and
    −mean[A(S − Σ_i p_i S_i)] with S = p(H + log p), over the tokens of the step."""
    l, h, mean_s = sheet.terms(sheet.u, "logp entropy mean_s")
    chosen = np.arange(l.value.shape[2]) < sheet.lengths(sheet.u)[..., None]
    if f"{sheet.u}.in_step" in sheet:
        chosen &= sheet[f"{sheet.u}.in_step"].astype(bool)[..., None]
    given = f"{sheet.u}.given_advantages"
    a = sheet[given] if given in sheet else advantages(sheet, sheet.u)
    a = terms((a if a.ndim == 3 else a[..., None]) * chosen)
    p, off_l, off_a = (np.exp(l.value), *(of.value - of.value[chosen].mean() for of in (l, a)))
    of_tokens = {
        "cov_logp_advantage": Terms(off_l * off_a * chosen, abs(a.value * l.value)),
        "steer": a * (1 - p) * (h + l),
        "wang": a * (p * (h + l) - mean_s),
    }
    sheet.estimates("predictors", **{name: -ratio(of, chosen) for name, of in of_tokens.items()})


def _parity(sheet: Sheet) -> None:
    """Δ = reported − scored of every token, ρ = e^{−Δ}: kl mean Δ, k3 mean(ρ − 1 + Δ)."""
    write, lengths = partial(sheet.write, "sampler_parity"), sheet["e.gen_lens"]
    scored, reported = (
        np.concatenate([row[:n] for row, n in zip(rows, lengths, strict=True)])
        for rows in (sheet["e.logq"].reshape(len(lengths), -1), sheet["e.sampler_logprobs"])
    )
    delta, sizes = reported - scored, np.abs(reported) + np.abs(scored)
    rho, p, q = np.exp(-delta), np.exp(reported), np.exp(scored)

    def of(value: float) -> Terms:
        return Terms(value, sizes.mean())

    write(mean_abs_difference=of(abs(delta).mean()), max_abs_difference=of(abs(delta).max()))
    write(kl=of(delta.mean()), k3=of((np.expm1(-delta) + delta).mean()))
    write(ratio_min=of(rho.min()), ratio_mean=of(rho.mean()), ratio_max=of(rho.max()))
    write(num_tokens=len(delta), share_outside=float(((rho < 0.9) | (rho > 1.1)).mean()))
    varied = min(p.std(), q.std()) > 1e-12
    write(pearson=Terms(np.corrcoef(q, p)[0, 1], 1.0) if varied else None)
