"""The benchmark family, through pytest-benchmark as a user runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import forked

SMALL = "batch: {num_prompts: 4, num_update_prompts: 4}\ngeneration: {num_return_sequences: 2, max_new_tokens: 6}\n"
QUICK = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.01")
ON = "-pno:anyio -pno:hypothesispytest -pno:jaxtyping"


def _run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "small.yaml").write_text(SMALL)
    demo = ("--probe-checkpoint=demo", "--probe-config=small.yaml")
    return forked.python("-m", "pytest", *demo, *args, cwd=folder)


def test_throughput_is_saved_and_gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved with tokens a second; against a run that was a thousand times as fast, --benchmark-compare-fail is red."""
    monkeypatch.setenv("PYTEST_ADDOPTS", ON)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would measure nothing
    done = _run(tmp_path, "-m", "benchmark", "--benchmark-save=first", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert "= entropy probe =" not in done.stdout  # nothing was judged
    (saved,) = tmp_path.rglob("*_first.json")
    content = json.loads(saved.read_text())
    by_name = {one["name"]: one for one in content["benchmarks"]}
    assert set(by_name) == {"test_scoring[demo]", "test_gradients[demo]", "test_sweep[demo]"}
    for one in by_name.values():
        assert 0 < one["extra_info"]["tokens"] <= 4 * 2 * 6
        per_second = one["extra_info"]["tokens"] / one["stats"]["median"]
        assert one["extra_info"]["tokens_per_second"] == pytest.approx(per_second)
        one["stats"]["median"] /= 1000
    saved.write_text(json.dumps(content))
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:100%")
    slower = _run(tmp_path, "--benchmark-only", *gate, *QUICK)
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_without_pytest_benchmark_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", f"{ON} -pno:benchmark")
    done = _run(tmp_path, "-m", "benchmark")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "pytest-benchmark is off; leave -p no:benchmark out" in done.stdout
