"""A checkpoint that can't be loaded: one failure of one line, the rest skipped, nothing passed over in silence."""

from __future__ import annotations

import re

import pytest

LINE = r"{folder}\S*: [^;\n]+; [^\n]+"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.mkdir("empty")
    pytester.mkdir("void")
    return pytester


def test_one_check_fails_with_one_line(project: pytest.Pytester) -> None:
    project.makepyfile(test_own="def test_own(): pass")
    result = project.runpytest_subprocess("--probe-checkpoint=empty", "--probe-json=report.json", "-rfs")
    outcomes = result.parseoutcomes()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert (outcomes["failed"], outcomes["passed"]) == (1, 1)
    assert outcomes["skipped"] > 10
    result.stdout.fnmatch_lines(["SKIPPED*: checkpoint not loaded"])
    result.stdout.fnmatch_lines(["empty: Not measured:*", "entropy-probe: *report.json: not written; *"])
    result.stdout.fnmatch_lines(["FAILED probe-checks/test_checkpoint.py::test_loads*"])
    text = result.stdout.str()
    assert "Traceback" not in text
    assert re.search(rf"__ test_loads\[empty\] _+\n{LINE.format(folder=project.path / 'empty')}\n[=-]", text)
    assert not list((project.path / "empty").iterdir())
    assert not (project.path / "report.json").exists()


def test_last_failed_runs_the_failed_check_beside_the_users_own(project: pytest.Pytester) -> None:
    project.makepyfile(test_own="def test_own(): assert False", test_good="def test_good(): pass")
    first = project.runpytest_subprocess("--probe-checkpoint=empty", "-q")
    assert (first.parseoutcomes()["failed"], first.parseoutcomes()["passed"]) == (2, 1)
    first.stdout.no_fnmatch_line("*= entropy probe =*")
    again = project.runpytest_subprocess("--probe-checkpoint=empty", "-q", "--lf")
    assert again.parseoutcomes()["failed"] == 2
    assert not {"passed", "skipped"} & set(again.parseoutcomes())


def test_the_line_is_shown_where_test_loads_is_not_selected(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=empty", "probe-checks/test_scaling.py")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes()["failed"] == 1
    assert re.search(LINE.format(folder=project.path / "empty"), result.stdout.str())


def test_a_users_own_test_gets_the_line(project: pytest.Pytester) -> None:
    project.makepyfile(test_own="def test_own(probe_report): pass")
    result = project.runpytest_subprocess("--probe-checkpoint=empty", "test_own.py")
    result.assert_outcomes(errors=1)
    assert re.search(LINE.format(folder=project.path / "empty"), result.stdout.str())
    assert "Traceback" not in result.stdout.str()


def test_one_checkpoint_stays_on_one_worker(project: pytest.Pytester) -> None:
    args = ("--probe-checkpoint=empty", "--probe-checkpoint=void", "-v", "-n2")
    result = project.runpytest_subprocess(*args)
    assert result.parseoutcomes()["failed"] == 2
    ran = re.findall(r"\[(gw\d)\].*probe-checks/.*\[(empty|void)\]", result.stdout.str())
    assert {name for _, name in ran} == {"empty", "void"}
    assert len(set(ran)) == 2
