"""DeepSpeed's ZeRO checkpoints: each rank's file holds its part of flat vectors, of moments and fp32 master weights.

Stages 1 and 2 put a group's parameters end to end, pad the end and give each rank an equal part;
stage 3 gives each rank a part of every parameter. `param_shapes` among the model's states names
the parameters in that order. The weights are the masters, which the next update changes.
`deepspeed_universal` reads the converted form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import load_pickle, read_tensors, reason, weight_files
from entropy_probe.model.checkpoint.stand_ins import DEEPSPEED, standing_in
from entropy_probe.model.checkpoint.stored import Gathered, Saved, Stored, require_rounded

CONVERT = (
    "if you trust it, convert it: python ds_to_universal.py --input_folder global_stepN --output_folder "
    "global_stepN_universal (only the weights: python zero_to_fp32.py)"
)
_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", re.ASCII)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError)
Shapes = dict[str, torch.Size]


def read(layout: Layout) -> Stored:
    """The masters, moments and hyper-parameters of all ranks, bit for bit. Raises `CheckpointError`."""
    paths = _rank_files(layout.optimizer.parent)
    ranks = [load(path)["optimizer_state_dict"] for path in paths]
    stage_3 = "fp32_flat_groups" in ranks[0]
    folder = paths[0].parent
    of_model = [
        folder
        / (
            f"zero_pp_rank_{r}_mp_rank_00_model_states.pt"
            if stage_3
            else "mp_rank_00_model_states.pt"
        )
        for r in (range(len(paths)) if stage_3 else [0])
    ]
    models = [load(path) for path in of_model]
    try:
        whole = (
            models[0].get("mp_world_size", 1),
            _partitions(ranks[0]),
            models[0]["dp_world_size"],
        )
        if whole != (1, len(paths), len(paths)):
            raise CheckpointError(
                folder,
                f"has {len(paths)} ranks' files, {whole[2]} ranks wrote it (tensor-parallel {whole[0]})",
                CONVERT,
            )
        shapes: list[Shapes] = models[0]["param_shapes"]
        masters, optimizer = (_stage_3 if stage_3 else _stages_1_and_2)(ranks, shapes)
        optimizer["param_groups"] = groups_of_adam(
            optimizer["param_groups"], models[0].get("ds_config"), paths[0]
        )
        weights = model_weights(models, masters, of_model[0])
        global_steps = models[0].get("global_steps")
    except DAMAGED as error:
        problem = (
            f"is not laid out as DeepSpeed 0.19 writes it ({type(error).__name__}: {reason(error)})"
        )
        raise CheckpointError(paths[0], problem, CONVERT) from error
    files = [*paths, *of_model, *agree_with_folder(layout.weights, masters)]
    step = global_steps if type(global_steps) is int else None
    return stored(layout, weights, optimizer, files, step)


def stored(
    layout: Layout,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    files: list[Path],
    step: int | None,
) -> Stored:
    """The masters, which an adapter's own file holds rounded."""
    return Stored(
        folder=layout.folder,
        weights=Gathered.of(weights, layout.folder, files),
        optimizer=lambda: optimizer,
        optimizer_files=list,
        counted=step,
        rounded=Saved(layout.weights, "adapter_model") if layout.is_adapter else None,
    )


def load(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's with tensors, plain values, and stand-ins for its own classes; nothing else is opened."""
    if not path.is_file():
        raise CheckpointError(path, "is missing", "copy the whole checkpoint folder")
    with standing_in(DEEPSPEED):
        content = load_pickle(path, CONVERT)
    if not isinstance(content, dict):
        raise CheckpointError(
            path, f"holds a {type(content).__name__}, not a dict", "copy it again"
        )
    return content


def _rank_files(folder: Path) -> list[Path]:
    """The optimizer's files by rank, 0 to the last; one model-parallel rank, and no other kind of part."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*_optim_states.pt")):
        match = _RANK_FILE.fullmatch(path.name)
        if match is None or int(match[2]) or int(match[1]) in found:
            raise CheckpointError(path, "is not from ZeRO with data-parallel ranks only", CONVERT)
        found[int(match[1])] = path
    for rank in range(max(found) + 1):
        if rank not in found:
            raise CheckpointError(
                folder, f"the optimizer's file of rank {rank} is missing", "copy the whole folder"
            )
    return [found[rank] for rank in sorted(found)]


def _partitions(rank: dict[str, Any]) -> int:
    if rank.get("ds_zero_partition_groups"):
        raise ValueError("experts lie in groups of ranks of their own")
    count = rank["partition_count"]
    return int(max(count)) if isinstance(count, list | tuple) else int(count)


def _stages_1_and_2(
    ranks: list[dict[str, Any]], shapes: list[Shapes]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]

    def cut(flats: list[Tensor], position: int) -> dict[str, Tensor]:
        of_group, pads = shapes[position], paddings[position]
        size, flat = flats[0].numel(), torch.cat(flats)
        needed = sum(shape.numel() for shape in of_group.values()) + sum(pads)
        # The end is padded to a multiple of 2 · ranks, which the masters are saved without.
        if any(f.numel() != size for f in flats[:-1]) or not 0 <= size * len(
            flats
        ) - needed < 2 * len(flats):
            raise ValueError(f"{[f.numel() for f in flats]} values for {needed}")
        parts, offset = {}, 0
        for (name, shape), pad in zip(of_group.items(), pads, strict=True):
            parts[name] = flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel() + pad
        return parts

    masters = [rank["single_partition_of_fp32_groups"] for rank in ranks]
    return _joined(masters, [rank["base_optimizer_state"] for rank in ranks], cut, shapes)


def _stage_3(
    ranks: list[dict[str, Any]], shapes: list[Shapes]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def cut(flats: list[Tensor], position: int) -> dict[str, Tensor]:
        sizes = {name: -(-shape.numel() // len(flats)) for name, shape in shapes[position].items()}
        if any(flat.shape != (sum(sizes.values()),) for flat in flats):
            raise ValueError(
                f"{[f.numel() for f in flats]} values for {sum(sizes.values())} on each rank"
            )
        parts, offset = {}, 0
        for name, size in sizes.items():
            shape = shapes[position][name]
            parts[name] = torch.cat([f[offset : offset + size] for f in flats])[
                : shape.numel()
            ].view(shape)
            offset += size
        return parts

    masters = [rank["fp32_flat_groups"] for rank in ranks]
    return _joined(masters, [rank["optimizer_state_dict"] for rank in ranks], cut, shapes)


def _joined(
    masters: list[list[Tensor]],
    optimizers: list[dict[str, Any]],
    cut: Callable[[list[Tensor], int], dict[str, Tensor]],
    shapes: list[Shapes],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All ranks' parts by name. The k-th flat vector of the groups is the k-th of the masters and of `shapes`."""
    groups = optimizers[0]["param_groups"]
    if [len(of_rank) for of_rank in masters] != [
        sum(len(group["params"]) for group in groups)
    ] * len(masters):
        raise ValueError("as many masters as flat vectors were expected")
    if len(shapes) != len(masters[0]):
        raise ValueError(f"{len(shapes)} lists of shapes for {len(masters[0])} flat vectors")
    weights: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    named, position = [], 0
    for group in groups:
        names: list[str] = []
        for key in group["params"]:
            weights |= cut([of_rank[position] for of_rank in masters], position)
            entries = [optimizer["state"].get(key) or {} for optimizer in optimizers]
            steps = {float(entry.get("step", group.get("step", -1))) for entry in entries}
            if len({frozenset(entry) for entry in entries}) != 1 or len(steps) != 1:
                raise ValueError(f"ranks differ in the steps or moments of flat vector {position}")
            # what is not Adam's is told as it is: the optimizer is known by it
            strange = {key: entries[0][key] for key in entries[0] if key not in (*_MOMENTS, "step")}
            of_vector: dict[str, dict[str, Any]] = {
                name: {"step": min(steps), **strange} if entries[0] else {}
                for name in shapes[position]
            }
            for moment in _MOMENTS:
                if moment in entries[0]:
                    for name, part in cut([entry[moment] for entry in entries], position).items():
                        of_vector[name][moment] = part
            state |= of_vector
            names += of_vector
            position += 1
        named.append({**group, "params": names})
    return weights, {
        "state": {name: entry for name, entry in state.items() if entry},
        "param_groups": named,
    }


def groups_of_adam(groups: list[dict[str, Any]], config: Any, path: Path) -> list[dict[str, Any]]:
    """The groups, saying whether the decay is AdamW's: deepspeed's own Adam says it in `ds_config` alone."""
    given = config.get("optimizer") if isinstance(config, dict) else None
    kind, options = (
        (given.get("type", ""), given.get("params") or {}) if isinstance(given, dict) else ("", {})
    )
    if kind and str(kind).lower() not in ("adam", "adamw"):
        raise CheckpointError(
            path, f"its optimizer is {str(kind)[:40]!r}", "use a checkpoint of Adam or AdamW"
        )
    coupled = str(kind).lower() == "adam" and options.get("adam_w_mode", True) is False
    return [{"decoupled_weight_decay": not coupled, **group} for group in groups]


def model_weights(
    models: list[dict[str, Any]], masters: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Buffers and frozen parameters as the model's file has them, the masters in place of what they round to."""
    module: dict[str, Tensor] = {
        n: t for n, t in models[0]["module"].items() if isinstance(t, Tensor) and t.numel()
    }
    require_rounded(module, masters, path)
    frozen: Shapes = models[0].get("frozen_param_shapes") or {}
    if len(models) > 1 or not frozen.keys() <= module.keys():  # stage 3 parts them like the rest
        for name, shape in frozen.items():
            parts = [model["frozen_param_fragments"][name].flatten() for model in models]
            module[name] = torch.cat(parts)[: shape.numel()].view(shape)
    weights = module | masters
    return weights | {
        a: weights[name]
        for a, name in (models[0].get("shared_params") or {}).items()
        if name in weights
    }


def agree_with_folder(folder: Path, masters: dict[str, Tensor]) -> list[Path]:
    """The full model's files that a Trainer leaves beside ZeRO's: they must hold the masters, rounded."""
    try:
        files = weight_files(folder, "model")
    except CheckpointError:
        return []
    for path in files:
        require_rounded(read_tensors(path), masters, path)
    return files
