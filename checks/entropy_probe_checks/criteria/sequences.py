"""A score depends on the sequence alone."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most, not_applicable
from entropy_probe_checks.thresholds import limit_for


@Criterion
def padding_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p between unpadded, right-padded and left-padded rows, in true float64.

    Padding changes a score: positions count padding, the mask lets it through, or the model does not honour
    attention_mask and position_ids.
    """
    measured = report.invariance.padding
    return at_most(measured.worst, measured.bound, detail=f"[{measured.example}]")


@Criterion
def sampler_parity(report: ProbeReport) -> Finding:
    """KL from the sampler to teacher forcing per token (k3 estimate, nats), where rollouts carry `logprobs`.

    The engine that sampled does not agree with the model here: temperature or top_p on one side only, other weights,
    or an engine in low precision. Importance weights are then wrong. Give the temperature and top_p that were used, and
    the checkpoint that was sampled from.
    """
    measured = report.sampler_parity
    if measured is None:
        return not_applicable("The rollouts carry no `logprobs` of the engine that sampled them.")
    outside, difference = measured.share_outside, measured.mean_abs_difference
    detail = f"[{outside:.2%} of ratios outside 0.9 to 1.1, mean |Δ| {difference:.2g}]"
    return at_most(measured.k3, limit_for(report, "sampler_parity"), detail=detail)
