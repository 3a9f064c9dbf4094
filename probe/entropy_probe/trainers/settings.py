"""The files in which trainers leave their settings, and what these say of the next update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_probe.errors import ProbeError
from entropy_probe.trainers import others, trl
from entropy_probe.trainers.found import Found

_ABOVE = 4
"""How many folders above a checkpoint a run's own files may stand."""


@dataclass(frozen=True)
class Source:
    """A file by its place in a checkpoint's folder or in one above it, and its reader."""

    file: str
    read: Callable[[Path], Found | None]
    above: bool = True


SOURCES = (
    Source("training_args.bin", trl.found, above=False),
    Source("config.yaml", others.nemo_rl),
    Source(".hydra/config.yaml", others.verl),
    Source("configs/trainer.json", others.prime_rl),
)


@dataclass(frozen=True)
class Trace:
    """What was found, if anything; and what was there and could not be read."""

    found: Found | None = None
    troubles: list[str] = field(default_factory=list)


def training_settings(folder: str | Path) -> Trace:
    """Of the checkpoint in `folder`: the first of the files that says something of an update."""
    troubles: list[str] = []
    start = Path(folder)
    for source in SOURCES:
        for place in (start, *start.resolve().parents[:_ABOVE]) if source.above else (start,):
            path = place / source.file
            try:
                found = source.read(path) if path.is_file() else None
            except (ProbeError, OSError) as error:
                troubles.append(str(error))
                continue
            if found is not None:
                return Trace(found, troubles)
    return Trace(None, troubles)


def fingerprinted(folder: str | Path) -> Mapping[str, Any]:
    """What of the settings a kept report has to be of."""
    found = training_settings(folder).found
    return {} if found is None else {"recipe": found.name, "parts": found.parts, **found.generation}
