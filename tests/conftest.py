"""Shared by all tests."""

import os
from collections.abc import Iterator

import pytest

# The models here are tiny: with two threads each of their operations waits for the second one to wake up.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import forked
import typecheck

typecheck.make_shapes_known()

pytest_plugins = ["pytester"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked at every call, except where whole measurements are repeated."""
    if typecheck.is_checked(request.path):
        yield
        return
    with typecheck.unchecked():
        yield


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """`runpytest_subprocess` forks a process in which the libraries are imported already."""
    monkeypatch.setattr(pytester, "run", forked.runs_of(pytester))
    return pytester
