"""Figures, computed again."""

import pytest

from entropy_probe_checks.criteria import audit

pytestmark = [pytest.mark.acceptance, pytest.mark.audit]


def test_figures_recomputed(_probe_judge):
    _probe_judge(audit.figures_recomputed)
