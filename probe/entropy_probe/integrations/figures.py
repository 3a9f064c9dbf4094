"""The numbers of a report under the names that trackers show: one table for the trainer's log and every tracker."""

from __future__ import annotations

from collections.abc import Callable

from entropy_probe.answer import answer, checked
from entropy_probe.report import Compared, ProbeReport

PREFIX = "probe/"
VERDICTS = {"good": 1.0, "unknown": 0.0, "bad": -1.0}
"""What `probe/verdict` is, by how the answer is to be taken: the kind that `answer` gives."""


def _change(report: ProbeReport) -> Compared | None:
    return None if report.next_step is None else report.next_step.per_token


def _change_per_response(report: ProbeReport) -> Compared | None:
    step = report.next_step
    both = () if step is None else report.compared(step)
    return both[1] if len(both) > 1 else None


def _verdict(report: ProbeReport) -> float | None:
    """`None` where nothing was judged."""
    if not report.verdicts:
        return None
    return VERDICTS[answer(report, checked(report.verdicts)).kind]


FIGURES: dict[str, tuple[str, Callable[[ProbeReport], float | None]]] = {
    "entropy": (
        "entropy per token, nats",
        lambda r: r.entropy.per_token.value,
    ),
    "entropy_se": ("its standard error", lambda r: r.entropy.per_token.se),
    "entropy_per_response": ("entropy per response, nats", lambda r: r.entropy.rb.value),
    "entropy_per_response_se": ("its standard error", lambda r: r.entropy.rb.se),
    "delta_h_predicted": (
        "change of the entropy per token by the next step as slope and curvature predict it, nats",
        lambda r: (of := _change(r)) and of.predicted,
    ),
    "delta_h_se": ("its standard error", lambda r: (of := _change(r)) and of.predicted_se),
    "delta_h_realised": (
        "the same change, measured at the parameters after the step, nats",
        lambda r: (of := _change(r)) and of.realised,
    ),
    "delta_h_realised_se": (
        "its standard error",
        lambda r: (of := _change(r)) and of.realised_se,
    ),
    "delta_h_predicted_per_response": (
        "the predicted change per response, nats",
        lambda r: (of := _change_per_response(r)) and of.predicted,
    ),
    "delta_h_predicted_per_response_se": (
        "its standard error",
        lambda r: (of := _change_per_response(r)) and of.predicted_se,
    ),
    "delta_h_realised_per_response": (
        "the realised change per response, nats",
        lambda r: (of := _change_per_response(r)) and of.realised,
    ),
    "delta_h_realised_per_response_se": (
        "its standard error",
        lambda r: (of := _change_per_response(r)) and of.realised_se,
    ),
    "momentum_share": (
        "share of the step that was decided before its batch, by momentum and weight decay",
        lambda r: r.update and r.update.momentum_share,
    ),
    "ess": (
        "effective sample size of the responses after the step, as a share of their number",
        lambda r: r.next_step and r.next_step.unclipped_ess_fraction,
    ),
    "resolves": (
        "smallest change per token that the responses can tell from noise: 2 standard errors, nats",
        lambda r: r.resolution and r.resolution.per_token,
    ),
    "reward": ("mean reward of the responses", lambda r: r.batch.mean_reward),
    "verdict": (
        "1 if all is well, 0 if that cannot be told, -1 if it is bad; absent if nothing was judged",
        _verdict,
    ),
}
"""Name without `probe/` → what it is, with its unit, and how it is read from a report. `None`: the report has none."""


def figures(report: ProbeReport) -> dict[str, float]:
    """Every figure of `FIGURES` that the report has, by its name with `probe/` before it.

    The values are the report's own, not rounded: `figures(r)["probe/entropy"] == r.entropy.per_token.value`.
    """
    found = ((name, read(report)) for name, (_, read) in FIGURES.items())
    return {PREFIX + name: float(value) for name, value in found if value is not None}
