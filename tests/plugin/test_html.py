"""`--probe-html`: a run of one checkpoint that is measured and one that does not load, as one page, and under xdist."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import forked
import healthy
from pages import Page

CONFIG = "limits: {param_scaling: 0.5, entropy: {min: 99}}\ngeneration: {num_return_sequences: 4, max_new_tokens: 8}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    healthy.supervised("llama", folder / "runs" / "a" / "checkpoint-3", 0)
    (folder / "runs" / "a" / "checkpoint-4").mkdir()
    (folder / "probe.yaml").write_text(CONFIG)
    return folder


def run(folder: Path, *arguments: str) -> Any:
    options = ("--probe-checkpoint=runs/a/checkpoint-*", "--probe-budget=smoke", "--probe-config=probe.yaml")
    rest = ("-m", "acceptance or gate", "-q", *arguments)
    return forked.python("-m", "pytest", *options, *rest, cwd=folder, environment={**os.environ, "COLUMNS": "80"})


def test_a_run_and_the_same_under_xdist(folder: Path) -> None:
    """The second takes what was measured from pytest's cache, in a worker, whose evidence comes to the page too."""
    done = run(folder, "--probe-html=deep/one.html")
    assert done.returncode == 1, done.stdout[-3000:]
    text = (folder / "deep" / "one.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.faults == []
    assert page.text.startswith("2 checkpoints")
    assert "Of 2 checkpoints 2 did not pass or could not be measured (checkpoint-3, checkpoint-4)." in page.text
    why = "has neither config.json nor adapter_config.json; give the folder that the trainer wrote"
    assert re.search(rf"Not measured: \S+checkpoint-4: {why}", page.text)
    failed = re.findall(r'<article class="failure (\w+)">\s*<h4>.*?<code>(\w+)</code>', text, re.DOTALL)
    assert ("inconclusive", "entropy") in failed  # nobody chose these prompts
    assert ("fail", "param_scaling") in failed
    assert {status for status, _ in failed} <= {"fail", "inconclusive"}
    assert "Responses that matter most" in page.text
    assert "Entropy audit" in page.text
    assert len(page.of("svg")) == 8

    done = run(folder, "--probe-html=two.html", "-n1")
    assert done.returncode == 1, done.stdout[-3000:]
    assert "report from pytest's cache" in done.stdout
    again = (folder / "two.html").read_text(encoding="utf-8")
    note = "<li>report from pytest&#39;s cache (--probe-no-cache)</li>"
    assert note in again
    assert _plain(again.replace(note, "")) == _plain(text)


def _plain(text: str) -> str:
    """Without times, and without a list of notes that a note alone made."""
    shown = unescape(text).partition("<h4>Time, seconds</h4>")[0]
    return re.sub(r'<ul class="notes"[^>]*></ul>\s*', "", shown)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("page.pdf", "--probe-html: *page.pdf: is not the name of a page; end its name in .html"),
        ("runs/a/checkpoint-3/page.html", "--probe-html: * is in the checkpoint *; give a path outside of it"),
        ("runs", "--probe-html: * is a folder; give a file, such as *report.html"),
        ("probe.yaml/page.html", "--probe-html: cannot write into *; give another path"),
    ],
)
def test_what_cannot_be_written_is_said_first(folder: Path, path: str, problem: str) -> None:
    done = run(folder, f"--probe-html={path}")
    assert done.returncode == 4
    pytest.LineMatcher(done.stderr.splitlines()).fnmatch_lines([f"*{problem}*"])
