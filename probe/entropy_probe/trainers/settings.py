"""The files in which trainers leave their settings, and what these say of the next update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from entropy_probe.errors import ProbeError, printable
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
    """What was found, if anything; and what was there and could not be used."""

    found: Found | None = None
    troubles: list[str] = field(default_factory=list)


def training_settings(folder: str | Path) -> Trace:
    """Of the checkpoint in `folder`: the first of the files that says something of an update, or that should."""
    start = Path(folder)
    for source in SOURCES:
        for place in (start, *start.resolve().parents[:_ABOVE]) if source.above else (start,):
            path = place / source.file
            try:
                found = source.read(path) if path.is_file() else None
            except (ProbeError, OSError) as error:
                return Trace(None, [str(error)])
            except Exception as error:  # a file from anywhere, in readers of several libraries
                what = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                return Trace(None, [f"{printable(path)}: its settings are not read ({what})"])
            if found is not None:
                return Trace(found)
    return Trace()
