"""Brings the shipped checks in as `probe-checks/test_<family>.py::test_<criterion>[<checkpoint>]`.

The checks live in an installed package. A virtual folder `probe-checks` is hung into the session,
so that ids are the same wherever they are installed. Modules are imported by dotted name, and the
user's naming rules do not apply to them. Registered only when a checkpoint is given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import pytest
from _pytest.runner import pytest_make_collect_report as collect_now

from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.names import TARGET_FIXTURE
from pytest_entropy_probe.selectors import KNOWN_FAILURES, SELECTORS
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.shipped import (
    NODE,
    PACKAGE,
    check_modules,
    function_of,
    import_module,
    withheld,
)
from pytest_entropy_probe.xfails import covers, mark

DESELECTED = pytest.StashKey[set[int]]()
DROPPED = "entropy_probe_dropped"


class CheckModule(pytest.Module):
    """One shipped module; imported by dotted name, and its functions named as they are here."""

    def _getobj(self) -> Any:
        return import_module(self.path.stem)

    def funcnamefilter(self, name: str) -> bool:
        return name.startswith("test_")

    def classnamefilter(self, name: str) -> bool:
        return False

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        with warnings_are_not_errors():
            items = list(super().collect())
        chosen = [item for item in items if _is_selected(item)]
        if not chosen:
            complaint = "no check is selected from this module; look at the id"
            raise self.CollectError(f"{self.nodeid}: {complaint}")
        name = self.path.stem
        return [item for item in chosen if not withheld(name, self.config, function_of(item.name))]


def _is_selected(item: pytest.Item | pytest.Collector) -> bool:
    selectors = item.config.stash[SELECTORS]
    return not selectors or any(covers(selector, item.nodeid) for selector in selectors)


class CheckFolder(pytest.Directory):
    """The virtual folder `probe-checks`."""

    def collect(self) -> Iterable[pytest.Collector]:
        modules = check_modules()
        if not modules:
            complaint = "no checks are installed; install pytest-entropy-probe again"
            raise self.CollectError(f"{PACKAGE}: {complaint}")
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
        any_file = next(iter(check_modules().values()), collector.path / NODE / "none")
        place = {"path": any_file.parent, "name": NODE, "nodeid": NODE}
        report.result = [*report.result, CheckFolder.from_parent(collector, **place)]
    elif isinstance(collector, CheckModule) and report.passed and not report.result:
        # `--lf` passes over files whose path is not that of a failure; the paths of our ids are
        # virtual.
        return collect_now(collector)
    return report


def suite_wanted(config: pytest.Config) -> bool:
    """Whether the checks take part: they do by name, or where no path was given."""
    explicit = config.args_source is pytest.Config.ArgsSource.ARGS
    return bool(config.stash[SELECTORS]) or not explicit


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config,
    items: list[pytest.Item],
) -> Generator[None]:
    """Mark known failures; stop if a hook took checks away without saying `pytest_deselected`."""
    ours = [item for item in items if isinstance(item.parent, CheckModule)]
    mark(ours, config.stash[KNOWN_FAILURES])
    yield
    left = {*map(id, items), *config.stash.get(DESELECTED, ())}
    dropped = [item.nodeid for item in ours if id(item) not in left]
    if not dropped:
        return
    what = f"{dropped[0]} and {len(dropped) - 1} more checks"
    complaint = f"{what} were dropped by a pytest_collection_modifyitems hook"
    output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if output is None:
        raise pytest.UsageError(f"{complaint}; let it pass items of probe-checks")
    output[DROPPED] = complaint  # inside a worker a usage error would be an internal one
    items.clear()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash.setdefault(DESELECTED, set()).add(id(item))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that needs a checkpoint, shipped or the user's own, runs once per checkpoint."""
    if TARGET_FIXTURE in metafunc.fixturenames:
        targets = metafunc.config.stash[SETTINGS].targets
        names = [target.name for target in targets]
        metafunc.parametrize(TARGET_FIXTURE, targets, indirect=True, ids=names)
