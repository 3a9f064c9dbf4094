"""What the batches hold: counts, rewards, ends, fingerprints; and the sampler's own log-probabilities."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet


def write(sheet: Sheet) -> None:
    for section, which, place in (("batch", "e", 0), ("update_batch", update(sheet), 1)):
        _batch(sheet, section, which, place)
    if sheet.report["sampler_parity"] is not None or sheet.has("e.sampler_logprobs"):
        _parity(sheet)


def update(sheet: Sheet) -> str:
    """What the arrays of the U batch begin with: those of E, where one batch serves as both."""
    return "u" if sheet.has("u.ids") else "e"


def responses(sheet: Sheet, which: str) -> list[list[int]]:
    """The tokens of every response."""
    starts, lengths = sheet[f"{which}.prompt_lens"], sheet[f"{which}.gen_lens"]
    rows = sheet[f"{which}.ids"]
    return [
        row[start : start + length].tolist()
        for row, start, length in zip(rows, starts, lengths, strict=True)
    ]


def part(sheet: Sheet, name: str) -> Any:
    """A part of the recipe."""
    return sheet.report["recipe"]["settings"][name]["value"]


def advantages(sheet: Sheet, which: str) -> np.ndarray:
    """The file's own (of tokens the largest in size), else r less its baseline, over its standard deviation + eps, as
    the recipe says; 0 of a response that a smaller group lacks."""
    if sheet.has(f"{which}.given_advantages"):
        given = sheet[f"{which}.given_advantages"]
        return given if given.ndim == 2 else np.take_along_axis(given, _largest(given), 2)[..., 0]
    baseline, scale = part(sheet, "baseline"), part(sheet, "scale")
    rewards, there = sheet[f"{which}.rewards"], present(sheet, which)
    groups = [own[is_there] for own, is_there in zip(rewards, there, strict=True)]
    found = [[_centred(own, g, baseline) for g in range(len(own))] for own in groups]
    every, of_all = np.concatenate(groups), [a for own in found for a in own]
    if scale == "advantages":
        mean = math.fsum(of_all) / len(of_all)
        found = [[a - mean for a in own] for own in found]
        every = np.array(of_all) - mean
    scaled = np.zeros(rewards.shape)
    for n, own in enumerate(found):
        for g, a in enumerate(own):
            among = {"group": groups[n], "leave_one_out": np.delete(groups[n], g)}
            spread = _deviation(among.get(scale, every), part(sheet, "ddof"))
            whole = scale == "none" or (spread == 0 and part(sheet, "undivided_at_zero"))
            scaled[n, g] = a if whole else a / (spread + part(sheet, "eps"))
    return scaled


def _largest(given: np.ndarray) -> np.ndarray:
    return np.abs(given).argmax(2)[..., None]


def present(sheet: Sheet, which: str) -> np.ndarray:
    """Whether prompt n has a response g: a smaller group lacks some."""
    return sheet[f"{which}.gen_lens"].reshape(sheet[f"{which}.rewards"].shape) > 0


def _centred(own: np.ndarray, g: int, baseline: str) -> float:
    if baseline == "none":
        return float(own[g])
    among = own if baseline == "mean" else np.delete(own, g)
    return float(own[g]) - math.fsum(among) / max(len(among), 1)


def _deviation(values: np.ndarray, ddof: int) -> float:
    if len(values) <= ddof or values.max() == values.min():
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((values - mean) ** 2) / (len(values) - ddof))


def _batch(sheet: Sheet, section: str, which: str, place: int) -> None:
    rewards, config, facts = sheet[f"{which}.rewards"], sheet.report["config"], sheet.facts
    prompts, group = rewards.shape
    texts, ends = [text for text in responses(sheet, which) if text], set(facts["eos"])
    mean = math.fsum(rewards.ravel()) / len(texts)
    off = np.where(present(sheet, which), rewards - mean, 0.0).sum(1)
    se = (
        math.sqrt(prompts / (prompts - 1) * math.fsum(off**2)) / len(texts) if prompts > 1 else None
    )
    size = float(np.abs(rewards).max())
    own = advantages(sheet, which)
    sheet.hold(f"{which}.advantages", own, float(np.abs(own).max()))
    idle = [
        float(np.abs(a).max()) <= 1e-12 * float(np.abs(r).max())
        for a, r in zip(own, rewards, strict=True)
    ]
    source = facts["source"][place]
    limit = config["generation"]["max_new_tokens"]
    unended = None
    if source == "sampled" and not config["generation"]["stop"]:
        unended = sum(text[-1] not in ends and len(text) < limit for text in texts)

    def line(name: str, again: object, size: float | None = None) -> None:
        sheet.write(f"{section}.{name}", again, size)

    line("num_prompts", prompts)
    line("num_responses", group)
    line("total_responses", len(texts))
    line("num_tokens", sum(len(text) for text in texts))
    line("source", source)
    line("same_batch", update(sheet) == "e")
    line("mean_reward", mean, size)
    line("mean_reward_se", se, size)
    line("zero_advantage_fraction", sum(idle) / prompts)
    line("missing_gold", facts["missing_gold"][place])
    line("given", facts["given"][place])
    line("early_eos", sum(any(token in ends for token in text[:-1]) for text in texts))
    line("unended", unended)
    line("fingerprint", _fingerprint(sheet, which))
    line("prompts_fingerprint", _of_prompts(sheet, which))
    line("reward", facts["reward"][place])
    line("prompts_are_builtin", facts["builtin"][place])
    line("found", facts["found"][place])
    given = "weights" if facts["weighed"][place] else "given"
    line("advantages", given if sheet.has(f"{which}.given_advantages") else "recipe")


def _fingerprint(sheet: Sheet, which: str) -> str:
    """SHA-256 of every row with where its response begins, of the rewards, and of advantages that were given."""
    rows = []
    for row, start, length in zip(
        sheet[f"{which}.ids"].tolist(),
        sheet[f"{which}.prompt_lens"].tolist(),
        sheet[f"{which}.gen_lens"].tolist(),
        strict=True,
    ):
        rows.append([start, *row[: start + length]])
    name = f"{which}.given_advantages"
    given = sheet[name].tolist() if sheet.has(name) else None
    content = (rows, sheet[f"{which}.rewards"].tolist(), given)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _of_prompts(sheet: Sheet, which: str) -> str:
    """SHA-256 of the ids of every prompt, which stand in its first response."""
    group = sheet[f"{which}.rewards"].shape[1]
    rows, starts = sheet[f"{which}.ids"][::group], sheet[f"{which}.prompt_lens"][::group]
    content = [row[:start].tolist() for row, start in zip(rows, starts, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parity(sheet: Sheet) -> None:
    """Δ = reported − scored of every token, ρ = e^{−Δ}: kl mean Δ, k3 mean(ρ − 1 + Δ)."""
    logq, lengths = sheet["e.logq"], sheet["e.gen_lens"]
    scored = np.concatenate(
        [row[:n] for row, n in zip(logq.reshape(len(lengths), -1), lengths, strict=True)]
    )
    reported = np.concatenate(
        [row[:n] for row, n in zip(sheet["e.sampler_logprobs"], lengths, strict=True)]
    )
    delta = reported - scored
    ratio = np.exp(-delta)
    p, q = np.exp(reported), np.exp(scored)
    a, b = q - q.mean(), p - p.mean()
    norms = math.sqrt(math.fsum(a * a)), math.sqrt(math.fsum(b * b))
    constant = min(norms) <= 1e-12 * math.sqrt(len(q))
    size = float(np.abs(reported).mean() + np.abs(scored).mean())
    again = {
        "num_tokens": len(delta),
        "mean_abs_difference": float(np.abs(delta).mean()),
        "max_abs_difference": float(np.abs(delta).max()),
        "kl": math.fsum(delta) / len(delta),
        "k3": math.fsum(np.expm1(-delta) + delta) / len(delta),
        "pearson": None if constant else math.fsum(a * b) / norms[0] / norms[1],
        "ratio_min": float(ratio.min()),
        "ratio_mean": float(ratio.mean()),
        "ratio_max": float(ratio.max()),
        "share_outside": float(((ratio < 0.9) | (ratio > 1.1)).mean()),
    }
    sizes = dict.fromkeys(again, size) | {"share_outside": None, "num_tokens": None, "pearson": 1.0}
    sheet.write("sampler_parity", again, sizes)
