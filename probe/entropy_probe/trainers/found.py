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
    `not_reproduced`: what the trainer does and the probe does not, in whole sentences that name both.
    """

    name: str
    source: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    prompts: int | None = None
    not_reproduced: tuple[str, ...] = ()


def several_steps(count: int | str) -> str:
    """Of a trainer that makes `count` steps from the responses of one rollout."""
    first = "The probe reproduces the first, where the ratio of the new policy to the old is 1."
    return f"The trainer makes {count} steps from each rollout. {first}"


def several_passes(setting: str) -> str:
    """Of a trainer that goes over a rollout more than once, by this setting."""
    first = (
        "The probe reproduces the first time, where the ratio of the new policy to the old is 1."
    )
    return f"The trainer goes over each rollout more than once ({setting}). {first}"


UNTIL_REWARDS_DIFFER = (
    "The trainer samples groups until their rewards differ. The probe keeps every group."
)
