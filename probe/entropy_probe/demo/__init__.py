"""The bundled demo: a tiny arithmetic policy, its GRPO checkpoint, and `train.py`, the script that made both."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from entropy_probe.errors import CheckpointError


def checkpoint_path() -> Path:
    """The bundled `checkpoint-N` folder; the model that its adapter belongs to is `base` beside it.

    Raises `CheckpointError` unless there is exactly one.
    """
    here = Path(__file__).resolve().parent
    found = sorted(here.glob("checkpoint-*"))
    if len(found) != 1:
        raise CheckpointError(
            here,
            f"holds {len(found)} checkpoint folders, expected 1",
            "install the package again, or run demo.train",
        )
    return found[0]


def is_of_the_demo(tokenizer: Any | None) -> bool:
    """Whether these are the demo's own tokens: then its questions and its reward are the checkpoint's."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    return vocabulary == _vocabulary()


@cache
def _vocabulary() -> dict[str, int]:
    found = json.loads((Path(__file__).parent / "base" / "tokenizer.json").read_text("utf-8"))
    return found["model"]["vocab"] | {
        token["content"]: token["id"] for token in found["added_tokens"]
    }
