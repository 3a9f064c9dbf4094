"""The update, and what is predicted from it."""

import pytest

from entropy_probe_checks.criteria import prediction

pytestmark = [pytest.mark.acceptance, pytest.mark.prediction]


def test_optimizer_step_cosine(_probe_judge):
    _probe_judge(prediction.optimizer_step_cosine)


def test_optimizer_step_norm(_probe_judge):
    _probe_judge(prediction.optimizer_step_norm)


def test_curvature_witness(_probe_judge):
    _probe_judge(prediction.curvature_witness)


def test_virtual_step(_probe_judge):
    _probe_judge(prediction.virtual_step)


def test_real_step(_probe_judge):
    _probe_judge(prediction.real_step)


def test_real_update_cosine(_probe_judge):
    _probe_judge(prediction.real_update_cosine)


def test_real_update_norm(_probe_judge):
    _probe_judge(prediction.real_update_norm)


def test_prediction(_probe_judge):
    _probe_judge(prediction.prediction)


def test_change_estimators_agree(_probe_judge):
    _probe_judge(prediction.change_estimators_agree)


def test_slope_identity(_probe_judge):
    _probe_judge(prediction.slope_identity)


def test_sweep_identity(_probe_judge):
    _probe_judge(prediction.sweep_identity)


def test_curvature_identity(_probe_judge):
    _probe_judge(prediction.curvature_identity)
