"""What the installed plugin costs a run that does not use it.

`pytest --co` in an empty folder, with the plugin and without it (`-p no:entropy_probe`), without other plugins, whose
start-up would drown the difference; processor time of the child. The target is 20 ms.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OTHERS = ("anyio", "benchmark", "hypothesispytest", "jaxtyping", "xdist", "xdist.looponfail")
PAIRS, TARGET_MS = 15, 20.0


def collect(folder: Path, *args: str) -> None:
    blocked = [f"-pno:{name}" for name in OTHERS]
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-pno:cacheprovider", *blocked, *args]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)  # noqa: S603


def children() -> float:
    """Processor time of the children that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.benchmark(timer=children)
def test_startup(benchmark: Any, tmp_path: Path) -> None:
    without: list[float] = []

    def turn() -> None:
        start = children()
        collect(tmp_path, "-pno:entropy_probe")
        without.append(children() - start)

    benchmark.pedantic(lambda: collect(tmp_path), setup=turn, rounds=PAIRS, warmup_rounds=1)
    taken = list(benchmark.stats.stats.data)
    difference = 1000 * statistics.median(a - b for a, b in zip(taken, without[1:], strict=True))
    benchmark.extra_info.update({"milliseconds more": difference, "target": TARGET_MS})
    print(f"the plugin adds {difference:.1f} ms to pytest --co; target {TARGET_MS:.0f}")
