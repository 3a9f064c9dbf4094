"""The table of predictors against a run, in real runs of pytest on checkpoints that differ."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import safetensors.torch

import forked
from entropy_probe import ProbeReport
from entropy_probe.demo import checkpoint_path
from entropy_probe.predictor_skill import run_skill

SMALL = "budget: smoke\nbatch: {num_prompts: 3, num_update_prompts: 3}\ninvariance: {max_examples: 0}\n"
SMALL += "generation: {num_return_sequences: 2, max_new_tokens: 6}\n"


def run_of(folder: Path, steps: tuple[int, ...], *, move: float) -> None:
    """The demo's checkpoint under several steps, its adapter larger by `move` at each."""
    shutil.copytree(checkpoint_path().parent / "base", folder / "a" / "base", copy_function=shutil.copyfile)
    for k, step in enumerate(steps):
        at = folder / "a" / f"checkpoint-{step}"
        shutil.copytree(checkpoint_path(), at, copy_function=shutil.copyfile)
        state = json.loads((at / "trainer_state.json").read_text())
        (at / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
        file = at / "adapter_model.safetensors"
        weights = {name: w * (1 + move * k) for name, w in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(weights, file, {"format": "pt"})


def test_a_run_of_four_has_the_table(tmp_path: Path) -> None:
    """On the terminal, and on GitHub's page; the figures are those of the reports."""
    run_of(tmp_path, (5, 15, 10, 20), move=0.1)
    (tmp_path / "probe.yaml").write_text(SMALL)
    page = tmp_path / "page.md"
    around = {**os.environ, "COLUMNS": "80", "GITHUB_STEP_SUMMARY": str(page)}
    options = ("--probe-config=probe.yaml", "--probe-checkpoint=a/checkpoint-*", "--probe-json=out", "-m", "zero_check")
    shown = forked.python("-m", "pytest", *options, cwd=tmp_path, environment=around).stdout
    run = run_skill([ProbeReport.from_json(file) for file in sorted((tmp_path / "out").glob("*.json"))])
    assert (run.steps, run.apart) == ([5, 10, 15, 20], 5)
    assert run.title in shown
    assert "5 steps lie between, and the probe predicts one" in " ".join(shown.split())
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for row in run.rows():
        assert " ".join(row) in lines
        assert f"| {' | '.join(row)} |" in page.read_text()
    below = shown[shown.index(run.title) :]
    assert max(map(len, below.splitlines())) <= 80


def test_three_have_none_and_uneven_steps_have_a_line(tmp_path: Path) -> None:
    """Copies of one checkpoint: no change is there to be told, and no skill."""
    run_of(tmp_path, (1, 2, 3, 4, 9), move=0.0)
    (tmp_path / "probe.yaml").write_text(SMALL)
    options = ("-m", "pytest", "--probe-config=probe.yaml", "-m", "zero_check")
    around = {**os.environ, "COLUMNS": "80"}

    def shown(which: str) -> str:
        done = forked.python(*options, f"--probe-checkpoint=a/checkpoint-{which}", cwd=tmp_path, environment=around)
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert "predictors against a run: the checkpoints are 1, 5 steps apart; give some at one" in shown("*")
    assert "predictors against" not in shown("[123]")
    lines = [" ".join(line.split()) for line in shown("[1234]").splitlines()]
    assert "the last change again 0/2 - - -" in lines
