"""What a test says of its checkpoint, as properties of its report, and how they are read again.

Properties are plain builtins: they go to JUnit files, and from xdist's workers to their
controller.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.subject import Subject

if TYPE_CHECKING:
    from entropy_probe import ProbeReport, Verdict
    from entropy_probe.report import UpdateSection

FIRST = "!    "
"""A line that begins so is read before any figure."""
_OF_A_VERDICT = ("criterion", "family", "status", "value", "limit", "unit")


def record(
    request: pytest.FixtureRequest,
    subject: Subject,
    verdict: Verdict | None = None,
) -> None:
    """Put the verdict into the test's properties.

    What was found, in words, goes with the first test that has it.
    """
    found: dict[str, Any] = {"checkpoint": subject.name, "state": subject.state}
    if subject.report is not None and not subject.headline_was_recorded:
        subject.headline_was_recorded = True
        found["headline"] = headline(subject.report)
    if verdict is not None:
        found |= {key: getattr(verdict, key) for key in _OF_A_VERDICT}
        found["unseen"] = verdict.unseen or None
    for key, value in found.items():
        if value is not None and value != "":
            plain = float(value) if isinstance(value, int | float) else value
            request.node.user_properties.append((f"probe_{key}", plain))


def records_of(report: pytest.TestReport) -> list[dict[str, Any]]:
    """What the test recorded, one table a verdict: each begins with the checkpoint."""
    records: list[dict[str, Any]] = []
    for key, value in report.user_properties:
        if key == "probe_checkpoint":
            records.append({})
        if key.startswith("probe_") and records:
            records[-1][key] = value
    return records


def _made_of(update: UpdateSection) -> str:
    """How much of the step its own batch decides."""
    shared = f"{update.momentum_share:.0%} momentum and decay"
    if update.spread_over_batches is None:
        return f"{shared}, the rest from one prompt"
    spread = f"{update.spread_over_batches:.2g}"
    return f"{shared}; another update batch moves ΔH by ±{spread} nats"


def headline(report: ProbeReport) -> str:
    """What must be known first, then what was found: the entropy, the first-order term, and what the optimizer's next
    step does. Within 80 columns, but for the first; what depends on prompts or rewards that nobody chose says so on
    its own line.
    """
    batch, entropy, update = report.batch, report.entropy, report.update
    lines = [FIRST + doubt for doubt in report.doubts]
    mark = f" ({report.not_chosen})" if report.not_chosen else ""
    responses = f"({batch.num_prompts}×{batch.num_responses} responses)"
    per_token = f"{entropy.per_token.value:.3g} ± {entropy.per_token.se:.2g} nats/token"
    per_response = f"{entropy.rb.value:.3g} ± {entropy.rb.se:.2g} nats/response"
    if mark:  # each figure on a line of its own
        lines += [f"H    {per_token}{mark}", f"     {per_response}{mark}"]
    else:
        lines.append(f"H    {per_token}, {per_response} {responses}")
    delta = report.two_batch or report.first_order
    if update is None or delta is None:
        return "\n".join([*lines, f"nothing about the next step: {report.no_second_moment}"])
    batches = "two batches" if report.two_batch else "one batch"
    if report.first_order is not None and report.first_order.mode == "block":
        batches = f"{batches}, {report.first_order.num_units} blocks"
    se = "" if delta.delta_h1_se is None else f" ± {delta.delta_h1_se:.2g}"
    slope, made_of = f"{delta.delta_h1 + 0.0:+.3g}{se} nats", _made_of(update)
    changes = zip(_HEADS, _changes(report, apart=bool(mark)), strict=False)
    lines += [f"{head}{change}{mark}" for head, change in changes]
    if mark:
        lines += [f"δH₁  {slope}, fresh step{mark}", *_wrapped("v    ", f"{made_of}{mark}")]
    else:
        lines += [f"δH₁  {slope}, fresh gradient step, lr {update.lr:.3g} ({batches})"]
        lines += [f"v    {made_of}"]
    if batch.same_batch:
        lines.append("     one batch: what is realised holds the noise that the update fitted")
    return "\n".join(lines)


_HEADS = ("ΔH   ", "     ", "     ", "     ")


def _changes(report: ProbeReport, *, apart: bool) -> list[str]:
    """Realised and predicted, `apart` or on one line, per token and, where the run was asked for it, per response."""
    step = report.next_step
    assert step is not None
    tokens = (*step.realised_per_token, step.predicted_per_token, step.predicted_per_token_se)
    pairs = [(*tokens, "nats/token")]
    if report.config["true_delta_h"]["normalize"] == "per_sequence":
        pairs.append((*step.realised, step.predicted, step.predicted_se, "nats/response"))
    said = []
    for value, se, predicted, predicted_se, unit in pairs:
        realised = f"realised {value + 0.0:+.3g} ± {se:.2g}"
        if predicted is None or predicted_se is None:
            why = "top_p < 1" if step.restricted else "one batch"
            both = [f"{realised} {unit}", f"not predicted ({why})"]
        else:
            told = f"predicted {predicted + 0.0:+.3g} ± {predicted_se:.2g} {unit}"
            both = [f"{realised} {unit}" if apart else realised, told]
        said += both if apart else [", ".join(both)]
    return said


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=head, subsequent_indent=" " * 5)
