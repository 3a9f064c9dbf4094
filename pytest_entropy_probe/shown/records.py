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


def headline(report: ProbeReport) -> str:
    """What must be known first, then what was found: the entropy, its change by the optimizer's next step, what the
    noise resolves, what the step is made of, and on which responses. Within 80 columns, but for the first; what depends
    on prompts or rewards that nobody chose says so in every figure.
    """
    entropy, mark = report.entropy, f" ({report.not_chosen})" if report.not_chosen else ""
    per_token = f"{entropy.per_token.value:.3g} ± {entropy.per_token.se:.2g} nats/token"
    per_response = f"{entropy.rb.value:.3g} ± {entropy.rb.se:.2g} nats/response"
    apart = bool(mark)  # each figure on a line of its own
    of_entropy = [per_token, per_response] if apart else [f"{per_token}, {per_response}"]
    lines = [FIRST + doubt for doubt in report.doubts]
    lines += _block("entropy", [f"{figure}{mark}" for figure in of_entropy])
    delta, update = report.two_batch or report.first_order, report.update
    if update is None or delta is None:
        lines += _block("change", [f"nothing about the next step: {report.no_second_moment}"])
    else:
        lines += _block("change", [f"{change}{mark}" for change in _changes(report, apart=apart)])
        if report.batch.same_batch:
            warning = "one batch served for both: the realised change has the noise that the update fitted"
            lines += _block("", [warning])
        lines += _block("resolves", [f"{said}{mark}" for said in resolution(report)])
        lines += _block("step", [f"{_made_of(update)}{mark}"])
        se = "" if delta.delta_h1_se is None else f" ± {delta.delta_h1_se:.2g}"
        batches = "two batches" if report.two_batch else "one batch"
        if report.first_order is not None and report.first_order.mode == "block":
            batches = f"{batches}, {report.first_order.num_units} blocks"
        slope = f"{delta.delta_h1 + 0.0:+.3g}{se} nats/response"
        by = f"by a fresh gradient step alone, lr {update.lr:.3g} ({batches})"
        lines += _block("gradient", [f"{slope} {by}{mark}"])
    return "\n".join([*lines, *_made_on(report)])


def _made_on(report: ProbeReport) -> list[str]:
    """On which responses, with which weights, and whose update."""
    batch, step = report.batch, report.next_step
    rows = f"{batch.num_prompts}, with {batch.num_responses} responses to each"
    given = batch.given if batch.given != "sampled" else "sampled"
    if batch.prompts_are_builtin:
        given = f"{given} from the built-in {report.config['batch']['dataset']}"
    lines = _block("prompts", [f"{rows}, {given}; reward {batch.reward}"])
    if step is not None:
        ess = f"{step.unclipped_ess_fraction:.2f} of the responses still count after the step"
        fresh = step.method == "resample"
        doubt = ", so the change is measured on fresh ones" if fresh else ": too few, not reliable"
        lines += _block("ESS", [ess + (doubt if fresh or not step.reliable else "")])
    return lines + _block("recipe", report.recipe.lines()[:1])


_LABEL = 9


def _block(label: str, said: list[str]) -> list[str]:
    """A label, and the lines that it stands before."""
    heads = [label.ljust(_LABEL)] + [" " * _LABEL] * (len(said) - 1)
    wrapped = zip(heads, said, strict=True) if said else ()
    return [line for head, text in wrapped for line in _wrapped(head, text)]


def _made_of(update: UpdateSection) -> str:
    """How much of the step its own batch decides."""
    shared = f"{update.momentum_share:.0%} momentum and decay"
    if update.spread_over_batches_per_token is None:
        return f"{shared}, the rest from one prompt"
    spread = f"{update.spread_over_batches_per_token:.2g}"
    return f"{shared}; another update batch moves the change by ±{spread} nats/token"


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
    said = f"{resolves:.2g} nats/token (2 standard errors)"
    if resolves > 0:
        said += f"; the predicted change is {_times(size / resolves)} that"
    enough = (
        step.reliable and step.method != "resample"
    )  # no number of prompts helps a step too large
    if of.prompts_needed is not None and size < resolves and enough:
        said += f": about {_rounded(of.prompts_needed)} prompts would decide"
    lines = [said]
    if of.target_se is not None:
        asked, prompts = (
            f"the standard error of {of.target_se:.2g} that was asked for",
            of.looks[-1].num_prompts,
        )
        lines.append(f"{asked} was {'' if of.reached else 'not '}reached with {prompts} prompts")
    if of.next_step is not None:
        low, high = of.next_step
        lines.append(f"with another update batch: {low:+.2g} to {high:+.2g} nats/token (95 %)")
    return lines


def _times(share: float) -> str:
    return f"{share:.1f} times" if share >= 1 else f"{share:.2g} of"


def _rounded(count: int) -> str:
    """To two digits: it is a guess."""
    return f"{float(f'{count:.2g}'):,.0f}"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        80,
        initial_indent=head,
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )
