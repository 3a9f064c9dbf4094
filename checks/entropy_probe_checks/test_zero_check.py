"""η = 0 changes nothing."""

import pytest

from entropy_probe_checks.criteria import zero_check

pytestmark = [pytest.mark.acceptance, pytest.mark.zero_check]


def test_zero_check(_probe_judge):
    _probe_judge(zero_check.zero_check)


def test_drawn_zero_check(_probe_judge):
    _probe_judge(zero_check.drawn_zero_check)
