"""The bundled demo: a tiny arithmetic policy, its GRPO checkpoint, and `train.py`, the script that made both."""

from __future__ import annotations

from pathlib import Path

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
