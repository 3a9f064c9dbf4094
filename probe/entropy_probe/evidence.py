"""What the numbers of a report are made of: kept beside it, so that other code can compute them again.

Arrays by name, in float64 and integers, and facts as in JSON; in a file both are one safetensors file. `docs/audit.md`
lists them. Nothing is as long as the parameters: with B·G responses of up to T tokens in E, K values of η, U units and
N trained tensors a file takes about 8·[B·G·T·(24 + 2K) + 2·N·U²] bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ProbeError

if TYPE_CHECKING:
    from torch import Tensor

_FACTS = "facts"


@dataclass(frozen=True, eq=False)
class Evidence:
    """`arrays` by name and `facts`."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]

    def having(self, prefix: str, more: Mapping[str, Tensor]) -> Evidence:
        """With more arrays, named `prefix.name`."""
        arrays = {f"{prefix}.{n}": np.asarray(t.detach().cpu()) for n, t in more.items()}
        return Evidence({**self.arrays, **arrays}, self.facts)

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return save(arrays, {_FACTS: json.dumps(self.facts)})

    def to_file(self, path: str | Path) -> None:
        """Write it atomically."""
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def from_file(cls, path: str | Path) -> Evidence:
        """Raises `ProbeError` where the file holds no evidence."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})[_FACTS])
                return cls({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            problem = f"holds no evidence ({type(error).__name__}: {error})"
            raise ProbeError(path, problem, "give the file that --probe-evidence wrote") from error


def evidence_file(folder: str | Path, name: str) -> Path:
    """Where the evidence of the checkpoint `name` is, in a folder of evidence."""
    return Path(folder) / f"{name}.safetensors"
