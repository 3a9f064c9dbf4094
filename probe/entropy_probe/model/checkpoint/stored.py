"""What a checkpoint's files hold: names, dtypes and shapes, and values when they are asked for.

`readers` makes a `Stored` of a folder in any format; loading and inspecting both begin with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.files import (
    Headers,
    global_step,
    header,
    read_headers,
    read_tensors,
    require_finite,
    weight_files,
)


@dataclass(frozen=True)
class Saved:
    """Weights in the files of `save_pretrained`, which transformers and peft open themselves.

    `stem`: `model` or `adapter_model`. No file is looked for or opened before it is asked for.
    """

    folder: Path
    stem: str

    @cached_property
    def files(self) -> list[Path]:
        return weight_files(self.folder, self.stem)

    @cached_property
    def headers(self) -> Headers:
        found: Headers = {}
        for headers in self._by_file.values():
            found |= headers
        return found

    @property
    def source(self) -> Path:
        """What an error names: the file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.folder

    def file_of(self, name: str) -> Path:
        """The file of a tensor; `source` for a name that is in none."""
        holding = (path for path, headers in self._by_file.items() if name in headers)
        return next(holding, self.source)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The values of these names, or of all. Raises for one that is not finite."""
        found: dict[str, Tensor] = {}
        if names is None:
            for path in self.files:
                found |= read_tensors(path)
            return found
        wanted = set(names)
        for path, headers in self._by_file.items():
            if here := wanted & headers.keys():
                found |= read_tensors(path, here)
        return found

    def require_finite(self) -> None:
        """Read every file, and hold none."""
        for path in self.files:
            read_tensors(path)

    @cached_property
    def _by_file(self) -> dict[Path, Headers]:
        return {path: read_headers(path) for path in self.files}


@dataclass(frozen=True)
class Gathered:
    """Weights that a reader puts together, by the names that they have in `model.state_dict()`.

    `read` takes names. `source`: what an error names. `files`: where they lie.
    """

    headers: Headers
    read: Callable[[Iterable[str]], dict[str, Tensor]]
    source: Path
    files: list[Path]

    @classmethod
    def of(cls, tensors: dict[str, Tensor], source: Path, files: list[Path]) -> Gathered:
        """Tensors that are in memory."""
        headers = {name: header(tensor) for name, tensor in tensors.items()}
        return cls(headers, lambda names: {name: tensors[name] for name in names}, source, files)

    def file_of(self, _: str) -> Path:
        return self.source

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The values of these names, or of all. Raises for one that is not finite."""
        found = self.read(self.headers if names is None else names)
        require_finite(found, self.source)
        return found


Weights = Saved | Gathered


@dataclass(frozen=True)
class Stored:
    """A checkpoint in one piece, whatever its format.

    `optimizer()` reads `{"state": {key: moments}, "param_groups": [..]}` like a state_dict, its
    keys being names where the format has names; `optimizer_files()` are the files that it reads.
    `counted`: the format's own count of steps. `lora`: the JSON file with an adapter's scaling,
    where the weights are those of peft's model, the base model's among them. `rounded`: an
    adapter's own file, which holds the weights too, rounded.
    """

    folder: Path
    weights: Weights
    optimizer: Callable[[], dict[str, Any]]
    optimizer_files: Callable[[], list[Path]]
    counted: int | None = None
    lora: Path | None = None
    rounded: Saved | None = None

    @property
    def global_step(self) -> int | None:
        return global_step(self.folder) if self.counted is None else self.counted

    @property
    def files(self) -> list[Path]:
        return [*self.weights.files, *self.optimizer_files()]


def require_rounded(stored: dict[str, Tensor], masters: dict[str, Tensor], path: Path) -> None:
    """What `stored` has of the masters must be their rounding, to one unit in the last place."""
    for name in stored.keys() & masters.keys():
        tensor, master = stored[name], masters[name]
        limits = torch.finfo(tensor.dtype)
        smallest = torch.tensor(limits.smallest_normal, dtype=master.dtype)
        allowed = limits.eps * torch.maximum(master.abs(), smallest)
        if tensor.shape == master.shape:
            differences = (tensor.to(master.dtype) - master).abs()
            if not bool((differences > allowed).any()):
                continue
        problem = f"{name} differs from the optimizer's master weights"
        raise CheckpointError(path, problem, "use files that were saved together")
