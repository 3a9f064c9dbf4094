"""Long rows: nothing quadratic is held in any stage, and no number changes by how that is done."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from counted import Sizes
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe.cost import tensors
from entropy_probe.cost.sizes import Network
from entropy_probe.memory import LiveTensors, live_tensors
from entropy_probe.model import attention
from entropy_probe.model.forward import bind
from entropy_probe.stages.memory import pass_memory
from entropy_probe.stages.memory.pass_memory import Passes, longest_rows
from entropy_probe.stages.responses.rollouts_file import read_rollouts

CPU = torch.device("cpu")
LENGTHS = (512, 1024, 2048)
STAGES = ("_score", "_score_at", "_differentiate", "_differentiate_alone", "_derive", "_alpha", "_twice")
FLOAT64 = {name: {"dtype": "float64"} for name in ("func_override", "tf_nograd", "tf_withgrad")}


def passes(folder: Path, length: int) -> Passes:
    """Every kind of pass over rows of `length` tokens on a model of four layers, two heads each."""
    return made(folder, Sizes(32, 64, layers=4, vocabulary=128, heads=2, prompt=16, response=length - 16))


def made(folder: Path, sizes: Sizes) -> Passes:
    model = load_checkpoint(sizes.checkpoint(folder)).model
    bound, float64 = bind(model), bind(model, torch.float64)
    rollouts = read_rollouts(sizes.rollouts(folder / "e.jsonl", 2, 1), bound, None)
    for model in (bound, float64):
        assert model.num_logits == sizes.vocabulary  # tries the output layer, which is no part of a pass
    return Passes(bound, float64, longest_rows((rollouts,)), ProbeConfig())


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], LiveTensors]:
    """Of one row, a pass of each kind. The model has two heads, where a real one has eight or more: so many scores make
    a row of 512 tokens a long one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONG", 2 * min(LENGTHS) ** 2)
        patch.setattr(attention, "_AT_ONCE", 1 << 18)
        found = {}
        for length in LENGTHS:
            of = passes(tmp_path_factory.mktemp("long"), length)
            for stage in STAGES:
                work = getattr(pass_memory, stage)
                found[stage, length] = live_tensors(lambda w=work, p=of: w(p, torch.arange(1)), CPU)
        return found


@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_linear_in_the_length(counted: dict[tuple[str, int], LiveTensors], stage: str) -> None:
    for length in LENGTHS[:-1]:
        short, long = counted[stage, length], counted[stage, 2 * length]
        assert long.most <= 2.2 * short.most
        assert long.largest <= 2.2 * short.largest


@pytest.mark.parametrize("stage", ["_derive", "_alpha", "_differentiate_alone"])
def test_without_blocks_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The counter sees what the test above would have to see."""
    monkeypatch.setattr(attention, "LONG", 2**60)
    work, one = getattr(pass_memory, stage), torch.arange(1)
    few, many = (passes(tmp_path / str(length), length) for length in LENGTHS[:2])
    short, long = (live_tensors(lambda: work(few, one), CPU), live_tensors(lambda: work(many, one), CPU))
    assert long.largest > 3.5 * short.largest
    assert long.most > 2.5 * short.most


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for key, inner in enumerate(value) for k, v in numbers(inner, f"{path}.{key}").items()}
    return {path: value}


# What of a report is no estimate, but a time, or what rounding leaves: differences of two ways that are both right,
# SEs and shares of such.
OF_ROUNDING = (
    ".timing", ".memory", ".environment", ".config", ".continuity", ".invariance", ".witness", ".integrity", ".cache",
    ".real_step", ".preconditioner",
)  # fmt: skip


def test_every_number_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, whole report by field: blocks of three queries, and layers run again, against today's way."""
    sizes = Sizes(prompt=6, response=10)
    checkpoint, files, reports = sizes.checkpoint(tmp_path), sizes.files(tmp_path / "files"), {}
    for way, blocks, again in (
        ("as before", False, "never"),
        ("again", False, "always"),
        ("both", True, "always"),
    ):
        with monkeypatch.context() as patch:
            if blocks:
                for name, value in (("LONG", 0), ("_AT_ONCE", 0), ("_FEWEST", 3)):
                    patch.setattr(attention, name, value)
            given = {"precision": FLOAT64, "invariance": {"max_examples": 1}, "recompute": again}
            report = run_probe(checkpoint, ProbeConfig.from_mapping(given), *files)
        assert report.memory.attention == ("blocks" if blocks else "short")
        assert report.memory.recompute is (again == "always")
        reports[way] = {
            k: v for k, v in numbers(report.model_dump(mode="json")).items() if not k.startswith(OF_ROUNDING)
        }
    before = reports["as before"]
    assert len(before) > 300
    beside = re.compile(r"\.update\.(slope_of_v0|slope_by_unit|spread_over_batches)_per_token")
    for name, value in before.items():  # bit for bit; X per token shares a forward where layers are not run again
        assert reports["again"][name] == (pytest.approx(value, rel=1e-13) if beside.match(name) else value), name
    assert reports["again"].keys() == before.keys()
    assert reports["both"].keys() == before.keys()
    off = {k: (v, reports["both"][k]) for k, v in before.items() if not close(v, reports["both"][k])}
    assert off == {}


def close(one: Any, other: Any) -> bool:
    """To 1e-9, of numbers of size 1e-7 or more: a smaller one is a difference whose terms are that large."""
    if isinstance(one, bool) or not isinstance(one, int | float):
        return one == other
    return bool(other == pytest.approx(one, rel=1e-9, abs=1e-16, nan_ok=True))


# h, f, layers, heads, tokens of a row; few logits, so that activations are most of it
SMALL = ((128, 384, 3, 4, 256), (192, 512, 4, 4, 192), (128, 512, 2, 8, 320))
FORMULAS = {
    "_score": (tensors.FORWARD, 4, False),
    "_differentiate": (tensors.CAPTURE, 4, False),
    "_differentiate again": (tensors.CAPTURE, 4, True),
    "_differentiate_alone": (tensors.LOOP, 4, False),
    "_differentiate_alone again": (tensors.LOOP, 4, True),
    "_derive": (tensors.JVP, 8, False),
    "_alpha": (tensors.ALPHA, 4, False),
    "_twice": (tensors.SECOND, 8, False),
}


@pytest.fixture(scope="module")
def ratios(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """predicted/counted of one row's pass, every row a long one, in blocks."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LONG", 0), ("_AT_ONCE", 1 << 16)):
            patch.setattr(attention, name, value)
        for place, (h, f, layers, heads, length) in enumerate(SMALL):
            sizes = Sizes(h, f, layers, 32, heads=heads, prompt=length - 8, response=8)
            of = made(tmp_path_factory.mktemp("formulas"), sizes)
            network = Network.of(of.bound.module)
            for name, (kept, bytes_of, again) in FORMULAS.items():
                one = replace(of, bound=replace(of.bound, recompute=again))
                work = getattr(pass_memory, name.partition(" ")[0])
                counted = live_tensors(lambda w=work, p=one: w(p, torch.arange(1)), CPU).most
                found[name, place] = bytes_of * kept.numbers(network, 1, length, again=again) / counted
    return found


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_long_rows(ratios: dict[tuple[str, int], float], name: str) -> None:
    assert [ratios[name, place] for place in range(len(SMALL))] == pytest.approx([1.0] * len(SMALL), rel=0.15)
