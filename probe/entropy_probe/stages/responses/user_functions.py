"""Datasets and rewards of the user's own, named by an entry point or as `module:function`.

Whatever goes wrong in them ends in one `ConfigError` on one line: a name that nothing answers to, a
module that cannot be imported, an exception raised inside, with its type and message (its traceback
stays chained).
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from entropy_probe.errors import ConfigError, ProbeError, shown

_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def find_function(
    name: str,
    *,
    key: str,
    group: str,
    built_in: Iterable[str],
) -> Callable[..., Any]:
    """The function that `name` means: an entry point of `group`, else `module:function`, imported.

    `key` is the configuration key that holds the name; `built_in` are the names that the caller
    knows itself, as users write them (`jsonl:PATH`). Raises `ConfigError`, for an unknown name with
    the known ones and the nearest.
    """
    module_name, path, known = place_of(name, key=key, group=group, built_in=built_in)
    found = call(_import, module_name, named=name, key=key)
    if found is None:
        raise ConfigError(key, f"{name!r}: there is no module {module_name}", _choose(name, known))
    for part in filter(None, path.split(".")):
        found = call(getattr, found, part, None, named=name, key=key)
        if found is None:
            raise ConfigError(key, f"{name!r}: {module_name} has no {path}", _choose(name, known))
    if not callable(found):
        raise ConfigError(key, f"{name!r} is a {type(found).__name__}", "name a function")
    return found


def place_of(
    name: str, *, key: str, group: str, built_in: Iterable[str]
) -> tuple[str, str, list[str]]:
    """The module in which `name` stands, its path there, and the known names; nothing is imported."""
    entries = list(metadata.entry_points(group=group))
    values = sorted({entry.value for entry in entries if entry.name == name})
    if len(values) > 1:
        problem = f"{name!r} is registered as {' and as '.join(values)}"
        raise ConfigError(key, problem, "give one as module:function")
    known = [*built_in, *sorted({entry.name for entry in entries})]
    if not values and not _SPEC.fullmatch(name):
        raise ConfigError(key, f"{shown(name)} is not known", _choose(name, known))
    value = name
    if values:
        value = values[0].partition("[")[0].strip()  # an entry point may name extras in brackets
    module_name, _, path = value.partition(":")
    return module_name, path, known


def _import(module: str) -> Any | None:
    """The module, which may stand in the current folder; None where it or a package above it does not exist.

    What its own code raises goes on.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
    name, here = module.partition(".")[0], Path.cwd()
    if str(here) in sys.path or not ((here / f"{name}.py").is_file() or (here / name).is_dir()):
        return None
    sys.path.append(str(here))  # where `python -m` looks too, and pytest and console scripts do not
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None
        raise


def _choose(name: str, known: list[str]) -> str:
    head, _, tail = name.partition(":")
    near = difflib.get_close_matches(
        head, [k.partition(":")[0] for k in known], n=1, cutoff=0.4
    )  # gsm8k is near gsm8k_r1_template
    meant = ""
    if near:
        colon = ":" if tail and f"{near[0]}:PATH" in known else ""
        meant = f"did you mean `{near[0]}{colon}{tail if colon else ''}`? "
    return f"{meant}known are {', '.join(known)}, or module:function of an importable module"


def call(function: Callable[..., Any], *arguments: Any, named: str, key: str) -> Any:
    """`function(*arguments)`; what it raises becomes one `ConfigError`.

    A `ProbeError` is one line already.
    """
    try:
        return function(*arguments)
    except ProbeError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard exits on import
        problem = f"{named!r} raised {type(error).__name__}: {error}"
        raise ConfigError(key, problem[:400], "correct it, or name another") from error
