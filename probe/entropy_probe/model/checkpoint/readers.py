"""The reader of each format. It opens what tells names and shapes, and raises `CheckpointError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from entropy_probe.layout import (
    DCP,
    FSDP,
    NOTES,
    PRETRAINED,
    TORCHTITAN,
    TRAINER,
    UNIVERSAL,
    VERL,
    ZERO,
    Layout,
)
from entropy_probe.model.checkpoint.formats import (
    dcp,
    deepspeed,
    deepspeed_universal,
    fsdp,
    torchtitan,
    trainer,
    verl,
)
from entropy_probe.model.checkpoint.stored import Stored

READERS: Mapping[str, Callable[[Layout], Stored]] = MappingProxyType(
    {
        TRAINER: trainer.read,
        PRETRAINED: trainer.read,
        NOTES: trainer.read,
        FSDP: fsdp.read,
        DCP: dcp.read,
        TORCHTITAN: torchtitan.read,
        VERL: verl.read,
        ZERO: deepspeed.read,
        UNIVERSAL: deepspeed_universal.read,
    }
)


def read(layout: Layout) -> Stored:
    """What is stored in the layout's folder, by the reader of its format."""
    return READERS[layout.format](layout)
