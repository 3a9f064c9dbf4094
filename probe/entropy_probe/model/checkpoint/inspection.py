"""What `entropy-probe inspect` prints, and gives to machines."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from pydantic import ByteSize

_WIDTH = 80
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FoundWeights:
    """`num_parameters`: those of the base model too, a tied head counted once. `shapes`: of the trained tensors."""

    kind: str
    model_type: str
    base_model: str | None
    num_parameters: int | None
    dtype: str
    shapes: Shapes


@dataclass(frozen=True)
class FoundOptimizer:
    """`covered` of the `total` tensors in the `groups` have moments, of `num_trainable` values together.

    Of an optimizer that is not Adam none has, and their values are not counted.
    """

    file: str
    type: str
    groups: int
    step: list[float]
    lr: list[float]
    betas: list[tuple[float, float]]
    covered: int
    total: int
    num_trainable: int | None


@dataclass(frozen=True)
class Inspection:
    """What was found; `None` where it could not be. `files` maps names to bytes; each problem keeps it from loading."""

    path: str
    note: str = ""
    format: str | None = None
    weights: FoundWeights | None = None
    optimizer: FoundOptimizer | None = None
    global_step: int | None = None
    tokenizer: int | None = None
    files: dict[str, int | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The same for the eye: 80 columns, but one line for each problem."""
        rows = [("checkpoint", self.path), ("", self.note), ("format", self.format or "unknown")]
        if self.weights is not None:
            rows += [
                ("kind", f"{self.weights.kind}, {self.weights.model_type}, {self.weights.dtype}"),
                ("base model", self.weights.base_model or ""),
                ("parameters", "" if self.weights.num_parameters is None else f"{self.weights.num_parameters:,}"),
            ]
        if self.optimizer is not None:
            found = self.optimizer
            rows += [
                ("trainable", "" if found.num_trainable is None else f"{found.num_trainable:,}"),
                ("optimizer", f"{found.type} in {found.file}, {found.groups} group{'s' * (found.groups != 1)}"),
                ("moments", f"of {found.covered} of its {found.total} tensors"),
                ("step", " to ".join(f"{step:g}" for step in found.step)),
                ("lr", ", ".join(f"{lr:g}" for lr in found.lr)),
                ("betas", ", ".join(f"{beta1:g} {beta2:g}" for beta1, beta2 in found.betas)),
            ]
        rows += [
            ("global step", "" if self.global_step is None else str(self.global_step)),
            ("tokenizer", f"{self.tokenizer:,} tokens" if self.tokenizer is not None else "none"),
            *(("" if k else "files", f"{_size(self.files[n]):>9}  {n}") for k, n in enumerate(self.files)),
        ]
        lines = [_wrapped(f"{label:<12}", value) for label, value in rows if value]
        lines += [_wrapped("warning: ", warning, "  ") for warning in self.warnings]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def _size(size: int | None) -> str:
    return "no file" if size is None else ByteSize(size).human_readable(separator=" ")


def _wrapped(label: str, value: Any, indent: str = " " * 12) -> str:
    return textwrap.fill(
        f"{label}{value}", _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
