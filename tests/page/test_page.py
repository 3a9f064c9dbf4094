"""The page: what stands on it, held against the report, slow loops and a parser of HTML."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entropy_probe import ProbeConfig, ProbeError, ProbeReport
from entropy_probe.__main__ import main
from entropy_probe.evidence import Evidence, evidence_file
from entropy_probe.page import writing
from entropy_probe.page.contents import Checkpoint
from entropy_probe.page.conventions import TOKENS, conventions
from entropy_probe.page.details import contributions, details_of
from entropy_probe.page.sentence import verdict
from entropy_probe.page.shown import number, percent, with_se
from entropy_probe.page.writing import figures_block, page_of, write_page
from entropy_probe.report import EntropySection, Estimate
from entropy_probe_checks import playbook
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.shown import explained, judged
from pages import HOSTILE, UNLOADED, Page
from pytest_entropy_probe.names import FLAGS, OPTIONS, option

EXACT = {"rel": 1e-12, "abs": 1e-15}
"""Sums of a few hundred numbers of one sign, in another order."""


@pytest.fixture(scope="module")
def text(three: list[Checkpoint]) -> str:
    return page_of([*three, UNLOADED])


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_is_one_file_that_asks_for_nothing(text: str, page: Page) -> None:
    assert len(text.encode()) < 3_000_000
    assert page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "embed", "base", "form")] == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            address = attributes.get(name, "#")
            assert address.startswith("#") or (tag, address) == ("link", "data:,"), (tag, address)
            assert address in ("#", "data:,") or address[1:] in page.ids
        assert not [name for name in attributes if name.startswith("on")]
        for name in re.findall(r"url\(([^)]*)\)", " ".join(attributes.values())):
            assert name.startswith("#")
            assert name[1:] in page.ids
        for name in ("aria-labelledby",):
            assert all(of in page.ids for of in attributes.get(name, "").split())
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    (policy,) = (meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy.partition("script-src")[2]


def test_texts_of_users_are_text(text: str, page: Page, three: list[Checkpoint]) -> None:
    """A prompt, the name of a checkpoint, a hint: wherever they stand."""
    assert HOSTILE in page.text
    assert "<b>unloaded" in page.text
    assert len(page.of("script")) == 1
    assert text.count("<script>") == text.count("</script>") == 1
    shown = replace(three[0].judged[0], status="fail", hint=HOSTILE, unit=HOSTILE, value=HOSTILE)
    report = three[0].report
    assert report is not None
    recipe = report.recipe.model_copy(update={"source": HOSTILE, "not_reproduced": [HOSTILE]})
    other = report.model_copy(update={"recipe": recipe, "environment": {HOSTILE: HOSTILE}})
    hostile = Checkpoint(HOSTILE, HOSTILE, 1, other, None, [shown], notes=[HOSTILE])
    again = Page(page_of([hostile, replace(UNLOADED, trouble=HOSTILE)], title=HOSTILE))
    assert (again.faults, again.of("img"), len(again.of("script"))) == ([], [], 1)
    assert again.text.count(HOSTILE) >= 9


def test_a_name_that_is_not_utf_8_is_written(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", [replace(UNLOADED, name="ckpt\udcff", trouble="ckpt\udcff: is missing")])
    assert "ckpt\\udcff: is missing" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_every_figure_is_named_and_described(page: Page, three: list[Checkpoint]) -> None:
    drawings = page.of("svg")
    # eight of each checkpoint that was measured, two over the steps
    assert len(drawings) == len(page.of("figure")) == 8 * len(three) + 2
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", drawing["viewbox"])
    for tag in ("title", "desc"):
        said = [data for of, data in page.texts if of == tag]
        assert len([line for line in said if len(line) > 5]) >= len(drawings)
    tables = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#010101")
    assert not [style for _, a in page.elements for style in a.values() if style.lower() in tables]


def test_every_criterion_is_explained(page: Page, three: list[Checkpoint]) -> None:
    for checkpoint in three:
        names = {one.name for one in checkpoint.judged}
        assert names >= set(CRITERIA)
        for one in checkpoint.judged:
            assert " ".join(one.measures.replace("`", "").split()) in page.text
    badges = [attributes["class"] for attributes in page.of("span") if "badge" in attributes.get("class", "")]
    assert {"badge pass", "badge fail", "badge inconclusive", "badge not_applicable"} <= set(badges)


def test_the_first_screen(three: list[Checkpoint]) -> None:
    """Per token first; and what is said follows from the report."""
    for checkpoint in three:
        report = checkpoint.report
        assert report is not None
        step = report.next_step
        assert step is not None
        (_, realised, unit), (_, predicted, _), *_ = figures_block(report)
        assert realised == with_se(*step.realised_per_token, signed=True)
        assert predicted == with_se(step.predicted_per_token, step.predicted_per_token_se, signed=True)
        assert unit == "nats/token"
    tones = [verdict(one)[0] for one in three]
    assert tones == ["good", "open", "bad"]
    assert verdict(UNLOADED) == ("bad", f"Not measured: {UNLOADED.trouble}.")


def test_without_adam_and_without_evidence(three: list[Checkpoint]) -> None:
    """What is not there is said in a line, and all else stands."""
    report = three[0].report
    assert report is not None
    optimizer = report.checkpoint.optimizer.model_copy(update={"no_second_moment": "the optimizer is SGD"})
    without = {"update": None, "first_order": None, "two_batch": None, "preconditioner": None, "entropy_change": []}
    checkpoint = report.checkpoint.model_copy(update={"optimizer": optimizer})
    other = report.model_copy(update={**without, "checkpoint": checkpoint}).with_evidence(None)
    assert details_of(other) is None
    shown = Page(page_of([Checkpoint("sgd", "", None, other)]))
    assert shown.faults == shown.of("svg") == []
    assert "nothing is known of the next step: the optimizer is SGD." in shown.text
    assert "need the evidence of the run: entropy-probe report" in shown.text


def test_what_nobody_chose_is_beside_every_figure(three: list[Checkpoint]) -> None:
    report = three[0].report
    assert report is not None
    batch = report.batch.model_copy(update={"prompts_are_builtin": True})
    chosen = replace(three[0], report=report.model_copy(update={"batch": batch}))
    shown = Page(page_of([chosen, UNLOADED]))
    mark = "not your prompts"
    tiles = figures_block(chosen.report)  # pyright: ignore[reportArgumentType]
    assert all(mark in unit for what, _, unit in tiles if "ΔH" in what or "H" in what.split(","))
    drawings = len(shown.of("svg"))
    assert drawings == 8
    # every figure's description and caption, four tiles, a note, a mark of the table, two captions
    assert shown.text.count(mark) >= 2 * drawings + 7
    assert verdict(chosen)[1].startswith("Not your prompts: ")


def test_the_entropy_audit_by_slow_loops() -> None:
    """On batches that are drawn: some responses end, some do not, one is not there, and one is its EOS alone."""
    for seed in range(6):
        report, evidence = drawn_evidence(seed, top_p=0.9 if seed % 2 else 1.0)
        found = conventions(report, evidence)
        names = ["full", "sampled"] + (["full_q", "sampled_q"] if seed % 2 else [])
        assert [row["estimator"] for row in found["rows"]] == names
        for row in found["rows"]:
            for which in TOKENS:
                slow = slow_averages(evidence, row["estimator"], which)
                for average, value in row["values"][which].items():
                    assert value == pytest.approx(slow[average], **EXACT), (row["estimator"], which, average)


def test_the_entropy_audit_has_the_figures_of_the_report(three: list[Checkpoint]) -> None:
    for checkpoint in three:
        report, details = checkpoint.report, checkpoint.details
        assert report is not None
        assert details is not None
        full, sampled = (row["values"]["all"] for row in details["conventions"]["rows"])
        assert full["per_token"] == pytest.approx(report.entropy.per_token.value, **EXACT)
        assert full["sum"] == pytest.approx(report.entropy.rb.value, **EXACT)
        assert sampled["sum"] == pytest.approx(report.entropy.naive.value, **EXACT)


def test_the_parts_of_responses_add_up_to_the_slope(three: list[Checkpoint]) -> None:
    for checkpoint in three:
        report, details = checkpoint.report, checkpoint.details
        assert report is not None
        assert report.update is not None
        assert report.evidence is not None
        assert details is not None
        of_all = contributions(report.evidence)
        assert of_all is not None
        size = float(np.abs(of_all).sum())
        assert of_all.sum() == pytest.approx(report.update.estimators["rb_hk"].value, rel=0, abs=1e-12 * size)
        arrays = report.evidence.arrays
        for row in details["responses"]:
            n, g = row["prompt"], row["response"]
            part = 0.0
            for t in range(row["tokens"]):
                later = sum(float(arrays["e.entropy"][n, g, k]) for k in range(t + 1, row["tokens"]))
                part += arrays["e.d_entropy"][n, g, t] + later * arrays["e.d_logp"][n, g, t]
            moved = report.update.lr * part / of_all.size
            assert row["moved"] == pytest.approx(moved, rel=1e-9, abs=1e-14 * report.update.lr * size)
            assert row["share"] == pytest.approx(moved / (report.update.lr * size), rel=1e-9, abs=1e-14)
            assert row["reward"] == arrays["e.rewards"][n, g]
        shares = [abs(row["share"]) for row in details["responses"]]
        assert shares == sorted(shares, reverse=True)
        assert len(shares) == min(40, details["num_responses"])
        fresh = {row["unit"]: row["moved"] for row in details["prompts"]}
        lr = report.update.lr
        assert fresh == {u: lr * slope for u, slope in enumerate(report.update.slope_by_unit)}


def test_entropy_over_tokens_and_positions_by_slow_loops() -> None:
    report, evidence = drawn_evidence(3)
    details = details_of(report.with_evidence(evidence))
    assert details is not None
    tokens = sorted((h for _, _, _, h in tokens_of(evidence, "full")), reverse=True)
    assert details["tokens"]["count"] == len(tokens)
    assert sum(details["tokens"]["shares"]) == pytest.approx(1.0)
    for low, high, share in zip(
        details["tokens"]["edges"], details["tokens"]["edges"][1:], details["tokens"]["shares"], strict=False
    ):
        last = high == details["tokens"]["edges"][-1]
        assert share == pytest.approx(sum(low <= h < high or (last and h == high) for h in tokens) / len(tokens))
    fifth = round(len(tokens) / 5)
    assert details["tokens"]["carried"] == pytest.approx(sum(tokens[:fifth]) / sum(tokens))
    places = details["positions"]
    for at, mean, count in zip(places["at"], places["mean"], places["count"], strict=True):
        own = [h for _, _, t, h in tokens_of(evidence, "full") if t == at - 1]
        assert mean == pytest.approx(sum(own) / len(own))
        assert count == len(own)


def drawn_evidence(seed: int, top_p: float = 1.0) -> tuple[Any, Evidence]:
    """Random scores of 3 prompts with 4 responses, as a run writes them: 0 past the end."""
    generator = np.random.default_rng(seed)
    prompts, group, steps, eos = 3, 4, 7, 9
    lengths = generator.integers(1, steps + 1, prompts * group)
    lengths[5], lengths[6] = 0, 1
    starts = generator.integers(1, 4, prompts * group)
    ids = generator.integers(10, 30, (prompts * group, 4 + steps))
    for row in range(prompts * group):
        if lengths[row] and (row == 6 or generator.random() < 0.6):
            ids[row, starts[row] + lengths[row] - 1] = eos
    there = np.arange(steps) < lengths.reshape(prompts, group, 1)
    scores = {
        name: np.where(there, sign * generator.random((prompts, group, steps)), 0.0)
        for name, sign in (("entropy", 1), ("entropy_q", 1), ("logp", -1), ("logq", -1))
    }
    arrays = {f"e.{name}": values for name, values in scores.items()}
    arrays |= {"e.gen_lens": lengths, "e.prompt_lens": starts, "e.ids": ids}
    arrays |= {"e.rewards": np.zeros((prompts, group)), "e.advantages": np.zeros((prompts, group))}
    facts = {"eos": [eos], "etas": [], "texts": None}
    config = {"generation": {"top_p": top_p, "temperature": 0.7}}
    h = float(scores["entropy"].sum() / lengths.sum())
    none = Estimate(value=0.0, se=0.0)
    section = EntropySection(
        naive=none,
        rb=none,
        rb_q=none,
        surprise=none,
        per_token=Estimate(value=h, se=0.0),
        rb_by_prompt=[],
        per_token_by_prompt=[],
        surprises=0,
    )
    return ProbeReport.model_construct(config=config, update=None, entropy=section), Evidence(arrays, facts)


def tokens_of(evidence: Evidence, estimator: str) -> list[tuple[int, bool, int, float]]:
    """(row, whether it is the EOS, position, term) of every token of the batch."""
    name = {"full": "entropy", "sampled": "logp", "full_q": "entropy_q", "sampled_q": "logq"}[estimator]
    sign, arrays, found = -1 if "sampled" in estimator else 1, evidence.arrays, []
    terms = arrays[f"e.{name}"].reshape(-1, arrays["e.entropy"].shape[2])
    for row in range(len(terms)):
        for t in range(int(arrays["e.gen_lens"][row])):
            token = int(arrays["e.ids"][row, int(arrays["e.prompt_lens"][row]) + t])
            found.append((row, token in evidence.facts["eos"], t, sign * float(terms[row, t])))
    return found


def slow_averages(evidence: Evidence, estimator: str, which: str) -> dict[str, float]:
    tokens = tokens_of(evidence, estimator)
    ended = {row for row, is_eos, _, _ in tokens if is_eos}
    rows: dict[int, list[float]] = {}
    for row, is_eos, _, term in tokens:
        if which in ("without_truncated", "without_both") and row not in ended:
            continue
        own = rows.setdefault(row, [])
        if not (is_eos and which in ("without_eos", "without_both")):
            own.append(term)
    some = [own for own in rows.values() if own]
    return {
        "per_token": sum(map(sum, some)) / sum(map(len, some)),
        "per_response": sum(sum(own) / len(own) for own in some) / len(some),
        "sum": sum(map(sum, rows.values())) / len(rows),
    }


@pytest.mark.parametrize(
    ("value", "se", "said"),
    [
        (-0.00048810, 0.00022303, "−0.00049 ± 0.00022"),
        (4.6049, 0.2298, "4.60 ± 0.23"),
        (123.4, 56.7, "123 ± 57"),
        (3.62e-5, 1.24e-5, "(3.6 ± 1.2)e−5"),
        (1.234e9, 5.6e7, "(1.234 ± 0.056)e9"),
        (1.0, 0.0, "1 ± 0"),
        (0.5, None, "0.5"),
        (None, None, "–"),
        (math.nan, 1.0, "nan ± 1"),
        (2.0, math.inf, "2 ± ∞"),
    ],
)
def test_numbers_are_written_short(value: float | None, se: float | None, said: str) -> None:
    assert with_se(value, se) == said


def test_single_numbers() -> None:
    assert [number(x) for x in (-1e-5, 0.25, -0.0, "exact", None, math.inf, 3.0)] == [
        "−1e-5".replace("-", "−"), "0.25", "0", "exact", "–", "∞", "3",
    ]  # fmt: skip
    assert [percent(x) for x in (0.5, 0.0123, -0.00321, None)] == ["50 %", "1.2 %", "−0.32 %", "–"]


def test_a_page_that_would_be_too_large_leaves_out_what_passed(
    three: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LARGEST", 550_000)
    text = page_of(three)
    shown = Page(text)
    assert len(text.encode()) <= 550_000
    assert shown.faults == []
    assert shown.text.count("are left out, to keep the file small") == 1
    healthy = text[text.index('<section id="checkpoint-0"') : text.index('<section id="checkpoint-1"')]
    assert "<svg" not in healthy
    assert unescape(verdict(three[0])[1]) in unescape(healthy)


def test_the_same_run_gives_the_same_text(three: list[Checkpoint]) -> None:
    assert page_of(three[:1]) == page_of(three[:1])


def test_the_playbook_has_every_family_and_gate() -> None:
    assert set(playbook.GATES) == set(GATES)
    assert set(playbook.FAMILIES) == {criterion.family for criterion in CRITERIA.values()} | {"golden"}
    said = " ".join(step for steps in (*playbook.GATES.values(), *playbook.FAMILIES.values()) for step in steps)
    assert set(re.findall(r"--probe-[a-z-]+", said)) <= {option(key) for key in (*OPTIONS, *FLAGS)}
    for section, key in re.findall(r"\b(batch|first_order|true_delta_h)\.(\w+)", f"{said} {playbook.OPEN}"):
        assert key in ProbeConfig().model_dump()[section]
    assert playbook.steps("ess", "importance", "pass") == ()
    assert playbook.steps("ess", "importance", "inconclusive") == (*playbook.FAMILIES["importance"], *playbook.OPEN)
    assert playbook.steps("se_identity", "ustatistic", "inconclusive") == playbook.OPEN
    assert playbook.steps("entropy", "gate", "inconclusive") == ()
    assert playbook.steps("entropy", "gate", "fail") == playbook.GATES["entropy"]


def test_the_command(three: list[Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a report that `run` wrote, with its evidence; the verdicts are found there. And what is wrong is one line."""
    report = three[0].report
    assert report is not None
    assert report.evidence is not None
    assert report.verdicts == []
    report.to_json(tmp_path / "r.json")
    file = evidence_file(tmp_path / "kept", report.checkpoint.name)
    report.evidence.to_file(file)
    at, html = str(tmp_path / "r.json"), str(tmp_path / "deep" / "page.html")
    assert main(["report", at, "--html", html, "--evidence", str(tmp_path / "kept")]) == 0
    again = Page(Path(html).read_text(encoding="utf-8"))
    assert again.faults == []
    assert HOSTILE in again.text
    assert verdict(three[0])[1] in again.text
    assert main(["report", at, "--html", html]) == 0
    assert HOSTILE not in Path(html).read_text(encoding="utf-8")
    for given, problem in (
        (["report", at, "--html", "page.txt"], "is not the name of a page; end its name in .html"),
        (["report", "nowhere.json", "--html", html], "nowhere.json: cannot be read"),
        (["report", at, "--html", html, "--evidence", str(tmp_path)], "holds no evidence"),
    ):
        capsys.readouterr()
        assert main(given) in (1, 4)
        assert problem in capsys.readouterr().err


def test_evidence_of_another_run_is_one_line(three: list[Checkpoint]) -> None:
    report, other = three[0].report, three[2].report
    assert report is not None
    assert report.evidence is not None
    assert other is not None
    with pytest.raises(ProbeError, match=r"^evidence: belongs to another run: .*; give the evidence of this report$"):
        details_of(report.with_evidence(other.evidence))
    facts = report.evidence.facts
    few = Evidence({name: a for name, a in report.evidence.arrays.items() if name != "e.rewards"}, facts)
    with pytest.raises(ProbeError, match=r"^evidence: does not fit the report \(KeyError: 'e.rewards'\); give"):
        details_of(report.with_evidence(few))


def test_no_matplotlib_is_said(three: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "find_spec", lambda _: None)
    with pytest.raises(ProbeError, match=r"need matplotlib; pip install pytest-entropy-probe\[plots\]"):
        write_page(tmp_path / "p.html", three)


def test_verdicts_of_the_report_are_kept(three: list[Checkpoint]) -> None:
    report = three[0].report
    assert report is not None
    one = CRITERIA["ess"](report)
    kept = judged(report.model_copy(update={"verdicts": [one]}))
    assert kept == [one]
    assert [v.status for v in explained(kept, {"ess": "xfail"})] == ["xfail"]
