"""Races: ours is timed by pytest-benchmark, and before each of its rounds every other way has its turn.

A machine that slows down then slows all of them. On a CPU one thread, and processor time, which a busy machine disturbs
less than wall time; on a GPU (`--device=cuda`) wall time of finished kernels. With `--results=FILE` every result is
written as soon as it is there, in place of an older one of the same benchmark, with its day, the machine and its load;
the terminal shows them as one table.
`--tiny` makes models and texts so small that every benchmark runs in a moment: tests/test_benchmarks.py.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import subjects
import torch
import transformers

from entropy_probe.memory import live_tensors

Way = Callable[[], Any]
_RACES = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the models are")
    parser.addoption("--results", type=Path, help="the file of results to write into")
    parser.addoption("--tiny", action="store_true", help="that everything runs, and not how fast")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RACES] = []
    subjects.TINY = config.getoption("--tiny")
    if config.getoption("--device") == "cpu":
        torch.set_num_threads(1)
        config.option.benchmark_timer = "time.process_time"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--tiny` one case of each benchmark."""
    if subjects.TINY:
        first = {str(item.originalname): item for item in reversed(items)}  # pyright: ignore[reportAttributeAccessIssue]
        items[:] = [item for item in items if item in first.values()]


def _machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; not the machine's name."""
    cuda = device.type == "cuda"
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@pytest.fixture
def keep(request: pytest.FixtureRequest, device: torch.device) -> Callable[[dict[str, Any]], None]:
    """Write a result into the file of results, where one was given."""
    path: Path | None = request.config.getoption("--results")
    load = os.getloadavg()[0]

    def write(found: dict[str, Any]) -> None:
        name = request.node.name.removeprefix("test_")
        if path is None:
            return
        results = json.loads(path.read_text()) if path.exists() else {}
        day = str(datetime.datetime.now(datetime.UTC).date())
        beside = {"day": day, "load": [load, os.getloadavg()[0]], "machine": _machine(device)}
        results[name] = {**beside, **found}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        part.replace(path)

    return write


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def race(
    benchmark: Any,
    device: torch.device,
    request: pytest.FixtureRequest,
    keep: Callable[[dict[str, Any]], None],
) -> Callable[..., dict[str, float]]:
    """`race(ours, others, ...)` → ratio of each other way's median time to ours."""

    def timed(way: Way) -> float:
        start = time.process_time() if device.type == "cpu" else time.perf_counter()
        _finished(way, device)
        return (time.process_time() if device.type == "cpu" else time.perf_counter()) - start

    def run(
        ours: Way,
        others: Mapping[str, Way],
        *,
        rounds: int = 5,
        warm: bool = False,
        once: tuple[str, ...] = (),
        times: Mapping[str, float] | None = None,
        quality: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
        memory: bool = False,
    ) -> dict[str, float]:
        """`once`: ways too slow for more than one round, which the caller has warmed up. `times`: ways that did a part
        of the work, and how many times it is the whole. `warm`: every way has run before. `quality`: how good ours is,
        measured by the caller. `targets`: the ratios asked for. `spread` in the result is the fastest and the slowest
        round over the median, and `load` how many processes wanted to run in the minute before, and at the end."""
        rounds = 1 if subjects.TINY else rounds
        taken: dict[str, list[float]] = {name: [] for name in others}

        def turns() -> None:
            for name, way in others.items():
                if name not in once or not taken[name]:
                    taken[name].append(timed(way))

        benchmark.pedantic(
            lambda: _finished(ours, device),
            setup=turns,
            rounds=rounds,
            warmup_rounds=0 if warm else 1,
        )
        scale = times or {}
        kept = {name: all_of if warm else all_of[1:] or all_of for name, all_of in taken.items()}
        seconds = {
            name: statistics.median(all_of) * scale.get(name, 1.0) for name, all_of in kept.items()
        }
        kept["ours"] = list(benchmark.stats.stats.data)
        own = benchmark.stats.stats.median
        ratios = {name: other / own for name, other in seconds.items()}
        found: dict[str, Any] = {
            "seconds": {"ours": own, **seconds},
            "ratios": ratios,
            "spread": {
                name: [min(of) / statistics.median(of), max(of) / statistics.median(of)]
                for name, of in kept.items()
            },
            "rounds": {name: len(of) for name, of in kept.items()},
            "quality": dict(quality or {}),
            "targets": dict(targets or {}),
        }
        if memory:
            found["bytes"] = {
                name: _peak(way, device) for name, way in {"ours": ours, **others}.items()
            }
        keep(found)
        request.config.stash[_RACES].append((request.node.name.removeprefix("test_"), found))
        return ratios

    return run


def _finished(way: Way, device: torch.device) -> Any:
    result = way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


def _peak(way: Way, device: torch.device) -> int:
    """Counted tensors: a resident peak is 0 after a larger one in the same process."""
    return live_tensors(lambda: _finished(way, device), device).most


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Every way: its median, its ratio to ours, its memory; then quality and targets."""
    for title, found in config.stash[_RACES]:
        terminalreporter.write_line(f"\n{title}")
        for name, seconds in found["seconds"].items():
            of_memory = found.get("bytes", {}).get(name)
            megabytes = f"{of_memory / 1e6:9.0f} MB" if of_memory is not None else ""
            ratio = found["ratios"].get(name)
            terminalreporter.write_line(
                f"  {name:<24}{1000 * seconds:10.1f} ms{f'{ratio:8.2f} of ours' if ratio else ' ' * 16}{megabytes}"
            )
        for name, target in found["targets"].items():
            terminalreporter.write_line(
                f"  target: {name} at {target:.2f} of ours; got {found['ratios'][name]:.2f}"
            )
        for name, value in found["quality"].items():
            terminalreporter.write_line(f"  {name}: {value:.2g}")
