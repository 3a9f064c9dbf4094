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
    none_drawn,
    not_applicable,
    part,
    unseen,
)
from entropy_probe_checks.thresholds import limit_for


@Criterion
def param_scaling(report: ProbeReport) -> Finding:
    """The factor by which (‖Δθ‖ tiny/‖Δθ‖ main)/(η_tiny/η_main) differs from 1, in true float64. ‖Δθ‖ is the distance
    of θ + ηv from θ, at a tiny η and at the main η.

    θ + ηv does not move θ in proportion to η: the addition runs in too few bits, v is zero, or something other than v
    is added. Check the dtype of the override and the norm of the update direction.
    """
    return at_most(
        factor_from_one(report.continuity.param_ratio), limit_for(report, "param_scaling")
    )


@Criterion
def logit_scaling(report: ProbeReport) -> Finding:
    """The factor by which (‖Δlogits‖ tiny/‖Δlogits‖ main)/(η_tiny/η_main) differs from 1, in true float64.

    The logits do not follow η: at η = 1e-10 only rounding noise moves them. A part of the forward pass runs in float32
    or below, or the forward pass is not deterministic. One cause is a custom layer that casts with an operation that
    the float64 context does not know.
    """
    return at_most(
        factor_from_one(report.continuity.logit_ratio), limit_for(report, "logit_scaling")
    )


@Criterion
def drawn_scaling(report: ProbeReport) -> Finding:
    """The value 1 − min(r, 1/r), where r = (‖Δlogits(η/1000)‖/‖Δlogits(η)‖)·1000, in true float64. Rows and directions
    v are drawn at random.

    Along a few tensors the logits do not follow η. A direction v that moves every tensor hides this. Look in the module
    that the example names for a cast, a cached weight or a random number.
    """
    measured = report.invariance.scaling
    if measured is None:
        if report.invariance.num_examples == 0:
            return none_drawn(report)
        return unseen("None of the drawn directions v moves a logit by more than rounding.")
    bound = (
        measured.bound if measured.bound < 0.5 else math.nan
    )  # half of the largest value bounds nothing
    return at_most(measured.worst, bound, detail=f"[{measured.example}]")


def _off_from(value: float | None, expected: float, limit: float, missing: str) -> Finding:
    """|value − expected|; NaN and infinities never pass."""
    return unseen(missing) if value is None else at_most(abs(value - expected), limit)


@part("taylor")
def logit_slope(report: ProbeReport) -> Finding:
    """The value |s − 1|, where s is the log-log slope of ‖Δlogits‖ against η over four decades of η, in true float64.

    The logits do not follow η, or do not grow with it. The cause is noise, rounding, or a forward pass that depends on
    more than θ. Look for dropout, state that changes from one forward pass to the next, and casts.
    """
    limit = limit_for(report, "logit_slope")
    if report.continuity.logit_monotone is False:
        return Finding("fail", math.inf, limit, "[not monotone in η]")
    return _off_from(report.continuity.logit_slope, 1.0, limit, "No logit moves along v.")


@part("taylor")
def delta_h_slope(report: ProbeReport) -> Finding:
    """The value |s − 1|, where s is the log-log slope of |ΔH| against η in the range where first order holds. It is
    measured on a few responses in true float64.

    At small η the realised change is not proportional to η: the weights, the payload that they multiply, or θ + ηv are
    not smooth in η.
    """
    missing = "Because of rounding or kinks of the model, fewer than 1.5 decades of η are in the range of first order."
    return _off_from(
        report.continuity.delta_h_slope, 1.0, limit_for(report, "delta_h_slope"), missing
    )


@part("taylor")
def taylor_order(report: ProbeReport) -> Finding:
    """The value |s − 2|, where s is the log-log slope of the remainder |ΔH − η·derivative| against η. The derivative is
    that of this estimator.

    What remains after the first order is not of second order, so the derivative is not that of the measured quantity.
    Look for another baseline, another weight, a detached tensor, or float32 in one of the two.
    """
    missing = (
        "Because of rounding or kinks, fewer than 1.5 decades of η show the remainder, or the model has no "
        "forward-mode derivative."
    )
    return _off_from(
        report.continuity.taylor_order, 2.0, limit_for(report, "taylor_order"), missing
    )


@part("taylor")
def change_identity(report: ProbeReport) -> Finding:
    """The largest relative error of dΔH/dη at η = 0: a finite difference against a forward-mode derivative (JVP). The
    naive, the Rao-Blackwell and the per-token estimator are compared.

    The realised change and the derivative do not belong to the same function of θ. Look for reversed log-weights, a
    payload that differs between the two, or a detached tensor.
    """
    found = report.continuity
    errors = [found.identity_error_naive, found.identity_error_rb, found.identity_error_per_token]
    found = [error for error in errors if error is not None]
    if not found:
        return unseen(
            "ΔH does not change along v, the model has kinks at every step, or it has no forward-mode derivative."
        )
    return at_most(largest(*found), limit_for(report, "change_identity"))


@part("taylor", needs_second_moment=True)
def step_resolved(report: ProbeReport) -> Finding:
    """The smallest step at which ΔH in the configured precision is within 10 % of ΔH in true float64, divided by lr.

    The optimizer's step is lost in rounding: at η = lr, ΔH is noise in this precision. Measure in float64 (`precision`
    in the configuration).
    """
    seen, lr = report.continuity, needed(report.update).lr
    if report.config["precision"]["func_override"]["dtype"] == "float64":
        return not_applicable("The run is in float64 itself.")
    limit = limit_for(report, "step_resolved")
    if seen.trusted_eta_min is None or seen.trusted_eta_max is None:
        return inconclusive(
            "At every η, ΔH differs from its value in float64. Measure in float64 (precision).",
            None,
            limit,
        )
    if seen.trusted_eta_max < min(lr, seen.taylor_eta_max or lr):
        detail = f"ΔH is resolved only up to η = {seen.trusted_eta_max:.2g}. Measure in float64 (precision)."
        return inconclusive(detail, seen.trusted_eta_min / lr, limit)
    return at_most(seen.trusted_eta_min / lr, limit, otherwise="inconclusive")
