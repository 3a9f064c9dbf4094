"""The commands and snippets of the README, and of the page that has all of it, run as they stand in an empty folder,
with a checkpoint where they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import forked
import kept_reports
from entropy_probe.demo import checkpoint_path

ROOT = Path(__file__).parents[2]
README = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/overview.md"))


def commands() -> list[str]:
    """Indented or quoted commands of our own, without their comments."""
    blocks = re.findall(r"^ {4}(pytest .*?)(?: {2,}#.*)?$", README, re.MULTILINE)
    quoted = re.findall(r"`((?:pytest|entropy-probe) [^`…']*)`", README)
    return list(dict.fromkeys(command.strip() for command in [*blocks, *quoted] if not command.endswith("=")))


def snippet(start: str) -> str:
    """The indented block that begins with `start`."""
    block = re.search(rf"^( +){re.escape(start)}.*\n(?:\1.*\n)*", README, re.MULTILINE)
    assert block is not None
    return textwrap.dedent(block.group(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("place")
    shutil.copytree(checkpoint_path(), tmp_path / "runs" / "checkpoint-500")
    shutil.copytree(checkpoint_path().parent / "base", tmp_path / "runs" / "base")
    kept_reports.copy(kept_reports.OURS, tmp_path / kept_reports.PLACE)
    return tmp_path


def run(place: Path, command: str) -> subprocess.CompletedProcess[str]:
    return forked.command(command, cwd=place)


def test_the_readme_has_its_commands() -> None:
    assert len(commands()) >= 6
    assert {"pytest --probe-checkpoint=demo -m acceptance", "pytest --probe-explain=ess"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_command(place: Path, command: str) -> None:
    done = run(place, command)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--out" in command:
        written = json.loads((place / command.split()[-1]).read_text())
        assert written["schema_version"] == 1


def test_python_snippet(place: Path) -> None:
    (place / "snippet.py").write_text(snippet("from entropy_probe import run_probe"))
    done = run(place, "python snippet.py")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"-?[\d.e-]+ ± [\d.e-]+\n", done.stdout)


def test_live_model_snippet(place: Path) -> None:
    load = "from entropy_probe import load_checkpoint\nloaded = load_checkpoint('runs/checkpoint-500')\n"
    load += "model, tokenizer = loaded.model, loaded.tokenizer\n"
    (place / "snippet.py").write_text(load + snippet("from entropy_probe import SequenceProcessor"))
    done = run(place, "python snippet.py")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"torch.Size\(\[1, 4\]\) [\d.]+\n", done.stdout), done.stdout


def test_the_reward_takes_text_and_messages() -> None:
    scope: dict[str, Any] = {}
    exec(snippet("def accuracy("), scope)  # noqa: S102 (the page's own text)
    texts = ["it is 5", "6"]
    assert scope["accuracy"](completions=texts, answer=["5", "5"], prompts=[""]) == [1.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert scope["accuracy"](completions=messages, answer=["5", "5"]) == [1.0, 0.0]


def test_prompts_and_reward(tmp_path: Path) -> None:
    """The six lines that come first under *Your own checkpoint*, on a chat model that TRL has trained."""
    import chat

    chat.run_of_trl(tmp_path / "runs")
    (tmp_path / "rewards.py").write_text(snippet("def accuracy("))
    dataset, (to_file, write, run_it) = (
        Dataset.from_list(chat.QUESTIONS),
        re.findall(
            r"^ {6}(dataset\.to_parquet\([^)]*\)|echo .*|pytest .*prompts\.parquet.*?)(?: {2,}#.*)?$",
            README,
            re.MULTILINE,
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        eval(to_file, {"dataset": dataset})  # noqa: S307
    subprocess.run(write, shell=True, check=True, cwd=tmp_path)  # noqa: S602
    done = run(tmp_path, f"{run_it} --probe-budget=smoke --probe-json=r.json")
    assert done.returncode == 1, done.stdout  # nobody has learned an answer: a reward of 0 is no update, and it is said
    shown = done.stdout.partition("= entropy probe =")[2]
    assert "gold answers are from the column `answer`" in shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["batch"]["reward"], report["batch"]["prompts_are_builtin"]) == ("rewards:accuracy", False)
    red = set(re.findall(r"^│ (\w+) .* (?:FAIL|INCONCLUSIVE) +│$", shown, re.MULTILINE))
    assert red <= {"y_coverage", "se_identity", "se_agreement"}


def test_test_snippet(place: Path) -> None:
    (place / "test_mine.py").write_text(snippet("def test_entropy_is_alive"))
    assert "1 skipped" in run(place, "pytest").stdout
    done = run(place, "pytest --probe-checkpoint=demo test_mine.py")
    assert "1 passed" in done.stdout, done.stdout
