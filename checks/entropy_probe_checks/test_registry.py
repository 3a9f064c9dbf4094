"""Every parameter is reached, none is changed."""

import pytest

from entropy_probe_checks.criteria import registry

pytestmark = [pytest.mark.acceptance, pytest.mark.registry]


def test_x_coverage(_probe_judge):
    _probe_judge(registry.x_coverage)


def test_y_coverage(_probe_judge):
    _probe_judge(registry.y_coverage)


def test_preconditioner_complete(_probe_judge):
    _probe_judge(registry.preconditioner_complete)


def test_preconditioner_finite(_probe_judge):
    _probe_judge(registry.preconditioner_finite)


def test_buffers_overridden(_probe_judge):
    _probe_judge(registry.buffers_overridden)


def test_live_model_unmodified(_probe_judge):
    _probe_judge(registry.live_model_unmodified)


def test_preconditioner_witness(_probe_judge):
    _probe_judge(registry.preconditioner_witness)


def test_moments_match(_probe_judge):
    _probe_judge(registry.moments_match)


def test_optimizer_as_saved(_probe_judge):
    _probe_judge(registry.optimizer_as_saved)
