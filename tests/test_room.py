"""Full fine-tunes that fit: vectors made where they are used and gradients on disk change no number, and hold less."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from counted import SMOKE, Counted, Sizes, count
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.cost.tensors import peaks
from entropy_probe.errors import MeasurementError
from entropy_probe.model import disk
from entropy_probe.model.forward import bind
from entropy_probe.stages import made
from entropy_probe.stages.gradients import units
from entropy_probe.stages.gradients.units import Rows
from entropy_probe.stages.made import Made, held_or_made

FULL = Sizes(layers=3, vocabulary=2048, lora=False, e=3, u=2)


def numbers(report: ProbeReport) -> dict[str, Any]:
    return report.model_dump(mode="json", exclude={"timing", "memory", "checkpoint"})


def test_made_is_the_mapping() -> None:
    asked: list[str] = []

    def make(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((2,), float(len(name)))

    whole = Made(["a", "bb"], make)
    assert asked == []
    assert [float(t[0]) for t in whole.values()] == [1.0, 2.0]
    assert (list(whole), len(whole), "a" in whole, "c" in whole) == (["a", "bb"], 2, True, False)
    assert asked == ["a", "bb", "a"]
    with pytest.raises(KeyError):
        whole["c"]
    assert isinstance(held_or_made({"a": (made.FEW,)}, make), dict)
    assert isinstance(held_or_made({"a": (made.FEW + 1,)}, make), Made)


def test_zeros_on_disk(tmp_path: Path) -> None:
    rows = disk.zeros((3, 5), torch.float64, tmp_path)
    assert torch.equal(rows, torch.zeros(3, 5, dtype=torch.float64))
    rows[1] += 2.0
    rows.mul_(3.0)
    assert rows.sum() == 30.0
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert disk.zeros((0, 5), torch.float32, tmp_path).shape == (0, 5)
    with pytest.raises(OSError, match="No such file"):
        disk.zeros((3, 5), torch.float64, tmp_path / "nowhere")
    with pytest.raises(OSError, match="No space left"):  # all room is reserved at once
        disk.zeros((shutil.disk_usage(tmp_path).free, 2), torch.float64, tmp_path)


def on_disk(patch: pytest.MonkeyPatch) -> list[int]:
    """Hardly any memory is free; what is made on disk is noted."""
    noted, zeros = [], disk.zeros
    patch.setattr(units, "available_bytes", lambda device: 1000)
    patch.setattr(disk, "zeros", lambda shape, *of: noted.append(shape[0]) or zeros(shape, *of))
    return noted


@pytest.fixture(scope="module")
def three_ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A full fine-tune with every witness: held in memory; made where it is used; and with gradients on disk."""
    folder, scratch = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("scratch")
    checkpoint, files = FULL.checkpoint(folder), FULL.files(folder / "files")
    given = {
        "invariance": {"max_examples": 1},
        "first_order": {"max_gradient_gib": 1e-3},
    }
    found: dict[str, Any] = {}
    for way in ("held", "made", "on disk"):
        with pytest.MonkeyPatch.context() as patch:
            if way == "made":
                patch.setattr(made, "FEW", 0)
            noted = on_disk(patch) if way == "on disk" else []
            more = {"offload_folder": str(scratch)} if way == "on disk" else {}
            found[way] = run_probe(checkpoint, ProbeConfig.from_mapping(given | more), *files)
            found[f"{way}, noted"] = noted
    return found


@pytest.mark.parametrize("way", ["made", "on disk"])
def test_no_number_changes(three_ways: dict[str, Any], way: str) -> None:
    """Bit for bit, in the whole report."""
    held, other = (numbers(three_ways[which]) for which in ("held", way))
    for report in (held, other):
        report["config"]["offload_folder"] = None
    assert held == other
    assert three_ways["held"].first_order.mode == "block"
    assert three_ways["held"].real_step is not None


def test_gradients_stood_on_disk(three_ways: dict[str, Any]) -> None:
    """X and Y of U, X of E, X per token, and the witness's X and Y: of every tensor."""
    tensors = three_ways["held"].registry.num_tensors
    rows = three_ways["on disk, noted"]
    assert len(rows) == 6 * tensors
    assert sum(rows) == (5 * 2 + 1) * tensors
    assert three_ways["held, noted"] == []


def test_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither memory nor disk: said before anything is scored, with both sizes and the remedy."""
    bound = bind(load_checkpoint(models.full_checkpoint(tmp_path / "full", "llama")).model)
    config = ProbeConfig.from_mapping({"first_order": {"max_gradient_gib": 1e-9}, "offload_folder": str(tmp_path)})
    needed = units.bytes_of_units(bound, 2)
    assert not Rows.of(bound, 2, config).on_disk  # half of what is free is enough
    monkeypatch.setattr(units, "available_bytes", lambda device: 2 * needed - 2)
    where = Rows.of(bound, 2, config)
    assert where == Rows(True, tmp_path)
    where.require_room(needed)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    said = rf"offload_folder {re.escape(str(tmp_path))}: has .* GiB left, gradients of the units take .*; give a folder"
    with pytest.raises(MeasurementError, match=said):
        where.require_room(needed)
    monkeypatch.undo()
    with pytest.raises(MeasurementError, match=r"cannot be used .*; give a folder on a disk with more room"):
        Rows(True, tmp_path / "nowhere").require_room(1)
    with pytest.raises(MeasurementError, match=r"cannot hold .* GiB more of gradients"):
        Rows(True, tmp_path / "nowhere").zeros(1, 1, torch.float32)
    Rows().require_room(2**60)


STANDARD = {"invariance": {"max_examples": 1}}
WAYS = {
    "held": (replace(FULL, e=2), SMOKE),
    "made": (replace(FULL, e=2), SMOKE),
    "made, all parts": (Sizes(128, 384, 3, 512, lora=False, e=2, u=2, response=12), STANDARD),
    "made, one batch": (Sizes(96, 256, 4, 1024, lora=False, e=3, u=None, response=12), SMOKE),
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, float], Counted]]:
    """What the formulas say, and what is counted, stage by stage."""
    found = {}
    for way, (sizes, given) in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made, "FEW", made.FEW if way == "held" else 0)
            counted = count(tmp_path_factory.mktemp("counts"), sizes, given)
            found[way] = peaks(counted.network, counted.run), counted
    return found


@pytest.mark.parametrize("way", WAYS)
def test_bytes_held(counts: dict[str, tuple[dict[str, float], Counted]], way: str) -> None:
    predicted, counted = counts[way]
    ratios = {stage: predicted[stage] / of for stage, of in counted.peaks.items() if stage in predicted}
    assert len(ratios) >= 9
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), rel=0.15)


def test_less_is_held(counts: dict[str, tuple[dict[str, float], Counted]]) -> None:
    """Of Ȳ, P, v₀ and D, 32 bytes for each parameter, nothing is held where they are used."""
    (_, held), (_, less) = (counts[way] for way in ("held", "made"))
    for stage in ("update", "slopes", "entropy change"):
        saved = (held.peaks[stage] - less.peaks[stage]) / held.network.trainable
        # where D is made it is one tensor at a time, which in this model is a third of all
        assert saved >= (0.95 * 32 if stage == "entropy change" else 20)
