"""Without a checkpoint the plugin does nothing, and costs next to nothing."""

from __future__ import annotations

import sys

import pytest

from pytest_entropy_probe.plugin import MARKERS, OPTIONS

HEAVY = {
    *("torch", "transformers", "pydantic", "numpy", "matplotlib", "rich", "yaml"),
    *("entropy_probe", "entropy_probe_checks"),
}

SPY = """
import sys

def pytest_unconfigure():
    print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_no_checkpoint_imports_nothing_and_shows_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins import numpy
    pytester.makepyfile(spy=SPY, test_own="def test_own(): pass")
    plugins = ("-p", "spy", "-p", "pytest_entropy_probe.plugin")
    result = pytester.run(sys.executable, "-m", "pytest", *plugins, "--co")  # with nothing imported
    assert result.ret == pytest.ExitCode.OK
    imported = next(line for line in result.outlines if line.startswith("IMPORTED")).split()
    assert "pytest_entropy_probe" in imported
    assert not HEAVY & set(imported)
    result.stdout.no_fnmatch_line("*entropy-probe 0*")
    result.stdout.no_fnmatch_line("*probe-checks*")
    result.stdout.fnmatch_lines(["*1 test collected*"])


def test_fixtures_without_a_checkpoint_skip_with_the_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(probe_report): pass\ndef test_two(probe_checkpoint): pass")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=2)
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
