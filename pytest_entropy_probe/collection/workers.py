"""Which of xdist's workers runs what: the tests of one checkpoint stay together."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_entropy_probe.collection.shipped import NODE, checkpoint_in, names_in_ids


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """One checkpoint is loaded once, on one worker; other tests go as `--dist` says."""
    from xdist import scheduler

    bases: dict[str, type[scheduler.LoadScopeScheduling]] = {
        "load": scheduler.LoadScopeScheduling,
        "worksteal": scheduler.LoadScopeScheduling,
        "loadscope": scheduler.LoadScopeScheduling,
        "loadfile": scheduler.LoadFileScheduling,
        "loadgroup": scheduler.LoadGroupScheduling,
    }
    mode = str(config.getoption("dist"))
    if mode not in bases:
        return None
    names = names_in_ids(config)

    class CheckpointScheduling(bases[mode]):
        def _split_scope(self, nodeid: str) -> str:
            name = checkpoint_in(nodeid, names)
            if name is not None:
                return f"{NODE}[{name}]"
            return nodeid if mode in ("load", "worksteal") else super()._split_scope(nodeid)

    return CheckpointScheduling(config, log)
