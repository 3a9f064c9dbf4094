"""A few architectures whose past is no key-value cache, end to end; tests/architectures.py takes all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import architectures
from entropy_probe.model.forward import bind


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("qwen3_next", "over the cache"),  # attention and linear attention
        ("mamba", "with prompts of one length at a time"),  # a state alone
        ("rwkv", "from whole rows"),  # a state that no argument takes
    ],
)
def test_without_a_key_value_cache_all_is_measured(name: str, read: str, tmp_path: Path) -> None:
    found = architectures.outcome(name, tmp_path)
    assert (found["outcome"], found.get("read")) == ("measured", read), found
    # RWKV takes no notice of a mask, so padding on the left changes scores
    assert set(found["red"]) == ({"padding_invariance"} if name == "rwkv" else set())


def test_what_a_forward_raises_is_one_line_with_the_type(tmp_path: Path) -> None:
    """XGLM makes a float32 of the least float64, which torch refuses: nothing can be measured in float64."""
    found = architectures.outcome("xglm", tmp_path)
    assert found["outcome"] == "refused", found
    assert re.fullmatch(
        r"the model: `xglm` cannot score .*\(RuntimeError: .*\); give --probe-rollouts .*", found["said"]
    )


def test_no_limit_of_positions_is_none() -> None:
    """XLNet says −1."""
    assert bind(architectures.tiny_model("xlnet")).longest_row is None
    assert bind(architectures.tiny_model("gpt2")).longest_row == 256


def test_the_page_has_every_type() -> None:
    page = architectures.PAGE.read_text()
    (listed,) = re.findall(r"\| what happens \| types \|\n((?:\|.*\n)+)", page)
    names = re.findall(r"`([\w.-]+)`", listed)
    assert sorted(names) == sorted({*architectures.CAUSAL, *architectures.WRAPPERS})
