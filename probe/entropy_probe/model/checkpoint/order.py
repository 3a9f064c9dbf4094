"""Which parameter is which: an `optimizer.pt` numbers its parameters by position.

The names come from `param_names`, from string keys or from an optimizer_param_names.json beside it; else every known
grouping (which trainers used, in which order) is tried against group sizes and shapes, and exactly one assignment must
fit. What cannot be mapped for sure is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from entropy_probe.errors import CheckpointError

_NORM_OR_BIAS = [re.compile(p) for p in (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")]
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)\.")
_DDP = re.compile(r"^module\.")


def names_of(
    keys: list[list[int | str]],
    groups: list[dict[str, Any]],
    state: dict[Any, Any],
    parameters: dict[str, nn.Parameter],
    model: nn.Module,
    path: Path,
) -> dict[int | str, str]:
    """The name of the parameter behind each key. Raises `CheckpointError` where it cannot be told for sure."""
    named = _names_in_file(keys, groups)
    if named is not None:
        for name in named.values():
            if name not in parameters:
                raise CheckpointError(
                    path, f"has state for {name}, which the model lacks", "use the optimizer saved with this model"
                )
        return named
    flat = [key for group in keys for key in group]
    sizes = [len(group) for group in keys if group]
    fitting: dict[tuple[str, ...], str] = {}
    for label, candidate in _candidate_orders(model).items():
        order = [name for group in candidate for name in group]
        if [len(group) for group in candidate if group] == sizes and _shapes_fit(flat, order, state, parameters):
            fitting.setdefault(tuple(order), label)
    if len(fitting) == 1:
        return dict(zip(flat, next(iter(fitting)), strict=True))
    count = sum(p.requires_grad for p in parameters.values())
    if not fitting:
        raise CheckpointError(
            path,
            f"its {len(flat)} tensors in groups of {sizes} fit no known order of this model's {count} trainable ones",
            "use the optimizer saved with this model, or save it with `param_names`",
        )
    raise CheckpointError(
        path,
        f"its order of parameters is ambiguous ({', '.join(fitting.values())} all fit)",
        "save the optimizer with names: AdamW(model.named_parameters())",
    )


def _names_in_file(keys: list[list[int | str]], groups: list[dict[str, Any]]) -> dict[int | str, str] | None:
    """Names from `param_names` or from string keys, without the prefixes of wrappers; `None` where there are none."""
    names: dict[int | str, str] = {}
    for group_keys, group in zip(keys, groups, strict=True):
        in_group = group.get("param_names")
        if in_group is None and all(isinstance(key, str) for key in group_keys):
            in_group = group_keys
        if not isinstance(in_group, list | tuple) or len(in_group) != len(group_keys):
            return None
        for key, name in zip(group_keys, in_group, strict=True):
            names[key] = _WRAPPERS.sub(r"\1", _DDP.sub("", str(name)))
    return names or None


def _candidate_orders(model: nn.Module) -> dict[str, list[list[str]]]:
    """Groupings that trainers are known to use: label → names per group, in the optimizer's order."""
    everything = [name for name, _ in model.named_parameters()]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())

    def split(decays: Callable[[str], bool]) -> list[list[str]]:
        return [[n for n in trainable if decays(n)], [n for n in trainable if not decays(n)]]

    in_layer_norm = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    return {
        "transformers 5 decay split": split(
            lambda n: n not in in_layer_norm and not any(p.search(n.lower()) for p in _NORM_OR_BIAS)
        ),
        "transformers 4.44 decay split": split(lambda n: n not in in_layer_norm and "bias" not in n),
        "one group of trainable parameters": [trainable],
        "one group of all parameters": [everything],
        "matrices before vectors": split(lambda n: parameters[n].ndim > 1),
    }


def _shapes_fit(
    keys: list[int | str], order: list[str], state: dict[Any, Any], parameters: dict[str, nn.Parameter]
) -> bool:
    if len(keys) != len(order):
        return False
    for key, name in zip(keys, order, strict=True):
        entry = state.get(key)
        moments = [m for m in entry.values() if isinstance(m, Tensor) and m.ndim > 0] if isinstance(entry, dict) else []
        if any(m.shape != parameters[name].shape for m in moments if m.numel() != 1 or parameters[name].numel() == 1):
            return False
    return True
