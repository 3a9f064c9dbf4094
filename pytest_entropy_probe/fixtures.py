"""Fixtures for tests of the user's own. Without a checkpoint they are there too, and skip.

Every run of pytest imports this file, and so it imports nothing of ours before a fixture is asked
for. PYTEST_DONT_REWRITE: what it asserts is for type checkers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from entropy_probe import ProbeReport
    from entropy_probe.model.forward import BoundModel
    from entropy_probe.stages.responses.rollouts import Rollouts
    from pytest_entropy_probe.golden import ProbeGolden
    from pytest_entropy_probe.subject import Subject
    from pytest_entropy_probe.targets import Target

_NO_CHECKPOINT = "needs a checkpoint: run pytest with --probe-checkpoint=PATH"


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
def _probe_subject(request: pytest.FixtureRequest, _probe_target: Target | None) -> Subject:
    """One for each checkpoint, whatever the number of times that pytest sets the fixture up."""
    if _probe_target is None:
        pytest.skip(_NO_CHECKPOINT)
    from pytest_entropy_probe.subject import subject_of

    return subject_of(_probe_target, request.session)


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
    """The checkpoint's model in the configured precision: `probe_model.module`, `.logits(ids)`."""
    __tracebackhide__ = True
    return _probe_subject.prepared.model


@pytest.fixture(scope="session")
def probe_rollouts(_probe_subject: Subject) -> Rollouts:
    """The E batch: token ids, lengths and rewards of the responses whose entropy is measured. Prompts that
    `batch.target_se` adds are not among them."""
    __tracebackhide__ = True
    return _probe_subject.prepared.rollouts


@pytest.fixture
def _probe_goldens(request: pytest.FixtureRequest, _probe_subject: Subject) -> ProbeGolden:
    """What `probe_golden` is, under a name that a repository does not take for its own."""
    from pytest_entropy_probe.golden import golden_of

    return golden_of(request, _probe_subject)


@pytest.fixture
def probe_golden(_probe_goldens: ProbeGolden) -> ProbeGolden:
    """Compares your own numbers with golden files: `probe_golden.check("name", {"x": array})`."""
    return _probe_goldens
