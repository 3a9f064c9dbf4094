"""--probe-explain, --probe-xfails, limits under -v, and the fixtures that hand out model and responses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import forked
from entropy_probe_checks.criteria import CRITERIA
from entropy_probe_checks.thresholds import LIMITS
from pytest_entropy_probe.collection.xfails import KnownFailure, read_xfails
from pytest_entropy_probe.progress import _lines
from pytest_entropy_probe.shown.explain import explanation

SMALL = """
batch: {num_prompts: 4, num_update_prompts: 4}
generation: {num_return_sequences: 2, max_new_tokens: 6}
allow_inconclusive: [y_coverage, se_identity, se_agreement]
limits: {param_scaling: 0.5}
"""
PARAM = "probe-checks/test_scaling.py::test_param_scaling"
OWN = """
import torch

def test_model_and_responses(probe_model, probe_rollouts, probe_report):
    assert probe_rollouts.num_prompts == probe_report.batch.num_prompts == 4
    with torch.no_grad():
        logits = probe_model.logits(probe_rollouts.ids)
    assert logits.shape[:2] == probe_rollouts.ids.shape
    assert not probe_model.module.training

def test_asked_for_later(request, probe_report):
    assert request.getfixturevalue("probe_model").module is not None
"""


def _pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "small.yaml").write_text(SMALL)
    return forked.python("-m", "pytest", "-p", "no:cacheprovider", *args, cwd=folder)


def _demo(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return _pytest(folder, "--probe-checkpoint=demo", "--probe-config=small.yaml", *args)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_explanation_says_what_why_and_what_to_do(name: str) -> None:
    text = explanation(name)
    assert text.startswith(f"{name} (-m {CRITERIA[name].family})")
    words = " ".join(text.split())
    for part in (CRITERIA[name].measures, CRITERIA[name].meaning, LIMITS[name].source):
        assert " ".join(part.split())[:40].replace("- ", "-") in words.replace("- ", "-")
    assert max(map(len, text.splitlines())) <= 80


def test_explain_prints_and_exits(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "--probe-explain=all")
    assert done.returncode == 0
    assert all(f"{name} (-m " in done.stdout for name in CRITERIA)
    assert "test session starts" not in done.stdout
    wrong = _pytest(tmp_path, "--probe-explain=es")
    assert wrong.returncode == 4
    assert "no criterion 'es'; did you mean ess?" in wrong.stderr


def test_known_failure_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text(f"# known\n\n{PARAM}  the limit was set below one\n")
    (tmp_path / "test_own.py").write_text(OWN)
    done = _demo(tmp_path, "--probe-xfails=known.txt", "-v", "-rx")
    assert done.returncode == 0, done.stdout
    assert "1 xfailed" in done.stdout
    assert "the limit was set below one" in done.stdout
    assert "XFAIL" in done.stdout.partition("= entropy probe =")[2]
    assert "limit param_scaling = 0.5: limits.param_scaling of the configuration" in done.stdout
    assert f"limit zero_check = 0: {LIMITS['zero_check'].source}" in done.stdout
    for own in ("test_model_and_responses", "test_asked_for_later"):
        assert f"test_own.py::{own}[demo] PASSED" in done.stdout


def test_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("probe-checks/test_scaling.py::test_logit_scaling[demo] it was broken once\n")
    done = _demo(tmp_path, "--probe-xfails=known.txt", "-m", "scaling", "-n2")
    assert done.returncode == 1
    assert "[XPASS(strict)] it was broken once" in done.stdout
    assert "param_scaling: 1 > 0.5" in done.stdout


def test_quiet_shows_neither_header_nor_table(tmp_path: Path) -> None:
    done = _demo(tmp_path, "-q", "-m", "zero_check")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "entropy" not in done.stdout


LABELS = ["entropy", "change", "resolves", "step", "gradient", "prompts", "ESS", "recipe"]


def test_what_was_found_is_said_whatever_was_selected(tmp_path: Path) -> None:
    done = _demo(tmp_path, "-m", "zero_check")
    assert done.returncode == 0
    found = done.stdout.partition("= entropy probe =")[2]
    labels = [line[:9].strip() for line in found.splitlines() if line[:9].strip() in LABELS]
    assert labels == LABELS
    assert max(map(len, found.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("probe-checks/test_nothing.py::test_x because", "known.txt:2: no check's id starts with"),
        (f"{PARAM}[other] because", "known.txt:2: no check's id starts with"),
        (PARAM, "known.txt:2: no reason"),
    ],
)
def test_lines_that_fit_nothing_are_usage_errors(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "known.txt").write_text(f"# comment\n{line}\n")
    with pytest.raises(pytest.UsageError, match=complaint):
        read_xfails(tmp_path / "known.txt", [f"{PARAM}[demo]"])
    with pytest.raises(pytest.UsageError, match="cannot be read"):
        read_xfails(tmp_path / "none.txt", [])


def test_a_name_with_blanks_belongs_to_the_id(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text(f"{PARAM}[my run] it is known\n{PARAM} so is this\n")
    assert read_xfails(tmp_path / "known.txt", [f"{PARAM}[my run]"]) == (
        KnownFailure(f"{PARAM}[my run]", "it is known"),
        KnownFailure(PARAM, "so is this"),
    )


def test_lines_of_progress_come_every_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 12.0, 15.0, 23.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with (tmp_path / "err").open("w") as stream:
        write = _lines(stream, "demo", lambda: print("left", file=stream))
        for done in range(4):
            write("sampling", done, 4)
    lines = ["left", "entropy-probe: demo: sampling 1/4, 12 s", "entropy-probe: demo: sampling 3/4, 23 s", ""]
    assert (tmp_path / "err").read_text() == "\n".join(lines)


def test_what_differs_from_the_defaults_stands_in_the_header(tmp_path: Path) -> None:
    """A limit and a budget of the user's own are shown without -v; what is as it always is, is not."""
    (tmp_path / "probe.yaml").write_text("budget: smoke\nlimits: {logit_scaling: 2.5}\n")
    given = ("--probe-checkpoint=demo", "--collect-only")
    changed, plain = _pytest(tmp_path, *given, "--probe-config=probe.yaml").stdout, _pytest(tmp_path, *given).stdout
    assert "limit logit_scaling = 2.5: limits.logit_scaling of the configuration" in changed
    assert "budget smoke, without taylor" in changed
    assert "limit zero_check" not in changed
    assert "  limit " not in plain
    assert "  budget " not in plain
