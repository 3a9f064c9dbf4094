"""Edges of use: what cannot be written, what is misspelt, and what is given without what it needs, each in one line and
before anything is measured; pipes that close; names in tables; a reward of one's own between runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import forked
from entropy_probe import Verdict
from entropy_probe.__main__ import EXIT_PIPE, EXIT_USAGE, main
from entropy_probe.errors import ConfigError
from entropy_probe.stages.responses import sources
from entropy_probe_checks.thresholds import require_known
from pytest_entropy_probe.judge import conclude
from pytest_entropy_probe.settings import read_settings
from pytest_entropy_probe.shown import tables, terminal
from pytest_entropy_probe.shown.explain import explanation
from pytest_entropy_probe.shown.tables import Row, Step

SMALL = "batch: {num_prompts: 2, num_update_prompts: 2, reward: 'mine:reward'}\nbudget: smoke\n"
SMALL += "generation: {num_return_sequences: 2, max_new_tokens: 4}\n"
OWN = "def test_own(probe_checkpoint): pass"


# What is written


UNWRITABLE = [
    ["--probe-json=/proc/none/x.json"],
    ["--probe-json=/proc/x.json"],
    [f"--probe-json={'x' * 300}.json"],
    ["--probe-plot=/proc/x.png"],
    ["--probe-evidence=/proc/x"],
    ["--probe-golden-dir=/proc/x", "--probe-golden-update=missing"],
    ["--junitxml=/proc/x/j.xml"],
    ["--junitxml=/proc/j.xml"],
]


@pytest.mark.parametrize("args", UNWRITABLE, ids=lambda args: args[0][:30])
def test_what_cannot_be_written_is_found_before_the_measurement(
    pytester: pytest.Pytester, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(test_own=OWN)
    Path("a").mkdir()
    with pytest.raises(pytest.UsageError) as error:
        read_settings(pytester.parseconfig("test_own.py", "--probe-checkpoint=a", *args))
    option = args[0].partition("=")[0]
    assert str(error.value).startswith(f"{option}: ")
    assert "cannot be written" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["a", "test_own.py"]


def test_the_page_of_a_job_too(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(test_own=OWN)
    Path("a").mkdir()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/proc/x")
    with pytest.raises(pytest.UsageError, match=r"^GITHUB_STEP_SUMMARY: /proc/x: cannot be written \("):
        read_settings(pytester.parseconfig("test_own.py", "--probe-checkpoint=a"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "page.md"))
    read_settings(pytester.parseconfig("test_own.py", "--probe-checkpoint=a"))
    assert not Path("page.md").exists()


@pytest.mark.parametrize("option", ["--out", "--plot", "--evidence"])
def test_the_command_too(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main(["run", "demo", option, "/proc/none.png"]) == EXIT_USAGE
    assert "entropy-probe: /proc/none.png: cannot be written (" in capsys.readouterr().err


def pytest_run(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.python("-m", "pytest", *args, cwd=folder, environment={**os.environ, **environment})


NO_FORWARD = """
import torch
def refuse(*args, **kwargs): raise AssertionError("a module was called")
torch.nn.Module.__call__ = refuse
"""


def test_full_disks_fail_a_run_that_shows_its_summary_and_an_own_reward_is_kept(tmp_path: Path) -> None:
    """Of report.json, and of JUnit's file, whose error would end pytest before the summary; then out of the cache,
    until a file that the reward imports changes."""
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "mine.py").write_text("from help_me import value\ndef reward(text, gold): return value(text)\n")
    (tmp_path / "help_me.py").write_text("def value(text): return float(len(text) % 3)\n")
    given = ["--probe-checkpoint=demo", "--probe-config=small.yaml", "-m", "zero_check"]
    first = pytest_run(tmp_path, *given, "--probe-json=/dev/full", "--junitxml=/dev/full", PYTEST_ADDOPTS="")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "Traceback" not in first.stdout + first.stderr
    assert "demo: Healthy: " in first.stdout or "demo: Cannot tell: " in first.stdout
    assert "entropy-probe: /dev/full: cannot be written (No space left on device); choose another path" in first.stdout
    assert "entropy-probe: a report of another plugin: cannot be written (No space left on device)" in first.stdout
    assert "2 passed" in first.stdout
    assert not (tmp_path / ".benchmarks").exists()  # with pytest-benchmark, which makes it

    (tmp_path / "conftest.py").write_text(NO_FORWARD)
    again = pytest_run(tmp_path, *given)
    assert again.returncode == 0, again.stdout
    assert "entropy-probe: demo: report from pytest's cache (--probe-no-cache)" in again.stdout
    (tmp_path / "help_me.py").write_text("def value(text): return float(len(text) % 5)\n")
    changed = pytest_run(tmp_path, *given)
    assert changed.returncode == 1
    assert "a module was called" in changed.stdout


def test_what_a_reward_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the user's, by name; nothing is imported; without a source there is a reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_here").mkdir()
    for name, text in {
        "__init__": "raise AssertionError('imported')",
        "of_mine": "import json, torch\nfrom . import near\nfrom .near import far\nfrom there import x\n",
        "near": "far = 1",
    }.items():
        (tmp_path / "rewards_here" / f"{name}.py").write_text(text)
    (tmp_path / "there.py").write_text("import rewards_here.of_mine\nx = 1\n")
    before = sources.digests("rewards_here.of_mine:reward")
    names = {"rewards_here.of_mine", "rewards_here.near", "rewards_here", "there", "torch"}
    assert set(before) == names
    (tmp_path / "there.py").write_text("x = 2\n")
    after = sources.digests("rewards_here.of_mine:reward")
    assert {name for name in names if before[name] != after[name]} == {"there"}
    with pytest.raises(ConfigError, match="'math:sqrt' is code of your own without a source"):
        sources.digests("math:sqrt")


# Names and options


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (
            ["--probe-json=x.json"],
            "--probe-json: nothing is measured without a checkpoint; add --probe-checkpoint=PATH",
        ),
        (["--probe-budget", "smoke"], "--probe-budget: nothing is measured without a checkpoint; *"),
        (["--probe-checkpoint=a", "-m", "acceptanec"], "-m: there is no marker acceptanec; did you mean acceptance?"),
        (["--probe-checkpoint=a", "-m", "gates or scaling"], "-m: there is no marker gates; did you mean gate?"),
        pytest.param(
            ["--probe-checkpoint=a", "--probe-device=cuda"],
            "device 'cuda': cannot be used (*); choose another --probe-device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (
            ["--probe-checkpoint=a", "--probe-config=ess.yaml"],
            "*the limit of `ess` is not set under `limits`; set true*",
        ),
    ],
)
def test_usage(pytester: pytest.Pytester, args: list[str], complaint: str) -> None:
    pytester.makepyfile(test_own=OWN)
    Path("a").mkdir()
    Path("ess.yaml").write_text("limits: {ess: {min: 0.3}}")
    result = pytester.runpytest_subprocess("test_own.py", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {complaint}".replace("[", "[[]")])
    assert len([line for line in result.errlines if line]) == 1


def test_a_marker_that_selects_nothing(pytester: pytest.Pytester) -> None:
    """Without a checkpoint; options in a file of pytest's own stay where there is none."""
    pytester.makepyfile(test_own="def test_own(): pass")
    pytester.makeini("[pytest]\naddopts = --probe-budget=smoke\n")
    for name, line in {
        "acceptance": "entropy-probe: -m acceptance selects checks of a checkpoint; add",
        "acceptanec": "entropy-probe: there is no marker acceptanec, did you mean acceptance? -m",
    }.items():
        result = pytester.runpytest_subprocess("-m", name)
        assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
        result.stdout.fnmatch_lines([line, "*--probe-checkpoint=PATH"])
        assert all(len(line) <= 80 for line in result.outlines if "checkpoint" in line)
    pytester.runpytest_subprocess("-m", "mine").stdout.no_fnmatch_line("entropy-probe: *")
    assert pytester.runpytest_subprocess().ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("limits: {logit_scalin: 2}", "unknown criterion `logit_scalin` under `limits`; did you mean `logit_scaling`?"),
        ("allow_inconclusive: [es]", "unknown criterion `es` under `allow_inconclusive`; did you mean `ess`?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "drill"])
def test_a_misspelt_limit_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str, command: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main([command, "demo", "--config", str(tmp_path / "c.yaml")]) == EXIT_USAGE
    assert capsys.readouterr().err == f"entropy-probe: configuration: {complaint}\n"


def test_a_reference_that_is_not_there_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the recipe comes to need it or not."""
    assert main(["run", "demo", "--reference-model", "nowhere"]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("entropy-probe: --reference-model: no such folder: nowhere; ")


def test_a_table_that_nothing_reads(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_own=OWN)
    pytester.makepyprojecttoml("[tool.entropy_probe]\nbudget = 'smoke'\n")
    Path("a").mkdir()
    result = pytester.runpytest_subprocess("test_own.py", "--probe-checkpoint=a")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *: nothing reads [[]tool.entropy_probe]; write [[]tool.entropy-probe]"])


def test_a_limit_of_another_section_is_known() -> None:
    with pytest.raises(ConfigError, match=r"the limit of `ess` is not set under `limits`; set true_delta_h.min_ess_fr"):
        require_known({"ess": {"min": 0.3}})


# Pipes


@contextmanager
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Standard output into a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield stream
    stream.close()


@pytest.mark.parametrize("args", [["inspect", "demo"], ["inspect", "demo", "--json"], ["--help"], ["run", "--help"]])
def test_a_closed_pipe_ends_silently(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    with closed(monkeypatch) as stream:
        assert main(args) == EXIT_PIPE
        stream.flush()  # nothing is left that Python would complain of at its end
    assert capfd.readouterr().err == ""


def test_standard_output_on_a_full_disk(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["inspect", "demo"]) == 1
    line = "entropy-probe: standard output: cannot be written (No space left on device); free space on it\n"
    assert capfd.readouterr().err == line


# What is shown


LONG = "runs-of-this-week/grpo-qwen2.5-0.5b-lr3e-6-kl0.04/checkpoint-1000"


def written(table: Any, above: list[str]) -> list[str]:
    lines: list[str] = []
    terminal.write_table(SimpleNamespace(hasmarkup=False, write_line=lines.append), table, above=above, width=80)
    return lines


@pytest.mark.parametrize("plain", [True, False])
def test_long_names_stand_above_their_rows(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, so that they can be searched for; short ones beside their figures."""
    monkeypatch.setattr(terminal, "plain", lambda: plain)
    figures = ("0.436±0.007", "-0.0093±0.0002", "-0.0100±0.0004", "1.00", "passed")
    steps = [Step(name, "run", None, *figures) for name in ("short", LONG)]
    lines = written(tables.steps_table(steps, plain=plain), tables.long_names(steps, plain=plain))
    assert LONG in lines
    assert "-0.0093" in lines[lines.index(LONG) + 1]
    assert any(line.startswith("short ") and "-0.0093" in line for line in lines)
    assert max(map(len, lines)) <= 80

    golden = f"golden_{'the_logits_of_a_layer_' * 2}"
    rows = [Row("c", name, "inconclusive", 1.23e-10, 4.56e-10) for name in ("preconditioner_complete", golden)]
    shown = written(tables.criteria_table("c", rows, plain=plain), tables.long_criteria(rows))
    assert any(line.startswith(("| ", "│ ")) and f" {golden} " in line for line in shown)
    assert any("preconditioner_complete" in line and "1.23e-10" in line for line in shown)
    assert max(map(len, shown)) <= 80


def test_a_relative_gate_says_in_what_it_is_measured() -> None:
    row = Row("c", "entropy", "fail", 0.62, 0.5, noisy=True, unit="share of the baseline")
    assert row.shown == ("0.62 share", "0.5 share")
    assert Row("c", "entropy", "pass", -0.0, 3.0, noisy=True, unit="SE of the difference").shown == ("0 SE", "3 SE")
    verdict = Verdict(
        criterion="entropy", family="gate", status="fail", value=0.62, limit=0.5, hint="", unit="share of the baseline"
    )
    with pytest.raises(pytest.fail.Exception, match=r"^entropy: 0.62 > 0.5 \(share of the baseline\)"):
        conclude(verdict, allowed=False)


def test_headings_of_an_explanation_stand_apart() -> None:
    text = explanation("preconditioner_witness")
    assert "  optimizer only for Adam" in text
    assert max(map(len, explanation("all").splitlines())) <= 80


def test_lines_of_progress_leave_the_row_of_dots_whole(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is ended before them, and stands again behind them as far as it was."""
    pytester.makepyfile(
        conftest="""
        import pytest
        from pytest_entropy_probe import progress
        progress.SECONDS_BETWEEN_LINES = 0.0

        @pytest.fixture
        def slow(request):
            with progress.shown(request.config, "demo") as show:
                show("load", 0, 0)
                show("sample", 1, 2)
        """,
        test_own="def test_a(): pass\ndef test_b(slow): pass\ndef test_c(): pass\n",
    )
    code = "import sys, pytest; sys.exit(pytest.main(['-p', 'no:randomly', 'test_own.py']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    lines = done.stdout.splitlines()
    first = lines.index("test_own.py .")
    assert [line.split(",")[0] for line in lines[first + 1 : first + 3]] == [
        "entropy-probe: demo: load",
        "entropy-probe: demo: sample 1/2",
    ]
    assert lines[first + 3].startswith("test_own.py ...")
    assert lines[first + 3].endswith("[100%]")
    apart = subprocess.run(command, capture_output=True, text=True, check=True)
    assert any(line.startswith("test_own.py ... ") for line in apart.stdout.splitlines())
    assert len(apart.stderr.splitlines()) == 2
