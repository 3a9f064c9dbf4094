"""What comes of loading a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from entropy_probe.memory import Held
from entropy_probe.model.checkpoint.moments.adam import AdamState
from entropy_probe.model.checkpoint.moments.others import OtherOptimizer


@dataclass(frozen=True)
class CheckpointInfo:
    """What the folder is: its kind, files and fingerprint.

    `fingerprint`: SHA-256 over weights, configuration and optimizer. `saved_states`: how many
    tensors the optimizer's file holds moments of, by their hyper-parameters. `warnings`: what was
    found out rather than read, or is hardly meant. `taken_as_frozen`: trainable as far as the
    files tell, but without optimizer state. `device_map`: where its modules are, if they are not
    all on one device.
    """

    path: Path
    base_model: Path | None
    adapter: str | None
    model_type: str
    num_parameters: int
    num_trainable: int
    weights_dtype: str
    optimizer_file: Path
    global_step: int | None
    fingerprint: str
    saved_states: dict[str, int]
    warnings: tuple[str, ...] = ()
    taken_as_frozen: tuple[str, ...] = ()
    device_map: dict[str, str] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """{θ, Adam state}: the model in float32 and eval mode, its tokenizer, Adam's state by name.

    `other`: the optimizer, where it is not Adam; `adam` is empty then. `held`: the memory that
    loading took. `in_one_copy`: several processes hold its tensors together, once.
    """

    model: nn.Module
    tokenizer: Any | None
    adam: dict[str, AdamState]
    info: CheckpointInfo
    other: OtherOptimizer | None = None
    held: Held | None = None
    in_one_copy: bool = False
