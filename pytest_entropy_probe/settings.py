"""What the user asked for: command line over ini keys, resolved to paths and unique names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from entropy_probe.options import overrides
from pytest_entropy_probe.library import usage_errors
from pytest_entropy_probe.names import PAGE
from pytest_entropy_probe.targets import Target, find_targets
from pytest_entropy_probe.values import (
    absolute,
    existing,
    flag,
    label,
    natural_number,
    not_empty,
    one_of,
    origin,
    place,
    text_of,
)

if TYPE_CHECKING:
    from entropy_probe.integrations.trackers import Sink


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
    evidence: Path | None = None
    plot_path: Path | None = None
    html_path: Path | None = None
    log: tuple[Sink, ...] = ()
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
    sharding: str | None = None
    seed: int | None = None
    target_se: str | None = None
    recipe: str | None = None
    reference_model: Path | None = None
    next: Path | None = None

    @property
    def overrides(self) -> dict[str, object]:
        """The options that replace a configuration key, by dotted key."""
        return overrides(self)

    def json_file(self, name: str) -> Path | None:
        """Where the report of `name` goes: the file, or NAME.json in a folder of several."""
        return self._file(self.json_path, f"{name}.json")

    def plot_file(self, name: str) -> Path | None:
        """Where the figure of `name` goes: the file, or NAME.png in a folder of several."""
        return self._file(self.plot_path, f"{name}.png")

    def baseline_file(self, name: str) -> Path | None:
        """The report that `name` is compared with: the file, or NAME.json of the folder."""
        if self.baseline is not None and self.baseline.is_dir():
            return self.baseline / f"{name}.json"
        return self.baseline

    def _file(self, path: Path | None, name: str) -> Path | None:
        return path if path is None or len(self.targets) == 1 else path / name


SETTINGS = pytest.StashKey[Settings]()


def read_settings(config: pytest.Config) -> Settings:
    """Resolve the options; `pytest.UsageError` (exit 4) for anything that isn't there."""
    above = (folder / "pyproject.toml" for folder in (config.rootpath, *config.rootpath.parents))
    without_targets = Settings(
        base_model=existing(config, "base_model", "folder"),
        config_file=existing(config, "config", "file"),
        pyproject=next((path for path in above if path.is_file()), None),
        rollouts=existing(config, "rollouts", "file"),
        update_rollouts=existing(config, "update_rollouts", "file"),
        prompts=existing(config, "prompts", "file or folder"),
        baseline=existing(config, "baseline", "file or folder"),
        evidence=_new_folder(config, "evidence"),
        log=_sinks(config),
        golden_dir=_folder(config, "golden_dir"),
        golden_update=_golden_update(config),
        no_cache=flag(config, "no_cache"),
        xfails_file=existing(config, "xfails", "file"),
        budget=_budget(config),
        device=text_of(config, "device"),
        memory_limit=text_of(config, "memory_limit"),
        device_map=text_of(config, "device_map"),
        offload_folder=existing(config, "offload_folder", "folder"),
        sharding=text_of(config, "sharding"),
        seed=natural_number(config, "seed"),
        target_se=text_of(config, "target_se"),
        recipe=text_of(config, "recipe"),
        reference_model=existing(config, "reference_model", "folder"),
        next=existing(config, "next", "folder"),
    )
    targets = _targets(config)
    several = len(targets) > 1
    settings = replace(
        without_targets,
        targets=targets,
        json_path=_output_path(config, "json", "report.json", several),
        plot_path=_output_path(config, "plot", "figure.png", several),
        html_path=_output_path(config, "html", "report.html", several=False),
    )
    _keep_out_of_checkpoints(config, settings)
    _require_drawable(config, settings)
    if not hasattr(config, "workerinput"):
        _require_outputs(config, settings)
    return settings


def _targets(config: pytest.Config) -> tuple[Target, ...]:
    name, start = origin(config, "checkpoint")
    given = config.getoption("probe_checkpoint")
    values = [not_empty(value, "checkpoint") for value in given or ()]
    targets = find_targets(values or config.getini("probe_checkpoint"), start, name)
    for target in targets:
        if config.rootpath.is_relative_to(target.path):
            problem = f"rootdir is in the checkpoint {target.path}"
            why = "where pytest would write its cache"
            raise pytest.UsageError(f"{name}: {problem}, {why}; start pytest in another folder")
    return targets


def _sinks(config: pytest.Config) -> tuple[Sink, ...]:
    """Where figures are logged; of xdist's processes the controller alone does."""
    given = config.getoption("probe_log") or config.getini("probe_log")
    if not given or hasattr(config, "workerinput"):
        return ()
    from entropy_probe.integrations.trackers import sink_of

    name, start = origin(config, "log")
    with usage_errors():
        return tuple(sink_of(not_empty(text, "log"), name, start) for text in given)


def _budget(config: pytest.Config) -> str | None:
    from entropy_probe.budgets import BUDGETS

    return one_of(config, "budget", BUDGETS)


def _folder(config: pytest.Config, key: str) -> Path | None:
    path = place(config, key)
    if path is not None and path.exists() and not path.is_dir():
        raise pytest.UsageError(f"{label(config, key)}: {path} is a file; give a folder")
    return path


def _new_folder(config: pytest.Config, key: str) -> Path | None:
    """A folder that is there, or can be made."""
    path = _folder(config, key)
    if path is not None:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not there.is_dir():
            problem = f"cannot write into {there}; give another folder"
            raise pytest.UsageError(f"{label(config, key)}: {problem}")
    return path


def _golden_update(config: pytest.Config) -> str | None:
    if text_of(config, "golden_update") is None:  # numpy is not imported unless it is needed
        return None
    from entropy_probe.golden import MODES

    mode, name = one_of(config, "golden_update", MODES), label(config, "golden_update")
    if text_of(config, "golden_dir") is None:
        raise pytest.UsageError(f"{name}: there is nothing to update; give --probe-golden-dir=DIR")
    if os.environ.get("CI") and not flag(config, "golden_update_in_ci"):
        problem = "CI is set, and then golden files are compared and not written"
        raise pytest.UsageError(f"{name}: {problem}; give --probe-golden-update-in-ci too")
    return mode


def _output_path(config: pytest.Config, key: str, example: str, several: bool) -> Path | None:
    path, name = place(config, key), label(config, key)
    if path is None:
        return None
    if several and path.is_file():
        remedy = "give a folder, as there are several checkpoints"
        raise pytest.UsageError(f"{name}: {path} is a file; {remedy}")
    above = (path, *path.parents)
    parent = next(folder for folder in above if folder.exists() and folder != path)
    if not parent.is_dir():
        raise pytest.UsageError(f"{name}: cannot write into {parent}; give another path")
    if not several and path.is_dir():
        remedy = f"give a file, such as {path / example}"
        raise pytest.UsageError(f"{name}: {path} is a folder; {remedy}")
    return path


def _keep_out_of_checkpoints(config: pytest.Config, settings: Settings) -> None:
    """Nothing is written into a checkpoint.

    A training may read it again, and its files name its kept report.
    """
    places = {
        "golden_dir": settings.golden_dir,
        "json": settings.json_path,
        "evidence": settings.evidence,
        "plot": settings.plot_path,
        "html": settings.html_path,
        "offload_folder": settings.offload_folder,
    }
    for key, path in places.items():
        for target in settings.targets:
            if path is not None and path.resolve().is_relative_to(target.path.resolve()):
                option = label(config, key)
                problem = f"{path} is in the checkpoint {target.path}"
                raise pytest.UsageError(f"{option}: {problem}; give a path outside of it")


def _require_drawable(config: pytest.Config, settings: Settings) -> None:
    """Say before the measurement, not after it, that a figure or the page could not be drawn."""
    path = settings.plot_file(settings.targets[0].name)
    if path is not None:
        from entropy_probe.plots import require_drawable

        with usage_errors(label(config, "plot")):
            require_drawable(path)
    if settings.html_path is not None:
        from entropy_probe.page.writing import require_page

        with usage_errors(label(config, "html")):
            require_page(settings.html_path)


def _require_outputs(config: pytest.Config, settings: Settings) -> None:
    """Find what could not be written before the measurement, not after it: ours, and what pytest writes of it."""
    from entropy_probe.atomic import require_appendable, require_folder, require_writable

    names = [target.name for target in settings.targets]
    for name in names:
        with usage_errors(label(config, "json")):
            _each(require_writable, settings.json_file(name))
        with usage_errors(label(config, "plot")):
            _each(require_writable, settings.plot_file(name))
    if settings.golden_dir is not None and settings.golden_update is not None:
        with usage_errors(label(config, "golden_dir")):
            _each(require_folder, *(settings.golden_dir / name for name in names))
    with usage_errors(label(config, "evidence")):
        _each(require_folder, settings.evidence)
    with usage_errors(label(config, "html")):
        _each(require_writable, settings.html_path)
    for name, dest in (("--junitxml", "xmlpath"), ("--html", "htmlpath")):
        if given := config.getoption(dest, None):
            path = absolute(os.path.expandvars(given), config.invocation_params.dir)
            with usage_errors(name):
                _each(require_appendable if path.parent.is_dir() else require_writable, path)
    if page := os.environ.get(PAGE):
        with usage_errors(PAGE):
            require_appendable(Path(page))


def _each(require: Callable[[Path], None], *paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            require(path)
