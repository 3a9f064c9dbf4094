"""U_cross and its standard errors agree with themselves."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any

from scipy.special import stdtrit

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.audit import audited
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    at_most,
    by_two_ways,
    factor_from_one,
    inconclusive,
    largest,
    needed,
    not_applicable,
    part,
    relative,
    second_moment,
    unseen,
    variance,
)
from entropy_probe_checks.thresholds import limit_for


@Criterion
def gradient_witness(report: ProbeReport) -> Finding:
    """The larger of ‖X_fast − X_naive‖ and ‖Y_fast − Y_naive‖, relative to their terms. Two units are computed again by
    the naive way.

    The fast per-prompt gradients are not the gradients of this model. The model uses a parameter in a way that mixes
    rows or prompts, such as tokens that change places. Do not believe U_cross and δH₁, and please report the
    architecture.
    """
    measured = report.witness
    if measured is None:
        return not_applicable("No prompt was recomputed.")
    differences = (measured["x_difference"], measured["y_difference"])
    found = [by_two_ways(d) for d in differences if d is not None]
    limit = limit_for(report, "gradient_witness")
    if found and not any(found) and report.registry.y_coverage > 0:
        return inconclusive(
            "Both ways agree to the last bit, so the second was not computed.", 0.0, limit
        )
    return at_most(largest(*found), limit)


@part("projections")
def projections_agree(report: ProbeReport) -> Finding:
    """The largest |s_k − X_kᵀw| relative to ‖X_k‖·‖w‖, where s_k is the same projection computed in another way. For w
    = PȲ, s_k comes from a JVP and from the α-trick; for w = v, it comes from the run's own JVP. It is infinite where
    the α-trick finds nothing, and the same model has the second derivative that it needs.

    Several ways to compute the same projections of the entropy gradient give different results. A gradient is cut, a
    mode of differentiation is wrong for an operation of this model, or prompts are mixed up. Do not believe any
    first-order number.
    """
    if report.witness is None:
        return not_applicable("No prompt was recomputed.")
    names = {"projections_jvp": "JVP", "projections_alpha": "α-trick"}
    if report.no_second_moment is None:
        names["projections_v"] = "JVP along v"
    found = {
        way: value for key, way in names.items() if (value := report.witness.get(key)) is not None
    }
    missing = [way for way in names.values() if way not in found]
    said = []
    if "α-trick" in missing and report.memory.left_out is not None:
        missing.remove("α-trick")
        said.append(f"no α-trick: {report.memory.left_out}")
    if missing:
        said.append(f"no {', no '.join(missing)}: an operation of the model lacks that derivative")
    detail = f"[{'; '.join(said)}]" if said else ""
    if not found:
        return unseen(detail)
    value = largest(*map(by_two_ways, found.values()))
    return at_most(value, limit_for(report, "projections_agree"), detail=detail)


@second_moment
def u_cross_identity(report: ProbeReport) -> Finding:
    """The largest of |mean(r) − U_cross|, of |U/(U−1)·X̄ᵀPȲ − Σ_n X_nᵀPY_n/(U(U−1)) − U_cross|, and of the differences
    of all four numbers from the auditor's. Each is relative to its terms.

    U_cross, its row means, its bars and its diagonal do not belong together: a factor B/(B−1), the diagonal or a
    preconditioner differs between them.
    """
    f = report.first_order
    if f is None:
        return _of_one_unit()
    units = f.num_units
    row_terms = math.fsum(abs(r) for r in f.row_means) / units
    whole, diagonal = units / (units - 1) * f.bars_dot, f.diag_sum / (units * (units - 1))
    deviations = [
        (abs(math.fsum(f.row_means) / units - f.u_cross), row_terms),
        (abs(whole - diagonal - f.u_cross), abs(whole) + abs(diagonal)),
    ]
    again = audited(report, *_of_first_order("u_cross row_means bars_dot diag_sum"))
    value = largest(again, *(relative(*deviation) for deviation in deviations))
    return at_most(value, limit_for(report, "u_cross_identity"))


def _of_one_unit() -> Finding:
    return not_applicable(
        "The update batch has one prompt, and U_cross multiplies gradients of two."
    )


def _of_first_order(fields: str) -> list[str]:
    return [f"first_order.{field}" for field in fields.split()]


@second_moment
def delta_h1_identity(report: ProbeReport) -> Finding:
    """The largest relative deviation of δH₁ from −lr·U_cross, of its standard error from lr·se_plugin, and of its sums
    over units, layers, modules and factors from the whole. Each number is also compared with the auditor's.

    δH₁ is not the first-order term of the U_cross that the report gives. A sign, the learning rate or a part is wrong.
    """
    f = report.first_order
    if f is None:
        return _of_one_unit()
    scale = f.lr * math.fsum(abs(x) for x in f.row_means) / f.num_units
    sums = [math.fsum(f.delta_h1_by_unit), *_sums(f.delta_h1_parts)]
    deviations = [
        _relative(f.delta_h1, -f.lr * f.u_cross, scale),
        *(_relative(s, f.delta_h1, scale) for s in sums),
    ]
    if f.se_plugin is not None:
        deviations.append(_relative(f.delta_h1_se, f.lr * f.se_plugin, f.lr * f.se_plugin))
    parts = "lr delta_h1 delta_h1_se delta_h1_by_unit delta_h1_parts"
    deviations.append(audited(report, *_of_first_order(parts)))
    return at_most(largest(*deviations), limit_for(report, "delta_h1_identity"))


@second_moment
def two_batch_identity(report: ProbeReport) -> Finding:
    """The largest relative deviation in four comparisons. X̄ᵀPȲ is compared with the mean of its projections on either
    side, and δH₁ with −lr·X̄ᵀPȲ. The two standard errors are compared with the variances of projections and
    interaction, and sums over parts with the whole. All of these are also compared with the auditor's.

    The two-batch term, its projections and its standard error do not belong together: units are weighted wrongly, or a
    sign or the learning rate is wrong.
    """
    across = report.two_batch
    if across is None:
        return not_applicable("One batch serves as both.")
    s, t, lr = across.projections, across.update_projections, needed(report.update).lr
    size = math.fsum(map(abs, s)) / len(s)
    var_s, var_t = (variance(x) / len(x) if len(x) > 1 else 0.0 for x in (s, t))
    # of several processes that send sums alone it is not known
    of_both = (across.interaction or 0.0) / (len(s) * len(t))
    total = lr * math.sqrt(max(var_s + var_t - of_both, of_both / 4))
    deviations = [
        _relative(across.bars_dot, _weighted_mean(s, report.batch.num_prompts), size),
        _relative(across.bars_dot, _weighted_mean(t, report.update_batch.num_prompts), size),
        _relative(across.delta_h1, -lr * across.bars_dot, lr * size),
        _relative(across.conditional_se, lr * math.sqrt(var_s), lr * size),
        *(_relative(whole, across.delta_h1, lr * size) for whole in _sums(across.delta_h1_parts)),
        audited(report, "two_batch"),
    ]
    if len(t) > 1:  # one unit does not say how another would differ
        deviations.append(_relative(across.delta_h1_se, total, lr * size))
    return at_most(largest(*deviations), limit_for(report, "two_batch_identity"))


def _weighted_mean(of_units: list[float], prompts: int) -> float:
    """Mean over prompts of a number per unit; sizes of units differ by at most one."""
    sizes = Counter(n * len(of_units) // prompts for n in range(prompts))
    return math.fsum(sizes[k] * x for k, x in enumerate(of_units)) / prompts


def _sums(parts: Any) -> list[float]:
    """Each table of parts, added up."""
    return [
        math.fsum(part.value for part in table.values())
        for table in (parts.layer, parts.module, parts.factor)
    ]


def _relative(got: float | None, expected: float, scale: float) -> float:
    """|got − expected|/scale; 0 where both are 0, NaN where there is nothing."""
    if got is None:
        return math.nan
    return relative(abs(got - expected), scale)


@second_moment
def se_formula(report: ProbeReport) -> Finding:
    """The largest relative deviation of both standard errors of U_cross, their ζ̂₁ and the interval from their formulas
    on the row means, and from the auditor's numbers. The formulas are ζ̂₁ = Σ(r − r̄)²/(U−1) and SE = √(4ζ̂₁/U); the
    jackknife uses U_{−u} = (U·U_cross − 2r_u)/(U−2).

    A standard error has a wrong factor, such as U/4 in ζ̂₁. Every statement in units of that standard error is wrong
    with it.
    """
    f = report.first_order
    if f is None:
        return _of_one_unit()
    units, mean = f.num_units, math.fsum(f.row_means) / f.num_units
    spread = math.fsum((r - mean) ** 2 for r in f.row_means)
    rounding = _rounding_of_se(report)
    se, limit = math.sqrt(4 * spread / (units - 1) / units), limit_for(report, "se_formula")
    if se <= rounding:
        return not_applicable("The standard error is 0, because all row means are equal.")
    half = float(stdtrit(units - 1, 0.975)) * se
    expected = [(f.zeta1_plugin, spread / (units - 1)), (f.se_plugin, se)]
    expected += [(high - low, 2 * half) for low, high in [f.interval]]
    if units >= 3:
        left_out = [(units * f.u_cross - 2 * r) / (units - 2) for r in f.row_means]
        centre = math.fsum(left_out) / units
        variance = (units - 1) / units * math.fsum((x - centre) ** 2 for x in left_out)
        expected += [
            (f.se_jackknife, math.sqrt(variance)),
            (f.zeta1_jackknife, units / 4 * variance),
        ]
    floor = rounding / limit  # what rounding does to an SE is no more than the limit of this
    middle = _relative(sum(f.interval) / 2, f.u_cross, half + floor)
    errors = "zeta1_plugin zeta1_jackknife se_plugin se_jackknife var_unbiased interval"
    again = audited(report, *_of_first_order(errors))
    off = (_relative(got, x, x * (1 + floor / se)) for got, x in expected)
    return at_most(largest(middle, again, *off), limit)


def _rounding_of_se(report: ProbeReport) -> float:
    """What float64 leaves of an SE of U_cross: row means are off by some ulps of the largest K_nm of their sums, and
    the jackknife takes each from the sum of all."""
    f = needed(report.first_order)
    terms = abs(f.diag_sum) + f.num_units * math.fsum(map(abs, f.row_means))
    return 8 * sys.float_info.epsilon * terms / math.sqrt(f.num_units)


def _ratio(report: ProbeReport) -> float | Finding:
    """se_jackknife/se_plugin, or why there is none."""
    f = report.first_order
    if f is None:
        return _of_one_unit()
    if f.num_units < 3 or f.se_jackknife is None or f.se_plugin is None:
        return not_applicable(f"The jackknife needs 3 units, and the batch has {f.num_units}.")
    if f.se_plugin <= _rounding_of_se(report) / limit_for(report, "se_identity"):
        return inconclusive(
            "The standard error is 0, because all row means are equal. This happens when no prompt has differing "
            "rewards. Give prompts that are solved sometimes, and neither always nor never, or more responses to each "
            "(generation.num_return_sequences)."
        )
    return f.se_jackknife / f.se_plugin


@second_moment
def se_identity(report: ProbeReport) -> Finding:
    """The value |se_jackknife/se_plugin·(U−2)/(U−1) − 1|. It must be 0, because the ratio of the two is known exactly.

    The plug-in and the jackknife standard error differ by more than their exact ratio (U−1)/(U−2). One of them has a
    wrong factor, such as U/4 in the plug-in, or U−1 in place of U−2 in the jackknife.
    """
    ratio = _ratio(report)
    if isinstance(ratio, Finding):
        return ratio
    units = needed(report.first_order).num_units
    return at_most(abs(ratio * (units - 2) / (units - 1) - 1), limit_for(report, "se_identity"))


@second_moment
def se_agreement(report: ProbeReport) -> Finding:
    """The factor between the jackknife and the plug-in standard error of U_cross.

    The two standard errors are far apart. Use more units before you believe either of them.
    """
    ratio = _ratio(report)
    return (
        ratio
        if isinstance(ratio, Finding)
        else at_most(factor_from_one(ratio), limit_for(report, "se_agreement"))
    )
