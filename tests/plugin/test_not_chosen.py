"""Without prompts, on a checkpoint that is not the demo: every place with a figure says so, and gates hold back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import forked
import healthy
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.criteria.gate import baseline_of

MARK = "not your prompts, nor reward"
FIRST = [
    "built-in prompts: give yours, --probe-prompts=FILE (or rollouts)",
    "stand-in reward, which says nothing about the policy: set batch.reward",
]
LIMITS = "limits: {entropy: {min: 0.05}, reward: {min: 0.1}, finite_moments: {max: 0}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and one run on it whose report is kept."""
    folder = tmp_path_factory.mktemp("not-chosen")
    healthy.supervised("llama", folder / "ckpt", 0)
    (folder / "probe.yaml").write_text(LIMITS + "generation: {num_return_sequences: 4, max_new_tokens: 12}\n")
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> Any:
    options = ("--probe-checkpoint=ckpt", "--probe-budget=smoke", "--probe-config=probe.yaml", *arguments)
    return forked.python(
        "-m", "pytest", *options, cwd=folder, environment={**os.environ, "COLUMNS": "80", **environment}
    )


def test_every_place_says_so(folder: Path) -> None:
    summary = folder / "summary.md"
    done = run(
        folder,
        "-m", "acceptance", "-v", "--probe-json=r.json", "--junitxml=j.xml", "--probe-plot=p.svg",
        "--probe-html=p.html",
        GITHUB_STEP_SUMMARY=str(summary),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    shown = done.stdout.partition("= entropy probe =")[2].splitlines()
    assert shown[1].startswith("ckpt: Not your prompts, nor reward: the ")
    at = shown.index(FIRST[0])
    assert at <= 4
    assert shown[at : at + 2] == FIRST
    assert max(map(len, shown)) <= 80
    block = "\n".join(shown)
    figures = re.findall(
        r"^(?=.{8} \S)(entropy|change|resolves|step|gradient) +(\S.*(?:\n {9}.*)*)", block, re.MULTILINE
    )
    assert [label for label, _ in figures] == ["entropy", "change", "resolves", "step", "gradient"]
    assert all(" ".join(text.split()).endswith(f"({MARK})") for _, text in figures), figures
    assert any(line.startswith(f"prediction against realisation (nats/token), {MARK}") for line in shown)
    markdown = summary.read_text()
    assert f"\\*: {MARK}; H in nats/token" in markdown
    (row,) = (line for line in markdown.splitlines() if line.startswith("| ckpt"))
    assert [cell.strip().endswith("\\*") for cell in row.split("|")[2:5]] == [True] * 3
    assert sum(MARK in line for line in markdown.splitlines()) >= 5
    assert sum(MARK in line for line in (folder / "j.xml").read_text().replace("&#10;", "\n").splitlines()) >= 4
    assert MARK in (folder / "p.svg").read_text()
    page = (folder / "p.html").read_text()
    assert page.count(f"These are {MARK}") >= 2 * page.count("<svg") >= 16
    assert page.count(f"nats/token, {MARK}") == 3
    report = json.loads((folder / "r.json").read_text())
    for section in ("batch", "update_batch"):
        assert report[section]["prompts_are_builtin"] is True
        assert report[section]["reward"] == "stand_in"


def test_gates_are_inconclusive_and_can_be_let_through(folder: Path) -> None:
    """But for those that no prompt decides."""
    done = run(folder, "-m", "gate", "-v")
    assert done.returncode == 1
    why = "The prompts are the built-in ones, not yours. Give --probe-prompts=FILE or --probe-rollouts=FILE."
    assert why in done.stdout
    outcomes = dict(re.findall(r"│ (entropy|reward|finite_moments) .* (\S+) +│", done.stdout))
    assert outcomes == {"entropy": "INCONCLUSIVE", "reward": "INCONCLUSIVE", "finite_moments": "PASS"}
    (folder / "lenient.yaml").write_text(
        (folder / "probe.yaml").read_text() + "allow_inconclusive: [entropy, reward]\n"
    )
    done = run(folder, "--probe-config=lenient.yaml", "-m", "gate")
    assert done.returncode == 0, done.stdout[-2000:]


def test_what_is_asked_for_is_not_marked(folder: Path) -> None:
    """The same questions and the same reward, but chosen; a stand-in that is asked for by name is one all the same."""
    extra = {
        "dataset: arithmetic, reward: tag_pref": "",
        "reward: tag_pref": "not your prompts",
        "dataset: arithmetic, reward: stand_in": "not your reward",
    }
    config = (folder / "probe.yaml").read_text()
    for batch, mark in extra.items():
        (folder / "chosen.yaml").write_text(config + f"batch: {{{batch}}}\n")
        options = ("--config", "chosen.yaml", "--budget", "smoke", "--out", "r.json")
        done = forked.python("-m", "entropy_probe", "run", "ckpt", *options, cwd=folder)
        assert done.returncode == 0
        report = json.loads((folder / "r.json").read_text())
        builtin, reward = report["batch"]["prompts_are_builtin"], report["batch"]["reward"]
        expected = {
            "": (False, "tag_pref"),
            "not your prompts": (True, "tag_pref"),
            "not your reward": (False, "stand_in"),
        }
        assert (builtin, reward) == expected[mark]
        told = "100% of the update's prompts have no advantage: the step is only momentum and decay" in done.stderr
        assert told == (reward == "tag_pref")  # nobody answers in tags


def test_a_baseline_on_other_questions_is_none(folder: Path) -> None:
    """And a stand-in reward of the E batch alone is one, where the update comes from a file."""
    loaded = load_checkpoint(folder / "ckpt")
    few = {"budget": "smoke", "generation": {"num_return_sequences": 4, "max_new_tokens": 12}}
    chosen = few | {"batch": {"dataset": "arithmetic", "reward": "stand_in"}, "invariance": {"max_examples": 0}}
    before, after = (run_probe(loaded, ProbeConfig.from_mapping(config)) for config in (few, chosen))
    limits = {"limits": {"entropy": {"fall": 0.5}, "finite_moments": {"max": 0}}}
    judged = after.model_copy(update={"baseline": baseline_of(before), "config": after.config | limits})
    assert GATES["entropy"](judged).status == "inconclusive"
    assert f"The baseline is {MARK}" in GATES["entropy"](judged).hint
    assert GATES["finite_moments"](judged).status == "pass"

    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Q{n}"}) + "\n" for n in range(20)))
    line = {"prompt_ids": [60, 61], "response_ids": [[70, 71], [72, 73]], "rewards": [1.0, 0.0]}
    (folder / "u.jsonl").write_text((json.dumps(line) + "\n") * 3)
    report = run_probe(
        loaded, ProbeConfig.from_mapping(few), None, folder / "u.jsonl", prompts=folder / "prompts.jsonl"
    )
    assert (report.batch.reward, report.update_batch.reward) == ("stand_in", "file")
    assert report.not_chosen == "not your reward"
    assert CRITERIA["gold_complete"](report).status == "not_applicable"
    gate = report.model_copy(update={"config": report.config | {"limits": {"reward": {"min": 0.1}}}})
    assert GATES["reward"](gate).status == "inconclusive"
