"""What the installed plugin costs a run that does not use it.

    python benchmarks/plugin_startup.py [pairs]

`pytest --co` in an empty folder, with the plugin and without it (`-p no:entropy_probe`), taken in turn, so that a
machine that slows down slows both; processor time, which a busy machine disturbs less than wall time; without other
plugins, whose start-up would drown the difference. Then the import alone, in an interpreter that has pytest already.
The target is 20 ms.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile

IMPORT = """
import time, pytest, _pytest.config
start = time.perf_counter()
import pytest_entropy_probe.plugin, pytest_entropy_probe.fixtures
print(1000 * (time.perf_counter() - start))
"""
TARGET_MS = 20.0
OTHERS = ("anyio", "benchmark", "hypothesispytest", "jaxtyping", "xdist", "xdist.looponfail")


def collect_ms(folder: str, *args: str) -> float:
    """Processor time of one `pytest --co` in `folder`, in milliseconds."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    blocked = [f"-pno:{name}" for name in OTHERS]
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-pno:cacheprovider", *blocked, *args]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)  # noqa: S603
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)


def import_ms() -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)  # noqa: S603
    return float(done.stdout)


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        collect_ms(folder)  # fills the caches
        both = [(collect_ms(folder, "-pno:entropy_probe"), collect_ms(folder)) for _ in range(pairs)]
    without, with_plugin = (statistics.median(column) for column in zip(*both, strict=True))
    difference = statistics.median(b - a for a, b in both)
    print(f"pytest --co, median of {pairs} pairs")
    print(f"  without the plugin  {without:8.1f} ms")
    print(f"  with the plugin     {with_plugin:8.1f} ms   x{with_plugin / without:.3f}")
    print(f"  difference          {difference:8.1f} ms   target < {TARGET_MS:.0f} ms")
    print(f"import after pytest   {statistics.median(import_ms() for _ in range(7)):8.1f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
