"""How much is computed: values under whatever the user sets, and parts that are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["smoke", "standard", "full"]
Part = Literal["taylor", "projections", "curvature witness", "real step"]


@dataclass(frozen=True)
class Budget:
    """`values` as in a configuration; a criterion whose part is in `left_out` is not asked."""

    values: Mapping[str, Mapping[str, Any]]
    left_out: tuple[Part, ...] = ()


BUDGETS: dict[Name, Budget] = {
    "smoke": Budget(
        {
            "generation": {"num_return_sequences": 4},
            "batch": {"num_prompts": 6, "num_update_prompts": 6},
            "invariance": {"max_examples": 2},
        },
        ("taylor", "projections", "curvature witness", "real step"),
    ),
    "standard": Budget({}),
    "full": Budget(
        {
            "generation": {"num_return_sequences": 16},
            "batch": {"num_prompts": 64, "num_update_prompts": 64},
            "true_delta_h": {"etas": "fine"},
            "invariance": {"max_examples": 100},
        }
    ),
}
