"""Loading a checkpoint as a configuration asks for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from entropy_probe import memory
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError
from entropy_probe.layout import find_layout
from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
from entropy_probe.model.device import usable_device
from entropy_probe.model.placement import IN_MEMORY, place
from entropy_probe.processes.world import ALONE, World

_OF_THE_FILES = 6
"""What one process holds of a full fine-tune, over the size of its checkpoint (12 bytes a parameter): θ, its copy in
float64, moments, v, sums of gradients, and the gradients of two units."""


def load_configured(
    path: str | Path, base_model: str | Path | None, config: ProbeConfig, world: World = ALONE
) -> Checkpoint:
    """The checkpoint on the configured device, its parts where the configuration puts them.

    Of several processes each calls this; `world.together()` makes them end alike. Each has a checkpoint of its own, or
    all have one (`sharding`), which rank 0 has loaded, in the memory of the machine.
    """
    device, missing = world.device(config.device), config.first_order.missing_state
    load = partial(load_checkpoint, path, base_model, missing_state=missing)
    if not _in_one_copy(path, config, world):
        return load(device, **config.placement)
    usable = usable_device(device)
    found = world.in_one_copy().one(lambda: load("cpu"), moved=True)
    info = found.info
    if usable.type != "cpu":  # what is in memory is lent to the process's own device
        info = replace(info, device_map=place(found.model, IN_MEMORY, usable).device_map)
    return replace(found, info=info, in_one_copy=True)


def _in_one_copy(path: str | Path, config: ProbeConfig, world: World) -> bool:
    """Whether processes hold the checkpoint, and what is as long as it, together."""
    if world.size == 1 or config.sharding == "prompt" or config.device_map is not None:
        return False
    if config.sharding == "auto" and not world.any(_is_too_much(path, config, world)):
        return False
    if world.is_of_one_machine():
        return True
    if config.sharding == "parameter":
        problem = "parameter needs processes that see one another's memory: Linux, on one machine"
        raise ConfigError("sharding", problem, "start them on one machine, or set sharding: prompt")
    return False


def _is_too_much(path: str | Path, config: ProbeConfig, world: World) -> bool:
    """Whether a full fine-tune does not fit into memory once for each process, or not whole on the device of one."""
    layout = find_layout(path)
    if layout.is_adapter:
        return False
    size = sum(_size(file) for file in layout.folder.rglob("*"))
    device = usable_device(world.device(config.device))
    here, there = (memory.available_bytes(of) for of in (torch.device("cpu"), device))
    too_much = here is not None and world.size * _OF_THE_FILES * size > here
    return too_much or (device.type != "cpu" and there is not None and 2 * size > there)


def _size(path: Path) -> int:
    """Of a file; 0 of what is none, or is gone by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
