"""Ids of shipped checks that are given on the command line, or in a file of known failures.

They are looked at before collection: inside an xdist worker a usage error would be an internal
one.
"""

from __future__ import annotations

import os

import pytest

from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.shipped import (
    NODE,
    check_modules,
    checkpoint_in,
    function_of,
    import_module,
    names_in_ids,
    withheld,
)
from pytest_entropy_probe.xfails import KnownFailure, read_xfails

SELECTORS = pytest.StashKey[tuple[str, ...]]()
KNOWN_FAILURES = pytest.StashKey[tuple[KnownFailure, ...]]()


def take_selectors(config: pytest.Config) -> None:
    """Take `probe-checks/…` out of the paths to collect, and keep it as a filter.

    No such file exists. An id that fits nothing ends the run with exit code 4.
    """
    taken = {arg: selector for arg in config.args if (selector := _selector(arg, config))}
    config.args = [arg for arg in config.args if arg not in taken]
    config.stash[SELECTORS] = tuple(taken.values())
    for arg, selector in taken.items():
        if not _exists(selector, config):
            remedy = "pytest --co --probe-checkpoint=... lists the ids"
            raise pytest.UsageError(f"not found: {arg}; {remedy}")
        test = selector.partition("::")[2]
        if reason := withheld(_module(selector), config, function_of(test)):
            raise pytest.UsageError(f"{arg}: {reason}")


def take_known_failures(config: pytest.Config) -> None:
    """Read --probe-xfails, if given."""
    path = config.stash[SETTINGS].xfails_file
    config.stash[KNOWN_FAILURES] = () if path is None else read_xfails(path, _all_ids(config))


def _all_ids(config: pytest.Config) -> list[str]:
    """The id of every shipped check on every checkpoint."""
    with warnings_are_not_errors():
        modules = {name: import_module(name) for name in check_modules()}
    return [
        f"{NODE}/{name}.py::{function}[{checkpoint}]"
        for name, module in modules.items()
        for function in vars(module)
        if function.startswith("test_")
        for checkpoint in names_in_ids(config)
    ]


def _selector(arg: str, config: pytest.Config) -> str | None:
    """The id that `arg` names, as written or from the current folder, if it is one of ours."""
    path, separator, rest = arg.partition("::")
    if not rest.isascii():
        rest = rest.encode("unicode_escape").decode("ascii")  # as ids are written
    absolute = config.invocation_params.dir / path
    if absolute.exists():
        return None
    for candidate in (os.path.normpath(path), os.path.relpath(absolute, config.rootpath)):
        candidate = candidate.replace(os.sep, "/")
        if candidate == NODE or candidate.startswith(f"{NODE}/"):
            return candidate + separator + rest
    return None


def _module(selector: str) -> str:
    """The name of the module that an id begins with; empty for all of them."""
    path = selector.partition("::")[0]
    return path.removeprefix(NODE).removeprefix("/").removesuffix(".py")


def _exists(selector: str, config: pytest.Config) -> bool:
    """Whether a folder, module, function or checkpoint fits.

    Nothing is imported unless a function is named.
    """
    path, _, test = selector.partition("::")
    if path == NODE:
        return not test
    module = _module(selector)
    if module not in check_modules() or not path.endswith(".py"):
        return False
    name, _, parameters = test.partition("[")
    with warnings_are_not_errors():
        known = not name or callable(getattr(import_module(module), name, None))
    if not known or not parameters:
        return known
    return checkpoint_in(f"[{parameters}", names_in_ids(config)) is not None
