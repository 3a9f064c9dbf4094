"""How long the stages take on this checkpoint, by pytest-benchmark; collected only when asked for."""

import pytest

pytestmark = [pytest.mark.benchmark]


def test_scoring(_probe_benchmark):
    _probe_benchmark("scoring")


def test_gradients(_probe_benchmark):
    _probe_benchmark("gradients")


def test_sweep(_probe_benchmark):
    _probe_benchmark("sweep")
