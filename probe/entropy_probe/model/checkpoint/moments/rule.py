"""Whether the keys of groups and states are Adam's: one that is not known may change what a step does.

What Adam reads of them is in `adam`; the optimizers that are known by other keys are in `others`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from entropy_probe.errors import shown
from entropy_probe.model.checkpoint.moments.blocks import QUANTISED, are_blocks

# fmt: off
# torch, Transformers 4 (and GaLore, APOLLO), apex, DeepSpeed, torchao, bitsandbytes
READ = frozenset({
    "params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "step",
    "bias_correction", "correct_bias", "decoupled_weight_decay", "adam_w_mode",
})
"""Group keys that v, P or the names of parameters are made from."""
_HOW = frozenset({"fused", "foreach", "capturable", "differentiable", "set_grad_none"})
_NOTES = frozenset({  # of schedulers, trainers and builders of groups
    "name", "names", "group_name", "param_group_name", "tag", "label", "layer", "layer_id", "layer_idx", "lr_scale",
    "lr_mult", "wd_mult", "pre_lr_mult", "pre_wd_mult", "layer_decay", "max_lr", "min_lr", "base_lr", "swa_lr",
    "max_momentum", "base_momentum", "min_momentum", "start_wd", "end_wd", "param_name", "default_config",
    "no_deprecation_warning",
})
_HARMLESS_IF_OFF = frozenset({  # bitsandbytes, timm, optimizers with Muon, DeepSpeed and Megatron
    "alpha", "t_alpha", "t_beta3", "caution", "cautious", "corrected_weight_decay", "use_muon", "is_muon", "moe",
    "is_expert_parallel", "is_decoupled_lr",
})
STATE = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
# fmt: on


def strange_in_group(group: Mapping[Any, Any]) -> str | None:
    """The first key that is not Adam's, with its value; `None` where all are, or are switched off."""
    for key, value in group.items():
        is_off = key in _HARMLESS_IF_OFF and _is_off(value)
        if key not in READ | _HOW | _NOTES and not is_off:
            return _named(key, value)
    betas = group.get("betas")
    if isinstance(betas, list | tuple) and len(betas) > 2:
        return _named("betas", betas)
    return None


def strange_in_state(entry: Mapping[Any, Any]) -> str | None:
    """The first key that is not Adam's and holds anything."""
    for key, value in entry.items():
        known = key in STATE or (key == QUANTISED and are_blocks(value))
        if not known and value is not None:
            return _named(key)
    return None


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float) and value == 0)


def _named(key: Any, value: Any = None) -> str:
    name = key if isinstance(key, str) else shown(key)
    if value is None or isinstance(value, Tensor | dict):
        return f"`{name}`"[:60]
    return f"`{name}: {shown(value)}`"[:60]
