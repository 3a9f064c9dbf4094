"""Scores do not depend on padding, neighbours or pieces; where something makes them depend on one, that one is red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.output_layer import OutputLayer
from entropy_probe.report import WorstCase
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import batches_by_length, score_rows
from entropy_probe.stages.witnesses import invariance

CONFIG = ProbeConfig()
PROPERTIES: dict[str, Callable[[BoundModel, Rollouts], WorstCase]] = {
    "padding": lambda bound, rollouts: invariance.padding(bound, rollouts, CONFIG),
    "batch": lambda bound, rollouts: invariance.batch(bound, rollouts, CONFIG),
    "chunk": lambda bound, rollouts: invariance.chunk(bound, rollouts, CONFIG),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.random_rollouts(tmp_path_factory.mktemp("rollouts") / "r.jsonl", prompts=5, responses=3, seed=3)


def red(model: Any, file: Path, dtype: torch.dtype = torch.float64) -> set[str]:
    bound = bind(model, dtype)
    rollouts = read_rollouts(file, bound, None)
    with torch.no_grad():
        return {name for name, measure in PROPERTIES.items() if measure(bound, rollouts).share > 1.0}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", list(models.CONFIGS))
def test_every_architecture_is_within_rounding(architecture: str, lora: bool, file: Path) -> None:
    """float64 to 1e-12, which is above the bound; float32 within the bound, and by more than nothing."""
    model = models.tiny_model(architecture)
    model = models.add_adapter(model, architecture) if lora else model
    for dtype in (torch.float64, torch.float32):
        bound = bind(model, dtype)
        rollouts = read_rollouts(file, bound, None)
        for name, measure in PROPERTIES.items():
            with torch.no_grad():
                found = measure(bound, rollouts)
            assert found.share < 0.25, (name, found)
            assert dtype is torch.float32 or found.bound < 1e-12
            assert dtype is torch.float64 or 0 < found.bound < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_scores_do_not_depend_on_the_batch_size(dtype: torch.dtype, top_p: float, file: Path) -> None:
    """1e-12 in float64; in float32 16 roundings of numbers up to 20."""
    bound = bind(models.tiny_model("qwen3"), dtype)
    rollouts = read_rollouts(file, bound, None)
    config = ProbeConfig.from_mapping({"generation": {"top_p": top_p}})
    tolerance = 1e-12 if dtype is torch.float64 else 16 * 20 * torch.finfo(dtype).eps
    with torch.no_grad():
        alone = [score_rows(bound, rollouts, torch.tensor([row]), config) for row in range(len(rollouts.ids))]
        assert top_p == 1.0 or any(torch.isneginf(scored.logq).any() for scored in alone)
        for size in (4, 15):
            for rows in batches_by_length(rollouts, size):
                together = score_rows(bound, rollouts, rows, config)
                for field in ("logp", "logq", "entropy", "entropy_q"):
                    for i, row in enumerate(rows.tolist()):
                        expected = getattr(alone[row], field)[0]
                        got = getattr(together, field)[i, : len(expected)]
                        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_touch_each_other(file: Path, dtype: torch.dtype) -> None:
    model: Any = models.tiny_model("llama")
    amount = 1e-9 if dtype is torch.float64 else 1e-3
    model.model.norm.register_forward_hook(lambda module, args, out: out + amount * out.mean(0, keepdim=True))
    assert {"batch"} <= red(model, file, dtype) <= {"batch", "padding", "chunk"}


def test_output_layer_that_mixes_positions(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OutputLayer.__call__
    monkeypatch.setattr(OutputLayer, "__call__", lambda *a: original(*a) + 1e-9 * original(*a).cumsum(0))
    assert {"chunk"} <= red(models.tiny_model("llama"), file)


def test_scores_of_the_wrong_position(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BoundModel.read_logits

    def shifted(self: BoundModel, ids: Any, rows: Any, columns: Any, *a: Any, **k: Any) -> Any:
        return original(self, ids, rows, (columns - 1).clamp(min=0), *a, **k)

    monkeypatch.setattr(BoundModel, "read_logits", shifted)
    assert {"chunk"} <= red(models.tiny_model("gpt2"), file)


def test_the_nearest_to_its_bound_is_reported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two dtypes the worse one; NaN is the worst of all."""
    bound = bind(models.tiny_model("llama"))
    float64 = bind(bound.module, torch.float64)
    rollouts = read_rollouts(file, bound, None)
    measured = invariance.invariance(bound, float64, rollouts, CONFIG)
    with torch.no_grad():
        both = [invariance.padding(m, rollouts, CONFIG) for m in (bound, float64)]
    assert measured.padding == max(both, key=lambda w: w.share)
    with torch.no_grad():
        next(bound.module.parameters())[rollouts.ids[0, 0]] = torch.nan
    assert "float32" in invariance.invariance(bound, float64, rollouts, CONFIG).batch.example
