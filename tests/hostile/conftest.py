"""What is timed here is what a file costs, not the import of transformers in the first test of a process."""

from __future__ import annotations

import pytest

from entropy_probe import load_checkpoint
from entropy_probe.demo import checkpoint_path


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    import entropy_probe.run
    import entropy_probe.stages.witnesses.properties  # noqa: F401

    load_checkpoint(checkpoint_path())
