"""Several processes under torchrun: rank 0 runs the session, the others measure with it.

Rank 0 says each step before it is taken: load, prepare or measure a checkpoint (`follower.py` has
the other side). It lets the others go when its session has ended.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest

from entropy_probe import ProbeError
from entropy_probe.processes import torchrun
from pytest_entropy_probe.library import usage_errors
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.targets import Target

if TYPE_CHECKING:
    from entropy_probe.processes.world import World

WORLD = pytest.StashKey[Any]()
END = "end"
"""What rank 0 says last."""


def world_of(config: pytest.Config) -> World:
    """All processes of this run; this one alone where there are no others."""
    from entropy_probe.processes.world import ALONE

    return config.stash.get(WORLD, ALONE)


def lead(config: pytest.Config) -> None:
    """Wait for the other processes; they are let go when the session has ended."""
    if torchrun.size() == 1:
        return
    option = config.option
    if getattr(option, "numprocesses", None) or getattr(option, "dist", "no") != "no":
        problem = "xdist and torchrun both start processes; leave one of them out"
        raise pytest.UsageError(f"-n: {problem}")
    from entropy_probe.processes.world import World

    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        stderr = os.dup(2)
    with usage_errors():
        world = config.stash[WORLD] = World.of_torchrun(stderr)

    def let_go() -> None:
        with suppress(ProbeError):
            world.told(END)
        world.close()

    config.add_cleanup(let_go)


def announce(config: pytest.Config, step: str, target: Target, *, keep: bool) -> None:
    """Tell the other processes what this one does next."""
    if WORLD in config.stash:
        index = config.stash[SETTINGS].targets.index(target)
        config.stash[WORLD].told((step, index, keep))
