"""What the measurement ran on: versions, device, threads, and the processes that took part."""

from __future__ import annotations

import platform

import torch

from entropy_probe.model.forward import BoundModel
from entropy_probe.processes.world import World
from entropy_probe.report import DistributedSection


def environment(bound: BoundModel, threads: int) -> dict[str, str | int]:
    """Versions of what computes, the device and the number of threads."""
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": str(bound.device),
        "threads": threads,
    }


def distributed_section(world: World) -> DistributedSection | None:
    """What each process has sent so far; `None` of one alone."""
    if world.size == 1:
        return None
    return DistributedSection(
        world_size=world.size,
        sharding="parameter" if world.one_copy else "prompt",
        bytes_sent_per_rank=world.bytes_sent,
        bytes_of_prompts_per_rank=world.bytes_of_prompts,
    )
