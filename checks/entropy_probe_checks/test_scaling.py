"""Tiny steps scale."""

import pytest

from entropy_probe_checks.criteria import scaling

pytestmark = [pytest.mark.acceptance, pytest.mark.scaling]


def test_param_scaling(_probe_judge):
    _probe_judge(scaling.param_scaling)


def test_logit_scaling(_probe_judge):
    _probe_judge(scaling.logit_scaling)


def test_drawn_scaling(_probe_judge):
    _probe_judge(scaling.drawn_scaling)


def test_logit_slope(_probe_judge):
    _probe_judge(scaling.logit_slope)


def test_delta_h_slope(_probe_judge):
    _probe_judge(scaling.delta_h_slope)


def test_taylor_order(_probe_judge):
    _probe_judge(scaling.taylor_order)


def test_change_identity(_probe_judge):
    _probe_judge(scaling.change_identity)


def test_step_resolved(_probe_judge):
    _probe_judge(scaling.step_resolved)
