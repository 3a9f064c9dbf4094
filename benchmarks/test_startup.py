"""What the installed plugin costs a run that does not use it: at most 20 ms of processor time.

`pytest --co` in an empty folder, with the plugin and without it (`-p no:entropy_probe`), without
other plugins, whose start-up would drown the difference. Once with our bytecode, as after a first
run; once without, as where we are installed in a folder that cannot be written to. Which modules
are imported is counted in tests/plugin/test_inert.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import subjects

import pytest_entropy_probe

OTHERS = ("anyio", "benchmark", "hypothesispytest", "jaxtyping", "xdist", "xdist.looponfail")
PAIRS, TARGET_MS = 20, 20.0


@pytest.fixture(params=["bytecode", "no bytecode"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
    if request.param == "bytecode":
        return kept
    ours = Path(pytest_entropy_probe.__file__).parent
    shutil.copytree(ours, tmp_path / ours.name, ignore=shutil.ignore_patterns("__pycache__"))
    return kept | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path)}


def children() -> float:
    """Processor time of the children that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.benchmark(timer=children)
def test_startup(
    benchmark: Any,
    keep: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    blocked = [f"-pno:{name}" for name in OTHERS]
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-pno:cacheprovider", *blocked]
    without: list[float] = []

    def collect(*args: str) -> None:
        subprocess.run(  # noqa: S603
            [*command, *args], cwd=tmp_path, env=environment, capture_output=True, check=False
        )

    def turn() -> None:
        start = children()
        collect("-pno:entropy_probe")
        without.append(children() - start)

    benchmark.pedantic(collect, setup=turn, rounds=1 if subjects.TINY else PAIRS, warmup_rounds=1)
    taken = list(benchmark.stats.stats.data)
    differences = [a - b for a, b in zip(taken, without[1:], strict=True)]
    more = 1000 * statistics.median(differences)
    keep({"milliseconds": {"more": more, "target": TARGET_MS}, "rounds": {"pairs": len(taken)}})
    print(f"the plugin adds {more:.1f} ms to pytest --co; target {TARGET_MS:.0f}")
