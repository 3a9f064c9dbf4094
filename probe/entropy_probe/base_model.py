"""The base model of an adapter, found on disk."""

from __future__ import annotations

from pathlib import Path

from entropy_probe.errors import CheckpointError, shown
from entropy_probe.text import read_json

HOW_TO_NAME_A_BASE = "name the base model's folder with --probe-base-model"


def find_base_model(folder: Path, base_model: Path | None) -> Path:
    """The folder that is given, else `base_model_name_or_path` of adapter_config.json.

    A relative path is tried against the current folder, the adapter's folder and its parents.
    Nothing is downloaded.
    """
    if base_model is not None:
        if not (base_model / "config.json").is_file():
            problem = "is not a model folder (no config.json)"
            raise CheckpointError(base_model, problem, HOW_TO_NAME_A_BASE)
        return _no_adapter(base_model)
    config_path = folder / "adapter_config.json"
    named = read_json(config_path).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        problem = f"base_model_name_or_path is {shown(named)}"
        raise CheckpointError(config_path, problem, HOW_TO_NAME_A_BASE)
    places = [Path.cwd(), folder, *folder.parents]
    for place in places:
        candidate = place / named  # an absolute `named` replaces `place`
        try:
            if (candidate / "config.json").is_file():
                return _no_adapter(candidate)
        except OSError:  # a name that no file system holds
            break
    problem = f"the base model {named[:120]!r} is not on disk, and nothing is downloaded"
    raise CheckpointError(config_path, problem, HOW_TO_NAME_A_BASE)


def _no_adapter(base: Path) -> Path:
    """transformers follows an adapter's configuration to yet another base model."""
    if (base / "adapter_config.json").is_file():
        raise CheckpointError(base, "is the base model, and an adapter itself", HOW_TO_NAME_A_BASE)
    return base
