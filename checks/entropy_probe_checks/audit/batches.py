"""What the batches hold: counts, rewards, advantages, fingerprints; the entropy at θ; the sampler's own scores."""

import hashlib
import json
import math
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, estimate, ratio, scatter, terms

LOGIT_VAR = 5
"""The place of Var_q(logit) among the features of a token."""


def write(sheet: Sheet) -> None:
    sheet.section("batch", _batch(sheet, "e", 0))
    sheet.section("update_batch", _batch(sheet, update(sheet), 1))
    sheet.section("entropy", _entropy(sheet))
    reported = sheet.has("e.sampler_logprobs")
    sheet.write("sampler_parity", _parity(sheet) if reported else None)


def update(sheet: Sheet) -> str:
    """What the arrays of the U batch begin with: those of E, where one batch serves as both."""
    return "u" if sheet.has("u.ids") else "e"


def part(sheet: Sheet, name: str) -> Any:
    """A part of the recipe."""
    return sheet.report["recipe"]["settings"][name]["value"]


def advantages(sheet: Sheet, which: str) -> np.ndarray:
    """(r − baseline)/(sd + eps) as the recipe says, 0 of a response that a smaller group lacks; or the file's own, of
    tokens the largest in size."""
    if sheet.has(f"{which}.given_advantages"):
        given = sheet[f"{which}.given_advantages"].reshape(*sheet[f"{which}.rewards"].shape, -1)
        return np.take_along_axis(given, np.abs(given).argmax(2)[..., None], 2)[..., 0]
    baseline, scale, ddof, eps = (part(sheet, n) for n in ("baseline", "scale", "ddof", "eps"))
    there = sheet.lengths(which) > 0
    groups = [own[some] for own, some in zip(sheet[f"{which}.rewards"], there, strict=True)]

    def among(kind: str, n: int, g: int) -> np.ndarray:
        """What a baseline or a deviation is of."""
        own = {"mean": groups[n], "group": groups[n], "leave_one_out": np.delete(groups[n], g)}
        return own.get(kind, every)

    every = np.zeros(1)  # of the baseline "none"
    left = [
        [
            r - math.fsum(among(baseline, n, g)) / max(len(among(baseline, n, g)), 1)
            for g, r in enumerate(own)
        ]
        for n, own in enumerate(groups)
    ]
    every = np.concatenate(left if scale == "advantages" else groups)
    if scale == "advantages":
        left = [np.array(own) - math.fsum(every) / len(every) for own in left]
    found = np.zeros(there.shape)
    for n, own in enumerate(left):
        for g, a in enumerate(own):
            of = among(scale, n, g)
            varied = len(of) > ddof and of.max() > of.min()
            sd = math.sqrt(scatter(of) / (len(of) - ddof)) if varied else 0.0
            as_it_is = scale == "none" or (sd == 0 and part(sheet, "undivided_at_zero"))
            found[n, g] = a if as_it_is else a / (sd + eps)
    return found


def _batch(sheet: Sheet, which: str, place: int) -> dict[str, Any]:
    rewards, facts, generation = sheet[f"{which}.rewards"], sheet.facts, sheet.config["generation"]
    starts, lengths = sheet[f"{which}.prompt_lens"].tolist(), sheet[f"{which}.gen_lens"].tolist()
    rows = [row.tolist() for row in sheet[f"{which}.ids"]]
    ranges = list(zip(rows, starts, lengths, strict=True))
    texts = [row[start : start + length] for row, start, length in ranges if length]
    eos, limit = set(facts["eos"]), generation["max_new_tokens"]
    reward = ratio(rewards, sheet.lengths(which) > 0)
    own = advantages(sheet, which)
    sheet.hold(f"{which}.advantages", Terms(own, np.full(own.shape, np.abs(own).max())))
    idle = np.abs(own).max(1) <= 1e-12 * np.abs(rewards).max(1)
    given, unended = "recipe", None
    if sheet.has(f"{which}.given_advantages"):
        given = "weights" if facts["weighed"][place] else "given"
    if facts["source"][place] == "sampled" and not generation["stop"]:
        unended = sum(text[-1] not in eos and len(text) < limit for text in texts)
    return {
        "num_prompts": rewards.shape[0],
        "num_responses": rewards.shape[1],
        "total_responses": len(texts),
        "num_tokens": sum(lengths),
        "same_batch": update(sheet) == "e",
        **estimate("mean_reward", reward),
        "zero_advantage_fraction": float(idle.mean()),
        "early_eos": sum(any(token in eos for token in text[:-1]) for text in texts),
        "unended": unended,
        "fingerprint": _fingerprint(sheet, which, ranges),
        "prompts_fingerprint": _sha([row[:n] for row, n, _ in ranges[:: rewards.shape[1]]]),
        "prompts_are_builtin": facts["builtin"][place],
        "advantages": given,
        **{
            name: facts[name][place]
            for name in ("source", "missing_gold", "given", "reward", "found")
        },
    }


def _fingerprint(sheet: Sheet, which: str, ranges: list[tuple[list[int], int, int]]) -> str:
    """Of every row with where its response begins, of the rewards, and of advantages that were given."""
    given = sheet.arrays.get(f"{which}.given_advantages")
    rows = [[start, *row[: start + length]] for row, start, length in ranges]
    rewards = sheet[f"{which}.rewards"].tolist()
    return _sha((rows, rewards, None if given is None else given.astype(float).tolist()))


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _entropy(sheet: Sheet) -> dict[str, Any]:
    """naive −S, rb R and R of q, per response; R/T per token; and −log q − R of q, which has mean 0 under q."""
    logp, logq, h, h_q = sheet.terms("e", "logp logq entropy entropy_q")
    s, r, r_q = logp.sum(-1), h.sum(-1), h_q.sum(-1)
    per_token, surprise = ratio(r, sheet.lengths("e")), (-logq.sum(-1) - r_q).mean()
    variance = (
        sheet["e.features"][..., LOGIT_VAR].sum() / sheet.config["generation"]["temperature"] ** 2
    )
    return {
        **{
            name: {"value": of.mean(), "se": of.se}
            for name, of in (
                ("naive", -s.mean(1)),
                ("rb", r.mean(1)),
                ("rb_q", r_q.mean(1)),
                ("per_token", per_token),
            )
        },
        "rb_by_prompt": r.mean(1),
        "per_token_by_prompt": per_token,
        "surprises": int((logp.value < math.log(0.5)).sum()),
        "surprise": {
            "value": surprise,
            "se": Terms(math.sqrt(variance) / s.value.size, surprise.size),
        },
    }


def _parity(sheet: Sheet) -> dict[str, Any]:
    """Δ = reported − scored of every token, ρ = e^{−Δ}: kl mean Δ, k3 mean(ρ − 1 + Δ)."""
    lengths, scored = sheet["e.gen_lens"], sheet["e.logq"]
    scored, reported = (
        np.concatenate([row[:n] for row, n in zip(rows, lengths, strict=True)])
        for rows in (scored.reshape(len(lengths), -1), sheet["e.sampler_logprobs"])
    )
    delta = terms(reported) - scored
    rho, size = np.exp(-delta.value), delta.size.mean()
    varied = min(np.exp(reported).std(), np.exp(scored).std()) > 1e-12
    correlation = varied and np.corrcoef(np.exp(scored), np.exp(reported))[0, 1]
    figures = {
        "mean_abs_difference": np.abs(delta.value).mean(),
        "max_abs_difference": np.abs(delta.value).max(),
        "kl": delta.value.mean(),
        "k3": (np.expm1(-delta.value) + delta.value).mean(),
        "ratio_min": rho.min(),
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
    }
    return {name: Terms(value, size) for name, value in figures.items()} | {
        "num_tokens": len(delta.value),
        "pearson": Terms(correlation, 1.0) if varied else None,
        "share_outside": float(((rho < 0.9) | (rho > 1.1)).mean()),
    }
