"""The checkpoint loads exactly as its trainer left it, and can be measured."""

import pytest

pytestmark = pytest.mark.acceptance


def test_loads(_probe_loaded):
    _probe_loaded()


def test_measures(_probe_measured):
    _probe_measured()
