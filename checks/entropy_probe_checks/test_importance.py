"""Importance weights."""

import pytest

from entropy_probe_checks.criteria import importance

pytestmark = [pytest.mark.acceptance, pytest.mark.importance]


def test_zero_step_change(probe_judge):
    probe_judge(importance.zero_step_change)


def test_zero_step_ess(probe_judge):
    probe_judge(importance.zero_step_ess)


def test_ess(probe_judge):
    probe_judge(importance.ess)


def test_pareto_k(probe_judge):
    probe_judge(importance.pareto_k)
