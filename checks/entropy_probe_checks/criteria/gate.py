"""Training health: quantities of the report held against the bounds that the user sets (`bounds.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from entropy_probe import ProbeReport
from entropy_probe.report import BaselineSection, EntropyChangeRow, Estimate
from entropy_probe_checks.bounds import COUNTS, NOISE, OF_A_BASELINE, UNITS, bounds_of
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    inconclusive,
    needed,
    not_applicable,
    second_moment,
)


@Criterion
def entropy(report: ProbeReport) -> Finding:
    """The entropy of the policy on the E batch, in nats per token, by the Rao-Blackwell estimator.

    Below `min` the policy writes few different responses and no longer explores. Above `max` it writes almost anything,
    and no longer answers. Go back to an earlier checkpoint, and train on with a smaller learning rate, a larger group
    or another penalty.
    """
    return _held(report, "entropy")


@second_moment
def predicted_change(report: ProbeReport) -> Finding:
    """The ratio |lr·∇hᵀv|/h: the share of its entropy per token that the policy gains or loses in the next step, to
    first order.

    The next step moves the entropy further than you allow. The learning rate is too large for these moments, or the
    update has turned against the entropy. Stop before this step is taken.
    """
    return _held(report, "predicted_change")


@second_moment
def realised_ratio(report: ProbeReport) -> Finding:
    """The realised ΔH divided by the predicted ΔH at η = lr, per token. The ratio is 1 where the step is as small as
    its derivatives assume.

    The step leaves the range in which first and second order describe the entropy. Nothing can be said about this step
    before the learning rate is smaller.
    """
    return _held(report, "realised_ratio")


@Criterion
def zero_advantage(report: ProbeReport) -> Finding:
    """The share of the prompts of the U batch whose responses all have advantage 0. Such prompts add nothing to the
    update.

    Most prompts are always solved, or never, so the gradient comes from few of them. Choose other prompts, or larger
    groups.
    """
    return _held(report, "zero_advantage")


@Criterion
def adam_step(report: ProbeReport) -> Finding:
    """The difference |step of the optimizer's state − global_step of trainer_state.json|.

    Moments and weights come from different steps of the run: a file was copied from another checkpoint, or the
    optimizer was started anew.
    """
    return _held(report, "adam_step")


@second_moment
def finite_moments(report: ProbeReport) -> Finding:
    """The number of entries of the preconditioner 1/(√v̂+ε) that are not finite.

    The optimizer's second moments have overflowed. Its next step writes NaN into the weights.
    """
    return _held(report, "finite_moments")


@Criterion
def reward(report: ProbeReport) -> Finding:
    """The mean reward of the responses of the E batch.

    The policy earns less than you allow. It forgot the task or its format, or the reward is no longer computed.
    """
    return _held(report, "reward")


def _entropy(report: ProbeReport) -> Estimate:
    return report.entropy.per_token


def _predicted_change(report: ProbeReport) -> Estimate | Finding:
    """SE(a/h) ≤ (SE(a) + |a/h|·SE(h))/h, whatever their correlation."""
    if report.update is None:
        return not_applicable(str(report.no_second_moment))
    update, size, lr = report.update, report.entropy.per_token, report.update.lr
    slope, se = update.delta_h1_per_lr_per_token, update.delta_h1_per_lr_per_token_se
    crossed = update.delta_h1_per_lr_cross_per_token, update.delta_h1_per_lr_cross_per_token_se
    if crossed[0] is not None and crossed[1] is not None:
        slope, se = crossed[0], crossed[1]
    return share_of_entropy(lr * slope, lr * se, size)


def share_of_entropy(change: float, se: float, size: Estimate) -> Estimate | Finding:
    """|change|/h of a change per token, with the bound on its standard error."""
    if size.value == 0:
        return inconclusive("The entropy is 0, so it has no relative change.")
    share = abs(change) / size.value
    return Estimate(value=share, se=(se + share * size.se) / size.value)


def _realised_ratio(report: ProbeReport) -> Estimate | Finding:
    step = report.next_step
    if report.no_second_moment is not None:
        return not_applicable(report.no_second_moment)
    if step is None:
        return inconclusive("The report has no ΔH at η = lr.")
    return ratio_of_changes(step)


def ratio_of_changes(step: EntropyChangeRow) -> Estimate | Finding:
    """Realised over predicted, per token: SE((r − l·p)/p) ≤ (SE(r − p) + |1 − l|·SE(p))/|p|, at the ratio l that was
    found."""
    of = step.per_token
    if of.predicted is None or of.predicted_se is None or of.difference_se is None:
        return not_applicable(
            "With top_p < 1, nothing is predicted about π restricted to the nucleus."
        )
    if not step.reliable or of.ratio is None:
        return inconclusive(
            f"The change at η = lr is not reliable: ESS/N is {step.unclipped_ess_fraction:.2g}. "
            "Give more responses, or set true_delta_h.fallback: resample."
        )
    se = (of.difference_se + abs(1 - of.ratio) * of.predicted_se) / abs(of.predicted)
    return Estimate(value=of.ratio, se=se)


def _zero_advantage(report: ProbeReport) -> Estimate:
    """Standard error of a share that allows for NOISE²/2 more prompts of either kind, as Wilson's interval does.

    16 of 16 are not certainty: a bound that is the truth fails less than once in 4000, whatever the number of prompts.
    """
    share, count = report.update_batch.zero_advantage_fraction, report.update_batch.num_prompts
    near = (share * count + NOISE**2 / 2) / (count + NOISE**2)
    return Estimate(value=share, se=math.sqrt(near * (1 - near) / count))


def _adam_step(report: ProbeReport) -> Estimate | Finding:
    step, saved = report.checkpoint.optimizer.step, report.checkpoint.global_step
    if saved is None:
        return not_applicable("The checkpoint has no trainer_state.json with a global_step.")
    if step is None:
        return not_applicable(
            f"The optimizer is {report.checkpoint.optimizer.type}, whose state has no step."
        )
    return Estimate(value=float(abs(step - saved)), se=0.0)


def _finite_moments(report: ProbeReport) -> Estimate | Finding:
    if report.preconditioner is None:
        return not_applicable(str(report.no_second_moment))
    return Estimate(value=float(report.preconditioner.num_nonfinite), se=0.0)


def _reward(report: ProbeReport) -> Estimate:
    return Estimate(value=report.batch.mean_reward, se=needed(report.batch.mean_reward_se))


_QUANTITIES: dict[str, Callable[[ProbeReport], Estimate | Finding]] = {
    "entropy": _entropy,
    "predicted_change": _predicted_change,
    "realised_ratio": _realised_ratio,
    "zero_advantage": _zero_advantage,
    "adam_step": _adam_step,
    "finite_moments": _finite_moments,
    "reward": _reward,
}


def baseline_of(report: ProbeReport) -> BaselineSection:
    """What gates compare with, of a report that serves as baseline."""
    found = {name: quantity(report) for name, quantity in _QUANTITIES.items() if name not in COUNTS}
    return BaselineSection(
        name=report.checkpoint.name,
        fingerprint=report.checkpoint.fingerprint,
        not_chosen=report.not_chosen,
        quantities={name: value for name, value in found.items() if isinstance(value, Estimate)},
    )


@dataclass(frozen=True)
class _Held:
    """One bound: what is shown beside its limit, and how far beyond limit and noise the quantity lies."""

    key: str
    value: float
    limit: float
    beyond: float


def _held(report: ProbeReport, name: str) -> Finding:
    """The bound that is missed by most, or met by least."""
    bounds = bounds_of(report.config["limits"]).get(name)
    if bounds is None:
        return not_applicable(f"The gate is off: there is no bound under limits.{name}.")
    if (why := _not_the_users(report, name)) is not None:
        return inconclusive(why)
    found = _QUANTITIES[name](report)
    if isinstance(found, Finding):
        return found
    before = report.baseline.quantities.get(name) if report.baseline is not None else None
    of_before = "" if report.baseline is None else report.baseline.not_chosen
    if before is not None and of_before and set(bounds) & set(OF_A_BASELINE):
        return inconclusive(
            f"The baseline is {of_before}. Use a report on your own prompts and reward as baseline."
        )
    return held_against(name, found, before, bounds)


def held_against(
    name: str, found: Estimate, before: Estimate | None, bounds: Mapping[str, float]
) -> Finding:
    """A quantity against its bounds, some of which speak of what it was `before`: the one that is missed by most, or
    met by least."""
    if before is None and set(bounds) & set(OF_A_BASELINE):
        return inconclusive(
            f"The baseline has no {name}. Use a report of a larger batch as baseline."
        )
    if math.isinf(found.se) or (before is not None and math.isinf(before.se)):
        return inconclusive(f"The standard error of {name} is infinite. Give more prompts.")
    worst = max(
        _each(found, before, bounds),
        key=lambda held: math.inf if math.isnan(held.beyond) else held.beyond,
    )
    beside = "" if before is None else f", baseline {before.value:.3g} ± {before.se:.2g}"
    detail = f"[limits.{name}.{worst.key}; {name} {found.value:.3g} ± {found.se:.2g}{beside}]"
    status, unit = "pass" if worst.beyond <= 0 else "fail", UNITS.get(worst.key, "")
    return Finding(status, worst.value, worst.limit, detail, unit=unit)


def _not_the_users(report: ProbeReport, name: str) -> str | None:
    """Why a bound cannot be held, where prompts or rewards that nobody chose decide the quantity."""
    if name in COUNTS:
        return None
    if report.batch.prompts_are_builtin or report.update_batch.prompts_are_builtin:
        return "The prompts are the built-in ones, not yours. Give --probe-prompts=FILE or --probe-rollouts=FILE."
    if name != "entropy" and "stand_in" in (report.batch.reward, report.update_batch.reward):
        return "The reward is a stand-in, not yours. Name your reward under batch.reward, or give rollouts."
    return None


def _each(found: Estimate, before: Estimate | None, bounds: Mapping[str, float]) -> Iterator[_Held]:
    noise = bounds.get("noise", NOISE)
    for key, sign in (("min", -1), ("max", 1)):
        if key in bounds:
            yield _Held(
                key, found.value, bounds[key], sign * (found.value - bounds[key]) - noise * found.se
            )
    if before is None:
        return
    size, together = abs(before.value), math.hypot(found.se, before.se)
    for key, sign in (("fall", -1), ("rise", 1)):
        change = sign * (found.value - before.value)
        if key in bounds:
            moved = before.se * abs(
                1 + sign * math.copysign(bounds[key], before.value)
            )  # SE of b ∓ share·|b|
            beyond = change - bounds[key] * size - noise * math.hypot(found.se, moved)
            yield _Held(key, _in_units(change, size), bounds[key], beyond)
        if f"{key}_se" in bounds:
            limit = bounds[f"{key}_se"]
            yield _Held(f"{key}_se", _in_units(change, together), limit, change - limit * together)


def _in_units(change: float, unit: float) -> float:
    """change/unit; infinite for any change where the unit is 0."""
    if unit == 0:
        return change * math.inf if change else 0.0
    return change / unit
