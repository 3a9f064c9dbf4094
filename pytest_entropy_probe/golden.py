"""Golden files in pytest: `probe_golden` compares, and writes where `--probe-golden-update` says so.

    def test_logits(probe_golden, probe_model):
        probe_golden.check("logits", {"logits": probe_model.logits(ids)}, rtol=1e-6)

`<golden-dir>/<checkpoint>/<check>.json` holds the numbers (`entropy_probe.golden`), one file a check, so that two
processes never write the same one. Nothing is written without the option:

    missing   makes files, and adds fields that a file lacks
    changed   replaces the values that are out of tolerance, in files that are there
    all       replaces every value, makes files, drops fields that are no more

A test whose numbers were written passes where all that the file now holds is in tolerance. Files that were written
are named at the end of the run; after a complete one, so are files that no check used. None is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.fixtures import Subject, measured, probe_config, record, warnings_are_not_errors
from pytest_entropy_probe.judge import conclude
from pytest_entropy_probe.settings import SETTINGS

if TYPE_CHECKING:
    from entropy_probe import ProbeReport, Verdict
    from entropy_probe.golden import Field, Golden
    from entropy_probe_checks.goldens import GoldenSection

HANDED_OVER = "entropy_probe_golden"
FILES = "entropy_probe_golden_files"
ARGS = "entropy_probe_args"
_USES_GOLDEN = "_probe_goldens"
_NAME = re.compile(r"[\w.+-]+")
_LIBRARIES = ("numpy", "peft", "torch", "transformers")


class ProbeGolden:
    """Compares the numbers of one test with golden files."""

    def __init__(self, request: pytest.FixtureRequest, subject: Subject, files: Files) -> None:
        self.nodeid = request.node.nodeid
        self._request = request
        self._subject = subject
        self._files = files

    def check(
        self, name: str, fields: Mapping[str, Any], *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Fail unless every number is within tolerance of what `<golden-dir>/<checkpoint>/<name>.json` holds.

        `fields`: name → number, text, bool, None, array, tensor, or lists of them. `rtol` and `atol` go into the file
        with new fields, in place of the defaults for their dtype (`entropy_probe.golden.new_field`); what the file
        has is what counts, and stays when values are updated: edit it there.
        """
        __tracebackhide__ = True
        from entropy_probe.golden import Golden, new_field

        with _one_line():
            new = {key: new_field(key, value, rtol, atol) for key, value in fields.items()}
        self.compare(name, Golden(self.meta(), new))

    def compare(self, name: str, got: Golden) -> None:
        """The same for fields that have their tolerances, and a `meta` of their own."""
        __tracebackhide__ = True
        with _one_line():
            verdict = self._verdict(name, got)
        self.conclude(verdict)

    def conclude(self, verdict: Verdict) -> None:
        """Record the verdict, and end the test where it does not pass."""
        __tracebackhide__ = True
        self._subject.verdicts[verdict.criterion] = verdict
        record(self._request, self._subject, verdict)
        conclude(verdict, allowed=False)

    def take(self, name: str) -> Path:
        """The file of a check, which belongs to this test alone from now on; `ProbeError` where it cannot."""
        from entropy_probe import ProbeError

        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise ProbeError(f"golden {name!r}", "is no name of a file", "use letters, digits, `.`, `_`, `+` and `-`")
        if any(part in ("", ".", "..") for part in self._subject.name.split("/")):
            raise ProbeError(
                f"checkpoint {self._subject.name!r}",
                "is no name of a folder",
                "give --probe-checkpoint=NAME=PATH",
            )
        folder = self._request.config.stash[SETTINGS].golden_dir
        assert folder is not None
        path = folder / self._subject.name / f"{name}.json"
        owner = self._files.owners.get(path)
        if owner is not None and (owner is self or owner.nodeid != self.nodeid):
            raise ProbeError(
                f"golden {name!r}", f"was already compared by {owner.nodeid}", "give every check a name of its own"
            )
        self._files.owners[path] = self  # a test that is run again takes its files over
        return path

    def meta(self, report: ProbeReport | None = None) -> dict[str, Any]:
        """What the numbers are made with; the fingerprint is known where the checkpoint has been measured."""
        from entropy_probe import __version__

        config = probe_config(self._request.config)
        report = report or self._subject.report
        meta: dict[str, Any] = {
            "versions": {"entropy_probe": __version__, "python": platform.python_version(), **_versions()},
            "dtype": config.precision.dtype,
            "device": config.device,
        }
        return meta if report is None else {**meta, "fingerprint": report.checkpoint.fingerprint}

    def _verdict(self, name: str, got: Golden) -> Verdict:
        """Compare with the file, after what the option has written into it."""
        from entropy_probe import Verdict
        from entropy_probe.golden import MODES, compare, explain, read, update, write

        path, mode = self.take(name), self._request.config.stash[SETTINGS].golden_update
        stored = before = read(path)
        if mode in MODES:
            stored, changed = update(before, got, mode)
            if stored is not None and stored is not before and write(path, stored):
                fields = "1 field" if changed == 1 else f"{changed} fields"
                self._files.written.append(f"{self._files.shown(path)}: {fields} written")
        answer: dict[str, Any] = {"criterion": f"golden_{name}", "family": "golden"}
        if stored is None:
            hint = f"{self._files.shown(path)} is not there; this makes it:\n{self._files.command}"
            return Verdict(**answer, status="fail", value="no golden file", limit=None, hint=hint)
        found = compare(stored.fields, got.fields)
        if not found.differences:
            return Verdict(**answer, status="pass", value=found.worst, limit=1.0, hint="")
        remedy = next(
            mode for mode in MODES if (after := update(stored, got, mode)[0]) and _agree(after.fields, got.fields)
        )
        hint = f"{explain(stored, got, found)}\nif what was got is right: --probe-golden-update={remedy}"
        return Verdict(**answer, status="fail", value=found.worst, limit=1.0, hint=hint)


def _agree(expected: Mapping[str, Field], got: Mapping[str, Field]) -> bool:
    from entropy_probe.golden import compare

    return not compare(expected, got).differences


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can act on ends the test with one line."""
    __tracebackhide__ = True
    from entropy_probe import ProbeError

    try:
        yield
    except ProbeError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@pytest.fixture
def _probe_goldens(request: pytest.FixtureRequest, _probe_subject: Subject) -> ProbeGolden:
    """What `probe_golden` is, under a name that a repository does not take for its own."""
    if request.config.stash[SETTINGS].golden_dir is None:
        pytest.skip("needs golden files: run pytest with --probe-golden-dir=DIR")
    files = request.config.pluginmanager.get_plugin(FILES)
    assert isinstance(files, Files)
    return ProbeGolden(request, _probe_subject, files)


@pytest.fixture
def probe_golden(_probe_goldens: ProbeGolden) -> ProbeGolden:
    """Compares numbers of your own with golden files: `probe_golden.check("name", {"x": array}, rtol=1e-6)`."""
    return _probe_goldens


@pytest.fixture
def _probe_golden_section(
    request: pytest.FixtureRequest, _probe_goldens: ProbeGolden, _probe_subject: Subject
) -> Callable[[GoldenSection], None]:
    """A callable that compares one section of the report with its golden file."""

    def judge(section: GoldenSection) -> None:
        __tracebackhide__ = True
        from entropy_probe import Verdict
        from entropy_probe.golden import Golden

        report = measured(request, _probe_subject)
        with warnings_are_not_errors():
            fields = section(report)
        name = section.name
        if isinstance(fields, str):
            with _one_line():
                _probe_goldens.take(name)
            criterion, status = f"golden_{name}", "not_applicable"
            _probe_goldens.conclude(
                Verdict(criterion=criterion, family="golden", status=status, value=None, limit=None, hint=fields)
            )
        else:
            _probe_goldens.compare(name, Golden(_probe_goldens.meta(report) | _of_run(report), fields))

    return judge


def _of_run(report: ProbeReport) -> dict[str, Any]:
    """Digests of the configuration, apart from what only judges or makes room, and of the responses."""
    from entropy_probe.config import JUDGES, MEANS

    config = {key: value for key, value in report.config.items() if key not in (*JUDGES, *MEANS)}
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "responses": {"e": report.batch.fingerprint, "u": report.update_batch.fingerprint},
    }


def pytest_itemcollected(item: pytest.Item) -> None:
    """`-m golden` selects everything that compares with golden files."""
    if _uses_golden(item) and item.get_closest_marker("golden") is None:
        item.add_marker("golden")


def _uses_golden(item: pytest.Item) -> bool:
    return _USES_GOLDEN in getattr(item, "fixturenames", ())


class Files:
    """Which golden files were used and written, and whether this run would have used them all.

    Registered where a checkpoint is given. An xdist worker hands over what it knows; the other process unites it.
    """

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
        given = getattr(self._config, "workerinput", {}).get(ARGS, self._config.invocation_params.args)
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
        if report.when == "call" and not report.failed and report.nodeid in {o.nodeid for o in self.owners.values()}:
            self._answered.add(report.nodeid)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None]:
        self._used |= set(map(str, self.owners))
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            known = {"expected": self._expected, "answered": self._answered, "used": self._used}
            output[HANDED_OVER] = {key: sorted(names) for key, names in known.items()} | {
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
        for path in self._obsolete():
            terminalreporter.write_line(
                f"entropy-probe: {self.shown(path)}: no check of this run uses it; delete it, or bring its check back"
            )

    def _obsolete(self) -> list[Path]:
        """Files of this run's checkpoints that no check used; none unless all that could use one ran and did."""
        settings = self._config.stash[SETTINGS]
        chosen = self._config.args_source is pytest.Config.ArgsSource.ARGS or any(
            self._config.getoption(name, None) for name in ("lf", "ignore", "ignore_glob", "collectonly")
        )
        if settings.golden_dir is None or chosen or not self._whole or not self._expected <= self._answered:
            return []
        folders = [settings.golden_dir / target.name for target in settings.targets]
        return sorted(path for folder in folders for path in folder.glob("*.json") if str(path) not in self._used)
