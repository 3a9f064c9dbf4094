"""Importance weights: exact at η = 0, and healthy at the step that the optimizer would take."""

from __future__ import annotations

import math
import sys
from typing import Any

from entropy_probe import ProbeError, ProbeReport
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    at_least,
    at_most,
    largest,
    needed,
    not_applicable,
    relative,
    second_moment,
    variance,
)
from entropy_probe_checks.thresholds import limit_for

_RESTRICTED = "With top_p < 1 the weights are π/q, which differ from 1 at η = 0."


def _row(report: ProbeReport, eta: float) -> Any:
    found = next((row for row in report.entropy_change if row.eta == eta), None)
    if found is None:
        raise ProbeError("report", f"has no entropy_change at η = {eta:g}", "measure again")
    return found


@Criterion
def zero_step_change(report: ProbeReport) -> Finding:
    """The largest |ΔĤ| at η = 0, over all estimators, per response and per token.

    A step of length zero changes the entropy. Either the scores at θ and at θ+ηv do not come from one forward function,
    or the scores at θ are stale.
    """
    row = _row(report, 0.0)
    names = ("", "_rb", "_pd", "_per_token", "_per_token_naive", "_per_token_pd")
    changes = [getattr(row, f"delta_h{name}") for name in names]
    return at_most(
        largest(*(abs(of) for of in changes if of is not None)),
        limit_for(report, "zero_step_change"),
    )


@Criterion
def zero_step_ess(report: ProbeReport) -> Finding:
    """The difference |N − ESS| at η = 0, where N is the number of responses and ESS the effective sample size.

    Every importance weight must be 1 at η = 0, and some are not. The log-weights are not S(θ⁺) − log q of the same
    tokens.
    """
    row = _row(report, 0.0)
    if row.restricted:
        return not_applicable(_RESTRICTED)
    size = report.batch.total_responses
    return at_most(abs(size - row.ess), limit_for(report, "zero_step_ess"))


@Criterion
def se_by_prompt(report: ProbeReport) -> Finding:
    """The largest relative difference between a standard error and sd/√B, where sd is taken over what each of the B
    prompts adds. The standard errors of H and of every ΔH are compared.

    A standard error is not that of a mean over prompts: the responses of one prompt are taken for independent, or √B is
    missing. Every comparison in standard errors is then wrong by the same factor.
    """
    pairs = [(report.entropy.rb.se, report.entropy.rb_by_prompt)]
    for row in report.entropy_change:
        pairs.append((row.delta_h_rb_se, row.delta_h_rb_by_prompt))
        if row.delta_h_pd_se is not None and row.delta_h_pd_by_prompt is not None:
            pairs.append((row.delta_h_pd_se, row.delta_h_pd_by_prompt))
    found = [(se, math.sqrt(variance(terms) / len(terms))) for se, terms in pairs]
    limit = limit_for(report, "se_by_prompt")
    # both are made of differences of entropies, and off by some ulps of these
    rounding = 8 * sys.float_info.epsilon * max(map(abs, report.entropy.rb_by_prompt)) / limit
    return at_most(largest(*(relative(abs(a - b), b + rounding) for a, b in found)), limit)


@second_moment
def ess(report: ProbeReport) -> Finding:
    """The ratio ESS/N at η = lr, the step that the optimizer would take. ESS is the effective sample size of the
    weights before any clipping, and N the number of responses.

    The step is large: after it, a few of these responses carry most of the weight, and the change of the entropy cannot
    be measured on them. More responses do not help. Check that update.lr in the report is your learning rate; if not,
    set first_order.lr. If it is, sample again after the step (true_delta_h.fallback: resample), or take smaller steps
    in training.
    """
    row = _row(report, needed(report.update).lr)
    limit = float(report.config["true_delta_h"]["min_ess_fraction"])
    if row.method != "snis":
        return not_applicable(
            f"The realised change comes from the fallback `{row.method}`.",
            row.unclipped_ess_fraction,
            limit,
        )
    least = -largest(-row.ess_fraction, -row.unclipped_ess_fraction)
    return at_least(least, limit, otherwise="inconclusive")


@second_moment
def pareto_k(report: ProbeReport) -> Finding:
    """The shape k-hat of the tail of the largest importance weights, at η = lr.

    A few weights are so large that their mean may not exist, so do not believe the realised change. Check that
    update.lr in the report is your learning rate; if not, set first_order.lr. If it is, sample again after the step
    (true_delta_h.fallback: resample), or take smaller steps in training.
    """
    row = _row(report, needed(report.update).lr)
    limit = float(report.config["true_delta_h"]["max_pareto_k"])
    if row.method == "resample":
        return not_applicable(
            "The realised change comes from fresh responses.", row.pareto_k, limit
        )
    if row.pareto_k is None:
        size = report.batch.total_responses
        reason = (
            f"k-hat is meaningful only for N ≥ 64, ESS/N < 0.95 and largest weights that differ. Here N is {size} "
            f"and ESS/N is {row.unclipped_ess_fraction:.3f}."
        )
        return not_applicable(reason, None, limit)
    return at_most(row.pareto_k, limit, otherwise="inconclusive")
