"""One list of parameters, all of it reached, none of it changed."""

from __future__ import annotations

from entropy_probe import ProbeReport, Verdict
from entropy_probe_checks.criteria.verdicts import at_least, at_most, without_answer
from entropy_probe_checks.thresholds import limit_for


def _coverage(report: ProbeReport, criterion: str, value: float, norm: float) -> Verdict:
    limit = limit_for(report, criterion)
    registry = report.registry
    side = "X (entropy gradient)" if criterion == "x_coverage" else "Y (policy gradient)"
    if value < limit and norm == 0.0:
        return without_answer(
            criterion,
            "registry",
            "inconclusive",
            f"{side} is zero everywhere: within every prompt all responses have the same "
            f"{'log-probability' if criterion == 'x_coverage' else 'reward'}. Give more prompts, or others.",
            value,
            limit,
        )
    unexplained = [name for name in registry.uncovered if name not in registry.explained]
    if value < limit and not unexplained and registry.explained:
        name, reason = next(iter(registry.explained.items()))
        return without_answer(criterion, "registry", "not_applicable", f"{name}: {reason}", value, limit)
    return at_least(
        criterion,
        "registry",
        value,
        limit,
        f"{side} never reaches {', '.join(unexplained[:3])}{' …' if len(unexplained) > 3 else ''}: the forward does "
        "not use these tensors, or a part of it is detached. Freeze what is unused, or find where the graph is cut.",
    )


def x_coverage(report: ProbeReport) -> Verdict:
    """Share of trainable tensors with a non-zero gradient in X."""
    return _coverage(report, "x_coverage", report.registry.x_coverage, report.first_order.norm_x_sum)


def y_coverage(report: ProbeReport) -> Verdict:
    """Share of trainable tensors with a non-zero gradient in Y."""
    return _coverage(report, "y_coverage", report.registry.y_coverage, report.first_order.norm_y_sum)


def preconditioner_complete(report: ProbeReport) -> Verdict:
    """Trainable tensors without Adam state."""
    missing = report.preconditioner.missing
    chosen = report.config["first_order"]["missing_state"] == "identity"
    return at_most(
        "preconditioner_complete",
        "registry",
        float(len(missing)),
        limit_for(report, "preconditioner_complete"),
        f"No second moment for {', '.join(missing[:3]) or 'none'}: P is 1 there, so δH₁ is not that of Adam's step. "
        "Save the checkpoint after a step in which every parameter took part.",
        otherwise="inconclusive" if chosen else "fail",
    )


def preconditioner_finite(report: ProbeReport) -> Verdict:
    """Entries of P that are NaN or infinite."""
    return at_most(
        "preconditioner_finite",
        "registry",
        float(report.preconditioner.num_nonfinite),
        limit_for(report, "preconditioner_finite"),
        "1/(√v̂ + ε) is not finite: ε is 0 and some second moments are 0, or the moments overflowed.",
    )


def buffers_overridden(report: ProbeReport) -> Verdict:
    """Buffers that a mapping of the default path replaced."""
    names = report.integrity.buffers_overridden
    return at_most(
        "buffers_overridden",
        "registry",
        float(len(names)),
        limit_for(report, "buffers_overridden"),
        f"θ + ηv was evaluated with buffers of its own ({', '.join(names[:3])}): it differs from θ by more than ηv.",
    )


def live_model_unmodified(report: ProbeReport) -> Verdict:
    """1 if the model's checksum changed during the run."""
    changed = report.integrity.checksum_before != report.integrity.checksum_after
    return at_most(
        "live_model_unmodified",
        "registry",
        float(changed),
        limit_for(report, "live_model_unmodified"),
        "A parameter, buffer, gradient or training flag of the live model is not what it was before the run: later "
        "numbers of this run do not belong to the checkpoint.",
    )
