"""`--probe-dry-run`: what a run of each checkpoint would take, from headers and options alone; nothing is collected."""

from __future__ import annotations

import pytest

from pytest_entropy_probe.library import plan_of, read_config
from pytest_entropy_probe.settings import read_settings


def dry_run(config: pytest.Config) -> int:
    """Print what `entropy-probe plan` says; 0 where every checkpoint fits, else 1.

    Raises `pytest.UsageError` where an option or the checkpoint is wrong, as a run would.
    """
    settings = read_settings(config)
    probe, fits = read_config(settings), True
    for target in settings.targets:
        text, one_fits = plan_of(target.path, settings, probe)
        print(f"{target.name}: {text}" if len(settings.targets) > 1 else text)
        fits &= one_fits
    return pytest.ExitCode.OK if fits else pytest.ExitCode.TESTS_FAILED
