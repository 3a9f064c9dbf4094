"""A step 1e5 times smaller must move parameters and logits 1e5 times less."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most, factor_from_one
from entropy_probe_checks.thresholds import limit_for


@Criterion
def param_scaling(report: ProbeReport) -> Finding:
    """Factor by which (‖Δθ‖ tiny/‖Δθ‖ main)/(η_tiny/η_main) is off from 1, in true float64.

    θ + ηv does not move θ in proportion to η: the addition runs in too few bits, v is zero, or v is not what is added.
    Check the dtype of the override and the norm of the update direction.
    """
    return at_most(factor_from_one(report.continuity.param_ratio), limit_for(report, "param_scaling"))


@Criterion
def logit_scaling(report: ProbeReport) -> Finding:
    """Factor by which (‖Δlogits‖ tiny/‖Δlogits‖ main)/(η_tiny/η_main) is off from 1, in true float64.

    The logits do not follow η: at η = 1e-10 they move by rounding noise. A part of the forward runs in float32 or below
    (a custom layer that casts with an operation the float64 context does not know), or it is not deterministic.
    """
    return at_most(factor_from_one(report.continuity.logit_ratio), limit_for(report, "logit_scaling"))
