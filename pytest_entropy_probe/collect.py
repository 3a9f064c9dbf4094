"""Brings the shipped checks into the run as `probe-checks/test_<family>.py::test_<criterion>[<checkpoint>]`.

The checks live in an installed package; a virtual folder `probe-checks` is hung into the session, so that ids are the
same wherever they are installed. Modules are imported by dotted name, and the user's naming rules do not apply to them.
Registered only when a checkpoint is given.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import pytest_make_collect_report as collect_now

from pytest_entropy_probe.fixtures import TARGET_FIXTURE, probe_config, warnings_are_not_errors
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.speed import withheld_because
from pytest_entropy_probe.xfails import KnownFailure, covers, mark, read_xfails

NODE = "probe-checks"
PACKAGE = "entropy_probe_checks"
SELECTORS = pytest.StashKey[tuple[str, ...]]()
DESELECTED = pytest.StashKey[set[int]]()
DROPPED = "entropy_probe_dropped"
KNOWN_FAILURES = pytest.StashKey[tuple[KnownFailure, ...]]()


def check_modules() -> dict[str, Path]:
    """module name → file, of every `test_*` module of the shipped package."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = sorted(module.name for module in pkgutil.iter_modules(folders) if module.name.startswith("test_"))
    return {name: Path(folders[0]) / f"{name}.py" for name in names}


def withheld(module: str, config: pytest.Config, function: str = "") -> str:
    """Why a shipped module, or one check of it, takes no part in this run and what would change that; empty where it
    does."""
    if module == "test_golden" and config.stash[SETTINGS].golden_dir is None:
        return "golden checks are collected only with --probe-golden-dir=DIR; give it"
    if module == "test_benchmark":
        return withheld_because(config)
    if module == "test_gate":
        name, on = function.removeprefix("test_"), gates_on(config)
        if not on or (name and name not in on):
            what = f"the gate {name} is off" if name else "no gate is on"
            return f"{what}; set bounds, such as limits: {{{name or 'entropy'}: {{min: 0.05}}}}"
    return ""


def gates_on(config: pytest.Config) -> Collection[str]:
    """The gates that have bounds."""
    from entropy_probe_checks.bounds import bounds_of

    return bounds_of(probe_config(config).limits)


class CheckModule(pytest.Module):
    """One shipped module; imported by dotted name, and with its own idea of what a test is called."""

    def _getobj(self) -> Any:
        return importlib.import_module(f"{PACKAGE}.{self.path.stem}")

    def funcnamefilter(self, name: str) -> bool:
        return name.startswith("test_")

    def classnamefilter(self, name: str) -> bool:
        return False

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        with warnings_are_not_errors():
            items = list(super().collect())
        selectors = self.config.stash[SELECTORS]
        chosen = [item for item in items if not selectors or any(covers(s, item.nodeid) for s in selectors)]
        if not chosen:
            raise self.CollectError(f"{self.nodeid}: no check is selected from this module; look at the id")
        return [item for item in chosen if not withheld(self.path.stem, self.config, _function(item.name))]


class CheckFolder(pytest.Directory):
    """The virtual folder `probe-checks`."""

    def collect(self) -> Iterable[pytest.Collector]:
        modules = check_modules()
        if not modules:
            raise self.CollectError(f"{PACKAGE}: no checks are installed; install pytest-entropy-probe again")
        selectors = self.config.stash[SELECTORS]
        for name, path in modules.items():
            nodeid = f"{NODE}/{name}.py"
            if withheld(name, self.config):
                continue
            if not selectors or any(covers(s, nodeid) or covers(nodeid, s) for s in selectors):
                yield CheckModule.from_parent(self, path=path, name=f"{name}.py", nodeid=nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if isinstance(collector, pytest.Session) and report.passed and suite_wanted(collector.config):
        folder = next(iter(check_modules().values()), collector.path / NODE / "none").parent
        report.result = [*report.result, CheckFolder.from_parent(collector, path=folder, name=NODE, nodeid=NODE)]
    elif isinstance(collector, CheckModule) and report.passed and not report.result:
        # `--lf` passes over files whose path is not that of a failure; the paths of our ids are virtual.
        return collect_now(collector)
    return report


def suite_wanted(config: pytest.Config) -> bool:
    """Whether the checks take part: they do by name, or where no path was given."""
    explicit = config.args_source is pytest.Config.ArgsSource.ARGS
    return bool(config.stash[SELECTORS]) or not explicit


def take_selectors(config: pytest.Config) -> None:
    """Take `probe-checks/…` out of the paths to collect, since no such file exists, and keep it as a filter.

    An id that fits nothing stops here, because inside an xdist worker a usage error would be an internal one.
    """
    taken = {arg: selector for arg in config.args if (selector := _selector(arg, config)) is not None}
    config.args = [arg for arg in config.args if arg not in taken]
    config.stash[SELECTORS] = tuple(taken.values())
    for arg, selector in taken.items():
        if not _exists(selector, config):
            raise pytest.UsageError(f"not found: {arg}; pytest --co --probe-checkpoint=... lists the ids")
        reason = withheld(_module(selector), config, _function(selector.partition("::")[2]))
        if reason:
            raise pytest.UsageError(f"{arg}: {reason}")


def take_known_failures(config: pytest.Config) -> None:
    """Read --probe-xfails, if given; here, for the same reason as the selectors."""
    path = config.stash[SETTINGS].xfails_file
    config.stash[KNOWN_FAILURES] = () if path is None else read_xfails(path, _all_ids(config))


def _all_ids(config: pytest.Config) -> list[str]:
    """The id of every shipped check on every checkpoint."""
    with warnings_are_not_errors():
        modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in check_modules()}
    return [
        f"{NODE}/{name}.py::{function}[{checkpoint}]"
        for name, module in modules.items()
        for function in vars(module)
        if function.startswith("test_")
        for checkpoint in _names(config)
    ]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Mark known failures; stop if somebody's hook took checks away without saying so (`pytest_deselected`)."""
    ours = [item for item in items if isinstance(item.parent, CheckModule)]
    mark(ours, config.stash[KNOWN_FAILURES])
    yield
    left = {*map(id, items), *config.stash.get(DESELECTED, ())}
    dropped = [item.nodeid for item in ours if id(item) not in left]
    if not dropped:
        return
    complaint = f"{dropped[0]} and {len(dropped) - 1} more checks were dropped by a pytest_collection_modifyitems hook"
    output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if output is None:
        raise pytest.UsageError(f"{complaint}; let it pass items of probe-checks")
    output[DROPPED] = complaint  # inside a worker a usage error would be an internal one
    items.clear()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash.setdefault(DESELECTED, set()).add(id(item))


def _selector(arg: str, config: pytest.Config) -> str | None:
    """The id that `arg` names, if it is one of ours: as written, or relative to the current folder."""
    path, separator, rest = arg.partition("::")
    rest = rest.encode("unicode_escape").decode("ascii") if not rest.isascii() else rest  # as ids are written
    absolute = config.invocation_params.dir / path
    if absolute.exists():
        return None
    for candidate in (os.path.normpath(path), os.path.relpath(absolute, config.rootpath)):
        candidate = candidate.replace(os.sep, "/")
        if candidate == NODE or candidate.startswith(f"{NODE}/"):
            return candidate + separator + rest
    return None


def _module(selector: str) -> str:
    """The name of the module that an id begins with; empty for all of them."""
    return selector.partition("::")[0].removeprefix(NODE).removeprefix("/").removesuffix(".py")


def _function(test: str) -> str:
    """The name of a test without its parameters."""
    return test.partition("[")[0]


def _exists(selector: str, config: pytest.Config) -> bool:
    """Whether a folder, module, function or checkpoint fits; nothing is imported unless a function is named."""
    path, _, test = selector.partition("::")
    if path == NODE:
        return not test
    module = _module(selector)
    if module not in check_modules() or not path.endswith(".py"):
        return False
    name, _, parameters = test.partition("[")
    with warnings_are_not_errors():
        known = not name or callable(getattr(importlib.import_module(f"{PACKAGE}.{module}"), name, None))
    return known and (not parameters or _checkpoint_in(f"[{parameters}", _names(config)) is not None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that needs a checkpoint, shipped or the user's own, runs once per checkpoint."""
    if TARGET_FIXTURE in metafunc.fixturenames:
        targets = metafunc.config.stash[SETTINGS].targets
        metafunc.parametrize(TARGET_FIXTURE, targets, indirect=True, ids=[target.name for target in targets])


def _names(config: pytest.Config) -> tuple[str, ...]:
    """The checkpoints' names as pytest writes them into ids."""
    return tuple(target.name.encode("unicode_escape").decode("ascii") for target in config.stash[SETTINGS].targets)


def _checkpoint_in(nodeid: str, names: tuple[str, ...]) -> str | None:
    """The checkpoint among a test's parameters; the longest, as one name can be part of another."""
    parameters = nodeid.partition("[")[2].rpartition("]")[0]
    found = [name for name in names if f"-{name}-" in f"-{parameters}-"]
    return max(found, key=len, default=None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """One checkpoint's tests stay on one worker, which loads and measures it once; other tests as `--dist` says."""
    from xdist import scheduler

    bases: dict[str, type[scheduler.LoadScopeScheduling]] = {
        "load": scheduler.LoadScopeScheduling,
        "worksteal": scheduler.LoadScopeScheduling,
        "loadscope": scheduler.LoadScopeScheduling,
        "loadfile": scheduler.LoadFileScheduling,
        "loadgroup": scheduler.LoadGroupScheduling,
    }
    mode = str(config.getoption("dist"))
    if mode not in bases:
        return None
    names = _names(config)

    class CheckpointScheduling(bases[mode]):
        def _split_scope(self, nodeid: str) -> str:
            name = _checkpoint_in(nodeid, names)
            if name is not None:
                return f"{NODE}[{name}]"
            return nodeid if mode in ("load", "worksteal") else super()._split_scope(nodeid)

    return CheckpointScheduling(config, log)
