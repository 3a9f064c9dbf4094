"""What a repository or a shell can do to a run without meaning to: each ends in one line or changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_probe_checks.criteria import CRITERIA
from pytest_entropy_probe.collection.xfails import KnownFailure, read_xfails

PARAM = "probe-checks/test_scaling.py::test_param_scaling"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_own="def test_mine(): pass")
    pytester.mkdir("ckpt")
    return pytester


@pytest.mark.parametrize("workers", [(), ("-n2",)])
def test_checks_that_a_hook_drops_are_missed(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    project.makeconftest(
        "def pytest_collection_modifyitems(items): items[:] = [i for i in items if 'test_own' in i.nodeid]"
    )
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", *workers)
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    text = result.stdout.str() + result.stderr.str()
    assert "checks were dropped by a pytest_collection_modifyitems hook" in text
    assert "INTERNALERROR" not in text


def test_checks_that_a_hook_deselects_are_not(project: pytest.Pytester) -> None:
    project.makeconftest(
        "def pytest_collection_modifyitems(items, config):\n"
        "    ours = [i for i in items if 'probe-checks' in i.nodeid]\n"
        "    items[:] = [i for i in items if i not in ours]\n"
        "    config.hook.pytest_deselected(items=ours)\n"
    )
    assert project.runpytest_subprocess("--probe-checkpoint=ckpt").ret == pytest.ExitCode.OK


def test_fixtures_of_the_users_own_do_not_reach_the_checks(project: pytest.Pytester) -> None:
    """An empty folder is no checkpoint, whatever a conftest calls its fixtures."""
    names = ("probe_judge", "probe_loaded", "probe_measured", "probe_checkpoint", "probe_report")
    project.makeconftest(
        "import pytest\n" + "".join(f"@pytest.fixture\ndef {name}(): return lambda *_: None\n" for name in names)
    )
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt")
    # The user's own test passes, test_loads fails, and nothing else is run: neither a criterion nor a gate.
    result.assert_outcomes(passed=1, failed=1, skipped=len(CRITERIA) + 1)
    result.stdout.fnmatch_lines(["*ckpt: has neither config.json nor adapter_config.json; *"])


@pytest.mark.parametrize("option", ["checkpoint", "config", "json", "seed", "rollouts", "device", "budget"])
def test_empty_values_are_refused(project: pytest.Pytester, option: str) -> None:
    given = () if option == "checkpoint" else ("--probe-checkpoint=ckpt",)
    result = project.runpytest_subprocess(*given, f"--probe-{option}=")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --probe-{option}: is empty; give a value or leave the option out"])


def test_a_glob_over_folders_with_an_equals_sign(project: pytest.Pytester) -> None:
    for folder in ("lr=1/checkpoint-5", "lr=2/checkpoint-5", "zz/checkpoint-5"):
        (project.path / folder).mkdir(parents=True)
    result = project.runpytest_subprocess("--co", "--probe-checkpoint=lr=*/checkpoint-*")
    result.stdout.fnmatch_lines(["entropy-probe *: 2 checkpoints: lr=1/checkpoint-5, lr=2/checkpoint-5"])
    result = project.runpytest_subprocess("--co", "--probe-checkpoint=x=*/checkpoint-5")
    result.stdout.fnmatch_lines(["entropy-probe *: 3 checkpoints: x/lr=1/checkpoint-5, x/lr=2/*, x/zz/checkpoint-5"])


def test_pytest_is_not_started_in_the_checkpoint(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.path / "ckpt")
    result = project.runpytest_subprocess("--probe-checkpoint=.", "--rootdir=.")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --probe-checkpoint: rootdir is in the checkpoint *; start pytest in another folder"]
    )
    assert not list((project.path / "ckpt").iterdir())


def test_rootdir_trap_between_nested_configurations(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nearer ini file would be left aside, and with it its keys."""
    project.makeini("[pytest]")
    sub = project.mkdir("sub")
    (sub / "pytest.ini").write_text("[pytest]\nprobe_seed = 3\n")
    monkeypatch.chdir(sub)
    result = project.runpytest_subprocess("--co", "--probe-checkpoint", "../ckpt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*write --probe-checkpoint=../ckpt*"])
    assert project.runpytest_subprocess("--co", "--probe-checkpoint=../ckpt").ret == pytest.ExitCode.OK


def test_report_that_could_not_be_written_is_refused_beforehand(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", "--probe-json=test_own.py/report.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --probe-json: cannot write into *test_own.py; give another path"])


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_devices_that_are_none(project: pytest.Pytester, device: str) -> None:
    result = project.runpytest_subprocess("--probe-checkpoint=ckpt", f"--probe-device={device}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = f"ERROR: configuration: `device`: '{device}' is not a device: give cpu, cuda or cuda:N*"
    result.stderr.fnmatch_lines([said])


def test_ini_paths_start_at_the_ini_file(project: pytest.Pytester) -> None:
    conf = project.mkdir("conf")
    (conf / "probe.yaml").write_text("limits: {nonsense: 1}")
    (conf / "other.ini").write_text("[pytest]\nprobe_config = probe.yaml\n")
    result = project.runpytest_subprocess(
        "-c", "conf/other.ini", "--rootdir=.", f"--probe-checkpoint={project.path}/ckpt"
    )
    result.stderr.fnmatch_lines(["ERROR: configuration: unknown criterion `nonsense` under `limits`; *"])


def test_pyproject_above_rootdir_is_read(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    project.makepyprojecttoml("[tool.entropy-probe]\nbatsh = 1\n")
    sub = project.mkdir("sub")
    (sub / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.chdir(sub)
    result = project.runpytest_subprocess("--co", "--probe-checkpoint=../ckpt")
    result.stderr.fnmatch_lines(["ERROR: *pyproject.toml: unknown key `batsh`; did you mean `batch`?"])


def test_known_failures_with_byte_order_mark_and_tabs(tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text(f"\ufeff# comment\n{PARAM}[demo]\tit is known\n", encoding="utf-8")
    ids = [f"{PARAM}[demo]", f"{PARAM}[demo2]"]
    assert read_xfails(file, ids) == (KnownFailure(f"{PARAM}[demo]", "it is known"),)
    file.write_text("p reason\n")
    with pytest.raises(pytest.UsageError, match="no check's id starts with 'p'"):
        read_xfails(file, ids)


def test_explanations_on_a_stream_that_knows_ascii_only(tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pytest", "--probe-explain=all"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "logit_scaling (-m scaling)" in done.stdout
