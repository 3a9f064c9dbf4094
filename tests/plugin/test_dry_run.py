"""`--probe-dry-run`: the plan of every checkpoint is printed, nothing is collected or measured, and the exit code says
whether it fits."""

from __future__ import annotations

from pathlib import Path

import pytest

import forked
from entropy_probe.__main__ import main

OWN = "def test_own(probe_report): raise AssertionError('measured')\n"


@pytest.mark.parametrize(("limit", "code"), [("8GiB", 0), ("1MiB", 1)])
def test_it_says_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, code: int) -> None:
    (tmp_path / "test_own.py").write_text(OWN)
    assert main(["plan", "demo", "--memory-limit", limit, "--budget", "smoke"]) == code
    said = capsys.readouterr().out
    options = (f"--probe-memory-limit={limit}", "--probe-budget=smoke", "--probe-dry-run")
    done = forked.python("-m", "pytest", "--probe-checkpoint=demo", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"test_own.py"}  # no cache, no report


def test_of_several_checkpoints_one_may_not_fit(tmp_path: Path) -> None:
    """Each under its own name; under the ini key, and with -n, too."""
    (tmp_path / "probe.yaml").write_text("memory_limit: 1MiB\n")
    given = ("--probe-checkpoint=one=demo", "--probe-checkpoint=two=demo", "-oprobe_dry_run=true", "-n1")
    for config, code in (((), 0), (("--probe-config=probe.yaml",), 1)):
        done = forked.python("-m", "pytest", *given, *config, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout.startswith("one: ")
        assert "\ntwo: " in done.stdout
        assert ("would fit: " in done.stdout) == bool(code)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "--probe-dry-run: nothing is measured without a checkpoint; add --probe-checkpoint=PATH"),
        (("--probe-checkpoint=nowhere",), "--probe-checkpoint: no such folder:"),
        (("--probe-checkpoint=empty",), "empty: "),
        (("--probe-checkpoint=demo", "--probe-memory-limit=much"), "`memory_limit`: 'much' is not a size"),
    ],
)
def test_what_is_wrong_is_a_usage_error(tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    (tmp_path / "empty").mkdir()
    done = forked.python("-m", "pytest", *options, "--probe-dry-run", cwd=tmp_path)
    assert done.returncode == 4, done.stdout
    assert line in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
