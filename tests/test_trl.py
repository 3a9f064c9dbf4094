"""The update that TRL's own trainer makes: from its checkpoint and the batch that was captured of its next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fidelity
import forked
from entropy_probe import ProbeConfig, ProbeError, load_checkpoint, run_probe
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.page.details import details_of
from entropy_probe_checks.criteria import CRITERIA
from site_pages import ROOT
from trl_runs import Run, train

CHOSEN = (
    "grpo, group", "bnpo, batch", "dr_grpo, none", "dapo, group", "cispo, batch", "sapo, none", "luspo, group",
    "vespo, group", "lora, beta", "beta", "beta, plain k3", "both, bnpo", "mask_truncated_completions, bnpo",
    "temperature 0.7", "max_grad_norm 0.05", "accumulation 4, bnpo", "weight decay 0.1", "two learning rates", "GSPO",
    "first of two windows, bnpo", "one prompt", "RLOO, mask_truncated", "RLOO, normalised",
)  # fmt: skip
"""Of `fidelity.SETTINGS`, whose table is in docs/recipes.md: at least one for each part of a recipe."""


@pytest.mark.parametrize("name", CHOSEN)
def test_the_gradient_and_the_step_are_trls(tmp_path: Path, name: str) -> None:
    """With `recipe: auto` and nothing else. Float32 leaves 1e-13 and 1e-9; a wrong part, 1e-4 at the least."""
    found = fidelity.of_setting(tmp_path / "run", name)
    assert found.gradient_turned <= 1e-6
    assert abs(found.gradient_longer) <= 1e-5
    assert found.step_turned <= 1e-8
    assert abs(found.step_longer) <= 1e-5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("num_iterations 2, second pass", "num_iterations 2"),
        ("lora_dropout 0.1", "uses dropout (0.1)"),
        ("bf16 autocast", "under autocast (bf16)"),
        ("second of two windows", "makes 2 steps from each rollout"),
    ],
)
def test_what_is_not_reproduced_is_said(tmp_path: Path, name: str, said: str) -> None:
    found = fidelity.of_setting(tmp_path / "run", name)
    assert any(said in line for line in found.not_reproduced)
    assert f"| {' '.join(found.not_reproduced)} |" in (ROOT / "docs" / "recipes.md").read_text()
    assert found.gradient_turned > 1e-6  # else it need not be said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("trl") / "run", steps=4, gradient_accumulation_steps=2)


SMALL: dict[str, Any] = {"budget": "smoke", "invariance": {"max_examples": 0}}


def test_the_next_checkpoint_is_asked(run: Run) -> None:
    """It is found by itself; on the batch of that very step both criteria judge, and the numbers are the trainer's."""
    own, other = run.batch(2), run.batch(0)
    report = run_probe(run.checkpoint(2), ProbeConfig.from_mapping(SMALL), other, own)
    real, update = report.real_update, report.update
    assert real is not None
    assert update is not None
    assert (real.steps_between, real.own_batch) == (1, True)
    assert CRITERIA["real_update_cosine"](report).status == CRITERIA["real_update_norm"](report).status == "pass"
    logs = {entry["step"]: entry for entry in run.logs if "grad_norm" in entry}
    assert real.logged_grad_norm == pytest.approx(logs[3]["grad_norm"], rel=1e-6)
    assert update.grad_norm == pytest.approx(logs[3]["grad_norm"], rel=1e-5)
    assert update.grad_norm_logged == pytest.approx(logs[2]["grad_norm"], rel=1e-6)
    assert update.clip_factor == pytest.approx(real.clip_factor, rel=1e-5)
    change = report.next_step
    assert change is not None
    assert real.delta_h == pytest.approx(change.delta_h_pd, rel=1e-3)
    assert real.delta_h_per_token == pytest.approx(change.delta_h_per_token_pd, rel=1e-3)
    assert real.predicted == pytest.approx(change.predicted, rel=1e-3)
    assert {name for name, judge in CRITERIA.items() if judge(report).status == "fail"} == set()


def test_another_batch_or_a_later_checkpoint(run: Run) -> None:
    """The numbers stand in the report, and the criteria say why they do not judge."""
    config = ProbeConfig.from_mapping(SMALL)
    report = run_probe(run.checkpoint(2), config, run.batch(0), run.batch(2), next_checkpoint=run.checkpoint(4))
    real = report.real_update
    assert real is not None
    assert (real.steps_between, real.gradient_cosine, real.logged_grad_norm) == (2, None, None)
    verdict = CRITERIA["real_update_cosine"](report)
    assert verdict.status == "not_applicable"
    assert "2 steps lie between" in verdict.hint
    unlike = run.batch(1).with_name("plain.jsonl")
    lines = [json.loads(line) for line in run.batch(1).read_text().splitlines()]
    for line in lines:
        del line["in_step"], line["micro_batches"], line["after_step"]
    unlike.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run_probe(run.checkpoint(2), config, run.batch(0), unlike)
    assert report.real_update is not None
    assert report.real_update.cosine < 1 - 1e-4
    verdict = CRITERIA["real_update_norm"](report)
    assert (verdict.status, "not the trainer's own" in verdict.hint) == ("not_applicable", True)


def test_a_next_one_that_cannot_be_read_ends_nothing(run: Run, tmp_path: Path) -> None:
    """Where it was found by itself: why stands in the report, and the rest is measured. One that was asked for is an
    error."""
    for step in (2, 3):
        shutil.copytree(run.checkpoint(step), tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    config = ProbeConfig.from_mapping(SMALL)
    report = run_probe(tmp_path / "checkpoint-2", config, run.batch(0), run.batch(2))
    assert report.real_update is None
    assert report.real_update_missing is not None
    assert "optimizer" in report.real_update_missing
    assert report.next_step is not None
    with pytest.raises(ProbeError, match="optimizer"):
        run_probe(
            tmp_path / "checkpoint-2", config, run.batch(0), run.batch(2), next_checkpoint=tmp_path / "checkpoint-3"
        )


def test_an_earlier_checkpoint_is_no_next_one(run: Run) -> None:
    done = forked.python(
        "-m", "entropy_probe", "run", run.checkpoint(2), "--budget=smoke", f"--rollouts={run.batch(0)}",
        f"--next={run.checkpoint(1)}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "give a later one of the same run" in done.stderr.splitlines()[-1]


def test_capturing_changes_nothing(tmp_path: Path) -> None:
    """The same weights, bit for bit, with and without it."""
    with_it, without = (train(tmp_path / str(on), steps=2, capture=on) for on in (True, False))
    weights = [dict(load_checkpoint(r.checkpoint(2)).model.named_parameters()) for r in (with_it, without)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_inspect_prints_the_recipe_in_six_lines(run: Run) -> None:
    lines = inspect_checkpoint(run.checkpoint(1)).text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("recipe"))
    end = next(k for k, line in enumerate(lines) if line.startswith("files"))
    assert lines[start] == "recipe      trl-dapo (training_args.bin)"
    assert end - start <= 6
    assert all(len(line) <= 80 for line in lines[start:end])


def test_rewards_alone_give_the_trainers_advantages(run: Run) -> None:
    """The file holds rewards, and what is captured of a step says which responses it took."""
    lines = [json.loads(line) for line in run.batch(1).read_text().splitlines()]
    assert all({"rewards", "in_step", "micro_batches"} <= set(line) and "advantages" not in line for line in lines)
    assert sorted(m for line in lines for m in line["micro_batches"]) == [0] * 8 + [1] * 8


def test_the_entropy_that_was_logged_is_the_full_one_per_token(run: Run) -> None:
    """At step 3 TRL logs that of checkpoint 2 on the batch of step 3: the mean of its two micro-batches, each the mean
    over their tokens. Float32 leaves 1e-6; the sampled one is off by 1e-2, the mean over responses by 1e-3."""
    report = run_probe(run.checkpoint(2), ProbeConfig.from_mapping(SMALL), run.batch(2), run.batch(0))
    evidence = report.evidence
    assert evidence is not None
    lines = [json.loads(line) for line in run.batch(2).read_text().splitlines()]
    micro = torch.tensor([line["micro_batches"] for line in lines])
    entropy = torch.from_numpy(evidence.arrays["e.entropy"])
    lengths = torch.from_numpy(evidence.arrays["e.gen_lens"]).reshape(micro.shape)
    each = [float(entropy[micro == m].sum() / lengths[micro == m].sum()) for m in micro.unique()]
    assert len(each) == 2
    logs = {entry["step"]: entry["entropy"] for entry in run.logs if "entropy" in entry}
    assert sum(each) / len(each) == pytest.approx(logs[3], rel=1e-5)
    details = details_of(report)
    assert details is not None
    found = details["conventions"]
    full = found["rows"][0]["values"]["all"]
    assert min(each) <= full["per_token"] <= max(each)
    assert full["per_token"] == pytest.approx(logs[3], rel=1e-3)  # responses of the micro-batches differ in length
    assert found["trainer"] == {"value": pytest.approx(logs[2], rel=1e-6), "step": 2, "steps": 1}
