"""A process that torchrun started beside rank 0: it measures with rank 0 and does nothing else.

It has no session, so that it collects, judges, prints and writes nothing. It ends with exit code 0
when rank 0's session does.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from entropy_probe import ProbeError
from entropy_probe.errors import DistributedError
from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.ranks import END, WORLD
from pytest_entropy_probe.settings import SETTINGS, read_settings
from pytest_entropy_probe.subject import Subject, probe_config

if TYPE_CHECKING:
    from entropy_probe.processes.world import World


def silence() -> None:
    """Python's own streams go nowhere; what a crash writes to file descriptor 2 is still seen."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def follow(config: pytest.Config) -> int:
    """Take every step that rank 0 takes, until its session ends. Errors are rank 0's to show."""
    from entropy_probe.processes.world import World

    try:
        settings = config.stash[SETTINGS] = read_settings(config)
        probe_config(config)
        world = config.stash[WORLD] = World.of_torchrun()
    except (ProbeError, pytest.UsageError):
        return pytest.ExitCode.USAGE_ERROR
    subjects: dict[int, Subject] = {}
    try:
        while (said := _heard(world)) is not None:
            step, index, keep = said
            target = settings.targets[index]
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
    return None if said == END else said


def _take(subject: Subject, step: str, *, keep: bool) -> None:
    try:
        subject.take(step, keep=keep)
    except DistributedError:
        raise
    except ProbeError:
        pass
    except Exception:
        os.write(2, traceback.format_exc().encode())
