"""pytest's folder of the repository, where the value of one of our options moved it.

Before plugins are known pytest takes PATH in `--probe-checkpoint PATH` for a test path. Outside
the repository that moves rootdir: the repository's configuration is ignored, and the cache is
written beside the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from _pytest.config.findpaths import locate_config

from pytest_entropy_probe.names import OPTIONS, option


def require_rootdir(config: pytest.Config, args: Sequence[str]) -> None:
    """`pytest.UsageError` where pytest took the value of an option for the place of the tests."""
    if config.known_args_namespace.inifilename:
        return
    names = {option(key) for key, (_, is_path, _) in OPTIONS.items() if is_path}
    here, root = config.invocation_params.dir, config.rootpath
    for name, value in pairwise(args):
        if name not in names:
            continue
        path = Path(os.path.abspath(here / value))
        folder = path if path.is_dir() else path.parent
        moved = root != here and root.is_relative_to(folder)
        harmless = folder.is_relative_to(here) and not moved
        if path.exists() and not harmless and not _is_configured(config, here):
            problem = f"pytest took this path for rootdir ({root})"
            raise pytest.UsageError(f"{name} {value}: {problem}; write {name}={value}")


def _is_configured(config: pytest.Config, here: Path) -> bool:
    """Whether the configuration is the one that pytest finds from the current folder."""
    return config.inipath is not None and locate_config(here, [here])[1] == config.inipath
