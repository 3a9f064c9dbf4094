"""What the user asked for: command line over ini keys, resolved to existing paths and unique names.

Relative paths on the command line start at the folder pytest was started in, those in an ini file at rootdir.
Every complaint is one line: option, what was got, what to do.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import pytest

DEMO = "demo"
# A name before `=` has no separator in it: `runs/lr=3/checkpoint-5` is a path.
_NAMED = re.compile(r"(?P<name>[\w.+-]+)=(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A checkpoint folder and the name that stands for it in test ids."""

    name: str
    path: Path


@dataclass(frozen=True)
class Settings:
    targets: tuple[Target, ...] = ()
    base_model: Path | None = None
    config_file: Path | None = None
    pyproject: Path | None = None
    rollouts: Path | None = None
    update_rollouts: Path | None = None
    prompts: Path | None = None
    json_path: Path | None = None
    xfails_file: Path | None = None
    device: str | None = None
    seed: int | None = None

    @property
    def overrides(self) -> dict[str, object]:
        """The options that replace a configuration key, by dotted key."""
        given = {"device": self.device, "batch.seed": self.seed}
        return {key: value for key, value in given.items() if value is not None}

    def json_file(self, name: str) -> Path | None:
        """Where the report of `name` goes: the file itself, or NAME.json in a folder when there are several."""
        if self.json_path is None or len(self.targets) == 1:
            return self.json_path
        return self.json_path / f"{name}.json"


SETTINGS = pytest.StashKey[Settings]()


def read_settings(config: pytest.Config) -> Settings:
    """Resolve the options; `pytest.UsageError` (exit 4) for anything that isn't there."""
    pyproject = config.rootpath / "pyproject.toml"
    without_targets = Settings(
        base_model=_path(config, "base_model", "folder"),
        config_file=_path(config, "config", "file"),
        pyproject=pyproject if pyproject.is_file() else None,
        rollouts=_path(config, "rollouts", "file"),
        update_rollouts=_path(config, "update_rollouts", "file"),
        prompts=_path(config, "prompts", "file"),
        xfails_file=_path(config, "xfails", "file"),
        device=_text(config, "device"),
        seed=_seed(config),
    )
    settings = replace(without_targets, targets=_targets(config))
    return replace(settings, json_path=_json_path(config, several=len(settings.targets) > 1))


def checkpoints_given(config: pytest.Config) -> bool:
    return bool(config.getoption("probe_checkpoint") or config.getini("probe_checkpoint"))


def _text(config: pytest.Config, key: str) -> str | None:
    value = config.getoption(f"probe_{key}")
    return value if value is not None else config.getini(f"probe_{key}") or None


def _origin(config: pytest.Config, key: str) -> tuple[str, Path]:
    """How the value is called in a message, and the folder its relative paths start at."""
    if config.getoption(f"probe_{key}"):
        return f"--probe-{key.replace('_', '-')}", config.invocation_params.dir
    return f"probe_{key} (ini)", config.rootpath


def _absolute(value: str, start: Path) -> Path:
    """Absolute, with `~` expanded; links stay, since their name is what the user knows."""
    return Path(os.path.abspath(start / Path(value).expanduser()))


def _path(config: pytest.Config, key: str, kind: str) -> Path | None:
    value = _text(config, key)
    if value is None:
        return None
    label, start = _origin(config, key)
    path = _absolute(value, start)
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        raise pytest.UsageError(f"{label}: no such {kind}: {path}; give the path of an existing {kind}")
    return path


def _seed(config: pytest.Config) -> int | None:
    value = _text(config, "seed")
    if value is None:
        return None
    try:
        seed = int(value)
    except ValueError:
        seed = -1
    if seed < 0:
        raise pytest.UsageError(f"{_origin(config, 'seed')[0]}: got {value!r}; give a whole number, 0 or more")
    return seed


def _json_path(config: pytest.Config, several: bool) -> Path | None:
    value = _text(config, "json")
    if value is None:
        return None
    label, start = _origin(config, "json")
    path = _absolute(value, start)
    if several and path.is_file():
        raise pytest.UsageError(f"{label}: {path} is a file; give a folder, as there are several checkpoints")
    if not several and path.is_dir():
        raise pytest.UsageError(f"{label}: {path} is a folder; give a file, such as {path / 'report.json'}")
    return path


def _targets(config: pytest.Config) -> tuple[Target, ...]:
    label, start = _origin(config, "checkpoint")
    values = config.getoption("probe_checkpoint") or config.getini("probe_checkpoint")
    found: dict[tuple[str | None, Path], None] = {}
    for value in values:
        found.update(dict.fromkeys(_expand(value, start, label)))
    return _name(list(found), label)


def _expand(value: str, start: Path, label: str) -> list[tuple[str | None, Path]]:
    """`value` as (explicit name, folder) pairs: a folder, NAME=PATH, a glob, or `demo`."""
    named = None if _absolute(value, start).exists() else _NAMED.fullmatch(value)
    name, text = (named["name"], named["path"]) if named else (None, value)
    if text == DEMO:
        from pytest_entropy_probe.fixtures import demo_path

        return [(name or DEMO, demo_path())]
    path = _absolute(text, start)
    if path.is_dir():
        return [(name, path)]
    folders = sorted((Path(match) for match in glob(str(path), recursive=True)), key=_natural)
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise pytest.UsageError(f"{label}: no such folder: {path}; give a checkpoint folder, NAME=PATH, a glob or demo")
    if name is not None and len(folders) > 1:
        return [(f"{name}/{folder.name}", folder) for folder in folders]
    return [(name, folder) for folder in folders]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """checkpoint-500 before checkpoint-1000."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _name(found: list[tuple[str | None, Path]], label: str) -> tuple[Target, ...]:
    """Explicit names as given; others by folder, with as many parents in front as tell them apart."""
    depth = [1] * len(found)
    while True:
        names = [name or "/".join(path.parts[-d:]) for (name, path), d in zip(found, depth, strict=True)]
        count = Counter(names)
        longer = [
            i for i, (name, path) in enumerate(found) if not name and count[names[i]] > 1 and depth[i] < len(path.parts)
        ]
        if not longer:
            break
        for i in longer:
            depth[i] += 1
    twice = [name for name, times in count.items() if times > 1]
    if twice:
        raise pytest.UsageError(f"{label}: the name {twice[0]!r} is given to {count[twice[0]]} folders; name each once")
    return tuple(Target(name, path) for name, (_, path) in zip(names, found, strict=True))
