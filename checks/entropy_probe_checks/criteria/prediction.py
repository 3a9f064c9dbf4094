"""The update direction is the optimizer's own."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most, not_applicable
from entropy_probe_checks.thresholds import limit_for


@Criterion
def optimizer_step_cosine(report: ProbeReport) -> Finding:
    """1 − cosine between v and a step of torch's own optimizer in float64, worst over the whole and every parameter.

    v is not the direction of the optimizer's next step: a moment, a bias correction, a decay or a sign is wrong.
    Predicted and realised changes are then those of another update.
    """
    cosine = report.update.cosine_with_optimizer_step
    if cosine is None:
        return not_applicable("No step was compared.")
    return at_most(1 - cosine, limit_for(report, "optimizer_step_cosine"), detail=_where(report))


@Criterion
def optimizer_step_norm(report: ProbeReport) -> Finding:
    """|‖v‖/‖step‖ − 1| against a step of torch's own optimizer in float64, worst over the whole and every parameter.

    v is as long as another step: a bias correction, epsilon or a learning rate of a group is wrong.
    """
    ratio = report.update.norm_ratio_with_optimizer_step
    if ratio is None:
        return not_applicable("No step was compared.")
    return at_most(abs(ratio - 1), limit_for(report, "optimizer_step_norm"), detail=_where(report))


@Criterion
def curvature_witness(report: ProbeReport) -> Finding:
    """Difference between D²_v by central differences and by reverse mode twice, on two prompts, relative to its terms.

    The curvature along v, and with it η* and the second-order prediction, is not the second derivative of the entropy:
    the step of the difference is wrong for this model, or one of its derivatives is.
    """
    value = (report.witness or {}).get("curvature")
    if value is None:
        return not_applicable("An operation of the model has no second derivative.")
    return at_most(value, limit_for(report, "curvature_witness"))


def _where(report: ProbeReport) -> str:
    return f"[{report.update.worst_parameter}]" if report.update.worst_parameter else ""
