"""Without a checkpoint the plugin does nothing, and costs next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from pytest_entropy_probe.plugin import MARKERS, OPTIONS

HEAVY = {
    *("torch", "transformers", "pydantic", "numpy", "scipy", "matplotlib", "rich", "yaml"),
    *("jaxtyping", "entropy_probe", "entropy_probe_checks"),
}
OURS = {"pytest_entropy_probe"} | {f"pytest_entropy_probe.{name}" for name in ("plugin", "names", "fixtures")}
SPY = """
import sys

def pytest_unconfigure():
    print("IMPORTED", *sorted(sys.modules))
"""


@pytest.fixture
def imported(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """A callable that runs pytest with these arguments, and says which modules it imported."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins import numpy
    pytester.makepyfile(spy=SPY, test_own="def test_own(): pass")

    def run(*args: str) -> set[str]:
        result = pytester.run(sys.executable, "-m", "pytest", "-p", "spy", *args)  # with nothing imported
        assert result.ret == pytest.ExitCode.OK
        if "--co" in args:
            result.stdout.fnmatch_lines(["*1 test collected*"])
        result.stdout.no_fnmatch_line("*entropy-probe 0*")
        result.stdout.no_fnmatch_line("*probe-checks*")
        return set(next(line for line in result.outlines if line.startswith("IMPORTED")).split())

    return run


@pytest.mark.parametrize("args", [["--co"], [], ["--fixtures"], ["--markers"]], ids=" ".join)
def test_no_checkpoint_imports_three_files_and_shows_nothing(
    imported: Callable[..., set[str]], args: list[str]
) -> None:
    """Nothing heavy, and nothing of the standard library that pytest does not import itself."""
    ours = imported("-p", "pytest_entropy_probe.plugin", *args)
    assert not HEAVY & {name.partition(".")[0] for name in ours}
    assert ours - imported(*args) == OURS


def test_the_fixtures_are_there_without_a_checkpoint(pytester: pytest.Pytester) -> None:
    names = ("checkpoint", "report", "model", "rollouts", "golden")
    shown = pytester.runpytest_subprocess("--fixtures").stdout
    shown.fnmatch_lines_random([f"probe_{name} *" for name in names])


def test_fixtures_without_a_checkpoint_skip_with_the_reason(pytester: pytest.Pytester) -> None:
    names = ("checkpoint", "report", "model", "rollouts", "golden")
    pytester.makepyfile("\n".join(f"def test_{name}(probe_{name}): pass" for name in names))
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(["SKIPPED*needs a checkpoint: run pytest with --probe-checkpoint=PATH"])


def test_a_shipped_id_without_a_checkpoint_says_what_is_missing(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("probe-checks/test_scaling.py::test_param_scaling")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *the shipped checks need a checkpoint; add --probe-checkpoint=PATH"])


def test_markers_and_options_are_documented(pytester: pytest.Pytester) -> None:
    markers = pytester.runpytest_subprocess("--markers").stdout.str()
    for name in MARKERS:
        assert f"@pytest.mark.{name}:" in markers
    options = pytester.runpytest_subprocess("--help").stdout.str()
    for key in OPTIONS:
        assert f"--probe-{key.replace('_', '-')}=" in options
        assert f"probe_{key} (" in options
