"""The Trainer's folders, and those of `save_pretrained` with an optimizer's file."""

from __future__ import annotations

from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.moments import adam
from entropy_probe.model.checkpoint.stored import Saved, Stored


def read(layout: Layout) -> Stored:
    """Nothing is opened yet: what is missing or damaged raises when it is asked for."""
    return Stored(
        folder=layout.folder,
        weights=Saved(layout.weights, "adapter_model" if layout.is_adapter else "model"),
        optimizer=lambda: adam.read_state(layout.optimizer),
        optimizer_files=lambda: adam.state_files(layout.optimizer),
    )
