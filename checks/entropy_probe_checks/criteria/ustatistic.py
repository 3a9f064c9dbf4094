"""U_cross and its standard errors agree with themselves."""

from __future__ import annotations

import math

from entropy_probe import ProbeReport, Verdict
from entropy_probe_checks.criteria.verdicts import at_most, without_answer
from entropy_probe_checks.thresholds import limit_for


def u_cross_identity(report: ProbeReport) -> Verdict:
    """Largest of |mean(r) − U_cross| and |U/(U−1)·X̄ᵀPȲ − Σ_n X_nᵀPY_n/(U(U−1)) − U_cross|, relative to their terms."""
    f = report.first_order
    units = f.num_units
    row_terms = math.fsum(abs(r) for r in f.row_means) / units
    whole, diagonal = units / (units - 1) * f.bars_dot, f.diag_sum / (units * (units - 1))
    deviations = [
        (abs(math.fsum(f.row_means) / units - f.u_cross), row_terms),
        (abs(whole - diagonal - f.u_cross), abs(whole) + abs(diagonal)),
    ]
    value = max((d / scale if scale > 0 else d for d, scale in deviations), key=lambda x: (math.isnan(x), x))
    return at_most(
        "u_cross_identity",
        "ustatistic",
        value,
        limit_for(report, "u_cross_identity"),
        "U_cross, its row means and its bars and diagonal do not belong together: a factor B/(B−1), the diagonal or a "
        "preconditioner differs between them.",
    )


def _ratio(report: ProbeReport) -> float | None:
    f = report.first_order
    return f.se_jackknife / f.se_plugin if f.se_jackknife is not None and f.se_plugin else None


def _without_ratio(report: ProbeReport, criterion: str) -> Verdict:
    f = report.first_order
    if f.num_units < 3:
        return without_answer(
            criterion, "ustatistic", "not_applicable", f"The jackknife needs 3 units, the batch has {f.num_units}."
        )
    return without_answer(
        criterion,
        "ustatistic",
        "inconclusive",
        "The standard error is 0: all row means are equal, as when no prompt has differing rewards. Give more prompts.",
        f.se_plugin,
    )


def se_identity(report: ProbeReport) -> Verdict:
    """|se_jackknife/se_plugin·(U−2)/(U−1) − 1|: the ratio is known exactly."""
    ratio, units = _ratio(report), report.first_order.num_units
    if ratio is None:
        return _without_ratio(report, "se_identity")
    return at_most(
        "se_identity",
        "ustatistic",
        abs(ratio * (units - 2) / (units - 1) - 1),
        limit_for(report, "se_identity"),
        "Plug-in and jackknife differ by more than their exact ratio (U−1)/(U−2): one of them has a wrong factor, such "
        "as U/4 in the plug-in or U−1 for U−2 in the jackknife.",
    )


def se_agreement(report: ProbeReport) -> Verdict:
    """se_jackknife/se_plugin, or its inverse where that is larger."""
    ratio = _ratio(report)
    if ratio is None:
        return _without_ratio(report, "se_agreement")
    return at_most(
        "se_agreement",
        "ustatistic",
        max(ratio, 1 / ratio) if ratio > 0 else math.inf,
        limit_for(report, "se_agreement"),
        "The two standard errors of U_cross are far apart: use more units before believing either.",
    )
