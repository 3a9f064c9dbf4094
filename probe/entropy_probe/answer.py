"""The answer in one sentence: what the next step does to the entropy, and whether the numbers that say so are to be
believed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from entropy_probe.report import ProbeReport, Verdict

COLLAPSED = 0.02
"""Nats per token: of fifty tokens all but one are certain."""
DRASTIC = 0.1
"""The share of its entropy that no healthy step takes or adds: ten such steps leave a third, or make it two and a half
times as much."""
NEGLIGIBLE = 0.01
"""A share of the entropy that a step may move it by without a word."""

Kind = Literal["good", "unknown", "bad"]


class Checked(NamedTuple):
    """How a criterion ended, which may be a `gate`; a test of the user's own has no name."""

    name: str
    status: str
    gate: bool = False


def checked(verdicts: Iterable[Verdict]) -> list[Checked]:
    """The rows of a report that has been judged."""
    return [Checked(v.criterion, v.status, v.family == "gate") for v in verdicts]


class Answer(NamedTuple):
    """How it is to be taken, the word that says so, and the rest of the sentence."""

    kind: Kind
    word: str
    rest: str

    def __str__(self) -> str:
        return f"{self.word}: {self.rest}"


def answer(report: ProbeReport | None, rows: Sequence[Checked], state: str = "") -> Answer:
    """The first of these that holds: it was not measured; checks failed; limits of the user's are missed; prompts or
    rewards are not the user's; checks cannot tell; the policy has collapsed, or is about to; noise; all is well.

    A policy that has collapsed leaves checks open, because its responses do not differ. That comes second then.
    """
    red = [row for row in rows if row.status in ("fail", "xpass")]
    failed, limits = [row for row in red if not row.gate], [row for row in red if row.gate]
    undecided = [row for row in rows if row.status == "inconclusive"]
    passed = _passed([row for row in rows if row not in red], others=bool(limits))
    asked = [row for row in rows if row.status not in ("not_applicable", "inconclusive")]
    if report is None:
        why = state.removeprefix("checkpoint ") or "no report"
        return Answer("bad", "Not measured", f"{why.removesuffix('.')}.")
    said = _change(report)
    if failed:
        return Answer(
            "bad", "Not to be trusted", f"{_count(failed, 'check')} failed ({_names(failed)})."
        )
    if limits:
        return Answer("bad", "Beyond your limits", f"{_names(limits)}. {said.capitalised} {passed}")
    if report.not_chosen:
        rest = f"{said.text} {passed}"
        return Answer("unknown", report.not_chosen.capitalize(), rest)
    h = report.entropy.per_token.value
    dead = f"the entropy is {h:.2g} nats/token, and the policy writes almost the same every time."
    if undecided:
        count = _count(undecided, "check")
        open_ones = f"{count} could not be decided ({_names(undecided)})."
        if h < COLLAPSED:
            return Answer("bad", "Collapsed", f"{dead} {open_ones}")
        return Answer("unknown", "Cannot tell", f"{open_ones} {said.capitalised}")
    if report.update is None:
        rest = f"nothing is known of the next step: {report.no_second_moment}. {passed}"
        return Answer("unknown", "No next step", rest)
    if h < COLLAPSED:
        return Answer("bad", "Collapsed", f"{dead} {passed}")
    if not asked:
        return Answer("unknown", "Not judged", f"{said.text} {passed}")
    if all(row.gate for row in asked) and said.word not in ("Collapsing", "Exploding"):
        return Answer("good", "Within your limits", f"{said.text} {passed}")
    kinds: dict[str, Kind] = {"Healthy": "good", "Cannot tell": "unknown"}
    return Answer(kinds.get(said.word, "bad"), said.word, f"{said.text} {passed}")


class _Change(NamedTuple):
    """What is said of the change by the next step, and what that makes of the run."""

    word: str
    text: str

    @property
    def capitalised(self) -> str:
        return self.text[:1].upper() + self.text[1:]


def _change(report: ProbeReport) -> _Change:
    step, h = report.next_step, report.entropy.per_token.value
    if step is None or report.update is None:
        return _Change("Cannot tell", "nothing is known of the next step.")
    of = step.per_token
    value, se = of.realised, of.realised_se
    if not (math.isfinite(value) and math.isfinite(se)):
        return _Change("Cannot tell", "the change by the next step could not be measured.")
    if not step.reliable:
        ess = f"ESS/N {step.unclipped_ess_fraction:.2g}"
        return _Change(
            "Cannot tell", f"the next step is too large for these responses to tell ({ess})."
        )
    size = abs(value) / h if h > 0 else 0.0
    share = f"{size:.1f} times" if size >= 1 else f"{100 * size:.2g} %"
    figure = f"{abs(value):.2g} ± {se:.1g} nats/token ({share})"
    if abs(value) >= 2 * se:
        word = "Healthy"
        if size >= DRASTIC:
            word = "Collapsing" if value < 0 else "Exploding"
        way = "lowers" if value < 0 else "raises"
        return _Change(word, f"the next step {way} the entropy by {figure}.")
    most = (abs(value) + 2 * se) / h if h > 0 else 0.0
    if most <= NEGLIGIBLE:
        return _Change(
            "Healthy", f"the next step moves the entropy by less than {100 * most:.1g} %."
        )
    more, needed = "", report.resolution and report.resolution.prompts_needed
    if needed is not None:
        more = f"; about {float(f'{needed:.2g}'):,.0f} prompts would decide"
    noise = f"the change by the next step, {value:+.2g} ± {se:.1g} nats/token, is within its noise"
    return _Change("Cannot tell", f"{noise}{more}.")


def _passed(rows: Sequence[Checked], *, others: bool) -> str:
    """How many checks were made, and that they passed: it is said where no check failed; of limits, whether these are
    `others` than those that are missed."""
    asked = [row for row in rows if row.status not in ("not_applicable", "inconclusive")]
    without = len([row for row in rows if row.status == "not_applicable"])
    known = len([row for row in asked if row.status == "xfail"])
    if not asked:
        return "No check was made of these numbers."
    if all(row.gate for row in asked):
        all_of_them = "Both" if len(asked) == 2 else f"All {len(asked)}"
        held = f"{all_of_them} limits hold" if len(asked) > 1 else "The one limit holds"
        if others:
            held = f"The other {f'{len(asked)} limits hold' if len(asked) > 1 else 'limit holds'}"
        return f"{held}; whether the numbers can be trusted was not asked (-m acceptance)."
    said = f"All {len(asked)} checks passed" if len(asked) > 1 else "The one check passed"
    if known:
        said = f"{len(asked) - known} of {len(asked)} checks passed, {known} fail as expected"
    return f"{said}{f' ({without} do not apply)' if without else ''}."


def _count(rows: Sequence[Checked], what: str) -> str:
    return f"{len(rows)} {what}{'s'[: len(rows) > 1]}"


def _names(rows: Sequence[Checked]) -> str:
    names = [row.name or "a test of your own" for row in rows]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
