"""One list of parameters, all of it reached, none of it changed."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import (
    Criterion,
    Finding,
    at_least,
    at_most,
    inconclusive,
    needed,
    not_applicable,
    second_moment,
)
from entropy_probe_checks.thresholds import limit_for


def _coverage(report: ProbeReport, value: float, limit: float, zero: str) -> Finding:
    registry = report.registry
    if value == 0.0 < limit:
        return inconclusive(zero, value, limit)
    unexplained = [name for name in registry.uncovered if name not in registry.explained]
    if value < limit and not unexplained and registry.explained:
        name, reason = next(iter(registry.explained.items()))
        return not_applicable(f"{name}: {reason}", value, limit)
    frozen = (
        f"[taken as frozen, because they have no Adam state: {_some(registry.taken_as_frozen)[1:]}"
    )
    return at_least(
        value, limit, detail=_some(unexplained) or (frozen if registry.taken_as_frozen else "")
    )


def _some(names: list[str]) -> str:
    return f"[{', '.join(names[:3])}{', …' if len(names) > 3 else ''}]" if names else ""


_NO_X = (
    "The gradient of the entropy is zero everywhere: all responses to a prompt have the same probability. The policy "
    "writes almost the same response each time, so it has collapsed on these prompts, and more of them do not help. "
    "Give prompts to which it responds in different ways, or take an earlier checkpoint. If you expect this, write "
    "allow_inconclusive: [x_coverage] in the configuration."
)
_NO_Y = (
    "The policy gradient is zero everywhere: all responses to a prompt have the same reward. Give prompts that are "
    "solved sometimes, and neither always nor never, or more responses to each (generation.num_return_sequences)."
)


@Criterion
def x_coverage(report: ProbeReport) -> Finding:
    """The share of trainable tensors that have a non-zero gradient in X, the gradient of the entropy.

    Some trainable tensors get no gradient: the forward pass does not use them, or a part of the graph is detached. They
    are missing from every dot product. Freeze the tensors that the model does not use, or find the place where the
    graph is cut.
    """
    return _coverage(report, report.registry.x_coverage, limit_for(report, "x_coverage"), _NO_X)


@Criterion
def y_coverage(report: ProbeReport) -> Finding:
    """The share of trainable tensors that have a non-zero gradient in Y, the policy gradient.

    Some trainable tensors get no gradient: the forward pass does not use them, or a part of the graph is detached. They
    are missing from every dot product. Freeze the tensors that the model does not use, or find the place where the
    graph is cut.
    """
    return _coverage(report, report.registry.y_coverage, limit_for(report, "y_coverage"), _NO_Y)


@second_moment
def preconditioner_complete(report: ProbeReport) -> Finding:
    """The number of trainable tensors that have no Adam state.

    No Adam state was found for these tensors. The probe sets P = 1 for them, so δH₁ is not that of Adam's step. Save
    the checkpoint after a step in which every parameter took part.
    """
    missing = needed(report.preconditioner).missing
    chosen = report.config["first_order"]["missing_state"] == "identity"
    return at_most(
        float(len(missing)),
        limit_for(report, "preconditioner_complete"),
        detail=_some(missing),
        otherwise="inconclusive" if chosen else "fail",
    )


@second_moment
def optimizer_as_saved(report: ProbeReport) -> Finding:
    """The number of tensors whose Adam state was not read, or was read with hyper-parameters that differ from those in
    the file.

    The probe did not read the optimizer as it was saved. Some state in the file was not mapped to a parameter, or a
    group's learning rate, β, ε or weight decay was not read. P and v are then those of another optimizer.
    """
    saved, read = report.checkpoint.optimizer.saved, report.checkpoint.optimizer.read
    off = {key: abs(saved.get(key, 0) - read.get(key, 0)) for key in {*saved, *read}}
    wrong = [key for key, count in off.items() if count]
    return at_most(
        float(sum(off.values())),
        limit_for(report, "optimizer_as_saved"),
        detail=_some(sorted(wrong)),
    )


@second_moment
def preconditioner_finite(report: ProbeReport) -> Finding:
    """The number of entries of P = 1/(√v̂ + ε) that are NaN or infinite.

    Either ε is 0 and some second moments are 0, or the moments have overflowed. Every dot product is then NaN.
    """
    return at_most(
        float(needed(report.preconditioner).num_nonfinite),
        limit_for(report, "preconditioner_finite"),
    )


@second_moment
def preconditioner_witness(report: ProbeReport) -> Finding:
    """The largest relative difference between P and the same factor from torch's own Adam, in float64. Torch's factor
    is found by giving its Adam a vanishing gradient.

    P is not 1/(√v̂ + ε): the bias correction, ε, the running maximum of AMSGrad or the learning rate of a group is
    wrong. U_cross and δH₁ are then wrong too.
    """
    value = needed(report.preconditioner).difference_from_torch
    if value is None:
        return not_applicable("No parameter has Adam state.")
    return at_most(value, limit_for(report, "preconditioner_witness"))


@second_moment
def moments_match(report: ProbeReport) -> Finding:
    """The evidence that two tensors of one shape hold each other's second moments, in standard errors. The pair with
    the largest evidence counts.

    The gradients of this batch look like the exp_avg_sq of another tensor. This happens when optimizer state is mapped
    to the parameters in another order; P, v, U_cross and δH₁ are then wrong. Save the optimizer with parameter names,
    or from parameters in the order of the model.
    """
    p = needed(report.preconditioner)
    if p.exchanged is None or p.exchanged_pair is None:
        return not_applicable(
            "No two tensors of one shape both have second moments and a gradient."
        )
    unseen = f"in {p.num_undecided} of {p.num_pairs} pairs an exchange would not be seen {_some(p.undecided)}"
    detail = f"[{' and '.join(p.exchanged_pair)}; {unseen.strip()}]"
    return at_most(p.exchanged, limit_for(report, "moments_match"), detail=detail)


@Criterion
def buffers_overridden(report: ProbeReport) -> Finding:
    """The number of buffers that the functional call replaced. By default it replaces parameters only.

    θ + ηv was evaluated with buffers of its own, so it differs from θ by more than ηv. Map parameters only.
    """
    names = report.integrity.buffers_overridden
    return at_most(float(len(names)), limit_for(report, "buffers_overridden"), detail=_some(names))


@Criterion
def live_model_unmodified(report: ProbeReport) -> Finding:
    """The number of modules whose checksum changed during the run. The live model and the probe's own copies of it are
    counted.

    A parameter, a buffer, a gradient or the training flag of the model is no longer what it was before the run. Later
    numbers of this run do not belong to the checkpoint. Look for code that writes into the module in place.
    """
    changed = report.integrity.checksum_before != report.integrity.checksum_after
    return at_most(
        float(changed + report.integrity.copies_modified),
        limit_for(report, "live_model_unmodified"),
    )
