"""The benchmark family: pytest-benchmark, with its own options and files, on a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.subject import Subject


def withheld_because(config: pytest.Config) -> str:
    """Why the family takes no part in this run, and what would change that.

    Empty where it does: -m names it, or --benchmark-only is given.
    """
    named = re.search(r"\bbenchmark\b", str(config.getoption("markexpr", "") or ""))
    if not named and not config.getoption("benchmark_only", False):
        return "benchmarks run only when asked for; give -m benchmark or --benchmark-only"
    if not config.pluginmanager.hasplugin("benchmark"):
        return "pytest-benchmark is off; leave -p no:benchmark out"
    return ""


def leave_no_empty_folder(config: pytest.Config) -> None:
    """pytest-benchmark makes its storage in every run: remove it after one that stored nothing there."""
    folder = config.invocation_params.dir / ".benchmarks"
    if not folder.exists() and not hasattr(config, "workerinput"):

        def remove() -> None:
            with suppress(OSError):  # it holds something, or is not there
                folder.rmdir()

        config.add_cleanup(remove)


@pytest.fixture
def _probe_benchmark(_probe_subject: Subject, benchmark: Any) -> Callable[[str], None]:
    """A callable that times a stage on the checkpoint; `extra_info` has its tokens a second."""

    def run(stage: str) -> None:
        __tracebackhide__ = True
        prepared = _probe_subject.prepared
        with warnings_are_not_errors():
            from entropy_probe.workloads import workload

            with workload(prepared, stage) as work:
                work.call()  # warms up
                benchmark(work.call)
        if benchmark.stats is not None:  # --benchmark-disable
            benchmark.extra_info["tokens"] = work.tokens
            median = benchmark.stats.stats.median
            benchmark.extra_info["tokens_per_second"] = work.tokens / median

    return run
