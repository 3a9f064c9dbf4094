"""The checkpoints of a run: folders, globs and `demo`, each with a name of its own in test ids."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import pytest

from entropy_probe.errors import printable
from pytest_entropy_probe.library import demo_path, newest_checkpoint
from pytest_entropy_probe.values import absolute

DEMO = "demo"
# A name before `=` has no separator in it: `runs/lr=3/checkpoint-5` is a path.
_NAMED = re.compile(r"(?P<name>[\w.+-]+)=(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A checkpoint folder and the name that stands for it in test ids.

    `note` says how it was chosen, where it was chosen from a run.
    """

    name: str
    path: Path
    note: str = ""


def find_targets(values: Sequence[str], start: Path, label: str) -> tuple[Target, ...]:
    """Every checkpoint once, in the order given; `label`: how messages call the option."""
    found: dict[_Found, None] = {}
    for value in values:
        found.update(dict.fromkeys(_expand(value, start, label)))
    return _name(list(found), label)


@dataclass(frozen=True)
class _Found:
    """A folder with the name it was given, or with the name that a glob was given: a prefix."""

    path: Path
    name: str | None = None
    prefix: str | None = None

    def called(self, depth: int) -> str:
        """Its name, with the last `depth` parts of its path where it was given none of its own."""
        parts = "/".join(self.path.parts[-depth:])
        return self.name or (f"{self.prefix}/{parts}" if self.prefix else parts)


def _expand(value: str, start: Path, label: str) -> list[_Found]:
    """`value` as folders: a folder, a glob, NAME=PATH, NAME=GLOB, or `demo`."""
    folders = _folders(absolute(value, start))
    named = None if folders else _NAMED.fullmatch(value)
    name, text = (named["name"], named["path"]) if named else (None, value)
    if text == DEMO and not folders:
        return [_Found(demo_path(), name or DEMO)]
    folders = folders or _folders(absolute(text, start))
    if not folders:
        remedy = _meant(text, start) or (
            "give a checkpoint folder, a glob, "
            "demo, or NAME=PATH with letters, digits, `.`, `_`, `+` and `-` in NAME"
        )
        raise pytest.UsageError(f"{label}: no such folder: {absolute(text, start)}; {remedy}")
    if len(folders) == 1:
        return [_Found(folders[0], name)]
    return [_Found(folder, prefix=name) for folder in folders]


def _folders(path: Path) -> list[Path]:
    """The folder itself, or those that it matches as a glob."""
    try:
        if path.is_dir():
            return [path]
    except OSError:  # a name too long, or below a folder without rights
        return []
    matches = sorted(map(Path, glob(str(path), recursive=True)), key=_natural)
    return [match for match in matches if match.is_dir()]


def _meant(text: str, start: Path) -> str:
    """Of a glob that fits nothing: one that has the same end and fits folders up to two levels below its beginning."""
    *above, last = Path(text).parts or ("",)
    begin = list(itertools.takewhile(lambda part: not has_magic(part), above))
    if not has_magic(text) or not begin:
        return ""
    for between in ((), ("*",), ("*", "*")):
        other = Path(*begin, *between, last)
        if _folders(absolute(str(other), start)):
            return f"give '{other}', which fits folders that are there"
    return ""


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """checkpoint-500 before checkpoint-1000."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _name(found: list[_Found], label: str) -> tuple[Target, ...]:
    """Explicit names as given; others by folder, with as many parents as tell them apart."""
    depth = [1] * len(found)
    while True:
        names = [folder.called(d) for folder, d in zip(found, depth, strict=True)]
        count = Counter(names)
        longer = [
            i
            for i, folder in enumerate(found)
            if not folder.name and count[names[i]] > 1 and depth[i] < len(folder.path.parts)
        ]
        if not longer:
            break
        for i in longer:
            depth[i] += 1
    if twice := [name for name, times in count.items() if times > 1]:
        times = count[twice[0]]
        problem = f"the name {twice[0]!r} is given to {times} folders"
        raise pytest.UsageError(f"{label}: {problem}; name each once")
    return tuple(_target(name, folder.path) for name, folder in zip(names, found, strict=True))


def _target(name: str, path: Path) -> Target:
    # xdist sends the name from process to process, as UTF-8
    return Target(printable(name), *newest_checkpoint(path))
