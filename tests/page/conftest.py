"""The runs that pages are made of, measured once for all files of this folder that one process runs."""

from __future__ import annotations

import pytest

import pages
from entropy_probe.page.contents import Checkpoint


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Healthy, noisy, collapsing."""
    folder = tmp_path_factory.mktemp("pages")
    runs = (pages.healthy_run, pages.noisy_run, pages.collapsing_run)
    return [pages.checkpoint(run(folder), step) for step, run in enumerate(runs, start=1)]
