"""What the evidence holds for the eye: texts of a batch, and the entropy that a trainer logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe.model.checkpoint.files import logged_entropy
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.texts import HEAD, TAIL, texts_of


class Letters:
    """A tokenizer whose token k is the k-th letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz"[k] for k in ids)


def rollouts(length: int = 2) -> Rollouts:
    """Two prompts with two responses each, the last of which is not there."""
    ids = torch.zeros(4, 3 + length, dtype=torch.int64)
    ids[:2, :3], ids[2:, :2] = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    ids[0, 3:], ids[1, 3] = 6, 7
    ids[2, 2] = 8
    lens = torch.tensor([3, 3, 2, 2]), torch.tensor([length, 1, 1, 0])
    nothing = {"advantages": None, "logprobs": None, "source": "", "missing_gold": 0}
    return Rollouts(ids, *lens, torch.zeros(2, 2), **nothing)


def test_texts_are_those_of_the_ids() -> None:
    found = texts_of(Letters(), rollouts())
    assert found == {"prompts": ["bcd", "ef"], "responses": [["gg", "h"], ["i", ""]]}


def test_a_long_text_loses_its_middle_and_says_so() -> None:
    found = texts_of(Letters(), rollouts(HEAD + TAIL + 7))
    assert found is not None
    assert found["responses"][0][0] == "g" * HEAD + " […7 characters…] " + "g" * TAIL


def test_ids_that_the_tokenizer_does_not_know_have_no_texts() -> None:
    strange = rollouts()
    strange.ids[0, 3] = 99
    assert texts_of(Letters(), strange) is None
    assert texts_of(None, strange) is None


@pytest.mark.parametrize(
    ("history", "found"),
    [
        ([{"step": 10, "entropy": 0.5}, {"step": 20, "entropy": 0.25}], {"value": 0.25, "step": 20, "steps": 10}),
        ([{"step": 7, "entropy": 1}], {"value": 1.0, "step": 7, "steps": 7}),
        ([{"step": 10, "entropy": 0.5}, {"step": 20, "loss": 1.0}], {"value": 0.5, "step": 10, "steps": 10}),
        ([{"step": 20, "entropy": 0.5}, {"step": 20, "entropy": 0.4}], {"value": 0.4, "step": 20}),
        ([{"step": "x", "entropy": 0.5}, {"step": 3, "entropy": "no"}, 5, {"step": 3, "entropy": float("nan")}], None),
        ([{"step": 3, "entropy": True}], None),
        ({}, None),
        (None, None),
    ],
)
def test_the_last_entropy_of_the_log(tmp_path: Path, history: Any, found: dict[str, float] | None) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert logged_entropy(tmp_path) == found


def test_a_log_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    assert logged_entropy(tmp_path) is None
    (tmp_path / "trainer_state.json").write_text("{")
    assert logged_entropy(tmp_path) is None
