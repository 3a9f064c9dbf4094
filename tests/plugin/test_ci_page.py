"""docs/ci.md: its files, its commands, its workflow and its callback, as they stand, where it says.

The commands that train are left out: a minute of training whose steps rounding may move.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

import callback_runs
import forked
from entropy_probe import ProbeConfig
from entropy_probe.demo import checkpoint_path
from entropy_probe_checks.bounds import GATES
from entropy_probe_checks.thresholds import require_known
from site_pages import own_inputs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCK = r"((?: {4}.*\n|\n(?= {4}))+)"
FILES = {
    name: textwrap.dedent(text) for name, text in re.findall(rf"^<!-- (\S+\.\w+) -->\n{BLOCK}", PAGE, re.MULTILINE)
}
COMMANDS = [line for line in re.findall(r"^ {4}(pytest .*)$", PAGE, re.MULTILINE)]
WORKFLOW = ".github/workflows/entropy.yml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the page's files, and a run of two checkpoints."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint_path().parent / "base", place / "runs" / "a" / "base", copy_function=shutil.copyfile)
    for step in (10, 20):
        copy = place / "runs" / "a" / f"checkpoint-{step}"
        shutil.copytree(checkpoint_path(), copy, copy_function=shutil.copyfile)
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    own_inputs(place)
    return place


def shell(place: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_STEP_SUMMARY")}
    addopts = f"{os.environ.get('PYTEST_ADDOPTS', '').replace('-pno:benchmark', '')} --probe-budget=smoke"
    around = {**outside, "PYTEST_ADDOPTS": addopts, **environment}
    return forked.command(command, cwd=place, environment=around)


def test_the_page_has_its_parts() -> None:
    assert {"probe.yaml", "relative.yaml", "callback.py", "test_mine.py", WORKFLOW} == set(FILES)
    assert len(COMMANDS) == 7


def test_every_gate_has_its_row() -> None:
    for gate in GATES:
        assert f"\n| `{gate}` | " in PAGE


@pytest.mark.parametrize("name", ["probe.yaml", "relative.yaml"])
def test_configurations_are_valid(name: str) -> None:
    config = ProbeConfig.from_mapping(yaml.safe_load(FILES[name]))
    require_known(config.model_dump(mode="json")["limits"], has_baseline=name == "relative.yaml")


def test_commands_in_their_order(place: Path) -> None:
    for command in COMMANDS:
        done = shell(place, command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert json.loads((place / "baseline.json").read_text())["schema_version"] == 1
    assert {"logits.json", "entropy.json"} <= {path.name for path in (place / "golden" / "demo").iterdir()}


def test_the_workflow(place: Path) -> None:
    """Every `run` step but the installation, whose package is ours."""
    table: dict[Any, Any] = yaml.safe_load(FILES[WORKFLOW])
    (job,) = table["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert [run for run in runs if run.startswith("pip")] == ["pip install 'pytest-entropy-probe[plots]'"]
    for run in runs:
        if not run.startswith("pip"):
            done = shell(place, run, CI="true", GITHUB_STEP_SUMMARY=str(place / "summary.md"))
            assert done.returncode == 0, f"{run}\n{done.stdout}{done.stderr}"
    (upload,) = (step for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    for name in upload["with"]["path"].split():
        assert (place / name).exists()
    restore, save = (step for step in job["steps"] if "actions/cache" in step.get("uses", ""))
    assert list((place / save["with"]["path"]).glob("*.json"))
    assert save["with"].items() <= restore["with"].items()
    assert save["if"] == upload["if"] == "always()"
    assert 'href="#checkpoint-1">checkpoint-20</a>' in (place / "report.html").read_text()
    assert "| checkpoint-10 (100) |" in (place / "summary.md").read_text()


def test_the_callback(tmp_path: Path) -> None:
    """It stops a training that misses a bound after the step that was probed, and lets one go on that does not."""
    for text, steps in ((FILES["callback.py"], 2), (FILES["callback.py"].replace('"min": 0.05', '"min": 3.9'), 1)):
        scope: dict[str, Any] = {}
        exec(text, scope)  # noqa: S102 (the page's own text)
        trainer = scope["with_gates"](callback_runs.grpo(tmp_path, "full", max_steps=2, learning_rate=1e-4))
        trainer.train()
        assert trainer.state.global_step == steps
        assert (tmp_path / "entropy-probe" / "step-0.json").is_file()


def test_the_reward_of_the_run_that_dies() -> None:
    config = ProbeConfig.load(ROOT / "docs" / "collapse.yaml")
    require_known(config.model_dump(mode="json")["limits"])
    assert config.batch.reward == "collapse:priced"
    code = "import collapse; print(collapse.priced('<answer>5</answer>', '5'), collapse.priced('', '5'))"
    done = shell(ROOT / "docs", f'python -c "{code}"')
    assert done.stdout.split() == [str(1 - 18 / 300), "0.0"], done.stderr
