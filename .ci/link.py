"""`python link.py WHEEL SITE [MORE…]`: what the wheel requires, as links in SITE to the packages of this Python.

Nothing is installed a second time. Nothing is there that neither the wheel nor one of MORE asks for, so that what our
packages import without requiring it is missing. `pip check` compares the versions afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

from packaging.requirements import Requirement


def required_by(found: Distribution, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": e}) for e in ("", *extras)
        ):
            yield requirement


def closure(asked: Iterable[Requirement]) -> dict[str, Distribution]:
    """All that is required, directly or not, by name."""
    found: dict[str, Distribution] = {}
    seen, open_ = set(), list(asked)
    while open_:
        requirement = open_.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            found[key[0]] = distribution(requirement.name)
            open_ += required_by(found[key[0]], requirement.extras)
    return found


def link(found: Distribution, site: Path) -> None:
    """Every file or folder that the distribution has at the top."""
    for name in {
        file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")
    }:
        source, target = Path(str(found.locate_file(name))).resolve(), site / name
        if not target.is_symlink():
            target.symlink_to(source)


def main(wheel: str, site: str, *more: str) -> None:
    with ZipFile(wheel) as file:
        (info,) = {name.partition("/")[0] for name in file.namelist() if ".dist-info/" in name}
        asked = [*required_by(PathDistribution(ZipPath(file, f"{info}/"))), *map(Requirement, more)]
    for found in closure(asked).values():
        link(found, Path(site))


if __name__ == "__main__":
    main(*sys.argv[1:])
