"""What torchrun says of this process, read without torch."""

from __future__ import annotations

import os


def size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    by_torchrun = all(key in os.environ for key in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if by_torchrun else 1


def rank() -> int:
    """This process among those that torchrun started; 0 without it."""
    return int(os.environ["RANK"]) if size() > 1 else 0
