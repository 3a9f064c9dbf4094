"""The update direction is the optimizer's own."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entropy_probe import ProbeReport
from entropy_probe.report import RealUpdateSection
from entropy_probe_checks.criteria.verdicts import (
    ENOUGH_SURPRISES,
    Finding,
    at_most,
    in_se,
    inconclusive,
    largest,
    needed,
    not_applicable,
    of_a_normal,
    part,
    relative,
    second_moment,
    unseen,
    variance,
)
from entropy_probe_checks.thresholds import limit_for

# Of an entropy: changes of it are rounded by some ulp of what they are made of.
_ROUNDING = {"float32": 1e-6, "float64": 1e-14}
# Terms that many times smaller than what rounding may hide say nothing.
_HIDDEN = 30


@second_moment
def optimizer_step_cosine(report: ProbeReport) -> Finding:
    """The value 1 − cosine between v and a step of torch's own optimizer in float64. It is computed for the whole and
    for every parameter, and the worst counts.

    v is not the direction of the optimizer's next step: a moment, a bias correction, the weight decay or a sign is
    wrong. Predicted and realised changes are then those of another update.
    """
    cosine = needed(report.update).cosine_with_optimizer_step
    if cosine is None:
        return not_applicable("No step was compared.")
    return at_most(
        abs(1 - cosine), limit_for(report, "optimizer_step_cosine"), detail=_where(report)
    )


@second_moment
def optimizer_step_norm(report: ProbeReport) -> Finding:
    """The value |‖v‖/‖step‖ − 1| for a step of torch's own optimizer in float64. It is computed for the whole and for
    every parameter, and the worst counts.

    v does not have the length of the optimizer's step: a bias correction, epsilon or the learning rate of a group is
    wrong.
    """
    ratio = needed(report.update).norm_ratio_with_optimizer_step
    if ratio is None:
        return not_applicable("No step was compared.")
    return at_most(abs(ratio - 1), limit_for(report, "optimizer_step_norm"), detail=_where(report))


@part("curvature witness", needs_second_moment=True)
def curvature_witness(report: ProbeReport) -> Finding:
    """The difference between two computations of the curvature D²_v, relative to its terms, on one prompt. One uses
    central differences, the other uses reverse mode twice.

    The curvature along v is not the second derivative of the entropy. The second-order prediction and η* are then wrong
    too. Either the step of the difference is wrong for this model, or one of the model's derivatives is.
    """
    value = (report.witness or {}).get("curvature")
    if value is None and report.memory.left_out is not None:
        return inconclusive(f"Memory: {report.memory.left_out}.")
    if value is None:
        return unseen("An operation of the model has no second derivative.")
    return at_most(value, limit_for(report, "curvature_witness"))


@part("real step", needs_second_moment=True)
def virtual_step(report: ProbeReport) -> Finding:
    """The difference |ΔH after θ + lr·v is written into a copy − ΔH by functional override|. The criterion also asks
    whether the copy was put back.

    The functional path does not evaluate the model at θ + lr·v: a tensor is not replaced, or a tied tensor is replaced
    twice.
    """
    step, limit = report.real_step, limit_for(report, "virtual_step")
    if step is None:
        return not_applicable(report.real_step_missing or "No step was taken.")
    if not step.virtual_undone:
        return Finding("fail", step.virtual_difference, limit, "[θ was not put back bit for bit]")
    return at_most(step.virtual_difference, limit)


@part("real step", needs_second_moment=True)
def real_step(report: ProbeReport) -> Finding:
    """The largest relative difference in S and ΔH between two models: one at θ + lr·v, and a copy after one step of
    torch's own optimizer. S is the log-probability of a response.

    The measured step is not the one that the optimizer takes: the learning rate of a group, clipping, a moment or the
    weight decay is wrong.
    """
    step = report.real_step
    if step is None:
        return not_applicable(report.real_step_missing or "No step was taken.")
    return at_most(largest(step.real_relative, step.real_seq_logp), limit_for(report, "real_step"))


@second_moment
def real_update_cosine(report: ProbeReport) -> Finding:
    """The value 1 − cosine between v and (θ′ − θ)/lr of the trainer's own next step. The same is computed for the
    gradients, and the larger value counts.

    On the trainer's own batch, the probe makes another update than the trainer made: the recipe, a mask, the reference
    model or a moment is not the run's. The section `recipe` of the report says which settings were taken, and from
    where.
    """
    return _of_real(
        report,
        limit_for(report, "real_update_cosine"),
        lambda real: (real.cosine, real.gradient_cosine),
        lambda cosine, rounding: (1 - cosine, rounding**2),
    )


@second_moment
def real_update_norm(report: ProbeReport) -> Finding:
    """The value |‖v‖/‖(θ′ − θ)/lr‖ − 1| for the trainer's own next step. The same is computed for the gradients, and
    the larger value counts.

    The size of the update is wrong, even if its direction is right: the normaliser of the loss, clipping, a coefficient
    or the learning rate differs from the run's.
    """
    return _of_real(
        report,
        limit_for(report, "real_update_norm"),
        lambda real: (real.norm_ratio, real.gradient_norm_ratio),
        lambda ratio, rounding: (abs(ratio - 1), rounding),
    )


def _not_the_same(report: ProbeReport) -> str:
    """Why there is nothing to compare, or the two steps need not be the same; or nothing."""
    real, recipe = report.real_update, report.recipe
    if real is None:
        return report.real_update_missing or "There is no next checkpoint."
    if not real.own_batch:
        return "The U batch is not the trainer's own: give the captured one to --probe-update-rollouts."
    if real.steps_between > 1:
        return f"{real.steps_between} steps lie between the two checkpoints."
    if recipe.not_reproduced:
        return f"The step is not the same: {' '.join(recipe.not_reproduced)}"
    return ""


def _of_real(
    report: ProbeReport,
    limit: float,
    of_v_and_gradient: Callable[[RealUpdateSection], tuple[float, float | None]],
    off_and_rounding: Callable[[float, float], tuple[float, float]],
) -> Finding:
    """The largest of what is off, each with what rounding explains of it, fourfold, taken for granted."""
    if reason := _not_the_same(report):
        return not_applicable(reason)
    real = needed(report.real_update)
    pairs = zip(of_v_and_gradient(real), (real.rounding, real.gradient_rounding), strict=True)
    found = [off_and_rounding(value, by) for value, by in pairs if value is not None]
    if any(4 * rounding > 0.1 for _, rounding in found):
        return inconclusive(
            "The checkpoints are stored in too few bits to show a step.", None, limit
        )
    return at_most(largest(*(off / max(1.0, 4 * by / limit) for off, by in found)), limit)


@second_moment
def prediction(report: ProbeReport) -> Finding:
    """The largest |ΔH realised − predicted| over the η in range, in standard errors of that difference. It is given as
    the equally rare number of standard errors of a normal distribution.

    The entropy does not change as slope and curvature say: v, the slope or the weights are wrong, or the responses are
    not from this policy. If the same responses serve both batches, use two batches. The realised change then contains
    what the update fitted in these responses, and the cross-fitted prediction does not.
    """
    rows = [row for row in report.entropy_change if row.eta != 0 and row.predicted is not None]
    if not rows:
        return not_applicable(
            "With top_p < 1, the slope of π predicts nothing about π restricted to the nucleus."
        )
    in_range, limit = [row for row in rows if row.in_range], limit_for(report, "prediction")
    if not in_range:
        return inconclusive(_why_out_of_range(rows), None, limit)
    low, high = _resolved(report)
    judged = [row for row in in_range if low <= abs(row.eta) <= high]
    if not judged:
        dtype = report.config["precision"]["func_override"]["dtype"]
        return inconclusive(
            f"Rounding in {dtype} hides ΔH at every η in range. Measure in float64 (precision).",
            None,
            limit,
        )
    worst = largest(*(in_se(_unexplained(report, row), row.difference_se) for row in judged))
    found, seen = of_a_normal(worst, report.batch.num_prompts - 1), report.entropy.surprises
    if found > limit and seen < ENOUGH_SURPRISES:
        return inconclusive(_too_few(report), found, limit)
    return at_most(found, limit)


def _unexplained(report: ProbeReport, row: Any) -> float:
    """|realised − predicted| beyond rounding and third order, |η|³·c²/4s.

    Third order is as much below second as second is below first. s is the slope, at least 2 SE of it, and c the
    curvature with 2 SE added.
    """
    update = needed(report.update)
    slope = max(abs(update.delta_h1_per_lr_rb), 2 * update.delta_h1_per_lr_rb_se)
    bend = abs(update.curvature or 0.0) + 2 * (update.curvature_se or 0.0)
    entropy = report.entropy.rb.value
    if report.config["true_delta_h"]["normalize"] == "per_token":
        slope = max(abs(update.delta_h1_per_lr_per_token), 2 * update.delta_h1_per_lr_per_token_se)
        bend = abs(update.curvature_per_token) + 2 * update.curvature_per_token_se
        entropy = report.entropy.per_token.value
    third = abs(row.eta) ** 3 * bend**2 / (4 * slope) if slope > 0 else 0.0
    rounding = _ROUNDING[report.config["precision"]["func_override"]["dtype"]] * abs(entropy)
    return _beyond(row.difference, third + rounding)


def _beyond(value: float, explained: float) -> float:
    """How much |value| is larger; NaN of NaN."""
    off = abs(value) - explained
    return 0.0 if off <= 0 else off


@second_moment
def change_estimators_agree(report: ProbeReport) -> Finding:
    """The largest difference between ΔH by the performance difference and ΔH by importance sampling, in standard errors
    of that difference. It is given as the equally rare number of standard errors of a normal distribution.

    Two estimates of one change on the same responses differ by more than noise. A weight, a prefix, a baseline or the
    entropies at θ+ηv are wrong in one of them.
    """
    limit = limit_for(report, "change_estimators_agree")
    low, high = _resolved(report)
    rounding = _ROUNDING[report.config["precision"]["func_override"]["dtype"]] * abs(
        report.entropy.rb.value
    )
    found = []
    for row in report.entropy_change:
        if row.delta_h_pd is None or row.delta_h_pd_by_prompt is None:
            return not_applicable("With top_p < 1, the performance difference is still about π.")
        if row.eta != 0 and row.plain and row.reliable and low <= abs(row.eta) <= high:
            pairs = zip(row.delta_h_pd_by_prompt, row.delta_h_rb_by_prompt, strict=True)
            terms = [one - other for one, other in pairs]
            off = _beyond(row.delta_h_pd - row.delta_h_rb, rounding)
            found.append(in_se(off, math.sqrt(variance(terms) / len(terms))))
    if not found:
        return inconclusive("At no η is ΔH both reliable and resolved.", None, limit)
    worst, seen = (
        of_a_normal(largest(*found), report.batch.num_prompts - 1),
        report.entropy.surprises,
    )
    if worst > limit and seen < ENOUGH_SURPRISES:
        return inconclusive(_too_few(report), worst, limit)
    return at_most(worst, limit)


def _too_few(report: ProbeReport) -> str:
    batch = report.batch
    return (
        f"Only {report.entropy.surprises} of {batch.num_tokens} tokens had a probability below 1/2. "
        "So few give no valid standard error. Give more responses."
    )


@second_moment
def sweep_identity(report: ProbeReport) -> Finding:
    """The difference |[ΔH(η) − ΔH(−η)]/2η − the derivative of this estimator on these responses|, relative to its
    terms, at the best ±η.

    The realised changes are not measured at θ + ηv. The direction, the sign or the length of the step, the responses or
    the weights differ from those of the slope. Sampling noise is not the cause, because this difference contains none.
    """
    limit, update = limit_for(report, "sweep_identity"), needed(report.update)
    if report.config["generation"]["top_p"] < 1.0:
        return not_applicable("top_p < 1: the weights belong to the restricted policy.")
    mean_length = report.batch.num_tokens / report.batch.total_responses
    kinds = [
        ("delta_h_per_token", update.slope_of_change_per_token, mean_length),
        ("delta_h_per_token_pd", update.delta_h1_per_lr_per_token, mean_length),
    ]
    if report.config["true_delta_h"]["normalize"] == "per_sequence":
        kinds.append(("delta_h_rb", update.slope_of_change, 1.0))
        kinds.append(("delta_h_pd", update.delta_h1_per_lr_rb, 1.0))
    size, pairs = update.slope_of_change_size, _pairs(report)
    rounding, of_slope = _rounding_of_change(report), update.slope_of_change_rounding
    found = {
        eta: [
            relative((getattr(up, name) - getattr(down, name)) / (2 * eta) - slope, size / per)
            for name, slope, per in kinds
        ]
        for eta, (up, down) in pairs.items()
    }
    noise = {eta: relative(rounding / eta + of_slope, size) for eta in found}
    missing = "At no pair ±η is ΔH both reliable and resolved. Give both signs, or `auto`, in true_delta_h.etas."
    return _at_agreeing_steps(found, noise, limit, missing, alone=len(pairs) == 1)


@second_moment
def curvature_identity(report: ProbeReport) -> Finding:
    """The difference between [ΔH(η) + ΔH(−η)]/η² and the second derivative of this estimator, which follows from the
    curvature. It is relative to its terms, at the best ±η.

    The curvature is not the second derivative of the measured change: one of its terms is missing or has a wrong
    factor. The second-order prediction and η* are then wrong too.
    """
    limit, update = limit_for(report, "curvature_identity"), needed(report.update)
    if report.config["generation"]["top_p"] < 1.0:
        return not_applicable("top_p < 1: the weights belong to the restricted policy.")
    mean_length = report.batch.num_tokens / report.batch.total_responses
    size, pairs = update.curvature_of_change_size, _pairs(report)
    kinds = [("delta_h_per_token_pd", update.curvature_per_token, size / mean_length)]
    if report.config["true_delta_h"]["normalize"] == "per_sequence":
        kinds.append(("delta_h_rb", update.curvature_of_change, size))
        kinds.append(("delta_h_pd", update.curvature or 0.0, size))
    ulps = _ROUNDING[report.config["precision"]["func_override"]["dtype"]] * abs(
        report.entropy.rb.value
    )
    rounding = largest(ulps, 2 * _rounding_of_change(report))  # of either ΔĤ
    found = {
        eta: [
            ((getattr(up, name) + getattr(down, name)) / eta**2 - second) / scale
            for name, second, scale in kinds
        ]
        for eta, (up, down) in pairs.items()
        if eta**2 * size * limit > rounding
    }
    missing = "At every ±η rounding hides the second order."
    return _at_agreeing_steps(found, {}, limit, missing, alone=len(pairs) == 1)


_SAME = 0.1
"""Of what both are off."""


def _rounding_of_change(report: ProbeReport) -> float:
    """What the configured precision leaves of a ΔĤ = Σŵ⁺R⁺ − ΣŵR of N responses of T tokens, each on its own:
    √(T/N)·δ·(1 + sd R), as an S enters times R − Ĥ. δ is the most that log p and entropy of a token are off from those
    in float64.
    """
    batch, own = report.batch, report.entropy.rb_by_prompt
    tokens = math.sqrt(batch.num_tokens) / batch.total_responses
    spread = math.sqrt(variance(own)) if len(own) > 1 else 0.0
    return tokens * report.invariance.precision.worst * (1 + spread)


def _at_agreeing_steps(
    found: Mapping[float, Sequence[float]],
    noise: Mapping[float, float],
    limit: float,
    missing: str,
    *,
    alone: bool,
) -> Finding:
    """The smallest |off| of any η, judged at the smaller of two steps that agree, or `alone` where there is but one;
    over 1 + noise/limit, so that what is off by the limit and its noise is let pass. Noise of five limits hides it.

    A difference with a step that crosses a router's choice or a kink, or is too long for the order, changes with its
    length, threefold and more from one step to the next, and says nothing; what is wrong at every step is the same.
    """
    etas = [eta for eta in sorted(found) if not noise.get(eta, 0.0) > 5 * limit]
    if not etas:
        return unseen(missing)
    agreeing = [
        small
        for small, large in itertools.pairwise(etas)
        if all(
            abs(one - other) <= max(limit, _SAME * min(abs(one), abs(other)))
            for one, other in zip(found[small], found[large], strict=True)
        )
    ]

    def best(some: Sequence[float]) -> float:
        return _best(
            [largest(*map(abs, found[eta])) / (1 + noise.get(eta, 0.0) / limit) for eta in some]
        )

    value = best(etas)
    if value > limit and not agreeing and not alone:
        return unseen("ΔH is not smooth in η: no two steps give the same difference.")
    return at_most(best(agreeing) if agreeing and not math.isnan(value) else value, limit)


def _best(found: list[float]) -> float:
    """The smallest; NaN if any is NaN."""
    return -largest(*(-off for off in found))


def _pairs(report: ProbeReport) -> dict[float, tuple[Any, Any]]:
    """η > 0 → the rows at η and −η, where both are reliable and resolved."""
    rows = {row.eta: row for row in report.entropy_change if row.reliable and row.method == "snis"}
    low, high = _resolved(report)
    return {
        eta: (row, rows[-eta])
        for eta, row in rows.items()
        if low <= eta <= high and eta > 0 and -eta in rows
    }


def _resolved(report: ProbeReport) -> tuple[float, float]:
    """The range of η that the configured dtype resolves, without an end where nothing was looked at."""
    seen = report.continuity
    if seen.taylor_eta_max is None:
        return 0.0, math.inf
    low, high = seen.trusted_eta_min or math.inf, seen.trusted_eta_max or math.inf
    return low, math.inf if high >= seen.taylor_eta_max else high


def _why_out_of_range(rows: Sequence[Any]) -> str:
    """What to do where no η is in range: the nearest ones are too far for the weights, or for second order."""
    nearest = min(abs(row.eta) for row in rows)
    if any(row.reliable for row in rows if abs(row.eta) == nearest):
        return f"Second order does not describe ΔH at η = {nearest:.2g}. Give smaller true_delta_h.etas, or `auto`."
    return (
        f"The importance weights at η = {nearest:.2g} cannot be believed. Give smaller true_delta_h.etas or "
        "first_order.lr, more responses, or a fallback."
    )


@second_moment
def slope_identity(report: ProbeReport) -> Finding:
    """The difference |−X̄ᵀv − mean of the slope's own terms|, relative to the terms of −X̄ᵀv and their rounding. X̄ᵀv
    comes from gradients and the slope from JVPs, each with its own weights. Of the difference per response and that per
    token, the larger counts. It is infinite where the stated rounding is less than that of float64, or has no end.

    The slope along v is not the one that the gradients give: a baseline, a term or a weight differs between the two.
    """
    update, first = needed(report.update), report.config["first_order"]
    name = "naive" if first["estimator"] == "naive" else f"rb_{update.baseline}"
    limit, found = limit_for(report, "slope_identity"), []
    hidden = True
    # a rounding of float64 of each of so many terms, and room for the size of a logit and of an entropy
    least = sys.float_info.epsilon / (100 * math.sqrt(max(report.batch.num_tokens, 1)))
    for of_v0, by_unit, rounding, slope in (
        (
            update.slope_of_v0,
            update.slope_by_unit,
            update.slope_rounding,
            update.estimators[name].value,
        ),
        (
            update.slope_of_v0_per_token,
            update.slope_by_unit_per_token,
            update.slope_rounding_per_token,
            update.delta_h1_per_lr_per_token,
        ),
    ):
        parts = [of_v0, *by_unit]
        terms, known = math.fsum(map(abs, parts)), rounding / limit
        hidden = hidden and terms < known / _HIDDEN
        possible = least * abs(slope) <= rounding < math.inf
        off = abs(math.fsum(parts) - slope) if possible else math.inf
        found.append(relative(off, terms + known))
    value = largest(*found)
    if hidden and value <= limit:
        return unseen("Rounding hides the slope along v.")
    return at_most(value, limit)


def _where(report: ProbeReport) -> str:
    return (
        f"[{needed(report.update).worst_parameter}]"
        if needed(report.update).worst_parameter
        else ""
    )
