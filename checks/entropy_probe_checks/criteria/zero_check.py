"""η = 0 must change nothing."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    at_most,
    largest,
    none_drawn,
)
from entropy_probe_checks.thresholds import limit_for


@Criterion
def zero_check(report: ProbeReport) -> Finding:
    """The value max|logits of the module − logits of functional_call at θ + 0·v| in the configured precision. The two
    must agree bit for bit.

    The functional path and the module itself disagree at the same parameters, so θ and θ+ηv are not compared under the
    same conditions. Look for autocast, dropout, a wrapper around the model, or buffers that change between forward
    passes.
    """
    measured = report.continuity
    value = measured.zero_check_max_abs
    if not measured.zero_check_bitwise and value == 0.0:
        value = float(
            "nan"
        )  # NaN logits compare unequal to themselves: their difference must not pass as zero
    return at_most(value, limit_for(report, "zero_check"))


@Criterion
def drawn_zero_check(report: ProbeReport) -> Finding:
    """The same difference as in `zero_check`, on rows that are drawn at random, with a random v in place of the update.

    On some rows, or when some tensors are replaced, the functional path and the module itself disagree. The example
    names them. Look for code that asks whether a weight is a Parameter, or the one that it saw before. Also look for
    code that treats one token differently from the others.
    """
    measured = report.invariance.zero_step
    if measured is None:
        return none_drawn(report)
    value = largest(measured.worst, measured.bound)  # a bound above 0 would allow what must not be
    return at_most(value, limit_for(report, "drawn_zero_check"), detail=f"[{measured.example}]")
