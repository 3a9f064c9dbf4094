"""Tiny steps scale."""

import pytest

from entropy_probe_checks.criteria import scaling

pytestmark = [pytest.mark.acceptance, pytest.mark.scaling]


def test_param_scaling(_probe_judge):
    _probe_judge(scaling.param_scaling)


def test_logit_scaling(_probe_judge):
    _probe_judge(scaling.logit_scaling)
