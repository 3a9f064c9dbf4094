"""Which parameter is which: an `optimizer.pt` numbers its parameters by position.

The names come from `param_names`, from string keys or from an optimizer_param_names.json beside it; else every known
grouping (`groupings`) is tried against group sizes and shapes. Where several fit, `content` decides if it clearly can.
What cannot be mapped for sure is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.moments.content import choose
from entropy_probe.model.checkpoint.moments.groupings import known_groupings

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)\.")
_DDP = re.compile(r"^module\.")
_MOST_NAMES = 4


def names_of(
    keys: list[list[int | str]],
    groups: list[dict[str, Any]],
    state: dict[Any, Any],
    parameters: dict[str, nn.Parameter],
    model: nn.Module,
    path: Path,
) -> tuple[dict[int | str, str], str]:
    """The name of the parameter behind each key, and a note where content decided which it is ("" otherwise).

    Raises `CheckpointError` where it cannot be told for sure.
    """
    named = names_in_file(keys, groups)
    if named is not None:
        for name in named.values():
            if name not in parameters:
                raise CheckpointError(
                    path,
                    f"has state for {name}, which the model lacks",
                    "use the optimizer saved with this model",
                )
        return named, ""
    flat = [key for group in keys for key in group]
    fitting = fitting_orders(keys, state, parameters, model)
    if not fitting:
        count = sum(p.requires_grad for p in parameters.values())
        raise CheckpointError(
            path,
            f"its {len(flat)} tensors in groups of {[len(group) for group in keys if group]} fit no known order of "
            f"this model's {count} trainable ones",
            "use the optimizer saved with this model, or save it with `param_names`",
        )
    orders, labels = list(fitting), list(fitting.values())
    shapes = [parameters[name].shape for name in orders[0]]
    moments = [
        _second_moment(state.get(key), shape) for key, shape in zip(flat, shapes, strict=True)
    ]
    if len(orders) == 1 or all(
        moment is None for moment in moments
    ):  # of no tensor: not Adam, whatever the order
        return dict(zip(flat, orders[0], strict=True)), ""
    found = choose(model, orders, moments)
    compared = f"({found.correlation:.2f} against {found.of_rival:.2f})"
    if found.clear:
        note = f"order of parameters decided by content: {labels[found.best]} {compared}"
        return dict(zip(flat, orders[found.best], strict=True)), note
    differ = [
        name
        for name, other in zip(orders[found.best], orders[found.rival], strict=True)
        if name != other
    ]
    raise CheckpointError(
        path,
        f"the order of its parameters is ambiguous ({'; '.join(labels)}: all fit), and its moments cannot tell apart "
        f"{some_names(differ)} {compared}",
        "save the optimizer with names: AdamW(model.named_parameters())",
    )


def some_names(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def fitting_orders(
    keys: list[list[int | str]],
    state: dict[Any, Any],
    parameters: dict[str, nn.Parameter],
    model: nn.Module,
) -> dict[tuple[str, ...], str]:
    """The orders of names that fit group sizes and shapes, each with the label of the first grouping that has it."""
    flat, sizes = [key for group in keys for key in group], [len(group) for group in keys if group]
    fitting: dict[tuple[str, ...], str] = {}
    for grouping in known_groupings(model):
        order = tuple(grouping.names)
        if (grouping.cut_anywhere or grouping.sizes == sizes) and _shapes_fit(
            flat, order, state, parameters
        ):
            fitting.setdefault(order, grouping.label)
    return fitting


def names_in_file(
    keys: list[list[int | str]], groups: list[dict[str, Any]]
) -> dict[int | str, str] | None:
    """Names from `param_names` or from string keys, without the prefixes of wrappers; `None` where there are none."""
    names: dict[int | str, str] = {}
    for group_keys, group in zip(keys, groups, strict=True):
        in_group = group.get("param_names")
        if in_group is None and all(isinstance(key, str) for key in group_keys):
            in_group = group_keys
        if not isinstance(in_group, list | tuple) or len(in_group) != len(group_keys):
            return None
        for key, name in zip(group_keys, in_group, strict=True):
            names[key] = bare_name(str(name))
    return names or None


def bare_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, FSDP and torch.compile."""
    return _WRAPPERS.sub(r"\1", _DDP.sub("", name))


def _shapes_fit(
    keys: list[int | str],
    order: tuple[str, ...],
    state: dict[Any, Any],
    parameters: dict[str, nn.Parameter],
) -> bool:
    if len(keys) != len(order):
        return False
    for key, name in zip(keys, order, strict=True):
        entry = state.get(key)
        moments = (
            [m for m in entry.values() if isinstance(m, Tensor) and m.ndim > 0]
            if isinstance(entry, dict)
            else []
        )
        if any(
            m.shape != parameters[name].shape
            for m in moments
            if m.numel() != 1 or parameters[name].numel() == 1
        ):
            return False
    return True


def _second_moment(entry: Any, shape: torch.Size) -> Tensor | None:
    """`exp_avg_sq`, where there is one that can be compared."""
    moment = entry.get("exp_avg_sq") if isinstance(entry, dict) else None
    if (
        not isinstance(moment, Tensor)
        or moment.layout is not torch.strided
        or not moment.is_floating_point()
    ):
        return None
    known = moment.shape == shape and not moment.is_meta and bool(torch.isfinite(moment).all())
    return moment if known else None
