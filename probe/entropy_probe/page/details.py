"""What only the evidence tells, as plain numbers and texts that JSON can hold: it goes from process to process so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from entropy_probe.errors import ProbeError
from entropy_probe.evidence import Evidence
from entropy_probe.page.conventions import conventions, present
from entropy_probe.report import ProbeReport

MOST_RESPONSES = 40
"""Responses in the table, those first that move the entropy most."""
MOST_PROMPTS = 40
_OF_THIS = "give the evidence of this report"
_BINS, _MOST_POSITIONS, _CARRIERS = 24, 120, 0.2


def details_of(report: ProbeReport) -> dict[str, Any] | None:
    """`None` where the report has no evidence at hand. Raises `ProbeError` for that of another run."""
    evidence = report.evidence
    if evidence is None:
        return None
    try:
        return _details(report, evidence)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        problem = f"does not fit the report ({type(error).__name__}: {error})"
        raise ProbeError("evidence", problem, _OF_THIS) from error


def _details(report: ProbeReport, evidence: Evidence) -> dict[str, Any]:
    found = conventions(report, evidence)
    h, again = report.entropy.per_token.value, found["rows"][0]["values"]["all"]["per_token"]
    if not math.isclose(h, again, rel_tol=1e-6, abs_tol=1e-9):  # a sum in another order
        problem = f"belongs to another run: it gives {again:.6g} nats per token, but the report has {h:.6g}"
        raise ProbeError("evidence", problem, _OF_THIS)
    return {
        "conventions": found,
        "tokens": _tokens(evidence),
        "positions": _positions(evidence),
        "responses": _responses(report, evidence),
        "num_responses": int(present(evidence).any(-1).sum()),
        "slope": _total(report, evidence),
        "prompts": _prompts(report, evidence),
    }


def _tokens(evidence: Evidence) -> dict[str, Any]:
    """How the entropy is spread over tokens: shares of tokens by H_t, and what the fifth with the most entropy has."""
    entropy = np.sort(evidence.arrays["e.entropy"][present(evidence)])[::-1]
    most, total = float(entropy.max(initial=0.0)), float(entropy.sum())
    counts, edges = np.histogram(entropy, _BINS, (0.0, most if most > 0 else 1.0))
    first = max(1, round(_CARRIERS * len(entropy)))
    return {
        "edges": edges.tolist(),
        "shares": (counts / max(len(entropy), 1)).tolist(),
        "count": len(entropy),
        "carriers": _CARRIERS,
        "carried": float(entropy[:first].sum() / total) if total > 0 else None,
    }


def _positions(evidence: Evidence) -> dict[str, Any]:
    """Mean, 10 % and 90 % of H_t at the t-th token, over the responses that have one; of long ones, over stretches."""
    entropy, there = evidence.arrays["e.entropy"], present(evidence)
    width = -(-entropy.shape[2] // _MOST_POSITIONS) or 1
    found: dict[str, Any] = {"at": [], "mean": [], "low": [], "high": [], "count": []}
    for start in range(0, entropy.shape[2], width):
        part = slice(start, start + width)
        own = entropy[..., part][there[..., part]]
        if not len(own):
            continue
        found["at"].append(start + 1)
        found["mean"].append(float(own.mean()))
        found["low"].append(float(np.quantile(own, 0.1)))
        found["high"].append(float(np.quantile(own, 0.9)))
        found["count"].append(int(there[..., start].sum()))
    return found


def contributions(evidence: Evidence) -> np.ndarray | None:
    """[B, G] what each response of E says of the slope ∇Hᵀv, divided by their number N, so that they add up to it:

        (1/N)·Σ_t [ D_vH_t + R_{>t}·D_v log p_t ],    R_{>t} = Σ_{k>t} H_k

    which is the Rao-Blackwell slope with the baseline `hk` (`update.estimators.rb_hk`). `None` without a direction v.
    """
    arrays = evidence.arrays
    if "e.d_logp" not in arrays:
        return None
    entropy = np.where(present(evidence), arrays["e.entropy"], 0.0)
    later = np.cumsum(entropy[..., ::-1], -1)[..., ::-1] - entropy
    terms = (arrays["e.d_entropy"] + later * arrays["e.d_logp"]).sum(-1)
    return terms / terms.size


def _total(report: ProbeReport, evidence: Evidence) -> dict[str, float] | None:
    """What the contributions at η = lr add up to, and their absolute values."""
    of_responses = contributions(evidence)
    if of_responses is None or report.update is None:
        return None
    moved = report.update.lr * of_responses
    return {"sum": float(moved.sum()), "size": float(np.abs(moved).sum())}


def _responses(report: ProbeReport, evidence: Evidence) -> list[dict[str, Any]]:
    """The responses that matter most: by their part in the slope, or by their entropy where there is no direction."""
    arrays, there = evidence.arrays, present(evidence)
    of_slope, size = contributions(evidence), 0.0
    lr = 0.0 if report.update is None else report.update.lr
    entropy = np.where(there, arrays["e.entropy"], 0.0).sum(-1)
    if of_slope is not None:
        of_slope = lr * of_slope
        size = float(np.abs(of_slope).sum())
    by = entropy if of_slope is None else np.abs(of_slope)
    lengths = arrays["e.gen_lens"].reshape(entropy.shape)
    order = [int(i) for i in np.argsort(-by, axis=None, kind="stable") if lengths.flat[i] > 0]
    advantages = arrays["e.advantages"]
    log_weights = _log_weights(evidence, lr)
    rows = []
    for place in order[:MOST_RESPONSES]:
        n, g = divmod(place, entropy.shape[1])
        length = int(lengths[n, g])
        own = advantages[n, g] if advantages.ndim == 2 else advantages[n, g, :length].mean()
        moved = None if of_slope is None else float(of_slope[n, g])
        rows.append(
            {
                "prompt": n,
                "response": g,
                **_texts(evidence, 0, "e", n, g),
                "reward": float(arrays["e.rewards"][n, g]),
                "advantage": float(own),
                "tokens": length,
                "entropy": float(entropy[n, g] / length),
                "moved": moved,
                "share": None if moved is None or size == 0 else moved / size,
                "log_weight": None if log_weights is None else float(log_weights[n, g]),
            }
        )
    return rows


def _log_weights(evidence: Evidence, eta: float) -> np.ndarray | None:
    """[B, G] Σ_t log p(θ + ηv) − Σ_t log q(θ), where that η was measured."""
    etas = [float(value) for value in evidence.facts["etas"]]
    if eta not in etas:
        return None
    after = evidence.arrays[f"after.{etas.index(eta)}.logp"].sum(-1)
    return after - evidence.arrays["e.logq"].sum(-1)


def _prompts(report: ProbeReport, evidence: Evidence) -> list[dict[str, Any]]:
    """The units of the update batch, a prompt or a block of prompts, by what their new gradient does to the entropy."""
    if report.update is None:
        return []
    arrays, same = evidence.arrays, "u.ids" not in evidence.arrays
    batch, place = ("e", 0) if same else ("u", 1)
    units = arrays[f"{batch}.unit_of_prompt"]
    advantages = np.abs(arrays[f"{batch}.advantages"]).reshape(len(units), -1).max(1)
    slopes = np.array(report.update.slope_by_unit)
    order = [int(u) for u in np.argsort(-np.abs(slopes), kind="stable")]
    rows = []
    for unit in order[:MOST_PROMPTS]:
        mine = np.flatnonzero(units == unit)
        rows.append(
            {
                "unit": unit,
                "prompt": _texts(evidence, place, batch, int(mine[0]), None)["asked"],
                "more": len(mine) - 1,
                "reward": float(arrays[f"{batch}.rewards"][mine].mean()),
                "no_advantage": int((advantages[mine] == 0).sum()),
                "moved": float(report.update.lr * slopes[unit]),
            }
        )
    return rows


def _texts(
    evidence: Evidence, place: int, batch: str, n: int, g: int | None
) -> dict[str, str | None]:
    """Prompt and response as text; token ids where no tokenizer wrote them."""
    texts = (evidence.facts.get("texts") or [None, None])[place]
    if texts is not None:
        answer = None if g is None else texts["responses"][n][g]
        return {"asked": texts["prompts"][n], "answer": answer}
    arrays = evidence.arrays
    row = n * arrays[f"{batch}.rewards"].shape[1] + (g or 0)
    start, length = (int(arrays[f"{batch}.{name}_lens"][row]) for name in ("prompt", "gen"))
    ids = arrays[f"{batch}.ids"][row]
    asked, answer = ids[:start].tolist(), ids[start : start + length].tolist()
    return {"asked": _ids(asked), "answer": None if g is None else _ids(answer)}


def _ids(tokens: list[int]) -> str:
    shown = " ".join(map(str, tokens[:200]))
    return f"token ids {shown}" + (" …" if len(tokens) > 200 else "")
