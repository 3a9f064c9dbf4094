"""The checkpoint loads exactly as its trainer left it, and can be measured."""

import pytest

pytestmark = pytest.mark.acceptance


def test_loads(probe_loaded):
    probe_loaded()


def test_measures(probe_measured):
    probe_measured()
