"""No file imports another that imports it in turn, imports inside functions included."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

PACKAGES = ("entropy_probe", "entropy_probe_checks", "pytest_entropy_probe")


def circle(*packages: str) -> list[str]:
    """Files that import one another in this order; empty where there is no circle.

    What is imported for type checkers alone does not count.
    """
    graph = grimp.build_graph(*packages, exclude_type_checking_imports=True, cache_dir=None)
    imported = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_there_is_no_circle() -> None:
    assert circle(*PACKAGES) == []


@pytest.mark.parametrize("back", ["    from ringed import one", "    from ringed.one import f"])
def test_a_circle_through_a_function_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str) -> None:
    package = tmp_path / "ringed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from ringed import two\nf = two\n")
    (package / "two.py").write_text(f"def late():\n{back}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = circle("ringed")
    assert set(found) == {"ringed.one", "ringed.two"}
    (package / "two.py").write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n{back}\n")
    assert circle("ringed") == []
