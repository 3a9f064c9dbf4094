"""Checkpoints whose weights and moments lie in pieces: each format's reader puts them together as `Sharded`.

A reader is a module with `read(layout) -> Sharded`, named in `READERS` under the format that
`entropy_probe.layout` sees. Nothing is ever executed: a pickle is opened with `weights_only=True`, or by `Restricted`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout


@dataclass(frozen=True)
class Sharded:
    """A checkpoint in one piece.

    `weights`: tensors by the name they have in `model.state_dict()`. `optimizer`: `{"state": {key: moments},
    "param_groups": [..]}` like a state_dict, its keys being names where the format has names. `files`: what was read.
    `global_step`: the trainer's own count, where the format has one. `lora`: the JSON file with an adapter's scaling,
    where the weights are those of peft's model, the base model's among them. `rounded_beside`: the folder's own files
    hold the weights too, rounded.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    files: list[Path]
    global_step: int | None = None
    lora: Path | None = None
    rounded_beside: bool = False

    @property
    def dtype(self) -> str:
        """The dtypes of the weights, such as `bfloat16` or `bfloat16/float32`."""
        return "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.weights.values()}))


def require_rounded(stored: dict[str, Tensor], masters: dict[str, Tensor], path: Path) -> None:
    """What `stored` has of the masters must be what they round to in its dtype, to one unit in the last place."""
    for name in stored.keys() & masters.keys():
        tensor, master = stored[name], masters[name]
        limits = torch.finfo(tensor.dtype)
        allowed = limits.eps * torch.maximum(master.abs(), torch.tensor(limits.smallest_normal, dtype=master.dtype))
        if tensor.shape != master.shape or bool(((tensor.to(master.dtype) - master).abs() > allowed).any()):
            raise CheckpointError(
                path, f"{name} differs from the optimizer's master weights", "use files that were saved together"
            )


READERS: dict[str, Callable[[Layout], Sharded]] = {}
# The same with the weights on the meta device, where that spares reading them.
HEADERS: dict[str, Callable[[Layout], Sharded]] = {}


class Restricted(pickle.Unpickler):
    """An unpickler that knows the names in `allowed` and no others: what a pickle calls is looked up there alone.

    `allowed[module, name]` is what the pickle gets for that name. Anything else raises `CheckpointError`.
    """

    def __init__(self, stream: BinaryIO, path: Path, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(stream)
        self._path, self._allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise CheckpointError(
                self._path, f"asks for {module}.{name}"[:120] + ", and was not executed", "do not trust this file"
            )
        return self._allowed[module, name]
