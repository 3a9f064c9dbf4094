"""The shipped checks join any run under stable ids, whatever the user's own rules are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import entropy_probe_checks
from entropy_probe_checks.bounds import GATES

HOSTILE = """
[pytest]
python_functions = check_*
python_files = check_*.py
filterwarnings = error
addopts = --strict-markers --strict-config
"""


GATES_ON = "limits: {" + ", ".join(f"{gate}: {{max: 1}}" for gate in GATES) + "}"
ON_REQUEST = {
    "test_golden.py": "--probe-golden-dir=golden",
    "test_gate.py": "--probe-config=gates.yaml",
    "test_benchmark.py": "--benchmark-only",
}


def shipped_tests() -> list[str]:
    """Ids without the checkpoint, read from the source text of the modules that need no other option."""
    folder = Path(next(iter(entropy_probe_checks.__path__)))
    return [
        f"probe-checks/{file.name}::{node.name}"
        for file in sorted(folder.glob("test_*.py"))
        if file.name not in ON_REQUEST
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


def test_no_gate_is_on(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", "-m", "gate")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["*no gate is on; set bounds, such as*"])


def test_a_path_leaves_the_checks_out(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--co", "-q", "--probe-checkpoint=ckpt", "check_own.py")
    assert _collected(result) == ["check_own.py::check_mine"]


@pytest.mark.parametrize(("module", "option"), ON_REQUEST.items())
def test_a_module_on_request(
    project: pytest.Pytester, module: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would measure nothing
    Path("gates.yaml").write_text(GATES_ON)
    selected = ("--co", "-q", "--probe-checkpoint=ckpt", f"probe-checks/{module}")
    without = project.runpytest_subprocess(*selected)
    assert without.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, without.errlines)
    assert line.startswith(f"ERROR: probe-checks/{module}: ")
    with_it = project.runpytest_subprocess(*selected, option, "-pbenchmark")
    assert with_it.ret == pytest.ExitCode.OK
    collected = [line for line in with_it.outlines if "::" in line]
    assert collected
    assert all(line.startswith(f"probe-checks/{module}::") for line in collected)
    everything = project.runpytest_subprocess("--co", "-q", "--probe-checkpoint=ckpt", option, "-pbenchmark")
    assert set(collected) < set(_collected(everything))


def test_a_gate_without_bounds_is_off_beside_others(project: pytest.Pytester) -> None:
    Path("one.yaml").write_text("limits: {reward: {min: 0}}")
    one = ("--co", "-q", "--probe-checkpoint=ckpt", "--probe-config=one.yaml")
    on = project.runpytest_subprocess(*one, "probe-checks/test_gate.py")
    assert _collected(on) == ["probe-checks/test_gate.py::test_reward[ckpt]"]
    off = project.runpytest_subprocess(*one, "probe-checks/test_gate.py::test_entropy")
    assert off.ret == pytest.ExitCode.USAGE_ERROR
    off.stderr.fnmatch_lines(["ERROR: *: the gate entropy is off; set bounds, such as limits: {entropy: {min: 0.05}}"])


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
