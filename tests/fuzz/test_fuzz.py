"""A few hundred of the inputs of `make fuzz`, and what it has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig
from entropy_probe.errors import CheckpointError, ConfigError, shown
from entropy_probe.model.checkpoint import load_checkpoint
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from fuzz.run import fuzz
from fuzz.targets import refused, targets
from hostile.damage import edited, group, write_good

INPUTS = 200


def test_a_short_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    tried = {name: fuzz(t, max(1, int(INPUTS * t.share)), 0) for name, t in targets(tmp_path).items()}
    assert sum(tried.values()) >= INPUTS - len(tried)
    assert not list((tmp_path / "cwd").iterdir())


def test_what_is_no_probe_error_gets_through() -> None:
    """Otherwise the fuzz could not fail."""
    with pytest.raises(ZeroDivisionError):
        refused(lambda: 1 // 0)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "decoupled_weight_decay"])
def test_a_flag_that_is_a_tensor(tmp_path: Path, flag: str) -> None:
    folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    group(**{flag: torch.zeros(0)})(folder)
    with pytest.raises(CheckpointError, match=rf"`{flag}` is tensor\(\[\]\), expected true or false"):
        load_checkpoint(folder)


def test_a_tokenizer_that_fails_when_it_is_used(tmp_path: Path) -> None:
    folder = write_good(tmp_path, full=False)
    edited("tokenizer_config.json", model_max_length="")(folder)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer([folder], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch: {1: 2}", "the key 1 is not a text"),
        ("limits: {entropy: {null: 2}}", "the key None is not a text"),
        ("!!int ", "is not readable YAML"),
        ("a: &a [1]\nb: *a", "stands for a section or a list"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "probe.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ProbeConfig.load(tmp_path / "probe.yaml")


def test_yaml_may_repeat_a_value(tmp_path: Path) -> None:
    (tmp_path / "probe.yaml").write_text("batch: {num_prompts: &n 4, num_update_prompts: *n}")
    assert ProbeConfig.load(tmp_path / "probe.yaml").batch.num_update_prompts == 4


def test_what_has_no_end_is_shown_in_a_line() -> None:
    endless: list[Any] = ["ha"]
    for _ in range(60):
        endless = [endless, endless]
    assert len(shown(endless)) <= 121
    assert shown(10**5000) == "a int"
