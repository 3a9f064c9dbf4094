"""Importance weights: exact at η = 0, and healthy at the step that the optimizer would take."""

from __future__ import annotations

from entropy_probe import ProbeReport, Verdict
from entropy_probe_checks.criteria.verdicts import at_least, at_most, without_answer
from entropy_probe_checks.thresholds import limit_for

_RESTRICTED = "top_p < 1: the weights are π/q, which differ from 1 at η = 0."


def _row(report: ProbeReport, eta: float):
    return next(row for row in report.entropy_change if row.eta == eta)


def zero_step_change(report: ProbeReport) -> Verdict:
    """Largest |ΔĤ| of the naive and the Rao-Blackwell estimate at η = 0."""
    row = _row(report, 0.0)
    if row.restricted:
        return without_answer("zero_step_change", "importance", "not_applicable", _RESTRICTED)
    return at_most(
        "zero_step_change",
        "importance",
        max(abs(row.delta_h), abs(row.delta_h_rb), key=lambda x: (x != x, x)),
        limit_for(report, "zero_step_change"),
        "A step of zero changes the entropy: scores at θ and at θ+ηv do not come from one forward function, or the "
        "scores at θ are stale.",
    )


def zero_step_ess(report: ProbeReport) -> Verdict:
    """|N − ESS| at η = 0."""
    size = report.batch.num_prompts * report.batch.num_responses
    row = _row(report, 0.0)
    if row.restricted:
        return without_answer("zero_step_ess", "importance", "not_applicable", _RESTRICTED)
    return at_most(
        "zero_step_ess",
        "importance",
        abs(size - row.ess),
        limit_for(report, "zero_step_ess"),
        "Weights are not all 1 at η = 0: log-weights are not S(θ⁺) − log q of the same tokens.",
    )


def ess(report: ProbeReport) -> Verdict:
    """ESS/N at η = lr, the step that the optimizer would take."""
    row = _row(report, report.first_order.lr)
    return at_least(
        "ess",
        "importance",
        row.ess_fraction,
        float(report.config["true_delta_h"]["min_ess_fraction"]),
        f"At η = lr = {row.eta:.3g} few responses carry the weight: θ+ηv is too far for these samples, and ΔH there is "
        "not measured. Use a smaller step (true_delta_h.etas, first_order.lr) or more responses.",
        otherwise="inconclusive",
    )


def pareto_k(report: ProbeReport) -> Verdict:
    """k̂ of the largest importance weights at η = lr."""
    row = _row(report, report.first_order.lr)
    limit = float(report.config["true_delta_h"]["max_pareto_k"])
    if row.pareto_k is None:
        return without_answer(
            "pareto_k",
            "importance",
            "not_applicable",
            f"k̂ means something only for N ≥ 64 and ESS/N < 0.95; ESS/N is {row.ess_fraction:.3f}.",
            None,
            limit,
        )
    return at_most(
        "pareto_k",
        "importance",
        row.pareto_k,
        limit,
        "The largest weights have so heavy a tail that their mean may not exist: ΔH at η = lr is not to be believed. "
        "Use a smaller step or more responses.",
        otherwise="inconclusive",
    )
