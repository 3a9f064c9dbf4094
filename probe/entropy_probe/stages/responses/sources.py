"""What a reward of the user's own is made of, by digest: its file, and the files of the user's that it imports.

Nothing is imported or run: files are found by their place, imports by reading them. A file that the function opens, a
server that it asks and a module that it imports by a computed name are not seen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

from entropy_probe.digests import file_digest
from entropy_probe.errors import ConfigError
from entropy_probe.stages.responses.rewards import GROUP, KEY, REWARDS
from entropy_probe.stages.responses.user_functions import place_of

_INSTALLED = frozenset({"site-packages", "dist-packages"})


def digests(reward: str) -> dict[str, str]:
    """Module → SHA-256 of its file; of an installed library, the date and size of its first file.

    The reward's own package counts file by file though it is installed. Raises `ConfigError` where there is no source.
    """
    first = place_of(reward, key=KEY, group=GROUP, built_in=REWARDS)[0]
    own, found = first.partition(".")[0], dict[str, str]()
    if _file(first) is None:
        problem = f"{reward!r} is code of your own without a source that can be read"
        raise ConfigError(KEY, problem, "name a function in a .py file")
    rest = [first]
    while rest:
        module = rest.pop()
        top = module.partition(".")[0]
        if module in found or top in sys.stdlib_module_names or top == "entropy_probe":
            continue
        path = _file(module)
        if path is None:  # of a namespace, in C, or a name inside of a module
            continue
        if top != own and not _INSTALLED.isdisjoint(path.parts):
            stat = (_file(top) or path).stat()
            found[top] = f"{stat.st_mtime_ns} {stat.st_size}"
            continue
        found[module] = file_digest(path)
        rest += _imported(module, path)
    return found


def _file(module: str) -> Path | None:
    """The .py file of a module, if it has one; packages above it are not imported."""
    top, *parts = module.split(".")
    for base in _bases(top):
        place = base.joinpath(*parts)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
    return None


def _bases(top: str) -> list[Path]:
    """Where the modules of a package are, and a module without its suffix; it may stand in the current folder."""
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return [Path.cwd() / top]
    folders = spec.submodule_search_locations
    return [Path(spec.origin or "").with_suffix("")] if folders is None else [*map(Path, folders)]


def _imported(module: str, path: Path) -> Iterator[str]:
    """The modules that a file imports, by their names from the top; names that may be modules or not among them."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        problem = f"{module} cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(KEY, problem, "correct it, or name another") from error
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            try:
                base = resolve_name(relative, package) if node.level else relative
            except ImportError:  # above the top: importing says so
                continue
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:  # a module's packages are imported before it
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))
