"""The one-command run passes on healthy checkpoints, whatever they were trained for; `healthy.py` has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import healthy
import typecheck


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("GPT-2, 128 positions", 0), ("DoRA on Qwen2", 1), ("GRPO by TRL, a chat model", 2), ("ZeRO", 1)],
)
def test_no_option_is_needed(tmp_path: Path, kind: str, seed: int) -> None:
    """ZeRO's has responses of one token, whose log p hardly moves along v."""
    with typecheck.unchecked():
        odd, doubts = healthy.statuses(tmp_path, kind, seed)
    assert odd == {}
    assert doubts[:2] == [
        "built-in prompts: give yours, --probe-prompts=FILE (or rollouts)",
        "stand-in reward, which says nothing about the policy: set batch.reward",
    ]
    if kind.startswith("GPT-2"):
        assert "responses end after 113 tokens, not 200: the model holds 128" in doubts


def test_a_collapsed_policy_is_inconclusive_and_never_failed(tmp_path: Path) -> None:
    with typecheck.unchecked():
        odd, doubts = healthy.statuses(tmp_path, "collapsed", 0)
    assert {found.partition(" ")[0] for found in odd.values()} == {"inconclusive"}
    assert "100% of the update's prompts have no advantage: the step is only momentum and decay" in doubts
