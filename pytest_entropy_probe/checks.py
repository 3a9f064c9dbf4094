"""Fixtures of the shipped checks: each is a callable that ends the test.

Registered only when a checkpoint is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import pytest

from pytest_entropy_probe.judge import conclude
from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.names import TARGET_FIXTURE
from pytest_entropy_probe.shown.records import record
from pytest_entropy_probe.subject import Subject
from pytest_entropy_probe.targets import Target

if TYPE_CHECKING:
    from entropy_probe import ProbeReport, Verdict
    from entropy_probe_checks.goldens import GoldenSection
    from pytest_entropy_probe.golden import ProbeGolden

    Criterion = Callable[[ProbeReport], Verdict]


_REPORTED = pytest.StashKey[dict[str, set[Target | None]]]()


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
def _probe_judge(
    request: pytest.FixtureRequest,
    _probe_subject: Subject,
) -> Callable[[Criterion], None]:
    """A callable that puts the report before a criterion and ends the test as its verdict says."""

    def judge(criterion: Criterion) -> None:
        __tracebackhide__ = True
        report = _measured(request, _probe_subject)
        with warnings_are_not_errors():
            verdict = criterion(report)
        _probe_subject.verdicts[verdict.criterion] = verdict
        record(request, _probe_subject, verdict)
        allowed = report.config.get("allow_inconclusive", ())
        conclude(verdict, allowed=verdict.criterion in allowed)

    return judge


@pytest.fixture
def _probe_golden_section(
    request: pytest.FixtureRequest, _probe_goldens: ProbeGolden, _probe_subject: Subject
) -> Callable[[GoldenSection], None]:
    """A callable that compares one section of the report with its golden file."""

    def judge(section: GoldenSection) -> None:
        __tracebackhide__ = True
        from pytest_entropy_probe.golden import judge_section

        judge_section(_probe_goldens, section, _measured(request, _probe_subject))

    return judge


def _measured(request: pytest.FixtureRequest, subject: Subject) -> ProbeReport:
    """The report; where there is none, the end of the test."""
    __tracebackhide__ = True
    subject.measure()
    if subject.report is None:
        record(request, subject)
        _no_numbers(request, subject)
    return subject.report


def _no_numbers(request: pytest.FixtureRequest, subject: Subject) -> NoReturn:
    """Skip, as another test reports the trouble.

    Where that one wasn't selected, the first that comes here does.
    """
    __tracebackhide__ = True
    reporter = "_probe_loaded" if subject.load_trouble else "_probe_measured"
    target = request.getfixturevalue(TARGET_FIXTURE)
    reported_elsewhere = target in _targets_with(reporter, request.session)
    if subject.trouble and not reported_elsewhere and not subject.trouble_was_reported:
        subject.trouble_was_reported = True
        subject.trouble.end()
    pytest.skip(subject.state)


def _targets_with(reporter: str, session: pytest.Session) -> set[Target | None]:
    """Whose trouble this fixture reports, of the tests that were selected; looked for once."""
    found = session.stash.setdefault(_REPORTED, {})
    if reporter not in found:
        items = (i for i in session.items if reporter in getattr(i, "fixturenames", ()))
        found[reporter] = {_target_of(item) for item in items}
    return found[reporter]


def _target_of(item: pytest.Item) -> Target | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get(TARGET_FIXTURE) if callspec else None
