"""Runs of the installed wheel in somebody else's repository.

`PROBE_MATRIX` names the folder that `.ci/wheel` made: `new` holds the wheel with the newest pytest, `old` layers pytest
8.4 over it. `make matrix` does both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

import kept_reports

MATRIX = os.environ.get("PROBE_MATRIX")

# Two prompts of two short responses each: the smallest measurement that runs every criterion.
SMALL = """
batch: {num_prompts: 4, num_update_prompts: 4}
generation: {num_return_sequences: 2, max_new_tokens: 6}
invariance: {max_examples: 1}
allow_inconclusive: [y_coverage, se_identity, se_agreement]
"""

# What is hostile here: strict markers and configuration, warnings as errors, other naming rules, folders with the names
# of our source roots, autouse fixtures at two levels, and importlib mode.
FILES = {
    "pyproject.toml": """
[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "--strict-markers --strict-config --import-mode=importlib"
filterwarnings = ["error"]
python_functions = ["check_*"]
python_files = ["check_*.py"]
pythonpath = ["."]
markers = ["own: a marker of this repository"]
""",
    "conftest.py": """
import pytest

@pytest.fixture(autouse=True, scope="session")
def _session_state():
    yield "ready"

@pytest.fixture(autouse=True)
def _no_home(monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
""",
    "checks/__init__.py": "",
    "checks/rules.py": "LIMIT = 3\n",
    "probe/__init__.py": "",
    "probe/core.py": '''
def double(x):
    """
    >>> double(2)
    4
    """
    return 2 * x
''',
    "tests/conftest.py": """
import pytest

@pytest.fixture(autouse=True)
def _nested(request, tmp_path):
    request.node.nested = tmp_path
""",
    "tests/check_own.py": """
import pytest
from checks.rules import LIMIT
from probe.core import double

def check_double(request):
    assert double(LIMIT) == 6
    assert request.node.nested.is_dir()

@pytest.mark.own
def check_marked():
    pass
""",
    "tests/deep/check_more.py": "def check_deep(): pass\n",
    "small.yaml": SMALL,
}
OWN = {"check_double", "check_marked", "check_deep"}


@dataclass(frozen=True)
class Ran:
    """Exit code, output, and outcome by test: {name: "passed" | "failed" | "skipped"}."""

    code: int
    output: str
    outcomes: dict[str, str]

    @property
    def own(self) -> set[str]:
        return {name for name in self.outcomes if name.startswith("check_")}

    @property
    def shipped(self) -> set[str]:
        return {name for name in self.outcomes if name.startswith("test_")}


@dataclass(frozen=True)
class Repository:
    """A repository of somebody else's, and the Python in which the wheel is installed."""

    folder: Path
    python: Path

    def run(self, *args: str, cwd: str = ".", checkpoint: str | None = "demo", measure: bool = False) -> Ran:
        """Run pytest. Unless it is to `measure`, the report that another run kept of the same measurement will do."""
        kept, shared = self.folder / kept_reports.PLACE, Path(str(MATRIX)) / "kept"
        if measure:
            shutil.rmtree(kept, ignore_errors=True)
        else:
            kept_reports.copy(shared, kept)
        given = [f"--probe-checkpoint={checkpoint}", f"--probe-config={self.folder / 'small.yaml'}"]
        junit = self.folder / "junit.xml"
        junit.unlink(missing_ok=True)
        command = [self.python, "-m", "pytest", *(given if checkpoint else ()), f"--junitxml={junit}", *args]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
        environment["PYTEST_ADDOPTS"] = "-pno:hypothesispytest -pno:jaxtyping -pno:benchmark -pno:anyio"
        done = subprocess.run(
            command, cwd=self.folder / cwd, capture_output=True, text=True, check=False, env=environment
        )
        kept_reports.copy(kept, shared)
        return Ran(done.returncode, done.stdout + done.stderr, _outcomes(junit))


def _outcomes(junit: Path) -> dict[str, str]:
    if not junit.is_file():
        return {}
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        name = case.get("name", "")
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


@pytest.fixture(params=["new", "old"], ids=["newest pytest", "pytest 8.4"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Repository:
    if MATRIX is None:
        pytest.skip("runs on the built wheel: make matrix")
    for name, content in FILES.items():
        path = tmp_path / "repo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Repository(tmp_path / "repo", Path(MATRIX) / request.param / "bin" / "python")
