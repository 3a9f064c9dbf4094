"""Loading a checkpoint as a configuration asks for it."""

from __future__ import annotations

from pathlib import Path

from entropy_probe.config import ProbeConfig
from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
from entropy_probe.processes.world import ALONE, World


def load_configured(
    path: str | Path, base_model: str | Path | None, config: ProbeConfig, world: World = ALONE
) -> Checkpoint:
    """The checkpoint on the configured device, its parts where the configuration puts them.

    Of several processes each calls this and has a checkpoint of its own; `world.together()` makes
    them end alike.
    """
    return load_checkpoint(
        path,
        base_model,
        world.device(config.device),
        missing_state=config.first_order.missing_state,
        **config.placement,
    )
