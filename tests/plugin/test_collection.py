"""The shipped checks join any run under stable ids, whatever the user's own rules are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import entropy_probe_checks

HOSTILE = """
[pytest]
python_functions = check_*
python_files = check_*.py
filterwarnings = error
addopts = --strict-markers --strict-config
"""


def shipped_tests() -> list[str]:
    """Ids without the checkpoint, read from the source text of the shipped modules."""
    folder = Path(next(iter(entropy_probe_checks.__path__)))
    return [
        f"probe-checks/{file.name}::{node.name}"
        for file in sorted(folder.glob("test_*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with naming rules of its own, a test, and an empty folder that passes for a checkpoint."""
    pytester.makeini(HOSTILE)
    pytester.makepyfile(check_own="def check_mine(): pass")
    pytester.mkdir("ckpt")
    pytester.mkdir("sub")
    return pytester


def _collected(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line]


def test_all_checks_join_the_users_own(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--co", "-q", "--probe-checkpoint=ckpt")
    assert result.ret == pytest.ExitCode.OK
    shipped = [f"{test}[ckpt]" for test in shipped_tests()]
    assert len(shipped) > 10
    assert sorted(_collected(result)) == sorted(["check_own.py::check_mine", *shipped])


def test_a_path_leaves_the_checks_out(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--co", "-q", "--probe-checkpoint=ckpt", "check_own.py")
    assert _collected(result) == ["check_own.py::check_mine"]


@pytest.mark.parametrize(
    ("folder", "args", "expected"),
    [
        (".", ["probe-checks/test_checkpoint.py::test_loads"], ["test_loads[a]", "test_loads[b]"]),
        (".", ["probe-checks/test_checkpoint.py::test_loads[b]"], ["test_loads[b]"]),
        ("sub", ["../probe-checks/test_checkpoint.py::test_loads[b]"], ["test_loads[b]"]),
        ("sub", ["probe-checks/test_checkpoint.py::test_loads[b]"], ["test_loads[b]"]),
        (".", ["probe-checks/test_checkpoint.py::test_loads[b]", "check_own.py"], ["check_mine", "test_loads[b]"]),
        (".", ["-k", "loads and b"], ["test_loads[b]"]),
    ],
)
def test_selection_by_id(
    project: pytest.Pytester, folder: str, args: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    ckpt = project.path / "ckpt"
    result = project.runpytest_subprocess(
        "--co", "-q", f"--probe-checkpoint=a={ckpt}", f"--probe-checkpoint=b={ckpt}", *args
    )
    assert [line.rpartition("::")[2] for line in _collected(result)] == expected


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    "stray",
    [
        "probe-checks/test_no.py",
        "probe-checks/test_checkpoint.py::test_no",
        "probe-checks/test_checkpoint.py::test_loads[no]",
    ],
)
def test_an_id_that_fits_nothing_is_a_usage_error(project: pytest.Pytester, stray: str, workers: str) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", f"-n{workers}", stray)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: not found: {stray.replace('[', '[[]')}; *"])


def test_nothing_selected_is_exit_code_5(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", "-k", "no_such_name")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
