"""Options of the command line and of pytest that set a key of the configuration."""

from __future__ import annotations

from pathlib import Path

KEYS = {
    "budget": "budget",
    "device": "device",
    "memory_limit": "memory_limit",
    "device_map": "device_map",
    "offload_folder": "offload_folder",
    "sharding": "sharding",
    "seed": "batch.seed",
    "target_se": "batch.target_se",
    "recipe": "recipe",
    "reference_model": "reference_model",
}
"""Name of the option, with underscores → dotted key."""
PROMPT_TOKENS = 200
"""Of a prompt, in the plan of a run whose prompts are not known yet."""


def overrides(options: object) -> dict[str, object]:
    """Dotted key → value of every option that was given; each is an attribute, `None` if not.

    `ProbeConfig.load` takes them as `overrides`.
    """
    values = {key: getattr(options, name) for name, key in KEYS.items()}
    given = {key: value for key, value in values.items() if value is not None}
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
