"""Shared by all tests."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The models here are tiny: with two threads each of their operations waits for the second one to wake up.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import forked
import typecheck

typecheck.make_shapes_known()

pytest_plugins = ["pytester"]

torch.set_num_threads(1)


# Files in which the most is measured, the longest first. What is left at the end is short then, whoever takes it.
LONGEST = (
    "faults/test_faults.py",
    "test_oracle.py",
    "test_memory_limit.py",
    "hostile/test_hostile.py",
    "test_cost.py",
    "plugin/test_site_commands.py",
    "plugin/test_ci_page.py",
    "page/test_browser.py",
    "page/test_page.py",
    "plugin/test_readme.py",
    "test_against_reference.py",
    "test_run.py",
    "test_distributed.py",
    "test_long_rows.py",
    "test_callback.py",
    "test_one_copy.py",
    "test_benchmarks.py",
    "plugin/test_demo_run.py",
    "test_properties.py",
    "test_placement.py",
    "test_healthy.py",
    "test_sequence_processor.py",
    "test_capture.py",
    "test_drill.py",
    "test_entropy_change.py",
    "test_audit.py",
    "test_mutants.py",
    "test_trl.py",
    "test_fsdp_callback.py",
    "test_room.py",
    "test_projections.py",
    "test_sampling.py",
    "test_users_inputs.py",
    "test_continuity.py",
    "plugin/test_known_failures.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What libraries and tests hold stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


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
