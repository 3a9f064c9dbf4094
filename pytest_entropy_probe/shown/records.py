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
    spread = f"{update.spread_over_batches_per_token:.2g}"
    return f"{shared}; another update batch moves ΔH by ±{spread} nats/token"


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
    for said in resolution(report):
        lines += _wrapped(_HEADS[1], said + mark)
    if mark:
        lines += [f"δH₁  {slope}, fresh step{mark}", *_wrapped("v    ", f"{made_of}{mark}")]
    else:
        lines += [f"δH₁  {slope}, fresh gradient step, lr {update.lr:.3g} ({batches})"]
        lines += _wrapped("v    ", made_of)
    if batch.same_batch:
        lines.append("     one batch: what is realised holds the noise that the update fitted")
    return "\n".join(lines)


_HEADS = ("ΔH   ", "     ", "     ", "     ")


def _changes(report: ProbeReport, *, apart: bool) -> list[str]:
    """Realised and predicted, `apart` or on one line, per token and, where the run was asked for it, per response."""
    step = report.next_step
    assert step is not None
    said = []
    for of in report.compared(step):
        realised = f"realised {of.realised + 0.0:+.3g} ± {of.realised_se:.2g}"
        if of.predicted is None or of.predicted_se is None:
            both = [f"{realised} {of.unit}", "not predicted (top_p < 1)"]
        else:
            told = f"predicted {of.predicted + 0.0:+.3g} ± {of.predicted_se:.2g} {of.unit}"
            both = [f"{realised} {of.unit}" if apart else realised, told]
        said += both if apart else [", ".join(both)]
    return said


def resolution(report: ProbeReport) -> list[str]:
    """What the noise can tell of the predicted change, and where the run's own next step may lie."""
    of, step = report.resolution, report.next_step
    if of is None or step is None or step.predicted_per_token is None:
        return []
    resolves, size = of.per_token, abs(step.predicted_per_token)
    said = f"resolves {resolves:.2g} nats/token (2 SE)"
    if resolves > 0:
        said += f"; the predicted change is {_times(size / resolves)} that"
    if of.prompts_needed is not None and size < resolves:
        said += f": about {_rounded(of.prompts_needed)} prompts would decide"
    lines = [said]
    if of.target_se is not None:
        asked, prompts = (
            f"the SE of {of.target_se:.2g} that was asked for",
            of.looks[-1].num_prompts,
        )
        lines.append(f"{asked} was {'' if of.reached else 'not '}reached with {prompts} prompts")
    if of.next_step is not None:
        low, high = of.next_step
        lines.append(f"by another update batch: {low:+.2g} to {high:+.2g} nats/token (95 %)")
    return lines


def _times(share: float) -> str:
    return f"{share:.1f} times" if share >= 1 else f"{share:.2g} of"


def _rounded(count: int) -> str:
    """To two digits: it is a guess."""
    return f"{float(f'{count:.2g}'):,.0f}"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=head, subsequent_indent=" " * 5)
