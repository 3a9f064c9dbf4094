"""The entropy audit: H of the E batch in every convention that trackers use, so that two numbers can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from entropy_probe.evidence import Evidence
from entropy_probe.report import ProbeReport

TOKENS = {
    "all": "all tokens",
    "without_eos": "without the EOS token",
    "without_truncated": "without truncated responses",
    "without_both": "without either",
}
"""Which tokens count. A response is truncated where its last token is no EOS."""


def conventions(report: ProbeReport, evidence: Evidence) -> dict[str, Any]:
    """`rows`, one for each estimator, and what of it is not measured. With f_t the estimator's term and T_i the number
    of tokens that count in response i,

        per_token     Σ_i Σ_t f_t / Σ_i T_i
        per_response  mean_i (Σ_t f_t / T_i)      over responses that have such a token
        sum           mean_i Σ_t f_t              over responses that are not left out

    in nats. f_t is the entropy H_t of the policy at the temperature of sampling, or −log p of the token that was
    sampled; at top_p < 1 also those of q, what was sampled from. `None` where no token counts.
    """
    generation = report.config["generation"]
    terms = {"full": ("entropy", 1.0), "sampled": ("logp", -1.0)}
    if generation["top_p"] < 1:
        terms |= {"full_q": ("entropy_q", 1.0), "sampled_q": ("logq", -1.0)}
    masks = _masks(evidence)
    rows = []
    for name, (array, sign) in terms.items():
        values = {
            which: _averages(sign * evidence.arrays[f"e.{array}"], *masks[which])
            for which in TOKENS
        }
        rows.append({"estimator": name, "values": values})
    return {
        "rows": rows,
        "temperature": generation["temperature"],
        "top_p": generation["top_p"],
        "truncated": int((~_ended(evidence) & _there(evidence)).sum()),
        "trainer": evidence.facts.get("trainer_entropy"),
    }


def present(evidence: Evidence) -> np.ndarray:
    """[B, G, T]: whether the response has such a token."""
    entropy = evidence.arrays["e.entropy"]
    lengths = evidence.arrays["e.gen_lens"].reshape(entropy.shape[:2])
    return np.arange(entropy.shape[2]) < lengths[..., None]


def _there(evidence: Evidence) -> np.ndarray:
    return np.asarray(present(evidence).any(-1))


def _ended(evidence: Evidence) -> np.ndarray:
    """[B, G]: whether the last token is an EOS."""
    arrays = evidence.arrays
    last = arrays["e.prompt_lens"] + arrays["e.gen_lens"] - 1
    tokens = arrays["e.ids"][np.arange(len(last)), last]
    return np.isin(tokens, evidence.facts["eos"]).reshape(arrays["e.entropy"].shape[:2])


def _masks(evidence: Evidence) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each choice of tokens: the tokens [B, G, T] and the responses [B, G] that count."""
    tokens, there, ended = present(evidence), _there(evidence), _ended(evidence)
    place = np.arange(tokens.shape[2])
    last = place == tokens.sum(-1, keepdims=True) - 1
    without_eos = tokens & ~(last & ended[..., None])
    whole = tokens & ended[..., None]
    return {
        "all": (tokens, there),
        "without_eos": (without_eos, there),
        "without_truncated": (whole, there & ended),
        "without_both": (without_eos & whole, there & ended),
    }


def _averages(terms: np.ndarray, tokens: np.ndarray, counted: np.ndarray) -> dict[str, Any]:
    sums, lengths = np.where(tokens, terms, 0.0).sum(-1), tokens.sum(-1)
    some = lengths > 0
    return {
        "per_token": float(sums.sum() / lengths.sum()) if some.any() else None,
        "per_response": float((sums[some] / lengths[some]).mean()) if some.any() else None,
        "sum": float(sums[counted].mean()) if counted.any() else None,
    }
