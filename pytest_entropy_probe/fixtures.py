"""Loads and measures checkpoints. `entropy_probe` is imported inside functions only: here, in settings and in summary.

A `Subject` is one checkpoint in this process: loaded and measured at most once, in whatever order tests run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_entropy_probe.judge import conclude, headline
from pytest_entropy_probe.kept import Kept, kept_report
from pytest_entropy_probe.processes import announce, world_of
from pytest_entropy_probe.settings import SETTINGS, Target

if TYPE_CHECKING:
    from entropy_probe import Checkpoint, ProbeConfig, ProbeReport, Verdict
    from entropy_probe.model.forward import BoundModel
    from entropy_probe.report import BaselineSection
    from entropy_probe.run import Prepared
    from entropy_probe.stages.responses.rollouts import Rollouts

    Criterion = Callable[[ProbeReport], Verdict]
    Progress = Callable[[str, int, int], None]

TARGET_FIXTURE = "_probe_target"
NOT_LOADED = "checkpoint not loaded"
NOT_MEASURED = "not measured"
_NO_CHECKPOINT = "needs a checkpoint: run pytest with --probe-checkpoint=PATH"


@contextmanager
def warnings_are_not_errors() -> Iterator[None]:
    """The user's warning filters, with `error` read as `default`: a library's warning is no verdict on a checkpoint.

    Deprecations inside the libraries that are measured with are not the user's to act on, and are not shown.
    """
    with warnings.catch_warnings():
        filters = [("default" if action == "error" else action, *rest) for action, *rest in warnings.filters]
        warnings.resetwarnings()
        warnings.filters.extend(filters)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        for category in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@dataclass(frozen=True)
class Trouble:
    """An error that every test which meets it raises again, from where it was raised first."""

    error: Exception
    traceback: TracebackType | None

    def end(self) -> NoReturn:
        """End the test: what a user can act on is one line, anything else keeps its traceback."""
        __tracebackhide__ = True
        from entropy_probe import ProbeError

        if isinstance(self.error, ProbeError):
            pytest.fail(str(self.error), pytrace=False)
        raise self.error.with_traceback(self.traceback)


class Subject:
    """One checkpoint: what became of loading and measuring it, and the verdicts on it.

    The loaded checkpoint is dropped when it has been measured, unless a test of the session asks for the model or the
    responses themselves.
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
        self.note = ""
        self._warnings: Sequence[str] = ()
        self._config = config
        self._keep = keep
        self._kept: Kept | None = None
        self._checkpoint: Checkpoint | None = None
        self._prepared: Prepared | None = None

    def load(self) -> Trouble | None:
        """Load once, unless the report of this very checkpoint is kept; the trouble that it ended in, if any."""
        if self._checkpoint is None and self.report is None and self.trouble is None:
            self._recall()
            if self.report is None:
                self._attempt("load_trouble", self._load)
        return self.load_trouble

    def measure(self) -> Trouble | None:
        """Load and measure once; the trouble that either ended in, if any."""
        if self.report is None and self.load() is None and self.report is None and self.trouble is None:
            self._attempt("measure_trouble", self._measure)
            if not self._keep:
                self._checkpoint = self._prepared = None
        return self.trouble

    @property
    def prepared(self) -> Prepared:
        """The bound model and its batches, for tests of the user's own; ends the test where there are none."""
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

    def _attempt(self, kind: str, step: Callable[[Progress], None]) -> None:
        """Take a step with its progress shown, and keep what went wrong as `kind`."""
        from pytest_entropy_probe.progress import shown

        try:
            with shown(self._config, self.name) as progress, warnings_are_not_errors():
                announce(self._config, step.__name__, self._target, keep=self._keep)
                step(progress)
        except Exception as error:
            setattr(self, kind, Trouble(error, error.__traceback__))

    def take(self, step: str, *, keep: bool) -> None:
        """A step as rank 0 announced it, in another process."""
        try:
            {"_load": self._load, "_prepare": self._prepare, "_measure": self._measure}[step](lambda *_: None)
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

    def _recall(self) -> None:
        """The report that an earlier run kept of the same measurement, under this run's name and limits."""
        with warnings_are_not_errors():
            self._kept = kept_report(self._config, self.path, probe_config(self._config))
            report, self.note = self._kept.read() if self._kept else (None, "")
        if report is not None:
            checkpoint = report.checkpoint.model_copy(update={"name": self.name, "path": str(self.path)})
            now = {"checkpoint": checkpoint, "config": probe_config(self._config).model_dump(mode="json")}
            self.report = self._with_baseline(report.model_copy(update=now))

    def _with_baseline(self, report: ProbeReport) -> ProbeReport:
        return report.model_copy(update={"baseline": baseline(self._config, self.name)})

    def _load(self, progress: Progress) -> None:
        from entropy_probe import load_checkpoint

        progress("load", 0, 0)
        settings, config, world = self._config.stash[SETTINGS], probe_config(self._config), world_of(self._config)
        with world.together():
            world.at("load")
            device, missing_state = world.device(config.device), config.first_order.missing_state
            self._checkpoint = load_checkpoint(
                self.path, settings.base_model, device, missing_state=missing_state, **config.placement
            )
        self._warnings = self._checkpoint.info.warnings

    def _prepare(self, progress: Progress) -> None:
        from entropy_probe.run import prepare

        settings = self._config.stash[SETTINGS]
        assert self._checkpoint is not None
        self._prepared = prepare(
            self._checkpoint,
            probe_config(self._config),
            settings.rollouts,
            settings.update_rollouts,
            prompts=settings.prompts,
            progress=progress,
            world=world_of(self._config),
        )

    def _measure(self, progress: Progress) -> None:
        from entropy_probe.run import measure

        if self._prepared is None:
            self._prepare(progress)
        assert self._prepared is not None
        report = measure(self._prepared, name=self.name, progress=progress)
        if report is None:  # it is rank 0's
            return
        self.report = self._with_baseline(report)
        if self._kept:
            not_kept = self._kept.write(report)
            self.note = self.note or not_kept

    def said(self) -> str:
        """What the end of the run says of the checkpoint beside its verdicts; empty where there is nothing to say."""
        warnings = [*(self.report.checkpoint.warnings if self.report else self._warnings)]
        if self.report and self.report.memory.over_limit:
            warnings.append(self.report.memory.over_limit)
        return "; ".join(filter(None, [self.note, *(f"warning: {warning}" for warning in warnings)]))

    def judged_report(self) -> ProbeReport | None:
        """The report with the verdicts that were reached in this process."""
        return self.report and self.report.model_copy(update={"verdicts": list(self.verdicts.values())})


SUBJECTS = pytest.StashKey[dict[str, Subject]]()
_CONFIG = pytest.StashKey[Any]()


def probe_config(config: pytest.Config) -> ProbeConfig:
    """The resolved configuration; a bad one ends the run with exit code 4."""
    if _CONFIG not in config.stash:
        from entropy_probe import ProbeConfig, ProbeError
        from entropy_probe_checks.thresholds import require_known

        settings = config.stash[SETTINGS]
        with warnings_are_not_errors():
            try:
                resolved = ProbeConfig.load(settings.config_file, settings.pyproject, settings.overrides)
                has_baseline = settings.baseline is not None
                require_known(resolved.limits, resolved.allow_inconclusive, has_baseline=has_baseline)
                config.stash[_CONFIG] = resolved
            except ProbeError as error:
                raise pytest.UsageError(str(error)) from error
    return config.stash[_CONFIG]


def baseline(config: pytest.Config, name: str) -> BaselineSection | None:
    """What gates compare the checkpoint `name` with; a report that is not there, or not one, ends with exit code 4."""
    path = config.stash[SETTINGS].baseline_file(name)
    if path is None:
        return None
    from entropy_probe import ProbeError, ProbeReport
    from entropy_probe_checks.criteria.gate import baseline_of

    with warnings_are_not_errors():
        try:
            return baseline_of(ProbeReport.from_json(path))
        except ProbeError as error:
            raise pytest.UsageError(f"--probe-baseline: {error}") from error


def demo_path() -> Path:
    """The folder behind the name `demo`."""
    from entropy_probe import ProbeError
    from entropy_probe.demo import checkpoint_path

    try:
        return Path(checkpoint_path())
    except ProbeError as error:
        raise pytest.UsageError(str(error)) from error


def write_reports(path: Path, texts: list[str]) -> str | None:
    """Write one checkpoint's report; `texts` are copies of it that differ in their verdicts. The error line, if any."""
    from entropy_probe import ProbeError, ProbeReport

    with warnings_are_not_errors():
        reports = [ProbeReport.model_validate_json(text) for text in texts]
        verdicts = {verdict.criterion: verdict for report in reports for verdict in report.verdicts}
        try:
            reports[0].model_copy(update={"verdicts": list(verdicts.values())}).to_json(path)
        except ProbeError as error:
            return str(error)
    return None


@pytest.fixture(scope="session")
def _probe_target(request: pytest.FixtureRequest) -> Target | None:
    """The checkpoint of this round; one round per --probe-checkpoint."""
    return getattr(request, "param", None)


@pytest.fixture(scope="session")
def probe_checkpoint(_probe_target: Target | None) -> Path:
    """The folder of the checkpoint that is probed; skips where none was given."""
    if _probe_target is None:
        pytest.skip(_NO_CHECKPOINT)
    return _probe_target.path


@pytest.fixture(scope="session")
def _probe_subject(
    request: pytest.FixtureRequest, _probe_target: Target | None, pytestconfig: pytest.Config
) -> Subject:
    """Kept beside the fixture, since pytest sets session fixtures up again when their parameter comes back."""
    if _probe_target is None:
        pytest.skip(_NO_CHECKPOINT)
    subjects = pytestconfig.stash.setdefault(SUBJECTS, {})
    asked_for = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    keep = bool(asked_for & {"probe_model", "probe_rollouts", "_probe_benchmark"})
    return subjects.setdefault(_probe_target.name, Subject(_probe_target, pytestconfig, keep=keep))


@pytest.fixture(scope="session")
def probe_report(_probe_subject: Subject) -> ProbeReport:
    """The `ProbeReport` of the checkpoint; measured at first use."""
    __tracebackhide__ = True
    if trouble := _probe_subject.measure():
        trouble.end()
    assert _probe_subject.report is not None
    return _probe_subject.report


@pytest.fixture(scope="session")
def probe_model(_probe_subject: Subject) -> BoundModel:
    """The checkpoint's model, bound to the configured precision: `probe_model.module`, `probe_model.logits(ids)`."""
    __tracebackhide__ = True
    return _probe_subject.prepared.model


@pytest.fixture(scope="session")
def probe_rollouts(_probe_subject: Subject) -> Rollouts:
    """The E batch: token ids, lengths and rewards of the responses on which the entropy is measured."""
    __tracebackhide__ = True
    return _probe_subject.prepared.rollouts


@pytest.fixture
def _probe_loaded(request: pytest.FixtureRequest, _probe_subject: Subject) -> Callable[[], None]:
    """A callable that fails, with one line, where the checkpoint can't be loaded."""

    def check() -> None:
        __tracebackhide__ = True
        trouble = _probe_subject.load()
        record(request, _probe_subject)
        if trouble:
            trouble.end()

    return check


@pytest.fixture
def _probe_measured(request: pytest.FixtureRequest, _probe_subject: Subject) -> Callable[[], None]:
    """A callable that fails, with one line, where the measurement can't be made."""

    def check() -> None:
        __tracebackhide__ = True
        trouble = _probe_subject.measure()
        record(request, _probe_subject)
        if _probe_subject.load_trouble:
            _no_numbers(request, _probe_subject)
        if trouble:
            trouble.end()

    return check


@pytest.fixture
def _probe_judge(request: pytest.FixtureRequest, _probe_subject: Subject) -> Callable[[Criterion], None]:
    """A callable that puts the report before a criterion and ends the test as its verdict says."""

    def judge(criterion: Criterion) -> None:
        __tracebackhide__ = True
        report = measured(request, _probe_subject)
        with warnings_are_not_errors():
            verdict = criterion(report)
        _probe_subject.verdicts[verdict.criterion] = verdict
        record(request, _probe_subject, verdict)
        conclude(verdict, allowed=verdict.criterion in report.config.get("allow_inconclusive", ()))

    return judge


def measured(request: pytest.FixtureRequest, subject: Subject) -> ProbeReport:
    """The report; where there is none, the end of the test."""
    __tracebackhide__ = True
    subject.measure()
    if subject.report is None:
        record(request, subject)
        _no_numbers(request, subject)
    return subject.report


def _no_numbers(request: pytest.FixtureRequest, subject: Subject) -> NoReturn:
    """Skip, as another test reports the trouble; where that one wasn't selected, the first that comes here does."""
    __tracebackhide__ = True
    reporter = "_probe_loaded" if subject.load_trouble else "_probe_measured"
    target = request.getfixturevalue(TARGET_FIXTURE)
    reported_elsewhere = any(
        reporter in getattr(item, "fixturenames", ()) and _target_of(item) == target for item in request.session.items
    )
    if subject.trouble and not reported_elsewhere and not subject.trouble_was_reported:
        subject.trouble_was_reported = True
        subject.trouble.end()
    pytest.skip(subject.state)


def _target_of(item: pytest.Item) -> Target | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(TARGET_FIXTURE) if callspec else None


def record(request: pytest.FixtureRequest, subject: Subject, verdict: Verdict | None = None) -> None:
    """Put the verdict into the test's properties, as plain builtins: they go to JUnit files and between processes.

    What was found, in words, goes with the first test that has it.
    """
    found: dict[str, Any] = {"checkpoint": subject.name, "state": subject.state}
    if subject.report is not None and not subject.headline_was_recorded:
        subject.headline_was_recorded = True
        found["headline"] = headline(subject.report)
    if verdict is not None:
        found |= {key: getattr(verdict, key) for key in ("criterion", "family", "status", "value", "limit")}
    plain = {key: float(value) if isinstance(value, int | float) else value for key, value in found.items()}
    request.node.user_properties.extend(
        (f"probe_{key}", value) for key, value in plain.items() if value is not None and value != ""
    )
