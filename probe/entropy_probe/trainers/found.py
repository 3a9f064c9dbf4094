"""What a file says of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Found:
    """The recipe that comes nearest, the parts that are set otherwise, and what no recipe has.

    `source` is the file's name. `generation`: the policy's temperature and length of responses; `template`: more
    arguments of the chat template; `prompts`: those of one step of the optimizer, where they are known;
    `not_reproduced`: what the trainer does beside, one line each.
    """

    name: str
    source: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    prompts: int | None = None
    not_reproduced: tuple[str, ...] = ()
