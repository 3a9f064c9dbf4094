"""verl's FSDP checkpoints: every rank saved its part of the weights and moments, as DTensors or as plain tensors.

`model_world_size_W_rank_R.pt` and `optim_world_size_W_rank_R.pt`; `extra_state_*` may hold
anything and stays closed. The optimizer numbers its parameters in the order of `parameters()`,
frozen ones included. FSDP2 shards each tensor; FSDP1 leaves the moments as plain vectors, parts of
a parameter with `use_orig_params` and of whole layers without.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import load_pickle, reason
from entropy_probe.model.checkpoint.stored import Gathered, Stored
from entropy_probe.text import read_json

_FILE = re.compile(r"(model|optim)_world_size_(\d+)_rank_(\d+)\.pt", re.ASCII)
_STEP = re.compile(r"global_step_(\d+)", re.ASCII)
_COPY = "copy the whole folder of one step"
_MERGED = "save with FSDP2 (actor strategy: fsdp2), which keeps every parameter's moments apart"


def read(layout: Layout) -> Stored:
    """Weights and moments of all ranks in one piece. Raises `CheckpointError`."""

    import torch.distributed.tensor  # noqa: F401 (its classes are in the pickles)

    files = _files(layout.folder)
    with _without_advice():
        loaded = {kind: [load_pickle(path, _COPY) for path in paths] for kind, paths in files.items()}
    models, optimizers = loaded["model"], loaded["optim"]
    try:
        weights = {name: _whole([m[name] for m in models]) for name in _same_keys(models) if _is_tensor(models, name)}
        states = [optimizer["state"] for optimizer in optimizers]
        state: dict[Any, Any] = {}
        for key in _same_keys(states):
            entries = [of_rank[key] for of_rank in states]
            state[key] = {what: _whole_moment([e[what] for e in entries]) for what in _same_keys(entries)}
        optimizer = {"state": state, "param_groups": list(optimizers[0]["param_groups"])}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        where = files["optim" if "weights" in locals() else "model"][0]
        problem = f"its ranks do not fit together ({type(error).__name__}: {reason(error)})"
        raise CheckpointError(where, problem, f"{_COPY}, or {_MERGED}") from error
    step = _STEP.fullmatch(layout.folder.name) or _STEP.fullmatch(layout.folder.parent.name)
    lora = _lora(layout.folder) if any(".lora_A." in name for name in weights) else None
    of_optimizer = [*files["optim"], *([lora] if lora else [])]
    return Stored(
        folder=layout.folder,
        weights=Gathered.of(weights, layout.folder, files["model"]),
        optimizer=lambda: optimizer,
        optimizer_files=lambda: of_optimizer,
        counted=int(step[1]) if step else None,
        lora=lora,
    )


def _lora(folder: Path) -> Path:
    """Where an adapter's `lora_alpha` stands: the tensors do not tell it."""
    places = (folder / "lora_adapter" / "adapter_config.json", folder / "lora_train_meta.json")
    if (found := next((place for place in places if place.is_file()), None)) is not None:
        return found
    raise CheckpointError(places[1], "is missing, and the adapter's `lora_alpha` with it", "write it: a JSON object")


@contextmanager
def _without_advice() -> Iterator[None]:
    """torch logs of every mesh that it was unpickled where no process group is; it is not used as one here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of weights and of moments, rank 0 to the last of the one world that wrote them."""
    found = {(m[1], int(m[2]), int(m[3])): p for p in sorted(folder.iterdir()) if (m := _FILE.fullmatch(p.name))}
    worlds = sorted({world for _, world, _ in found})
    config = folder / "fsdp_config.json"
    saved = read_json(config).get("world_size") if config.is_file() else worlds[0]
    if not isinstance(saved, int) or worlds != [saved]:
        raise CheckpointError(folder, f"has files of {worlds} ranks, its fsdp_config.json says {saved!r}", _COPY)
    if len(found) > 2 * saved:
        raise CheckpointError(folder, f"has {len(found)} files of {saved} ranks", _COPY)
    for kind in ("model", "optim"):
        for rank in range(saved):
            if (kind, saved, rank) not in found:
                raise CheckpointError(folder / f"{kind}_world_size_{saved}_rank_{rank}.pt", "is missing", _COPY)
    return {kind: [found[kind, saved, rank] for rank in range(saved)] for kind in ("model", "optim")}


def _same_keys(of_ranks: list[dict[Any, Any]]) -> list[Any]:
    if any(not isinstance(of_rank, dict) or list(of_rank) != list(of_ranks[0]) for of_rank in of_ranks):
        raise ValueError("ranks hold different names")
    return list(of_ranks[0])


def _is_tensor(of_ranks: list[dict[Any, Any]], name: Any) -> bool:
    return isinstance(name, str) and isinstance(of_ranks[0][name], Tensor)


def _whole_moment(parts: list[Any]) -> Any:
    """As `_whole`; a plain vector is FSDP1's, of which one rank has all."""
    if isinstance(parts[0], Tensor) and parts[0].ndim:
        if type(parts[0]) is Tensor and len(parts) > 1:
            raise ValueError("moments are FSDP1's flat vectors")
        return _whole(parts)
    if any(float(part) != float(parts[0]) for part in parts):
        raise ValueError("ranks differ in `step`")
    return float(parts[0])


def _whole(parts: list[Tensor]) -> Tensor:
    """One tensor of all ranks' parts: sharded along one dimension, evenly or not, or the same on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    first = parts[0]
    if not isinstance(first, DTensor):
        if any(isinstance(part, DTensor) or not torch.equal(part, first) for part in parts):
            raise ValueError("ranks differ in a tensor that all have")
        return first
    if any(not isinstance(p, DTensor) or (p.shape, p.placements) != (first.shape, first.placements) for p in parts):
        raise ValueError("ranks differ in the shape of a tensor")
    mesh, placements = first.device_mesh.mesh, first.placements
    if sorted(mesh.flatten().tolist()) != list(range(len(parts))) or any(
        type(placement) not in (Replicate, Shard) for placement in placements
    ):
        raise ValueError(f"{placements} over ranks {mesh.tolist()} of {len(parts)}")
    dims = [axis for axis, placement in enumerate(placements) if isinstance(placement, Shard)]
    local = [part.to_local() for part in parts if isinstance(part, DTensor)]
    if len(dims) > 1:
        raise ValueError(f"{placements} shards twice")
    if not dims:
        rows, dim = mesh.reshape(-1, 1), 0
    else:
        rows, dim = mesh.movedim(dims[0], -1).reshape(-1, mesh.shape[dims[0]]), placements[dims[0]].dim  # pyright: ignore[reportAttributeAccessIssue]
    replicas = [torch.cat([local[rank] for rank in row], dim) for row in rows.tolist()]
    if any(not torch.equal(a, b) for a, b in pairwise(replicas)):
        raise ValueError("replicas differ")
    if replicas[0].shape != first.shape:
        raise ValueError(f"parts make {tuple(replicas[0].shape)} of {tuple(first.shape)}")
    return replicas[0]
