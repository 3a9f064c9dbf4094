"""Gates, baselines and several checkpoints in real runs: exit codes, the table by step, figures, GitHub's summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import forked
from entropy_probe.demo import checkpoint_path

SMALL = "budget: smoke\nbatch: {num_prompts: 3, num_update_prompts: 3}\n"
SMALL += "generation: {num_return_sequences: 2, max_new_tokens: 6}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one run: the demo's files under the steps 20, 100 and 9, so that order needs the number."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(checkpoint_path().parent / "base", folder / "a" / "base", copy_function=shutil.copyfile)
    for step in (20, 100, 9):
        at = folder / "a" / f"checkpoint-{step}"
        shutil.copytree(checkpoint_path(), at, copy_function=shutil.copyfile)
        state = json.loads((at / "trainer_state.json").read_text())
        (at / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    return folder


def run(folder: Path, limits: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What was measured before is in pytest's cache of the folder."""
    (folder / "probe.yaml").write_text(f"{SMALL}limits: {{{limits}}}\n")
    around = {**os.environ, "COLUMNS": "80", **environment}
    return forked.python("-m", "pytest", "--probe-config=probe.yaml", *args, cwd=folder, environment=around)


ONE = "--probe-checkpoint=a/checkpoint-100"
ALL = "--probe-checkpoint=a/checkpoint-*"


def test_a_gate_passes_fails_and_says_why(folder: Path) -> None:
    passed = run(folder, "entropy: {min: 1e-9}, adam_step: {max: 0}", ONE, "-m", "gate", "--probe-json=before.json")
    assert passed.returncode == 0, passed.stdout
    assert "2 passed" in passed.stdout
    assert "limit entropy = min 1e-09: limits.entropy of the configuration" in passed.stdout
    failed = run(folder, "entropy: {min: 50}", ONE, "-m", "gate", "--junitxml=junit.xml")
    assert failed.returncode == 1
    value = json.loads((folder / "before.json").read_text())["entropy"]["per_token"]["value"]
    assert f"\nentropy: {value:.3g} < 50\n[limits.entropy.min; entropy {value:.3g} ± " in failed.stdout
    junit = (folder / "junit.xml").read_text()
    assert '<property name="probe_family" value="gate" />' in junit


def test_a_step_that_is_not_the_trainers_fails(folder: Path) -> None:
    """The copies have the moments of step 100."""
    failed = run(folder, "adam_step: {max: 0}", "--probe-checkpoint=a/checkpoint-20", "-m", "gate")
    assert failed.returncode == 1
    assert "\nadam_step: 80 > 0\n" in failed.stdout


def test_a_baseline(folder: Path) -> None:
    report = json.loads((folder / "before.json").read_text())
    bounds = "entropy: {fall: 0.1, fall_se: 4, rise_se: 4}"
    same = run(folder, bounds, ONE, "-m", "gate", "--probe-baseline=before.json")
    assert same.returncode == 0, same.stdout
    report["entropy"]["per_token"]["value"] *= 40
    (folder / "many").mkdir()
    (folder / "many" / "checkpoint-100.json").write_text(json.dumps(report))
    fallen = run(folder, bounds, ONE, "-m", "gate", "--probe-baseline=many", "--probe-json=after.json")
    assert fallen.returncode == 1
    assert "baseline" in fallen.stdout
    after = json.loads((folder / "after.json").read_text())
    assert after["baseline"]["quantities"]["entropy"] == report["entropy"]["per_token"]
    assert [v["status"] for v in after["verdicts"] if v["criterion"] == "entropy"] == ["fail"]


@pytest.mark.parametrize(
    ("baseline", "complaint"),
    [
        ("nowhere", "--probe-baseline: no such file or folder: "),
        ("probe.yaml", "--probe-baseline: "),
        ("a", "checkpoint-100.json: cannot be read"),
        (None, "`limits.entropy.fall` needs a baseline; give --probe-baseline=report.json"),
    ],
)
def test_a_baseline_that_is_none(folder: Path, baseline: str | None, complaint: str) -> None:
    given = [] if baseline is None else [f"--probe-baseline={baseline}"]
    done = run(folder, "entropy: {fall: 0.1}", ONE, *given)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, done.stderr.splitlines())
    assert complaint in line


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_a_run_ends_in_one_table_by_step(folder: Path, workers: list[str]) -> None:
    out = folder / f"out{len(workers)}"
    done = run(
        folder,
        "adam_step: {max: 0}, entropy: {min: 1e-9}",
        *(ALL, "-m", "gate", f"--probe-json={out}", f"--probe-plot={out}", *workers),
        GITHUB_STEP_SUMMARY=str(folder / f"summary{len(workers)}.md"),
    )
    assert done.returncode == 1
    section = done.stdout.partition("= entropy probe =")[2].partition("= short test summary")[0]
    assert max(map(len, section.splitlines())) <= 80
    table = section.partition("next step of 3 checkpoints: change in nats/token, (out of range)")[2]
    lines = [line.split() for line in table.splitlines() if "checkpoint-" in line and "±" in line]
    assert [line[0] for line in lines] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert [" ".join(line[-2:]) for line in lines[:2]] == ["1 failed"] * 2
    assert lines[2][-1] == "passed"
    for step, line in zip((9, 20, 100), lines, strict=True):
        report = json.loads((out / f"checkpoint-{step}.json").read_text())
        assert report["checkpoint"]["global_step"] == step
        value, _, se = line[1].partition("±")
        assert float(value) == pytest.approx(report["entropy"]["per_token"]["value"], abs=float(se))
    # what passed is not shown again
    assert section.count("│ adam_step") == 2
    assert "checkpoint-9: Beyond your limits: adam_step." in section
    assert "checkpoint-100: Within your limits: " in section
    assert "│ entropy" not in section
    assert (out / "by_step.png").read_bytes().startswith(b"\x89PNG")
    summary = (folder / f"summary{len(workers)}.md").read_text()
    assert summary.index("| checkpoint-9 | 0.") < summary.index("| checkpoint-20 | 0.")
    assert "adam_step: 80 > 0" in summary
    assert summary.count("<details>") == summary.count("</details>") == 3


def test_x_stops_at_the_first_checkpoint_that_fails(folder: Path) -> None:
    done = run(folder, "adam_step: {max: 85}", ALL, "-m", "gate", "-x")
    assert done.returncode == 1
    assert "FAILED probe-checks/test_gate.py::test_adam_step[checkpoint-9]" in done.stdout
    assert "1 failed" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]


def test_a_summary_that_cannot_be_written_is_said(folder: Path) -> None:
    done = run(folder, "entropy: {min: 1e-9}", ONE, "-m", "gate", GITHUB_STEP_SUMMARY=str(folder / "no" / "file"))
    assert done.returncode == 4
    assert "GITHUB_STEP_SUMMARY" in done.stderr
    assert "cannot be written (No such file or directory)" in done.stderr


def test_a_checkpoint_that_does_not_load_has_its_line(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "checkpoint-7").mkdir(parents=True, exist_ok=True)
    summary = tmp_path / "summary.md"
    args = (ONE, "--probe-checkpoint=b/checkpoint-7", "-m", "gate")
    done = run(folder, "entropy: {min: 1e-9}", *args, GITHUB_STEP_SUMMARY=str(summary), COLUMNS="40")
    assert done.returncode == 1
    assert "checkpoint-7 - - - - not loaded" in " ".join(done.stdout.split())
    assert "has neither config.json nor adapter_config.json" in summary.read_text()
