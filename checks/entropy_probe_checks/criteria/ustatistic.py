"""U_cross and its standard errors agree with themselves."""

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
    not_applicable,
)
from entropy_probe_checks.thresholds import limit_for


@Criterion
def gradient_witness(report: ProbeReport) -> Finding:
    """Larger of ‖X_fast − X_naive‖ and the same of Y, relative to their terms, over two units that are recomputed.

    The fast per-prompt gradients are not this model's: it uses a parameter in a way that mixes rows or prompts, such as
    tokens that change places. U_cross and δH₁ cannot be believed; please report the architecture.
    """
    measured = report.witness
    if measured is None:
        return not_applicable("No prompt was recomputed.")
    differences = (measured["x_difference"], measured["y_difference"])
    return at_most(largest(*(d for d in differences if d is not None)), limit_for(report, "gradient_witness"))


@Criterion
def projections_agree(report: ProbeReport) -> Finding:
    """Largest |s_k − X_kᵀw| relative to ‖X_k‖·‖w‖: w = PȲ by a JVP and by the α-trick, w = v by the run's own JVP.

    Several ways to the same projections of the entropy gradient differ: a gradient is cut, a mode of differentiation is
    wrong for an operation of this model, or prompts are mixed up. Nothing of first order holds.
    """
    if report.witness is None:
        return not_applicable("No prompt was recomputed.")
    names = {"projections_jvp": "JVP", "projections_alpha": "α-trick", "projections_v": "JVP along v"}
    found = {way: value for key, way in names.items() if (value := report.witness.get(key)) is not None}
    missing = [way for way in names.values() if way not in found]
    detail = f"[no {', no '.join(missing)}: an operation lacks that derivative]" if missing else ""
    return at_most(largest(*found.values()), limit_for(report, "projections_agree"), detail=detail)


@Criterion
def u_cross_identity(report: ProbeReport) -> Finding:
    """Larger of |mean(r) − U_cross| and |U/(U−1)·X̄ᵀPȲ − Σ_n X_nᵀPY_n/(U(U−1)) − U_cross|, relative to their terms.

    U_cross, its row means and its bars and diagonal do not belong together: a factor B/(B−1), the diagonal or a
    preconditioner differs between them.
    """
    f = report.first_order
    units = f.num_units
    row_terms = math.fsum(abs(r) for r in f.row_means) / units
    whole, diagonal = units / (units - 1) * f.bars_dot, f.diag_sum / (units * (units - 1))
    deviations = [
        (abs(math.fsum(f.row_means) / units - f.u_cross), row_terms),
        (abs(whole - diagonal - f.u_cross), abs(whole) + abs(diagonal)),
    ]
    value = largest(*(d / scale if scale > 0 else d for d, scale in deviations))
    return at_most(value, limit_for(report, "u_cross_identity"))


def _ratio(report: ProbeReport) -> float | Finding:
    """se_jackknife/se_plugin, or why there is none."""
    f = report.first_order
    if f.num_units < 3 or f.se_jackknife is None or f.se_plugin is None:
        return not_applicable(f"The jackknife needs 3 units, the batch has {f.num_units}.")
    if f.se_plugin <= 1e-12 * max(map(abs, f.row_means)):  # rounding
        return inconclusive(
            "The standard error is 0: all row means are equal, as when no prompt has differing rewards. "
            "Give more prompts."
        )
    return f.se_jackknife / f.se_plugin


@Criterion
def se_identity(report: ProbeReport) -> Finding:
    """|se_jackknife/se_plugin·(U−2)/(U−1) − 1|: the ratio is known exactly.

    Plug-in and jackknife differ by more than their exact ratio (U−1)/(U−2): one of them has a wrong factor, such as U/4
    in the plug-in or U−1 for U−2 in the jackknife.
    """
    ratio, units = _ratio(report), report.first_order.num_units
    if isinstance(ratio, Finding):
        return ratio
    return at_most(abs(ratio * (units - 2) / (units - 1) - 1), limit_for(report, "se_identity"))


@Criterion
def se_agreement(report: ProbeReport) -> Finding:
    """Factor between the jackknife and the plug-in standard error of U_cross.

    The two standard errors are far apart: use more units before believing either.
    """
    ratio = _ratio(report)
    return ratio if isinstance(ratio, Finding) else at_most(factor_from_one(ratio), limit_for(report, "se_agreement"))
