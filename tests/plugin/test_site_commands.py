"""Every command of the site's own pages, run as it stands in the order of the page, with the files that the page has.

What needs a GPU or a trainer says so above its block. What is run elsewhere, or stands on an older page, is named here
beside the test that runs it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import forked
import kept_reports
from entropy_probe import ProbeConfig
from entropy_probe.demo import checkpoint_path
from entropy_probe_checks.thresholds import require_known
from site_pages import PAGES, ROOMS, ROOT, commands, fenced, lines, own_inputs

OURS = [page for page in PAGES if page.startswith(ROOMS)]
TRAINER = "needs a trainer"
RUN_BY = {
    r"pip install ": "tests/matrix",
    r"entropy-probe drill ": "tests/test_drill.py::test_",
    r"torchrun .*-m entropy_probe run ": "tests/test_distributed.py::test_",
    r"torchrun .*-m pytest ": "tests/test_distributed.py::test_",
    r"pytest -n 2 ": "tests/plugin/test_demo_run.py::test_workers_hand_over_reports_and_verdicts",
    r"python docs/collapse.py": TRAINER,
    r"PYTHONPATH=docs pytest .*collapse": TRAINER,
}
"""Commands → the test that runs such a one with the same options."""

OLDER = {
    "audit.md": "tests/plugin/test_site_commands.py::test_blocks_of_a_page",
    "ci.md": "tests/plugin/test_ci_page.py::test_commands_in_their_order",
    "overview.md": "tests/plugin/test_readme.py::test_command",
    "predictors.md": "tests/plugin/test_every_command.py::test_command",
    "recipes.md": "tests/test_trl.py::test_the_next_checkpoint_is_asked",
    "scaling.md": "tests/plugin/test_every_command.py::test_command",
}
"""Pages that were there before → the test that runs their commands, or the same with other names."""

ROLLOUT = {"input": "What is 18+35?\n", "output": "<answer>53</answer>", "gts": "53", "score": 1.0, "step": 3}
"""A line as verl writes it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a run of TRL's kind, and the files that the pages speak of without showing them."""
    place = tmp_path_factory.mktemp("place")
    for run, steps in (("runs", (500,)), ("runs/a", (10, 20))):
        shutil.copytree(checkpoint_path().parent / "base", place / run / "base", copy_function=shutil.copyfile)
        for step in steps:
            shutil.copytree(checkpoint_path(), place / run / f"checkpoint-{step}", copy_function=shutil.copyfile)
    for name in ("e.jsonl", "u.jsonl"):
        shutil.copyfile(ROOT / "golden" / "demo" / name, place / name)
    (place / "step.jsonl").write_text("".join(json.dumps(ROLLOUT | {"score": of}) + "\n" for of in (1.0, 0.0)))
    own_inputs(place)
    kept_reports.copy(kept_reports.OURS, place / kept_reports.PLACE)
    return place


def shell(place: Path, command: str) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if key not in ("CI", "GITHUB_STEP_SUMMARY")}
    addopts = f"{os.environ.get('PYTEST_ADDOPTS', '')} --probe-budget=smoke"
    return forked.command(command, cwd=place, environment={**outside, "PYTEST_ADDOPTS": addopts})


def exists(test: str) -> bool:
    """Whether a file has a test whose name begins so."""
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_dir() or (path.is_file() and f"def {name}" in path.read_text())


def elsewhere(command: str) -> str:
    """The test that runs a command; empty where none is named."""
    return next((test for pattern, test in RUN_BY.items() if re.match(pattern, command)), "")


def test_what_is_run_elsewhere_is_run_there() -> None:
    assert {test for test in (*RUN_BY.values(), *OLDER.values()) if test != TRAINER and not exists(test)} == set()
    used = {pattern for pattern in RUN_BY for page in PAGES for one, _ in commands(page) if re.match(pattern, one)}
    assert used == set(RUN_BY)


def test_every_page_with_commands_is_known() -> None:
    with_commands = {page for page in PAGES if any(not needs for _, needs in commands(page))}
    assert with_commands <= {*OURS, *OLDER}
    assert {needs for page in PAGES for _, needs in commands(page)} <= {"", "a GPU", "a trainer"}


@pytest.mark.parametrize("page", OURS)
def test_blocks_of_a_page(place: Path, page: str) -> None:
    """In their order: files are written, Python is run, configurations are valid, and every command ends with exit code
    0 and has written what it names."""
    for kind, title, needs, text in fenced(page):
        if title:
            (place / title).write_text(text)
        if kind == "python":
            ast.parse(text)
        if kind == "python" and not title and not needs:
            done = forked.python("-c", text, cwd=place)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
        if kind == "yaml":
            config = ProbeConfig.from_mapping(yaml.safe_load(text))
            require_known(config.model_dump(mode="json")["limits"], config.allow_inconclusive, has_baseline=True)
        for command in lines(text) if kind == "sh" and not needs else ():
            if not elsewhere(command):
                done = shell(place, command)
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                for file in re.findall(r"(?:--out|--probe-json=) ?(\S+)", command):
                    assert (place / file).stat().st_size > 0, command
