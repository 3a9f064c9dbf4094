"""The first screen of a run, and the sentence on it: what stands there, for whom, at 80 columns and more."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from entropy_probe import ProbeReport
from entropy_probe.answer import Answer, Checked, answer
from entropy_probe.page.contents import Checkpoint
from pages import UNLOADED
from pytest_entropy_probe.shown import screen
from pytest_entropy_probe.shown.records import headline
from pytest_entropy_probe.shown.tables import Row

SCREENS = Path(__file__).parent / "screens"
GOOD = [
    Checked("a", "pass"),
    Checked("b", "pass"),
    Checked("c", "not_applicable"),
    Checked("entropy", "pass", gate=True),
]


class Terminal:
    """What is written, and in which colours."""

    hasmarkup = False

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.markup: list[dict[str, bool]] = []

    def write_line(self, line: str, **markup: bool) -> None:
        self.lines.append(line)
        self.markup.append(markup)


def rows_of(checkpoint: Checkpoint) -> list[Row]:
    return [
        Row(
            checkpoint.name,
            one.name,
            one.status,
            one.value,
            one.limit,
            f"{one.name}: found\n{one.hint}" if one.status in ("fail", "inconclusive") else "",
            noisy=one.family == "gate",
            family=one.family,
        )
        for one in checkpoint.judged
    ]


def shown(checkpoint: Checkpoint, **options: Any) -> Terminal:
    terminal, rows, report = Terminal(), rows_of(checkpoint), checkpoint.report
    said = answer(report, [Checked(row.criterion, row.status, row.noisy) for row in rows], checkpoint.trouble)
    found = "" if report is None else headline(report)
    screen.show(terminal, checkpoint.name, said, found, rows, **options)
    return terminal


def with_section(report: ProbeReport, section: str, **values: Any) -> ProbeReport:
    return report.model_copy(update={section: getattr(report, section).model_copy(update=values)})


def broken(checkpoint: Checkpoint) -> Checkpoint:
    """The same, but one criterion failed."""
    judged = [replace(one, status="fail") if one.name == "slope_identity" else one for one in checkpoint.judged]
    return replace(checkpoint, judged=judged)


def unchosen(checkpoint: Checkpoint) -> Checkpoint:
    report = checkpoint.report
    assert report is not None
    builtin = with_section(with_section(report, "batch", prompts_are_builtin=True), "batch", reward="stand_in")
    return replace(checkpoint, report=builtin)


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("name", ["healthy", "noisy", "collapsing", "failed", "unloaded", "unchosen"])
def test_the_first_screen(three: list[Checkpoint], name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and paths aside, as in the folder `screens`, whatever the width; no line above 80 columns."""
    monkeypatch.setenv("COLUMNS", columns)
    healthy, noisy, collapsing = three
    checkpoint = {
        "healthy": healthy,
        "noisy": noisy,
        "collapsing": collapsing,
        "failed": broken(healthy),
        "unloaded": UNLOADED,
        "unchosen": unchosen(healthy),
    }[name]
    lines = shown(checkpoint).lines
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"[-+−]?\d[\d.,]*(e[-+]\d+)?", "#", re.sub(r"[│╭╮╰╯─┬┴┼├┤]+", "", text))
    text = re.sub(r" +", " ", re.sub(r"(?<= )/\S+/", "", text)) + "\n"
    file = SCREENS / f"{name}.txt"
    if os.environ.get("SCREENS_WRITTEN_ANEW"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_all_rows_stand_under_v_and_colours_tell_the_kind(three: list[Checkpoint]) -> None:
    healthy, noisy, collapsing = three
    kinds = [shown(one).markup[0] for one in (healthy, noisy, collapsing)]
    assert kinds == [{"bold": True, of: True} for of in ("green", "yellow", "red")]
    few, all_of_them = ("\n".join(shown(healthy, verbose=verbose).lines) for verbose in (False, True))
    for one in healthy.judged:
        assert (f"│ {one.name} " in few) == (one.status not in ("pass", "not_applicable"))
        assert f"│ {one.name} " in all_of_them


def said(report: ProbeReport, rows: list[Checked] = GOOD) -> Answer:
    return answer(report, rows)


def test_the_answer_says_what_holds_first(three: list[Checkpoint]) -> None:
    report = three[0].report
    assert report is not None
    red, limit = Checked("x", "fail"), Checked("entropy", "fail", gate=True)
    undecided = Checked("ess", "inconclusive")
    assert said(report).word == "Healthy"
    assert said(report).rest.endswith(" All 3 checks passed (1 do not apply).")
    assert str(said(report, [red, limit, undecided, *GOOD])) == "Not to be trusted: 1 check failed (x)."
    assert said(report, [limit, undecided, *GOOD]).word == "Beyond your limits"
    assert said(report, [limit, GOOD[-1]]).rest.endswith(
        "The other limit holds; whether the numbers can be trusted was not asked (-m acceptance)."
    )
    assert "The other 2 limits hold; " in said(report, [limit, GOOD[-1], GOOD[-1]]).rest
    assert said(with_section(report, "batch", prompts_are_builtin=True), [undecided]).word == "Not your prompts"
    assert str(said(report, [undecided, *GOOD])).startswith("Cannot tell: 1 check could not be decided (ess). The next")
    assert said(report, []).word == "Not judged"
    assert said(report, [GOOD[-1]]).word == "Within your limits"
    assert said(report, [Checked("a", "xfail"), *GOOD]).rest.endswith(
        "3 of 4 checks passed, 1 fail as expected (1 do not apply)."
    )
    dead = with_section(report, "entropy", per_token=report.entropy.per_token.model_copy(update={"value": 0.0038}))
    assert str(said(dead, [undecided, *GOOD])) == (
        "Collapsed: the entropy is 0.0038 nats/token, and the policy writes almost the same every time. "
        "1 check could not be decided (ess)."
    )
    assert said(dead, [red, undecided]).word == "Not to be trusted"
    assert str(answer(None, [], "checkpoint not loaded")) == "Not measured: not loaded."
    six = [Checked(f"c{n}", "fail") for n in range(6)]
    assert str(said(report, six)) == "Not to be trusted: 6 checks failed (c0, c1, c2, c3 and 2 more)."


@pytest.mark.parametrize(
    ("h", "value", "se", "word", "text"),
    [
        (1.0, -0.05, 0.01, "Healthy", "lowers the entropy by 0.05 ± 0.01 nats/token (5 %)."),
        (1.0, 0.05, 0.01, "Healthy", "raises the entropy by 0.05 ± 0.01 nats/token (5 %)."),
        (1.0, -0.11, 0.01, "Collapsing", "lowers the entropy by 0.11"),
        (1.0, 0.11, 0.01, "Exploding", "raises the entropy by 0.11"),
        (1.0, -2.0, 0.01, "Collapsing", "(2.0 times)"),
        (
            1.0,
            0.019,
            0.01,
            "Cannot tell",
            "+0.019 ± 0.01 nats/token, is within its noise; about 18 prompts would decide.",
        ),
        (1.0, 0.002, 0.003, "Healthy", "moves the entropy by less than 0.8 %."),
        (1.0, math.nan, 0.01, "Cannot tell", "could not be measured"),
        (1.0, 0.01, math.inf, "Cannot tell", "could not be measured"),
        (0.019, -0.001, 0.0001, "Collapsed", "the entropy is 0.019 nats/token"),
    ],
)
def test_what_the_change_is_called(
    three: list[Checkpoint], h: float, value: float, se: float, word: str, text: str
) -> None:
    report = three[0].report
    assert report is not None
    change = {"delta_h_per_token_pd": value, "delta_h_per_token_pd_se": se, "reliable": True}
    rows = [row.model_copy(update=change) for row in report.entropy_change]
    report = with_section(report, "entropy", per_token=report.entropy.per_token.model_copy(update={"value": h}))
    report = with_section(report, "resolution", prompts_needed=18).model_copy(update={"entropy_change": rows})
    found = said(report)
    assert found.word == word
    assert text in found.rest
    gates_alone = said(report, [GOOD[-1]]).word
    assert gates_alone == (word if word in ("Collapsing", "Exploding", "Collapsed") else "Within your limits")
    assert found.kind == {"Healthy": "good", "Cannot tell": "unknown"}.get(word, "bad")


def test_a_remark_says_of_which_batch_it_is(three: list[Checkpoint]) -> None:
    report = three[0].report
    assert report is not None
    odd = with_section(report, "batch", found=["of both", "of the first"])
    odd = with_section(odd, "update_batch", found=["of the second", "of both"])
    assert odd.doubts[-3:] == ["of both", "entropy batch: of the first", "update batch: of the second"]
    one = with_section(odd, "update_batch", found=["of both"], same_batch=True)
    assert one.doubts[-2:] == ["of both", "of the first"]


@pytest.mark.parametrize(
    ("changed", "told", "promised"),
    [
        ({"reliable": True, "method": "snis"}, "after the step", True),
        ({"reliable": False, "method": "snis"}, "after the step: too few, not reliable", False),
        ({"reliable": True, "method": "resample"}, "after the step, so the change is measured on fresh ones", False),
    ],
)
def test_no_number_of_prompts_is_promised_for_a_step_too_large(
    three: list[Checkpoint], changed: dict[str, Any], told: str, promised: bool
) -> None:
    report = three[0].report
    assert report is not None
    rows = [row.model_copy(update=changed) for row in report.entropy_change]
    resolution = report.resolution
    assert resolution is not None
    resolution = resolution.model_copy(update={"per_token": 1e3, "prompts_needed": 18})
    text = " ".join(headline(report.model_copy(update={"entropy_change": rows, "resolution": resolution})).split())
    assert re.search(rf"of the responses still count {told} recipe ", text)
    assert ("about 18 prompts would decide" in text) == promised


def test_a_step_that_is_too_large_is_called_so(three: list[Checkpoint]) -> None:
    report = three[0].report
    assert report is not None
    rows = [row.model_copy(update={"reliable": False, "unclipped_ess_fraction": 0.11}) for row in report.entropy_change]
    found = said(report.model_copy(update={"entropy_change": rows}))
    assert found.rest.startswith("the next step is too large for these responses to tell (ESS/N 0.11).")
