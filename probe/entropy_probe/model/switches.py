"""Switches that training leaves in a configuration, and that no measurement may depend on.

They make a forward return other things, or by another kernel, than it returns without them: router logits whose loss
cannot be taken without labels, tuples, attentions. Dropout needs no entry: a forward runs in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SET: dict[str, bool] = {
    "output_router_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}
"""What a forward reads, and what it is to find."""
_KERNELS = ("attn_implementation", "experts_implementation")
LEFT_OUT = frozenset(
    [
        *("use_return_dict", "torchscript", "gradient_checkpointing", "use_cache"),
        *(
            f"{before}{name}{after}"
            for name in _KERNELS
            for before in ("", "_")
            for after in ("", "_internal")
        ),
    ]
)
"""What is left to the library's default, or said with each call."""


def without_switches(config: Any) -> Any:
    """The values of a config.json, at any depth, as a measurement needs them."""
    if isinstance(config, list):
        return [without_switches(inner) for inner in config]
    if not isinstance(config, dict):
        return config
    kept = {key: without_switches(value) for key, value in config.items() if key not in LEFT_OUT}
    return kept | {key: value for key, value in SET.items() if key in kept}


def switched(modules: list[nn.Module]) -> list[tuple[Any, str]]:
    """Every configuration of a live model, and the switch in it, that is not as a measurement needs it."""
    configs = {id(config): config for config in _configs(modules)}
    return [
        (config, key)
        for config in configs.values()
        for key, value in SET.items()
        if getattr(config, key, value) not in (value, None)
    ]


def _configs(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        config = getattr(module, "config", None)
        if config is not None:
            yield config
            yield from (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))


@contextmanager
def as_needed(places: list[tuple[Any, str]]) -> Iterator[None]:
    """Inside, the switches are as a measurement needs them."""
    before = [getattr(config, key) for config, key in places]
    try:
        for config, key in places:
            setattr(config, key, SET[key])
        yield
    finally:
        for (config, key), value in zip(places, before, strict=True):
            setattr(config, key, value)
