"""Run folders stand for their newest checkpoint, in every place that takes a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import models
from entropy_probe import load_checkpoint
from entropy_probe.__main__ import main
from entropy_probe.config import ProbeConfig
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import CheckpointError
from entropy_probe.inputs import digest
from entropy_probe.layout import find_layout
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.report import ProbeReport
from test_checkpoint import assert_same, trained


def test_the_largest_number_with_an_optimizer_is_taken(tmp_path: Path) -> None:
    last, held, parameters = trained(tmp_path, models.tiny_model("llama"), max_steps=11, save_steps=1)
    loaded = load_checkpoint(tmp_path)
    assert loaded.info.path == last == tmp_path / "checkpoint-11"
    assert loaded.info.fingerprint == load_checkpoint(last).info.fingerprint
    assert_same(tmp_path, held, parameters, global_step=11)
    found = inspect_checkpoint(tmp_path)
    assert (found.path, found.problems) == (str(last), [])
    assert found.note == f"checkpoint-11 is the newest of 11 checkpoints in {tmp_path}"

    (last / "optimizer.pt").unlink()
    shutil.copy(last / "config.json", tmp_path)  # the final model beside its checkpoints
    shutil.copy(last / "model.safetensors", tmp_path)
    assert load_checkpoint(tmp_path).info.global_step == 10
    assert find_layout(tmp_path).note.endswith("; 1 newer without optimizer state")
    assert find_layout(last).folder == last


def test_a_run_without_optimizer_states(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / f"checkpoint-{n}").mkdir()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints has an optimizer state"):
        load_checkpoint(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert len(found.problems) == 1
    assert main(["inspect", str(tmp_path)]) == 1


def test_a_folder_of_runs_names_the_checkpoints_in_them(tmp_path: Path) -> None:
    """What is one level too high is refused with the names; the folders that have no optimizer's file are not named."""
    for name in ("a/checkpoint-3", "a/checkpoint-20", "b/checkpoints/step_7", "alone", "logs"):
        (tmp_path / name).mkdir(parents=True)
        if name != "logs":
            (tmp_path / name / "optimizer.pt").touch()
    (tmp_path / "a" / "checkpoint-30").mkdir()
    names = "a/checkpoint-3, a/checkpoint-20, alone, b/checkpoints/step_7"
    said = rf"neither a checkpoint nor a run, .*: {names}; give one of them, such as {tmp_path}/b/checkpoints/step_7$"
    with pytest.raises(CheckpointError, match=said):
        find_layout(tmp_path)
    assert [names in problem for problem in inspect_checkpoint(tmp_path).problems] == [True]
    for more in range(9):
        (tmp_path / "a" / f"checkpoint-10{more}").mkdir()
        (tmp_path / "a" / f"checkpoint-10{more}" / "optimizer.bin").touch()
    with pytest.raises(CheckpointError, match=r": a/checkpoint-3, .*, a/checkpoint-102 …; give one"):
        find_layout(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "a" / "checkpoint-3" / "optimizer.pt").touch()
    (tmp_path / "A").mkdir(mode=0)
    with pytest.raises(CheckpointError, match="a/checkpoint-3"):
        find_layout(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two copies of the demo checkpoint, with their base beside it."""
    shutil.copytree(checkpoint_path().parent / "base", tmp_path / "base")
    for n in (20, 100):
        shutil.copytree(checkpoint_path(), tmp_path / "run" / f"checkpoint-{n}")
    return tmp_path / "run"


def test_measuring_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "report.json"
    assert main(["run", str(run), "--budget", "smoke", "--out", str(out)]) == 0
    assert f"checkpoint-100 is the newest of 2 checkpoints in {run}" in capsys.readouterr().err
    report = ProbeReport.from_json(out).checkpoint
    assert (report.name, report.path) == ("checkpoint-100", str(run / "checkpoint-100"))


def test_the_digest_is_that_of_the_chosen_checkpoint(run: Path) -> None:
    before = digest(run, ProbeConfig())
    assert before == digest(run / "checkpoint-100", ProbeConfig())
    newer = Path(shutil.copytree(run / "checkpoint-100", run / "checkpoint-101"))
    state = json.loads((newer / "trainer_state.json").read_text())
    (newer / "trainer_state.json").write_text(json.dumps({**state, "global_step": 101}))
    assert digest(run, ProbeConfig()) != before
