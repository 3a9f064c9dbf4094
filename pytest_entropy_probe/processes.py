"""Several processes under torchrun: rank 0 runs the session, the others measure with it and do nothing else.

Rank 0 says each step before it is taken: load, prepare or measure a checkpoint. The others have no session, so that
they collect, judge, print and write nothing; they end with exit code 0 when rank 0's session does.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.settings import SETTINGS, Target

if TYPE_CHECKING:
    from entropy_probe.processes.world import World

WORLD = pytest.StashKey[Any]()
_END = "end"


def world_of(config: pytest.Config) -> World:
    """All processes of this run; this one alone where there are no others."""
    from entropy_probe.processes.world import ALONE

    return config.stash.get(WORLD, ALONE)


def silence() -> None:
    """Python's own streams go nowhere; what a crash writes to file descriptor 2 is still seen."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def lead(config: pytest.Config) -> None:
    """Wait for the other processes; they are let go when the session has ended."""
    from entropy_probe import ProbeError
    from entropy_probe.processes import torchrun

    if torchrun.size() == 1:
        return
    if getattr(config.option, "numprocesses", None) or getattr(config.option, "dist", "no") != "no":
        raise pytest.UsageError("-n: xdist and torchrun both start processes; leave one of them out")
    from entropy_probe.processes.world import World

    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        stderr = os.dup(2)
    try:
        world = config.stash[WORLD] = World.of_torchrun(stderr)
    except ProbeError as error:
        raise pytest.UsageError(str(error)) from error

    def let_go() -> None:
        with suppress(ProbeError):
            world.told(_END)
        world.close()

    config.add_cleanup(let_go)


def announce(config: pytest.Config, step: str, target: Target, *, keep: bool) -> None:
    """Tell the other processes what this one does next."""
    if WORLD in config.stash:
        config.stash[WORLD].told((step, config.stash[SETTINGS].targets.index(target), keep))


def follow(config: pytest.Config) -> int:
    """Take every step that rank 0 takes, until its session ends. Errors are rank 0's to show."""
    from entropy_probe import ProbeError
    from entropy_probe.processes.world import World
    from pytest_entropy_probe.fixtures import Subject, probe_config, warnings_are_not_errors

    try:
        probe_config(config)
        world = config.stash[WORLD] = World.of_torchrun()
    except (ProbeError, pytest.UsageError):
        return pytest.ExitCode.USAGE_ERROR
    subjects: dict[int, Subject] = {}
    try:
        while (said := _heard(world)) is not None:
            step, index, keep = said
            target = config.stash[SETTINGS].targets[index]
            subject = subjects.setdefault(index, Subject(target, config, keep=keep))
            with warnings_are_not_errors():
                _take(subject, step, keep=keep)
    except ProbeError:  # the others are gone
        return pytest.ExitCode.TESTS_FAILED
    finally:
        world.close()
    return pytest.ExitCode.OK


def _heard(world: World) -> tuple[str, int, bool] | None:
    """What rank 0 announces; `None` when its session has ended."""
    said: Any = world.told(None)
    return None if said == _END else said


def _take(subject: Any, step: str, *, keep: bool) -> None:
    from entropy_probe import ProbeError
    from entropy_probe.errors import DistributedError

    try:
        subject.take(step, keep=keep)
    except DistributedError:
        raise
    except ProbeError:
        pass
    except Exception:
        os.write(2, traceback.format_exc().encode())
