"""Training health, within the bounds that the user sets; a check without bounds is not collected."""

import pytest

from entropy_probe_checks.criteria import gate

pytestmark = [pytest.mark.gate]


def test_entropy(_probe_judge):
    _probe_judge(gate.entropy)


def test_predicted_change(_probe_judge):
    _probe_judge(gate.predicted_change)


def test_realised_ratio(_probe_judge):
    _probe_judge(gate.realised_ratio)


def test_zero_advantage(_probe_judge):
    _probe_judge(gate.zero_advantage)


def test_adam_step(_probe_judge):
    _probe_judge(gate.adam_step)


def test_finite_moments(_probe_judge):
    _probe_judge(gate.finite_moments)


def test_reward(_probe_judge):
    _probe_judge(gate.reward)
