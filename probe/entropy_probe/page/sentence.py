"""The verdict on a checkpoint in a few sentences: what the next step does, and whether the numbers can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropy_probe.page.contents import BAD, OPEN, Checkpoint, Judged
from entropy_probe.page.shown import percent, with_se
from entropy_probe.report import ProbeReport

_NAMED = 3
_DECIDED = 2.0  # standard errors from which on a direction is named


def verdict(checkpoint: Checkpoint) -> tuple[str, str]:
    """(`good`, `open` or `bad`; the sentences)."""
    report = checkpoint.report
    if report is None:
        why = checkpoint.trouble or "the run ended before it was measured"
        return "bad", f"Nothing was measured: {why}"
    failed = [one for one in checkpoint.judged if one.status in BAD]
    gates = [one for one in failed if one.family == "gate"]
    distrusted = [one for one in failed if one.family != "gate"]
    undecided = [one for one in checkpoint.judged if one.status in OPEN]
    said = [_change(report)]
    if report.not_chosen:
        said.append(f"These are {report.not_chosen}, so that it may be otherwise on yours.")
    if distrusted:
        said.append(f"Do not rely on these numbers yet: {_named(distrusted, 'failed')}.")
    if gates:
        said.append(f"A limit that you set is crossed: {_named(gates, 'failed')}.")
    if undecided:
        said.append(f"Left open: {_named(undecided, 'could not decide')}.")
    if not failed and not undecided:
        said.append(_trust(checkpoint.judged))
    tone = "bad" if failed else "open" if undecided or not checkpoint.judged else "good"
    return tone, " ".join(said)


def verdict_of_all(checkpoints: Sequence[Checkpoint]) -> tuple[str, str]:
    """The same of several checkpoints: how many are well, and which are not."""
    by_tone: dict[str, list[str]] = {"bad": [], "open": [], "good": []}
    for checkpoint in checkpoints:
        by_tone[verdict(checkpoint)[0]].append(checkpoint.name)
    told = {
        "bad": "did not pass or could not be measured",
        "open": "stayed open",
        "good": "passed",
    }
    said = [
        f"{len(names)} {told[tone]}" + ("" if tone == "good" else f" ({_some(names)})")
        for tone, names in by_tone.items()
        if names
    ]
    tone = next((tone for tone, names in by_tone.items() if names), "open")
    return tone, f"Of {len(checkpoints)} checkpoints {', '.join(said)}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _trust(judged: Sequence[Judged]) -> str:
    passed = sum(one.status == "pass" for one in judged)
    if not passed:
        return "No criterion was asked, so that nothing says whether these numbers can be trusted."
    if all(one.family == "gate" for one in judged):
        return f"All {passed} of your gates pass; the acceptance suite was not asked."
    return f"The numbers can be trusted: all {passed} criteria that could be asked pass."


def _change(report: ProbeReport) -> str:
    h = report.entropy.per_token
    own = f"The policy has {with_se(h.value, h.se)} nats of entropy per token"
    step = report.next_step
    if step is None:
        return f"{own}. Nothing can be said about the next step: {report.no_second_moment}."
    value, se = step.realised_per_token
    of_h = f", {percent(value / h.value, signed=True)} of the entropy" if h.value else ""
    amount = f"{with_se(value, se, signed=True)} nats per token"
    if not math.isfinite(value) or not math.isfinite(se):
        return f"The change by the next step could not be measured ({amount}). {own}."
    if not step.reliable:
        said = f"The next step is too large for this batch to tell what it does ({amount}"
        return f"{said}; ESS/N {step.unclipped_ess_fraction:.2f}). {own}."
    if abs(value) <= _DECIDED * se:
        return f"The next step changes the entropy by less than this batch can resolve: {amount}. {own}."
    does = "lowers" if value < 0 else "raises"
    size = with_se(abs(value), se)
    return f"The next step {does} the entropy by {size} nats per token{of_h}. {own}."


def _named(found: Sequence[Judged], what: str) -> str:
    names = _some([one.name for one in found])
    noun = "gate" if all(one.family == "gate" for one in found) else "criterion"
    plural = {"gate": "gates", "criterion": "criteria"}[noun] if len(found) > 1 else noun
    return f"{len(found)} {plural} {what} ({names})"
