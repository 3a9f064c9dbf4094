"""Importance weights."""

import pytest

from entropy_probe_checks.criteria import importance

pytestmark = [pytest.mark.acceptance, pytest.mark.importance]


def test_zero_step_change(_probe_judge):
    _probe_judge(importance.zero_step_change)


def test_zero_step_ess(_probe_judge):
    _probe_judge(importance.zero_step_ess)


def test_ess(_probe_judge):
    _probe_judge(importance.ess)


def test_pareto_k(_probe_judge):
    _probe_judge(importance.pareto_k)


def test_se_by_prompt(_probe_judge):
    _probe_judge(importance.se_by_prompt)
