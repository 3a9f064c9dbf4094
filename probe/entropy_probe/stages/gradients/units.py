"""What a unit of the U-statistic is: a prompt, or a block of prompts where gradients of all do not fit."""

from __future__ import annotations

import torch

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.share import Share, Units

# Gradients of single prompts that are held beside those of the units.
_WITNESSED = 8


def units_of_prompts(rollouts: Rollouts) -> Units:
    """Every prompt a unit of its own."""
    return Units("exact", torch.arange(rollouts.num_prompts))


def units_of(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Units:
    """The units of a batch; the same however many processes there are."""
    mode, num_units = units_within_memory(bound, rollouts, config)
    return Units(mode, torch.arange(rollouts.num_prompts) * num_units // rollouts.num_prompts)


def units_within_memory(
    bound: BoundModel, rollouts: Rollouts, config: ProbeConfig
) -> tuple[str, int]:
    """(mode, number of units): every prompt a unit in `exact` mode where the gradients fit into
    `first_order.max_gradient_gib`, else as many blocks as fit; `num_blocks` of them in `block` mode.

    Held at once are X and Y of the U batch, X of the E batch, and X and Y of two prompts in two ways,
    for the witness.
    """
    first_order, size_b = config.first_order, rollouts.num_prompts
    room = (first_order.max_gradient_gib * 2**30 / _bytes_of_one(bound) - _WITNESSED) / 3
    if first_order.mode == "exact" and size_b <= room:
        return "exact", size_b
    most = int(room)
    wanted = max(most, 2) if first_order.mode == "exact" else min(first_order.num_blocks, size_b)
    if wanted > most:
        needed = bytes_of_units(bound, wanted) / 2**30
        raise MeasurementError(
            "first_order.max_gradient_gib",
            f"gradients of {wanted} blocks need {needed:.2g} GiB, {first_order.max_gradient_gib:g} are allowed",
            "raise it, or set first_order.num_blocks lower" if wanted > 2 else "raise it",
        )
    return "block", wanted


def pairs_fit(bound: BoundModel, share: Share, config: ProbeConfig) -> bool:
    """Whether Y of all units may go round the processes, U·D numbers, so that all X_nᵀPY_m are known."""
    sent = len(share.units.sizes) * _bytes_of_one(bound)
    return share.several and sent <= config.first_order.max_pairs_gib * 2**30


def bytes_of_units(bound: BoundModel, units: int) -> int:
    """What the gradients of so many units take, with those of the witness."""
    return int((3 * units + _WITNESSED) * _bytes_of_one(bound))


def _bytes_of_one(bound: BoundModel) -> float:
    trainable = sum(p.numel() for p in bound.registry.trainable.values())
    return trainable * torch.finfo(bound.dtype).bits / 8
