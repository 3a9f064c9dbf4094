"""What a report depends on: files, the configuration, this library's code, and what it runs on.

A kept report is looked up by it. torch is asked for the names of accelerators alone, and so it is
not imported for a measurement on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from entropy_probe.base_model import find_base_model
from entropy_probe.config import JUDGES, ProbeConfig
from entropy_probe.digests import file_digest
from entropy_probe.errors import ConfigError
from entropy_probe.layout import IN_PIECES, configured, find_layout, following
from entropy_probe.stages.responses import sources
from entropy_probe.stages.responses.rewards import REWARDS
from entropy_probe.trainers.resolved import resolved

version = cache(metadata.version)  # a session may have a hundred checkpoints
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "arviz-stats",
)


def digest(
    checkpoint: Path,
    config: ProbeConfig,
    rollouts: Path | None = None,
    update_rollouts: Path | None = None,
    *,
    prompts: Path | None = None,
    next_checkpoint: Path | None = None,
    base_model: Path | None = None,
    processes: int = 1,
) -> str:
    """SHA-256 over all that `run_probe` with these arguments depends on, the limits excluded.

    Every file of the checkpoint's folder (and of its base model's) counts, tokenizer and all.
    Nothing is loaded. A reward of the user's own counts by its source (`sources`). Raises `ProbeError`
    where the report depends on what has no digest, as a dataset that is code of the user's own.
    """
    reward = config.batch.reward
    names = [reward] if isinstance(reward, str) else reward
    own = {} if rollouts is not None else {n: sources.digests(n) for n in names if n not in REWARDS}
    layout = configured(find_layout(checkpoint), base_model)
    after = next_checkpoint or following(layout.folder)
    base = find_base_model(layout.weights, base_model) if layout.is_adapter else None
    reference = config.reference_model
    given = {"rollouts": rollouts, "update_rollouts": update_rollouts, "prompts": prompts}
    of_files = rollouts is not None or update_rollouts is not None
    given_reference = {"has_reference": True, "samples_update": not of_files}
    config, recipe = resolved(config, layout.folder, **given_reference)
    samples = rollouts is None and prompts is None
    asked = {
        "batch": config.batch.model_fields_set,
        "generation": config.generation.model_fields_set,
    }
    known = {
        "checkpoint": [
            _digests(layout.folder, "**/*" if layout.format in IN_PIECES else "*"),
            _digests(layout.weights),
        ],
        "base": None if base is None else _digests(base),
        "next": None if after is None else _digests(after, "**/*"),
        "recipe": recipe.model_dump(mode="json"),
        "reference": None if reference is None else _digests(Path(reference).expanduser()),
        "files": {key: path and [str(path), _digest_of(path)] for key, path in given.items()},
        "dataset": _dataset(config.batch.dataset) if samples else None,
        "rewards": own,
        "asked": {section: sorted(keys) for section, keys in asked.items()},
        "config": config.model_dump(mode="json", exclude=set(JUDGES)),
        "code": _digests(Path(__file__).parent, "**/*.py"),
        "versions": {name: version(name) for name in LIBRARIES},
        "processes": processes,
        "machine": [
            platform.python_version(),
            platform.platform(),
            _device(config.device),
            _devices(config),
        ],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    files = (path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _digest_of(path: Path) -> Any:
    return _digests(path, "**/*") if path.is_dir() else file_digest(path)


def _dataset(name: str) -> Any:
    kind, _, place = name.partition(":")
    path = Path(place).expanduser()
    if kind == "arithmetic":
        return None
    if kind not in ("jsonl", "gsm8k_r1_template") or not place:
        problem = f"{name!r} is code, whose data have no digest"
        raise ConfigError("batch.dataset", problem, "give a file to keep the report")
    return _digest_of(path)


def _devices(config: ProbeConfig) -> list[str]:
    """What a map by accelerate depends on; without one, nothing."""
    if config.device_map is None:
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]


def _device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    try:
        return torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        problem = f"{device!r} is not there ({error})"
        raise ConfigError("device", problem, "give one that is") from error
