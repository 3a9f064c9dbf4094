"""What `entropy-probe inspect` finds out about the optimizer, without the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.inspection import FoundOptimizer, FoundWeights, Notes, values_in
from entropy_probe.model.checkpoint.moments import adam, others
from entropy_probe.model.checkpoint.moments.blocks import with_moments
from entropy_probe.model.checkpoint.moments.order import names_in_file
from entropy_probe.model.checkpoint.stored import Stored

_MOST_PROBLEMS = 5


def found_optimizer(
    layout: Layout,
    stored: Stored,
    weights: FoundWeights | None,
    found: Notes,
) -> FoundOptimizer:
    """Raises `CheckpointError` where there is none, or none that is known."""
    state_dict, path = with_moments(stored.optimizer()), layout.optimizer
    kind = others.recognise(state_dict, path)
    if kind is not None:
        return _other_optimizer(kind, state_dict, path, found)
    groups = state_dict["param_groups"]
    keys = adam.adam_keys(state_dict, path)
    states, broken = _states(state_dict, keys, path)
    found.problems += broken[:_MOST_PROBLEMS]
    if len(broken) > _MOST_PROBLEMS:
        more = len(broken) - _MOST_PROBLEMS
        found.problems.append(f"{path}: {more} more tensors cannot be used; see those above")
    if not states:
        raise CheckpointError(
            path, "has no moments of any tensor", "use a checkpoint of Adam or AdamW"
        )
    if lost := adam.lost_to_rounding(states):
        found.warnings.append(lost)
    total = sum(len(of_group) for of_group in keys)
    parts = sum(map(bool, keys))
    if parts > 2 and names_in_file(keys, groups) is None:
        decided = "their order is decided when the model is loaded"
        found.warnings.append(f"{parts} groups without names: {decided}")
    with found.trying():
        _compare(states, total - len(broken), weights, path, found)
    steps = [state.step for state in states]
    return FoundOptimizer(
        file=path.name,
        type=adam.kind_of(states),
        groups=len(groups),
        step=sorted({min(steps), max(steps)}),
        lr=sorted({state.lr for state in states}, reverse=True),
        betas=sorted({state.betas for state in states}),
        covered=len(states),
        total=total,
        num_trainable=sum(state.exp_avg.numel() for state in states),
    )


def _states(
    state_dict: dict[str, Any], keys: list[list[int | str]], path: Path
) -> tuple[list[adam.AdamState], list[str]]:
    """The states that Adam can have, and what is wrong with the others; a tensor may have none."""
    states: list[adam.AdamState] = []
    broken: list[str] = []
    for group, of_group in zip(state_dict["param_groups"], keys, strict=True):
        for key in of_group:
            entry = state_dict["state"].get(key)
            if entry in (None, {}):
                continue
            moment = entry.get("exp_avg") if isinstance(entry, dict) else None
            shape = getattr(moment, "shape", torch.Size())
            try:
                states.append(adam.adam_state(f"tensor {key}", entry, group, shape, path))
            except CheckpointError as error:
                broken.append(str(error))
    return states, broken


def _other_optimizer(
    kind: others.Kind,
    state_dict: dict[str, Any],
    path: Path,
    found: Notes,
) -> FoundOptimizer:
    of = others.described(kind, state_dict, path)
    found.warnings.append(f"{of.reason}; criteria that need one are not applicable")
    return FoundOptimizer(
        file=path.name,
        type=of.kind,
        groups=len(state_dict["param_groups"]),
        step=[] if of.step is None else [of.step],
        lr=[] if of.lr is None else [of.lr],
        betas=[],
        covered=0,
        total=sum(len(keys) for keys in others.keys_of(kind, state_dict, path)),
        num_trainable=None,
    )


def _compare(
    states: list[adam.AdamState],
    total: int,
    weights: FoundWeights | None,
    path: Path,
    found: Notes,
) -> None:
    """Compare the moments with the weights' headers: as many tensors, of the same shapes.

    Experts that a file keeps apart and the model together have other shapes and as many values.
    """
    steps = [state.step for state in states]
    if min(steps) != max(steps):
        found.warnings.append(f"steps differ: {min(steps):g} to {max(steps):g}")
    if weights is None:
        return
    missing = min(total, len(weights.shapes)) - len(states)
    if "adapter" in weights.kind and missing > 0:
        remedy = "save it after a step of every parameter"
        raise CheckpointError(path, f"{missing} tensors have no moments", remedy)
    if (frozen := total - len(states)) > 0:
        found.warnings.append(f"{frozen} frozen tensors are in the optimizer, without moments")
    moments = Counter(tuple(state.exp_avg.shape) for state in states)
    rest = moments - Counter(weights.shapes.values())
    values = sum(state.exp_avg.numel() for state in states)
    if rest and values != values_in(weights.shapes):
        which = f"{rest.total()} of its {len(states)} tensors"
        raise CheckpointError(
            path,
            f"{which} have shapes that the weights lack: {next(iter(rest))}",
            "use the optimizer saved with this model",
        )
    if len(states) < (count := len(weights.shapes)):
        found.warnings.append(f"moments of {len(states)} tensors, the weights have {count}")
