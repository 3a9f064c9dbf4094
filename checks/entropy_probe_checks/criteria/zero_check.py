"""η = 0 must change nothing."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most
from entropy_probe_checks.thresholds import limit_for


@Criterion
def zero_check(report: ProbeReport) -> Finding:
    """max|logits of the module − logits of functional_call at θ + 0·v|, bit for bit, in the configured precision.

    The functional path and the module itself disagree at the same parameters, so θ and θ+ηv are not compared in one
    context. Look for autocast, dropout, a wrapper around the model, or buffers that change between forwards.
    """
    measured = report.continuity
    value = measured.zero_check_max_abs
    if not measured.zero_check_bitwise and value == 0.0:
        value = float("nan")  # NaN logits compare unequal to themselves: their difference must not pass as zero
    return at_most(value, limit_for(report, "zero_check"))
