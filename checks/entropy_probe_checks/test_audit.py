"""Figures computed again, and the folder read and scored again."""

import pytest

from entropy_probe_checks.criteria import audit

pytestmark = [pytest.mark.acceptance, pytest.mark.audit]


def test_figures_recomputed(_probe_judge):
    _probe_judge(audit.figures_recomputed)


def test_as_stored(_probe_judge):
    _probe_judge(audit.as_stored)


def test_moments_possible(_probe_judge):
    _probe_judge(audit.moments_possible)


def test_plain_forward(_probe_judge):
    _probe_judge(audit.plain_forward)


def test_plain_step(_probe_judge):
    _probe_judge(audit.plain_step)


def test_prompts_as_given(_probe_judge):
    _probe_judge(audit.prompts_as_given)


def test_rewards_again(_probe_judge):
    _probe_judge(audit.rewards_again)


def test_batches_independent(_probe_judge):
    _probe_judge(audit.batches_independent)


def test_fresh_responses(_probe_judge):
    _probe_judge(audit.fresh_responses)
