"""A checkpoint in this process, and the configuration that it is measured with.

A `Subject` is loaded and measured at most once, in whatever order tests run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from entropy_probe import ProbeError
from entropy_probe.config import JUDGES
from pytest_entropy_probe import library
from pytest_entropy_probe.kept import Kept, kept_report
from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.progress import shown
from pytest_entropy_probe.ranks import announce, world_of
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.targets import Target

if TYPE_CHECKING:
    from entropy_probe import Checkpoint, ProbeConfig, ProbeReport, Verdict
    from entropy_probe.pipeline.prepared import Prepared
    from entropy_probe.report import BaselineSection

    Progress = Callable[[str, int, int], None]

NOT_LOADED = "checkpoint not loaded"
NOT_MEASURED = "not measured"
_ASK_FOR_THE_MODEL = frozenset({"probe_model", "probe_rollouts", "_probe_benchmark"})
_CONFIG = pytest.StashKey[Any]()


def probe_config(config: pytest.Config) -> ProbeConfig:
    """The resolved configuration; a bad one ends the run with exit code 4."""
    if _CONFIG not in config.stash:
        config.stash[_CONFIG] = library.read_config(config.stash[SETTINGS])
    return config.stash[_CONFIG]


def baseline(config: pytest.Config, name: str) -> BaselineSection | None:
    """What gates compare the checkpoint `name` with; what is no report ends with exit code 4."""
    path = config.stash[SETTINGS].baseline_file(name)
    return None if path is None else library.read_baseline(path)


@dataclass(frozen=True)
class Trouble:
    """An error that every test which meets it raises again, from where it was raised first."""

    error: Exception
    traceback: TracebackType | None

    def end(self) -> NoReturn:
        """End the test: what a user can act on is one line, anything else keeps its traceback."""
        __tracebackhide__ = True
        if isinstance(self.error, ProbeError):
            pytest.fail(str(self.error), pytrace=False)
        raise self.error.with_traceback(self.traceback)


class Subject:
    """One checkpoint: what became of loading and measuring it, and the verdicts on it.

    The loaded checkpoint is dropped when it has been measured, unless a test of the session asks
    for the model or the responses themselves.
    """

    def __init__(self, target: Target, config: pytest.Config, *, keep: bool) -> None:
        self.name = target.name
        self.path = target.path
        self._target = target
        self.report: ProbeReport | None = None
        self.verdicts: dict[str, Verdict] = {}
        self.load_trouble: Trouble | None = None
        self.measure_trouble: Trouble | None = None
        self.trouble_was_reported = False
        self.headline_was_recorded = False
        self.note = self.not_written = ""
        self._warnings: Sequence[str] = ()
        self._config = config
        self._keep = keep
        self._kept: Kept | None = None
        self._not_kept = ""
        self._checkpoint: Checkpoint | None = None
        self._prepared: Prepared | None = None

    def load(self) -> Trouble | None:
        """Load once, unless the report of this very checkpoint is kept; the trouble, if any."""
        if self._checkpoint is None and self.report is None and self.trouble is None:
            self._recall()
            if self.report is None:
                self._attempt("load_trouble", self._load)
        return self.load_trouble

    def measure(self) -> Trouble | None:
        """Load and measure once; the trouble that either ended in, if any."""
        if self.report is None:
            self.load()
        if self.report is None and self.trouble is None:
            self._attempt("measure_trouble", self._measure)
            if not self._keep:
                self._checkpoint = self._prepared = None
        return self.trouble

    @property
    def prepared(self) -> Prepared:
        """The bound model and its batches; ends the test where there are none."""
        __tracebackhide__ = True
        if self._prepared is None and self.trouble is None:
            if self._checkpoint is None:
                self._attempt("load_trouble", self._load)
            if self.trouble is None:
                self._attempt("measure_trouble", self._prepare)
        if self.trouble is not None:
            self.trouble.end()
        assert self._prepared is not None
        return self._prepared

    def take(self, step: str, *, keep: bool) -> None:
        """A step as rank 0 announced it, in another process."""
        steps = {"_load": self._load, "_prepare": self._prepare, "_measure": self._measure}
        try:
            steps[step](lambda *_: None)
        finally:
            if step == "_measure" and not keep:
                self._checkpoint = self._prepared = None

    @property
    def trouble(self) -> Trouble | None:
        return self.load_trouble or self.measure_trouble

    @property
    def state(self) -> str:
        """Why there are no numbers, or an empty string."""
        return NOT_LOADED if self.load_trouble else NOT_MEASURED if self.measure_trouble else ""

    def said(self) -> str:
        """What the end of the run says of the checkpoint beside its verdicts; often nothing."""
        warnings = [*(self.report.checkpoint.warnings if self.report else self._warnings)]
        if self.report:
            warnings += self.report.memory.said
        return "; ".join(filter(None, [self.note, *(f"warning: {text}" for text in warnings)]))

    def judged_report(self) -> ProbeReport | None:
        """The report with the verdicts that were reached in this process."""
        verdicts = {"verdicts": list(self.verdicts.values())}
        return self.report and self.report.model_copy(update=verdicts)

    def _attempt(self, kind: str, step: Callable[[Progress], None]) -> None:
        """Take a step with its progress shown, and keep what went wrong as `kind`."""
        try:
            with shown(self._config, self.name) as progress, warnings_are_not_errors():
                announce(self._config, step.__name__, self._target, keep=self._keep)
                step(progress)
        except Exception as error:
            setattr(self, kind, Trouble(error, error.__traceback__))

    def _recall(self) -> None:
        """The report that an earlier run kept of the same measurement, with this run's limits."""
        config = probe_config(self._config)
        with warnings_are_not_errors():
            self._kept, self._not_kept = kept_report(self._config, self.path, config)
            report, self.note = self._kept.read() if self._kept else (None, "")
        if report is not None:
            renamed = {"name": self.name, "path": str(self.path)}
            now = {
                "checkpoint": report.checkpoint.model_copy(update=renamed),
                "config": report.config | config.model_dump(mode="json", include=set(JUDGES)),
            }
            self.report = self._with_baseline(report.model_copy(update=now))
            self._write_evidence()

    def _with_baseline(self, report: ProbeReport) -> ProbeReport:
        return report.model_copy(update={"baseline": baseline(self._config, self.name)})

    def _load(self, progress: Progress) -> None:
        progress("load", 0, 0)
        settings, config = self._config.stash[SETTINGS], probe_config(self._config)
        world = world_of(self._config)
        self._checkpoint = library.load(self.path, settings, config, world)
        self._warnings = self._checkpoint.info.warnings

    def _prepare(self, progress: Progress) -> None:
        assert self._checkpoint is not None
        settings, config = self._config.stash[SETTINGS], probe_config(self._config)
        world = world_of(self._config)
        self._prepared = library.prepare(self._checkpoint, settings, config, world, progress)

    def _measure(self, progress: Progress) -> None:
        if self._prepared is None:
            self._prepare(progress)
        assert self._prepared is not None
        report = library.measure(self._prepared, self.name, progress)
        if report is None:  # it is rank 0's
            return
        self.report = self._with_baseline(report)
        if self._kept:
            self._not_kept = self._kept.write(report)
        self.note = "; ".join(filter(None, [self.note, self._not_kept]))
        self._write_evidence()

    def _write_evidence(self) -> None:
        """Where --probe-evidence asks for it: beside the report, and by whoever has it."""
        folder = self._config.stash[SETTINGS].evidence
        if folder is not None and self.report is not None:
            self.not_written = library.write_evidence(folder, self.name, self.report)


SUBJECTS = pytest.StashKey[dict[str, Subject]]()


def subject_of(target: Target, session: pytest.Session) -> Subject:
    """The one of this checkpoint.

    pytest sets a session fixture up again when its parameter comes back.
    """
    subjects = session.config.stash.setdefault(SUBJECTS, {})
    if target.name not in subjects:
        asked_for = {name for item in session.items for name in getattr(item, "fixturenames", ())}
        keep = not asked_for.isdisjoint(_ASK_FOR_THE_MODEL)
        subjects[target.name] = Subject(target, session.config, keep=keep)
    return subjects[target.name]
