"""The model of a checkpoint, whatever its weights are: a full model, an adapter, or both in one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from entropy_probe.base_model import find_base_model
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.stored import Stored
from entropy_probe.model.checkpoint.weights import adapter, pretrained


@dataclass(frozen=True)
class Built:
    """The model, and the files that say what it is.

    `config`: its own; `settings`: the JSON file with an adapter's scaling. `adapter`: its kind, such
    as `LoRA`; `base`: the base model's folder, where it counts.
    """

    model: nn.Module
    config: Path
    base: Path | None = None
    adapter: str | None = None
    settings: Path | None = None


def build(layout: Layout, stored: Stored, base: Path | None, *, values: bool = True) -> Built:
    """What loading and inspecting have in common. Raises `CheckpointError`.

    Without `values` the headers alone are read, and the model is on the meta device: whatever is
    wrong with names and shapes raises as it does in loading.
    """
    folder = layout.weights
    if layout.is_adapter:
        base = find_base_model(folder, base)
        name = layout.adapter_name
        model = adapter.load_adapter(folder, base, stored, name=name, values=values)
        config = folder / "adapter_config.json"
        return Built(model, config, base, adapter.check_config(folder), settings=config)
    if stored.lora is not None:
        model = adapter.wrap(folder, stored, stored.lora, base, values=values)
        return Built(model, folder / "config.json", base, adapter.kind_of(model), stored.lora)
    config = pretrained.require_config(folder)
    return Built(pretrained.load_full_model(folder, stored.weights, values=values), config)
