"""The shipped checks: their modules, their ids, and which of them take no part in a run."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import pytest

from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.speed import withheld_because
from pytest_entropy_probe.subject import probe_config

NODE = "probe-checks"
PACKAGE = "entropy_probe_checks"


def check_modules() -> dict[str, Path]:
    """module name → file, of every `test_*` module of the shipped package."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    return {name: Path(folders[0]) / f"{name}.py" for name in names if name.startswith("test_")}


def import_module(name: str) -> ModuleType:
    """By dotted name, wherever it is installed."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def function_of(test: str) -> str:
    """The name of a test without its parameters."""
    return test.partition("[")[0]


def names_in_ids(config: pytest.Config) -> tuple[str, ...]:
    """The checkpoints' names as pytest writes them into ids."""
    names = (target.name for target in config.stash[SETTINGS].targets)
    return tuple(name.encode("unicode_escape").decode("ascii") for name in names)


def checkpoint_in(nodeid: str, names: tuple[str, ...]) -> str | None:
    """The checkpoint among a test's parameters; the longest, as a name can be part of another."""
    parameters = nodeid.partition("[")[2].rpartition("]")[0]
    found = [name for name in names if f"-{name}-" in f"-{parameters}-"]
    return max(found, key=len, default=None)


def withheld(module: str, config: pytest.Config, function: str = "") -> str:
    """Why a shipped module, or one check of it, takes no part in this run, and what to give.

    Empty where it does.
    """
    if module == "test_golden" and config.stash[SETTINGS].golden_dir is None:
        return "golden checks are collected only with --probe-golden-dir=DIR; give it"
    if module == "test_benchmark":
        return withheld_because(config)
    if module == "test_gate":
        name, on = function.removeprefix("test_"), _gates_on(config)
        if not on or (name and name not in on):
            what = f"the gate {name} is off" if name else "no gate is on"
            return f"{what}; set bounds, such as limits: {{{name or 'entropy'}: {{min: 0.05}}}}"
    return ""


def _gates_on(config: pytest.Config) -> Collection[str]:
    """The gates that have bounds."""
    from entropy_probe_checks.bounds import bounds_of

    return bounds_of(probe_config(config).limits)
