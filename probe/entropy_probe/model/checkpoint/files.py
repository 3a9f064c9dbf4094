"""Reading the files of a checkpoint: JSON, safetensors, and pickles that can hold nothing but tensors.

Only safetensors and `torch.load(weights_only=True)` are ever opened; `training_args.bin` and `rng_state.pth` never.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entropy_probe.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "is missing", "copy the whole checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not readable JSON ({error})", "restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, f"holds a {type(content).__name__}, not an object", "restore the file")
    return content


def load_pickle(path: Path) -> Any:
    """`torch.load(weights_only=True)` on the CPU; what is not tensors and plain containers is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _broken(path, error) from error
        raise CheckpointError(
            path,
            "holds more than tensors and plain values, and was not executed",
            "save the optimizer's state_dict alone",
        ) from error
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(path, f"cannot be read ({reason(error)})", "copy it again: it is truncated or no torch file")


def reason(error: Exception) -> str:
    """What a library's exception says, in at most 160 characters of one line; a heading that ends in `:` is skipped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0])[:160]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """`stem.safetensors`, or the shards that `stem.safetensors.index.json` names; every one exists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(index, "has no `weight_map`", "restore the file")
        shards = sorted({folder / Path(name).name for name in names.values()})
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(shard, f"is missing, {index.name} names it", "copy the whole checkpoint folder")
        return shards
    pickled = [p.name for p in folder.glob("*.bin") if p.name in ("pytorch_model.bin", "adapter_model.bin")]
    got = f"only {pickled[0]}" if pickled else "no weights"
    raise CheckpointError(folder, f"{got}, expected {single.name}", "save the model with safe_serialization=True")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises on a truncated file and on the first non-finite tensor."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, f"is not a readable safetensors file ({error})", "copy it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                path, f"{name} holds {count} non-finite of {tensor.numel()} values", "use an earlier checkpoint"
            )
    return tensors


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of the files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode())
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; large ones are read once in a process, as long as neither size nor time changes."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
