"""U_cross and its standard errors."""

import pytest

from entropy_probe_checks.criteria import ustatistic

pytestmark = [pytest.mark.acceptance, pytest.mark.ustatistic]


def test_u_cross_identity(probe_judge):
    probe_judge(ustatistic.u_cross_identity)


def test_se_identity(probe_judge):
    probe_judge(ustatistic.se_identity)


def test_se_agreement(probe_judge):
    probe_judge(ustatistic.se_agreement)
