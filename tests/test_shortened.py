"""Second derivatives of long rows are taken on a part of each: both sides on the same part, and the report says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from counted import Sizes
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe.model.forward import bind
from entropy_probe.stages.memory.pass_memory import Passes, longest_rows
from entropy_probe.stages.responses.rollouts import Group, Rollouts, assembled
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.share import Share
from entropy_probe.stages.witnesses import projections, shortened, witness
from entropy_probe_checks.criteria import prediction, ustatistic
from test_projections import CURVATURE_TOLERANCE, ESTIMATORS, TOLERANCE, Subject, adapter


def rollouts(*lengths: tuple[int, list[int]]) -> Rollouts:
    """A group of so many tokens of a prompt and of its responses for each, with ids that count from 1."""
    groups = []
    for prompt, responses in lengths:
        rows = [list(range(1, prompt + t + 1)) for t in responses]
        groups.append(Group(list(range(1, prompt + 1)), [row[prompt:] for row in rows], [0.0] * len(rows)))
    return assembled(groups, "file", 0)


@pytest.mark.parametrize(
    ("prompt", "responses", "expected"),
    [
        (3, [5, 2], (3, [5, 2])),  # no row is longer
        (3, [20, 2], (3, [5, 2])),  # the whole prompt, and what fits after it
        (6, [20, 3], (4, [4, 3])),  # half a row is generated
        (30, [2, 1], (6, [2, 1])),  # but for a response that has not as much
        (30, [4, 9], (4, [4, 4])),
    ],
)
def test_rows(
    monkeypatch: pytest.MonkeyPatch, prompt: int, responses: list[int], expected: tuple[int, list[int]]
) -> None:
    monkeypatch.setattr(shortened, "LONGEST", 8)
    whole = rollouts((prompt, responses), (2, [3, 3]))
    found = shortened.shortened(whole)
    assert (found is whole) == (max(responses) + prompt <= 8)
    before, generated = expected
    assert found.prompt_lens.tolist() == [before] * 2 + [2, 2]
    assert found.gen_lens.tolist() == [*generated, 3, 3]
    for i, t in enumerate(generated):
        row = found.ids[i].tolist()
        assert row[: before + t] == list(range(prompt - before + 1, prompt + t + 1))
        assert found is whole or not any(row[before + t :])


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortened, "LONGEST", 8)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("first_order", ESTIMATORS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("mode", [{}, {"mode": "block", "num_blocks": 3}], ids=["exact", "block"])
def test_both_witnesses_agree_on_short_rows(first_order: dict[str, Any], mode: dict[str, Any], tmp_path: Path) -> None:
    """In float64, to what whole rows agree to (measured: 4e-16 and 2e-10)."""
    subject = Subject.of(adapter(), tmp_path, **first_order, **mode)
    assert shortened.shortened(subject.rollouts) is not subject.rollouts
    found = subject.agreement
    assert found.projections_alpha is not None
    assert found.projections_alpha < TOLERANCE
    assert found.projections_jvp is not None
    assert found.projections_jvp < TOLERANCE
    assert subject.curvature is not None
    assert subject.curvature < CURVATURE_TOLERANCE


@pytest.mark.usefixtures("eight")
def test_whole_rows_on_one_side_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X, or the central difference, of rows that are not those of the other side."""
    subject = Subject.of(adapter(), tmp_path)
    chosen = subject.rollouts

    def whole(share: Share) -> Share:
        prompts = torch.arange(share.rollouts.num_prompts)
        return Share.of(chosen.of_prompts(prompts), share.units)

    of_units, of_slopes = projections.unit_gradients, witness.derived
    with monkeypatch.context() as patch:
        patch.setattr(projections, "unit_gradients", lambda bound, share, *a: of_units(bound, whole(share), *a))
        assert (subject.agreement.projections_alpha or 0.0) > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(witness, "derived", lambda one, other, share, *a: of_slopes(one, other, whole(share), *a))
        assert (subject.curvature or 0.0) > 1e-3


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("change", [lambda x: -x, torch.zeros_like, lambda x: (1 + 1e-3) * x])
def test_a_wrong_way_is_seen_on_short_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    subject = Subject.of(adapter(), tmp_path)
    by_alpha, twice = projections.by_alpha, witness.twice_in_reverse
    monkeypatch.setattr(projections, "by_alpha", lambda *of: change(by_alpha(*of)))
    monkeypatch.setattr(witness, "twice_in_reverse", lambda *of: float(change(torch.tensor(twice(*of)))))
    assert (subject.agreement.projections_alpha or 0.0) > 1e-6
    assert (subject.curvature or 0.0) > 1e-6


def test_the_report_says_so(tmp_path: Path) -> None:
    """A whole run on rows of 150 tokens, in float32."""
    sizes = Sizes(prompt=6, response=144)
    given = {"invariance": {"max_examples": 1}}
    report = run_probe(sizes.checkpoint(tmp_path), ProbeConfig.from_mapping(given), *sizes.files(tmp_path / "files"))
    assert report.memory.second_order_tokens == shortened.LONGEST == 128
    assert report.memory.left_out is None
    assert any("second derivatives are of the first 128 tokens" in said for said in report.memory.said)
    for criterion in (prediction.curvature_witness, ustatistic.projections_agree):
        verdict = criterion(report)
        assert verdict.status == "pass"
        assert verdict.value
    short = report.memory.model_copy(update={"second_order_tokens": None})
    assert short.said == []


def test_left_out_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where second derivatives alone are too much, all else is measured, and the verdicts give the reason."""
    sizes = Sizes(prompt=6, response=10)
    kinds = [lambda config, positions: 2**40]
    monkeypatch.setattr(Passes, "kinds_of_second_order", lambda passes, usable: kinds)
    given = {"invariance": {"max_examples": 1}, "memory_limit": "6GiB"}
    report = run_probe(sizes.checkpoint(tmp_path), ProbeConfig.from_mapping(given), *sizes.files(tmp_path / "files"))
    assert report.witness is not None
    assert report.witness["curvature"] is report.witness["projections_alpha"] is None
    assert report.witness["projections_jvp"] is not None
    said = report.memory.left_out
    assert said is not None
    assert "one response needs 1.11e+03 GiB" in said
    assert report.memory.said == [said]
    verdict = prediction.curvature_witness(report)
    assert (verdict.status, verdict.unseen) == ("inconclusive", False)
    assert said in verdict.hint
    verdict = ustatistic.projections_agree(report)
    assert verdict.status == "pass"
    assert f"[no α-trick: {said}]" in verdict.hint
    assert "lacks" not in verdict.hint


def test_rows_of_the_planned_passes_are_short(tmp_path: Path) -> None:
    """What a limit of memory counts for second derivatives does not grow with the rows."""
    sizes, found = Sizes(), []
    model = load_checkpoint(sizes.checkpoint(tmp_path)).model
    bound, float64 = bind(model), bind(model, torch.float64)
    config = ProbeConfig()
    for response in (122, 250):
        made = replace(sizes, prompt=6, response=response).rollouts(tmp_path / f"{response}.jsonl", 2, 1)
        passes = Passes(bound, float64, longest_rows((read_rollouts(made, bound, None),)), config)
        found.append([kind(config, 4) for kind in passes.kinds_of_second_order(2**60)])
    assert len(found[0]) == 2
    assert found[0] == found[1]
