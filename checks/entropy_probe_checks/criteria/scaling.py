"""A step 1e5 times smaller must move parameters and logits 1e5 times less."""

from __future__ import annotations

import math

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    at_most,
    factor_from_one,
    inconclusive,
    largest,
    needed,
    not_applicable,
    part,
    unseen,
)
from entropy_probe_checks.thresholds import limit_for


@Criterion
def param_scaling(report: ProbeReport) -> Finding:
    """Factor by which (‖Δθ‖ tiny/‖Δθ‖ main)/(η_tiny/η_main) is off from 1, in true float64.

    θ + ηv does not move θ in proportion to η: the addition runs in too few bits, v is zero, or v is not what is added.
    Check the dtype of the override and the norm of the update direction.
    """
    return at_most(
        factor_from_one(report.continuity.param_ratio), limit_for(report, "param_scaling")
    )


@Criterion
def logit_scaling(report: ProbeReport) -> Finding:
    """Factor by which (‖Δlogits‖ tiny/‖Δlogits‖ main)/(η_tiny/η_main) is off from 1, in true float64.

    The logits do not follow η: at η = 1e-10 they move by rounding noise. A part of the forward runs in float32 or below
    (a custom layer that casts with an operation the float64 context does not know), or it is not deterministic.
    """
    return at_most(
        factor_from_one(report.continuity.logit_ratio), limit_for(report, "logit_scaling")
    )


@Criterion
def drawn_scaling(report: ProbeReport) -> Finding:
    """1 − min(r, 1/r) with r = (‖Δlogits(η/1000)‖/‖Δlogits(η)‖)·1000 in true float64, on drawn rows along drawn v.

    Along some few tensors the logits do not follow η, which a v that moves every tensor hides: a cast, a cached weight
    or a random number in the one module that the example names.
    """
    measured = report.invariance.scaling
    if measured is None:
        if report.invariance.num_examples == 0:
            return not_applicable("invariance.max_examples is 0.")
        return unseen("No drawn v moves a logit above rounding.")
    bound = (
        measured.bound if measured.bound < 0.5 else math.nan
    )  # half of the largest value bounds nothing
    return at_most(measured.worst, bound, detail=f"[{measured.example}]")


def _off_from(value: float | None, expected: float, limit: float, missing: str) -> Finding:
    """|value − expected|; NaN and infinities never pass."""
    return unseen(missing) if value is None else at_most(abs(value - expected), limit)


@part("taylor")
def logit_slope(report: ProbeReport) -> Finding:
    """|log-log slope of ‖Δlogits‖ against η − 1| over four decades of η, in true float64.

    The logits do not follow η, or do not grow with it: noise, rounding, or a forward that is not a function of θ. Look
    for dropout, state that changes from one forward to the next, and casts.
    """
    limit = limit_for(report, "logit_slope")
    if report.continuity.logit_monotone is False:
        return Finding("fail", math.inf, limit, "[not monotone in η]")
    return _off_from(report.continuity.logit_slope, 1.0, limit, "No logit moves along v.")


@part("taylor")
def delta_h_slope(report: ProbeReport) -> Finding:
    """|log-log slope of |ΔH| against η − 1| in the range of first order, on a few responses in true float64.

    The realised change does not start in proportion to η: weights, payload or θ + ηv are not smooth in η.
    """
    missing = "Rounding or the model's kinks leave fewer than 1.5 decades of η in the range of first order."
    return _off_from(
        report.continuity.delta_h_slope, 1.0, limit_for(report, "delta_h_slope"), missing
    )


@part("taylor")
def taylor_order(report: ProbeReport) -> Finding:
    """|log-log slope of the remainder |ΔH − η·derivative| against η − 2|, the derivative being this estimator's own.

    What is left after the first order is not of second order: the derivative is not that of what is measured. A
    baseline, a weight, a detached tensor or float32 in one of the two.
    """
    missing = (
        "Rounding or kinks leave fewer than 1.5 decades of η for the remainder, or there is no "
        "forward-mode derivative."
    )
    return _off_from(
        report.continuity.taylor_order, 2.0, limit_for(report, "taylor_order"), missing
    )


@part("taylor")
def change_identity(report: ProbeReport) -> Finding:
    """Largest relative error of dΔH/dη at 0 by finite difference against its JVP: naive, Rao-Blackwell, per token.

    Realised change and derivative do not belong to the same function of θ: reversed log-weights, another payload, a
    detached tensor.
    """
    found = report.continuity
    errors = [found.identity_error_naive, found.identity_error_rb, found.identity_error_per_token]
    found = [error for error in errors if error is not None]
    if not found:
        return unseen(
            "ΔH does not move along v, the model has kinks at every step, or there is no forward-mode derivative."
        )
    return at_most(largest(*found), limit_for(report, "change_identity"))


@part("taylor", needs_second_moment=True)
def step_resolved(report: ProbeReport) -> Finding:
    """Smallest step at which ΔH in the configured precision is within 10 % of that in true float64, over lr.

    The optimizer's step is lost in rounding: ΔH at η = lr is noise in this precision. Measure in float64 (precision).
    """
    seen, lr = report.continuity, needed(report.update).lr
    if report.config["precision"]["func_override"]["dtype"] == "float64":
        return not_applicable("The run is in float64 itself.")
    limit = limit_for(report, "step_resolved")
    if seen.trusted_eta_min is None or seen.trusted_eta_max is None:
        return inconclusive(
            "ΔH differs from that in float64 at every η: measure in float64 (precision).",
            None,
            limit,
        )
    if seen.trusted_eta_max < min(lr, seen.taylor_eta_max or lr):
        detail = f"ΔH is resolved up to η = {seen.trusted_eta_max:.2g} only: measure in float64 (precision)."
        return inconclusive(detail, seen.trusted_eta_min / lr, limit)
    return at_most(seen.trusted_eta_min / lr, limit, otherwise="inconclusive")
