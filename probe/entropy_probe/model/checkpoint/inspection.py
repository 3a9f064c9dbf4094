"""What `entropy-probe inspect` prints, and gives to machines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ByteSize

from entropy_probe.errors import CheckpointError
from entropy_probe.report import RecipeSection

_WIDTH = 80
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FoundWeights:
    """`num_parameters`: those of the base model too, a tied head counted once.

    `shapes`: of the trained tensors.
    """

    kind: str
    model_type: str
    base_model: str | None
    num_parameters: int | None
    dtype: str
    shapes: Shapes

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("kind", f"{self.kind}, {self.model_type}, {self.dtype}"),
            ("base model", self.base_model or ""),
            ("parameters", _counted(self.num_parameters)),
        ]


@dataclass(frozen=True)
class FoundOptimizer:
    """`covered` of the `total` tensors in the `groups` have moments.

    They have `num_trainable` values together. Of an optimizer that is not Adam none has, and their
    values are not counted.
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

    def rows(self) -> list[tuple[str, str]]:
        groups = f"{self.groups} group{'s' * (self.groups != 1)}"
        return [
            ("trainable", _counted(self.num_trainable)),
            ("optimizer", f"{self.type} in {self.file}, {groups}"),
            ("moments", f"of {self.covered} of its {self.total} tensors"),
            ("step", " to ".join(f"{step:g}" for step in self.step)),
            ("lr", ", ".join(f"{lr:g}" for lr in self.lr)),
            ("betas", ", ".join(f"{beta1:g} {beta2:g}" for beta1, beta2 in self.betas)),
        ]


@dataclass(frozen=True)
class Inspection:
    """What was found; `None` where it could not be.

    `files` maps names to bytes; each of the problems keeps the checkpoint from loading.
    """

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
    recipe: RecipeSection | None = None

    def text(self) -> str:
        """The same for the eye: 80 columns, but one line for each problem."""
        rows = [
            ("checkpoint", self.path),
            ("", self.note),
            ("format", self.format or "unknown"),
            *(() if self.weights is None else self.weights.rows()),
            *(() if self.optimizer is None else self.optimizer.rows()),
            ("global step", "" if self.global_step is None else str(self.global_step)),
            ("tokenizer", "none" if self.tokenizer is None else f"{self.tokenizer:,} tokens"),
        ]
        of_recipe = [] if self.recipe is None else self.recipe.lines()
        rows += [("" if k else "recipe", line) for k, line in enumerate(of_recipe)]
        sizes = [f"{_size(size):>9}  {name}" for name, size in self.files.items()]
        rows += [("" if k else "files", line) for k, line in enumerate(sizes)]
        lines = [_wrapped(f"{label:<12}", value) for label, value in rows if value]
        lines += [_wrapped("warning: ", warning, "  ") for warning in self.warnings]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


class Notes:
    """Warnings and problems, in the order in which they are found."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.problems: list[str] = []

    @contextmanager
    def trying(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if str(error) not in self.problems:  # met in two places
                self.problems.append(str(error))
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); make it readable"
            self.problems.append(f"{error.filename}: {problem}")


def _counted(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _size(size: int | None) -> str:
    return "no file" if size is None else ByteSize(size).human_readable(separator=" ")


def _wrapped(label: str, value: Any, indent: str = " " * 12) -> str:
    return textwrap.fill(
        f"{label}{value}",
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def values_in(shapes: Shapes) -> int:
    """How many values tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())
