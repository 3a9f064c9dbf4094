"""Which golden files a run used and wrote; after a complete one, those that no check used.

Registered where a checkpoint is given. An xdist worker hands over what it knows; the other process
unites it.
"""

from __future__ import annotations

import shlex
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.names import GOLDEN_FIXTURE
from pytest_entropy_probe.settings import SETTINGS

if TYPE_CHECKING:
    from pytest_entropy_probe.golden import ProbeGolden

HANDED_OVER = "entropy_probe_golden"
PLUGIN = "entropy_probe_golden_files"
ARGS = "entropy_probe_args"


class GoldenFiles:
    """Which golden files were used and written, and whether this run would have used them all."""

    def __init__(self, config: pytest.Config) -> None:
        self.owners: dict[Path, ProbeGolden] = {}
        self.written: list[str] = []
        self._config = config
        self._whole = True
        self._expected: set[str] = set()
        self._answered: set[str] = set()
        self._used: set[str] = set()

    @property
    def command(self) -> str:
        """The command that this run was, with the option that makes what is missing."""
        own = self._config.invocation_params.args
        given = getattr(self._config, "workerinput", {}).get(ARGS, own)
        return shlex.join(["pytest", *map(str, given), "--probe-golden-update=missing"])

    def shown(self, path: Path) -> Path:
        here = self._config.invocation_params.dir
        return path.relative_to(here) if path.is_relative_to(here) else path

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[ARGS] = list(map(str, self._config.invocation_params.args))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._whole &= report.passed

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None]:
        self._expected = {item.nodeid for item in items if _uses_golden(item)}
        yield
        self._whole &= self._expected <= {item.nodeid for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that failed may have files that it did not come to."""
        if report.when == "call" and not report.failed:
            owners = {owner.nodeid for owner in self.owners.values()}
            self._answered |= owners & {report.nodeid}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None]:
        self._used |= set(map(str, self.owners))
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[HANDED_OVER] = {
                "expected": sorted(self._expected),
                "answered": sorted(self._answered),
                "used": sorted(self._used),
                "written": self.written,
                "whole": self._whole,
            }
        yield

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        known = getattr(node, "workeroutput", {}).get(HANDED_OVER)
        if known is None:
            self._whole = False
            return
        self._expected |= set(known["expected"])
        self._answered |= set(known["answered"])
        self._used |= set(known["used"])
        self.written += known["written"]
        self._whole &= known["whole"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in sorted(self.written):
            terminalreporter.write_line(f"entropy-probe: {line}")
        remedy = "delete it, or bring its check back"
        for path in self._obsolete():
            line = f"{self.shown(path)}: no check of this run uses it; {remedy}"
            terminalreporter.write_line(f"entropy-probe: {line}")

    def _obsolete(self) -> list[Path]:
        """Files of this run's checkpoints that no check used.

        None unless all that could use one ran and did.
        """
        settings = self._config.stash[SETTINGS]
        by_option = ("lf", "ignore", "ignore_glob", "collectonly")
        by_path = self._config.args_source is pytest.Config.ArgsSource.ARGS
        chosen = by_path or any(self._config.getoption(name, None) for name in by_option)
        complete = self._whole and not chosen and self._expected <= self._answered
        if settings.golden_dir is None or not complete:
            return []
        folders = [settings.golden_dir / target.name for target in settings.targets]
        files = (path for folder in folders for path in folder.glob("*.json"))
        return sorted(path for path in files if str(path) not in self._used)


def _uses_golden(item: pytest.Item) -> bool:
    return GOLDEN_FIXTURE in getattr(item, "fixturenames", ())
