"""How a verdict ends a test: pass, skip with its reason, or a failure whose line 1 is `criterion: value > limit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from entropy_probe import ProbeReport, Verdict


def conclude(verdict: Verdict, *, allowed: bool) -> None:
    __tracebackhide__ = True
    if verdict.status == "pass":
        return
    if verdict.status == "not_applicable":
        pytest.skip(verdict.hint)
    head = f"{verdict.criterion}: {_comparison(verdict.value, verdict.limit)}"
    if verdict.status == "inconclusive":
        head = f"{head} (inconclusive)"
        if allowed:
            pytest.skip(f"{head}; allowed by allow_inconclusive: {verdict.hint}")
    pytest.fail(f"{head}\n{verdict.hint}", pytrace=False)


def headline(report: ProbeReport) -> str:
    """What was found: the entropy, the first-order term, and what the optimizer's next step does; within 80 columns."""
    batch, entropy, first = report.batch, report.entropy, report.first_order
    of_entropy = (
        f"H    {entropy.rb.value:.3g} ± {entropy.rb.se:.2g} nats/response, "
        f"{entropy.per_token.value:.3g} nats/token ({batch.num_prompts}×{batch.num_responses} responses)"
    )
    if first is None:
        return f"{of_entropy}\nnothing about the next step: {report.no_second_moment}"
    delta, batches = (report.two_batch, "two batches") if report.two_batch else (first, "one batch")
    if first.mode == "block":
        batches = f"{batches}, {first.num_units} blocks"
    step, unit = report.next_step, report.unit_of_change.removesuffix("/response")
    assert step is not None
    se = 0.0 if delta.delta_h1_se is None else delta.delta_h1_se
    predicted = "not predicted (top_p < 1)"
    if step.predicted is not None and step.predicted_se is not None:
        predicted = f"predicted {step.predicted + 0.0:+.3g} ± {step.predicted_se:.2g}"
    lines = (
        of_entropy,
        f"δH₁  {delta.delta_h1 + 0.0:+.3g} ± {se:.2g} nats, fresh gradient step, lr {first.lr:.3g} ({batches})",
        f"ΔH   realised {step.delta_h_rb + 0.0:+.3g} ± {step.delta_h_rb_se:.2g}, {predicted} {unit}",
    )
    warning = ("     one batch: what is realised holds the noise that the update fitted",)
    return "\n".join(lines + (warning if batch.same_batch else ()))


def number(value: float | str | None) -> str:
    """`value` as it is shown: three digits of a number, text as it is."""
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _comparison(value: float | str | None, limit: float | str | None) -> str:
    """`value > limit`, with the sign that is true; all digits where three do not tell the two apart."""
    if isinstance(value, int | float) and isinstance(limit, int | float):
        for sign, holds in ((">", value > limit), ("<", value < limit)):
            if holds:
                shown = (number(value), number(limit))
                left, right = shown if len(set(shown)) == 2 else (repr(value), repr(limit))
                return f"{left} {sign} {right}"
    return f"got {number(value)}" + ("" if limit is None else f", limit {number(limit)}")
