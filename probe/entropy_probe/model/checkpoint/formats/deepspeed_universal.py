"""DeepSpeed's universal form, what `ds_to_universal.py` makes of ZeRO's files: a folder a parameter, whole tensors.

`zero/<name>/{fp32,exp_avg,exp_avg_sq}.pt` hold a tensor, flat after stage 3, else as it is and
under `param`; the step is in `step.pt` or with the hyper-parameters in `zero/optimizer_state.pt`.
The model's file has shapes and order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import load_pickle, reason
from entropy_probe.model.checkpoint.formats.deepspeed import (
    CONVERT,
    DAMAGED,
    Shapes,
    agree_with_folder,
    groups_of_adam,
    load,
    model_weights,
    stored,
)
from entropy_probe.model.checkpoint.stored import Stored

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt", re.ASCII)


def read(layout: Layout) -> Stored:
    """The masters, moments and hyper-parameters, bit for bit. Raises `CheckpointError`."""
    zero = layout.optimizer.parent
    whole = load(layout.optimizer)
    named = {_MODEL.fullmatch(path.name): path for path in zero.parent.glob("*_model_states.pt")}
    of_model = [named[m] for m in sorted((m for m in named if m), key=lambda m: int(m[1] or 0))]
    models = [load(path) for path in of_model]
    if not models or len(named) != len(models) or models[0].get("mp_world_size", 1) != 1:
        problem = "holds *_model_states.pt of other ranks than data-parallel ones, or none"
        raise CheckpointError(
            zero.parent, problem, "copy the whole folder of a run without tensor parallelism"
        )
    files = [layout.optimizer, *of_model]
    masters: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    try:
        shapes: list[Shapes] = models[0]["param_shapes"]
        vectors = (whole.get("optimizer_state_dict") or {}).get(
            "state", {}
        )  # stage 3 leaves its steps here
        if sum(len(group["params"]) for group in whole["param_groups"]) != len(shapes):
            raise ValueError(f"{len(shapes)} lists of shapes, not one for each flat vector")
        in_order = iter(shapes)
        for group in whole["param_groups"]:
            names: list[str] = []
            for key in group["params"]:
                of_vector = next(in_order)
                for name, shape in of_vector.items():
                    found = _tensors(zero, name, tuple(shape))
                    masters[name] = found.pop("fp32")
                    step = zero / name / "step.pt"
                    stated = vectors.get(key, {}).get("step", group.get("step"))
                    state[name] = {
                        **found,
                        "step": load_pickle(step, CONVERT) if step.is_file() else stated,
                    }
                    files += sorted((zero / name).glob("*.pt"))
                names += of_vector
            groups.append({**group, "params": names})
        groups = groups_of_adam(groups, models[0].get("ds_config"), layout.optimizer)
        weights = model_weights(models, masters, of_model[0])
    except DAMAGED as error:
        problem = (
            f"is not laid out as DeepSpeed 0.19 writes it ({type(error).__name__}: {reason(error)})"
        )
        raise CheckpointError(layout.optimizer, problem, CONVERT) from error
    files += agree_with_folder(layout.weights, masters)
    optimizer = {"state": state, "param_groups": groups}
    return stored(layout, weights, optimizer, files, models[0].get("global_steps"))


def _tensors(zero: Path, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if Path(name).name != name or name == "..":
        raise ValueError(f"{name[:60]!r} is not the name of a parameter")
    found: dict[str, Tensor] = {}
    for what in ("fp32", "exp_avg", "exp_avg_sq"):
        path = zero / name / f"{what}.pt"
        if not path.is_file():
            raise CheckpointError(path, "is missing", "copy the whole folder")
        content = load_pickle(path, CONVERT)
        tensor = content["param"] if isinstance(content, dict) else content
        found[what] = tensor.reshape(shape)
    for path in sorted((zero / name).glob("*.pt")):
        if path.stem not in (*found, "step"):  # the optimizer is known by it
            found[path.stem] = torch.empty(0)
    return found
