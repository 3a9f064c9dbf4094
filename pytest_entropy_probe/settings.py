"""What the user asked for: command line over ini keys, resolved to existing paths and unique names.

Relative paths on the command line start at the folder pytest was started in, those in an ini file at that file.
Every complaint is one line: option, what was got, what to do.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import pytest

DEMO = "demo"
# A name before `=` has no separator in it: `runs/lr=3/checkpoint-5` is a path.
_NAMED = re.compile(r"(?P<name>[\w.+-]+)=(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A checkpoint folder and the name that stands for it in test ids; `note`, where it was chosen from a run."""

    name: str
    path: Path
    note: str = ""


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
    plot_path: Path | None = None
    baseline: Path | None = None
    golden_dir: Path | None = None
    golden_update: str | None = None
    no_cache: bool = False
    xfails_file: Path | None = None
    budget: str | None = None
    device: str | None = None
    memory_limit: str | None = None
    device_map: str | None = None
    offload_folder: Path | None = None
    seed: int | None = None

    @property
    def overrides(self) -> dict[str, object]:
        """The options that replace a configuration key, by dotted key."""
        given = {
            "budget": self.budget,
            "device": self.device,
            "memory_limit": self.memory_limit,
            "device_map": self.device_map,
            "offload_folder": None if self.offload_folder is None else str(self.offload_folder),
            "batch.seed": self.seed,
        }
        return {key: value for key, value in given.items() if value is not None}

    def json_file(self, name: str) -> Path | None:
        """Where the report of `name` goes: the file itself, or NAME.json in a folder when there are several."""
        return self._file(self.json_path, f"{name}.json")

    def plot_file(self, name: str) -> Path | None:
        """Where the figure of `name` goes: the file itself, or NAME.png in a folder when there are several."""
        return self._file(self.plot_path, f"{name}.png")

    def baseline_file(self, name: str) -> Path | None:
        """The report that `name` is compared with: the file itself, or NAME.json of the folder that was given."""
        return self.baseline / f"{name}.json" if self.baseline is not None and self.baseline.is_dir() else self.baseline

    def _file(self, path: Path | None, name: str) -> Path | None:
        return path if path is None or len(self.targets) == 1 else path / name


SETTINGS = pytest.StashKey[Settings]()


def read_settings(config: pytest.Config) -> Settings:
    """Resolve the options; `pytest.UsageError` (exit 4) for anything that isn't there."""
    above = (folder / "pyproject.toml" for folder in (config.rootpath, *config.rootpath.parents))
    pyproject = next((path for path in above if path.is_file()), None)
    without_targets = Settings(
        base_model=_path(config, "base_model", "folder"),
        config_file=_path(config, "config", "file"),
        pyproject=pyproject,
        rollouts=_path(config, "rollouts", "file"),
        update_rollouts=_path(config, "update_rollouts", "file"),
        prompts=_path(config, "prompts", "file"),
        baseline=_path(config, "baseline", "file or folder"),
        golden_dir=_golden_dir(config),
        golden_update=_golden_update(config),
        no_cache=_flag(config, "no_cache"),
        xfails_file=_path(config, "xfails", "file"),
        budget=_budget(config),
        device=_text(config, "device"),
        memory_limit=_text(config, "memory_limit"),
        device_map=_text(config, "device_map"),
        offload_folder=_path(config, "offload_folder", "folder"),
        seed=_seed(config),
    )
    targets = _targets(config)
    several = len(targets) > 1
    settings = replace(
        without_targets,
        targets=targets,
        json_path=_output_path(config, "json", "report.json", several),
        plot_path=_output_path(config, "plot", "figure.png", several),
    )
    _keep_out_of_checkpoints(config, settings)
    _require_drawable(config, settings)
    return settings


def checkpoints_given(config: pytest.Config) -> bool:
    return bool(config.getoption("probe_checkpoint") or config.getini("probe_checkpoint"))


def _text(config: pytest.Config, key: str) -> str | None:
    value = config.getoption(f"probe_{key}")
    if value is not None:
        return _not_empty(value, key)
    return config.getini(f"probe_{key}") or None


def _not_empty(value: str, key: str) -> str:
    """An empty value is what an unset shell variable leaves behind."""
    if not value.strip():
        raise pytest.UsageError(f"--probe-{key.replace('_', '-')}: is empty; give a value or leave the option out")
    return value


def _origin(config: pytest.Config, key: str) -> tuple[str, Path]:
    """How the value is called in a message, and the folder its relative paths start at."""
    if config.getoption(f"probe_{key}") is not None:
        return f"--probe-{key.replace('_', '-')}", config.invocation_params.dir
    return f"probe_{key} (ini)", config.rootpath if config.inipath is None else config.inipath.parent


def _absolute(value: str, start: Path) -> Path:
    """Absolute, with `~` expanded; links stay, since their name is what the user knows."""
    return Path(os.path.abspath(start / Path(value).expanduser()))


def _place(config: pytest.Config, key: str) -> tuple[str, Path | None]:
    """How the option is called in a message, and the path that it was given."""
    value = _text(config, key)
    label, start = _origin(config, key)
    return label, None if value is None else _absolute(value, start)


def _path(config: pytest.Config, key: str, kind: str) -> Path | None:
    label, path = _place(config, key)
    if path is None:
        return None
    if not ((path.is_dir() and "folder" in kind) or (path.is_file() and "file" in kind)):
        raise pytest.UsageError(f"{label}: no such {kind}: {path}; give the path of an existing {kind}")
    return path


def _one_of(config: pytest.Config, key: str, valid: Collection[str]) -> str | None:
    value = _text(config, key)
    if value is not None and value not in valid:
        raise pytest.UsageError(f"{_origin(config, key)[0]}: got {value!r}; give one of {', '.join(valid)}")
    return value


def _budget(config: pytest.Config) -> str | None:
    if _text(config, "budget") is None:  # nothing is imported unless it is needed
        return None
    from entropy_probe.budgets import BUDGETS

    return _one_of(config, "budget", BUDGETS)


def _flag(config: pytest.Config, key: str) -> bool:
    return bool(config.getoption(f"probe_{key}") or config.getini(f"probe_{key}"))


def _golden_dir(config: pytest.Config) -> Path | None:
    label, path = _place(config, "golden_dir")
    if path is not None and path.exists() and not path.is_dir():
        raise pytest.UsageError(f"{label}: {path} is a file; give a folder")
    return path


def _golden_update(config: pytest.Config) -> str | None:
    if _text(config, "golden_update") is None:
        return None
    from entropy_probe.golden import MODES

    value, label = _one_of(config, "golden_update", MODES), _origin(config, "golden_update")[0]
    if _text(config, "golden_dir") is None:
        raise pytest.UsageError(f"{label}: there is nothing to update; give --probe-golden-dir=DIR")
    if os.environ.get("CI") and not _flag(config, "golden_update_in_ci"):
        raise pytest.UsageError(
            f"{label}: CI is set, where golden files are compared, not written; give --probe-golden-update-in-ci too"
        )
    return value


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


def _output_path(config: pytest.Config, key: str, example: str, several: bool) -> Path | None:
    label, path = _place(config, key)
    if path is None:
        return None
    if several and path.is_file():
        raise pytest.UsageError(f"{label}: {path} is a file; give a folder, as there are several checkpoints")
    parent = next(folder for folder in (path, *path.parents) if folder.exists() and folder != path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise pytest.UsageError(f"{label}: cannot write into {parent}; give another path")
    if not several and path.is_dir():
        raise pytest.UsageError(f"{label}: {path} is a folder; give a file, such as {path / example}")
    return path


def _keep_out_of_checkpoints(config: pytest.Config, settings: Settings) -> None:
    """Nothing is written into a checkpoint: a training may read it again, and its files name its kept report."""
    places = {
        "golden_dir": settings.golden_dir,
        "json": settings.json_path,
        "plot": settings.plot_path,
        "offload_folder": settings.offload_folder,
    }
    for key, path in places.items():
        for target in settings.targets:
            if path is not None and path.resolve().is_relative_to(target.path.resolve()):
                raise pytest.UsageError(
                    f"{_origin(config, key)[0]}: {path} is in the checkpoint {target.path}; give a path outside of it"
                )


def _require_drawable(config: pytest.Config, settings: Settings) -> None:
    """Say before the measurement, not after it, that a figure could not be drawn."""
    path = settings.plot_file(settings.targets[0].name)
    if path is None:
        return
    from entropy_probe import ProbeError
    from entropy_probe.plots import require_drawable

    try:
        require_drawable(path)
    except ProbeError as error:
        raise pytest.UsageError(f"{_origin(config, 'plot')[0]}: {error}") from error


def _targets(config: pytest.Config) -> tuple[Target, ...]:
    label, start = _origin(config, "checkpoint")
    given = config.getoption("probe_checkpoint")
    values = [_not_empty(value, "checkpoint") for value in given] if given else config.getini("probe_checkpoint")
    found: dict[_Found, None] = {}
    for value in values:
        found.update(dict.fromkeys(_expand(value, start, label)))
    targets = _name(list(found), label)
    for target in targets:
        if config.rootpath.is_relative_to(target.path):
            raise pytest.UsageError(
                f"{label}: rootdir is in the checkpoint {target.path}, where pytest would write its cache; "
                "start pytest in another folder"
            )
    return targets


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
    folders = _folders(_absolute(value, start))
    named = None if folders else _NAMED.fullmatch(value)
    name, text = (named["name"], named["path"]) if named else (None, value)
    if text == DEMO and not folders:
        from pytest_entropy_probe.fixtures import demo_path

        return [_Found(demo_path(), name or DEMO)]
    folders = folders or _folders(_absolute(text, start))
    if not folders:
        raise pytest.UsageError(
            f"{label}: no such folder: {_absolute(text, start)}; give a checkpoint folder, a glob, demo, or NAME=PATH "
            "with letters, digits, `.`, `_`, `+` and `-` in NAME"
        )
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
    return [match for match in sorted(map(Path, glob(str(path), recursive=True)), key=_natural) if match.is_dir()]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """checkpoint-500 before checkpoint-1000."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _name(found: list[_Found], label: str) -> tuple[Target, ...]:
    """Explicit names as given; others by folder, with as many parents in front as tell them apart."""
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
    twice = [name for name, times in count.items() if times > 1]
    if twice:
        raise pytest.UsageError(f"{label}: the name {twice[0]!r} is given to {count[twice[0]]} folders; name each once")
    return tuple(_target(name, folder.path) for name, folder in zip(names, found, strict=True))


def _target(name: str, path: Path) -> Target:
    """The checkpoint itself, or the newest of a run; what cannot be told is left for loading to complain about."""
    from entropy_probe import ProbeError
    from entropy_probe.errors import printable
    from entropy_probe.layout import find_layout

    name = printable(name)  # xdist sends it from process to process, as UTF-8
    try:
        layout = find_layout(path)
    except ProbeError:
        return Target(name, path)
    return Target(name, layout.folder, layout.note)
