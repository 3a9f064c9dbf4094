"""U_cross and its standard errors."""

import pytest

from entropy_probe_checks.criteria import ustatistic

pytestmark = [pytest.mark.acceptance, pytest.mark.ustatistic]


def test_gradient_witness(_probe_judge):
    _probe_judge(ustatistic.gradient_witness)


def test_projections_agree(_probe_judge):
    _probe_judge(ustatistic.projections_agree)


def test_u_cross_identity(_probe_judge):
    _probe_judge(ustatistic.u_cross_identity)


def test_se_identity(_probe_judge):
    _probe_judge(ustatistic.se_identity)


def test_se_agreement(_probe_judge):
    _probe_judge(ustatistic.se_agreement)


def test_delta_h1_identity(_probe_judge):
    _probe_judge(ustatistic.delta_h1_identity)


def test_two_batch_identity(_probe_judge):
    _probe_judge(ustatistic.two_batch_identity)


def test_se_formula(_probe_judge):
    _probe_judge(ustatistic.se_formula)
