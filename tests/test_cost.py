"""The formulas of cost against what is counted: flops, live tensors and bytes sent, each within 25 %."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import counted
from counted import SIZES, SMOKE, Counted, Counter, Sizes, count
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint
from entropy_probe.cost import computation, tensors
from entropy_probe.cost.computation import FORWARD, GROWING, flops
from entropy_probe.cost.sizes import Batch, Network
from entropy_probe.cost.tensors import peaks
from entropy_probe.cost.traffic import sent
from entropy_probe.model.forward import bind
from entropy_probe.stages.sampling import sample

TOLERANCE = 0.25
STANDARD = {"invariance": {"max_examples": 2}}
BLOCKS = SMOKE | {"first_order": {"estimator": "rb", "mode": "block", "num_blocks": 2}}
RUNS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "all parts": (SIZES["small"], STANDARD),
    "full": (SIZES["full"], SMOKE | {"true_delta_h": {"normalize": "per_token"}}),
    "wide": (SIZES["wide"], SMOKE),
    "long": (SIZES["long"], SMOKE),
    "blocks": (Sizes(e=4, u=4), BLOCKS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    return {name: count(tmp_path_factory.mktemp("cost"), *of) for name, of in RUNS.items()}


def outside(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """predicted/measured of the stages where the two are not within the tolerance; what is 0 must be."""
    ratios = {stage: predicted[stage] / of if of else 1.0 + predicted[stage] for stage, of in measured.items()}
    return {stage: ratio for stage, ratio in ratios.items() if not abs(ratio - 1) <= TOLERANCE}


def of_matrices(counts: Mapping[str, int]) -> dict[str, int]:
    """Without the update, whose only products compare a few thousand entries with Adam's moments."""
    return {stage: of for stage, of in counts.items() if stage != "update"}


@pytest.mark.parametrize("name", RUNS)
def test_flops(runs: dict[str, Counted], name: str) -> None:
    run = runs[name]
    predicted, measured = flops(run.network, run.run), run.flops
    assert outside(predicted, of_matrices(measured)) == {}
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), rel=TOLERANCE)
    assert set(predicted) == set(measured) | ({"real step"} if "real step" in run.run.left_out else set())


@pytest.mark.parametrize("name", RUNS)
def test_bytes_held(runs: dict[str, Counted], name: str) -> None:
    run = runs[name]
    predicted = peaks(run.network, run.run)
    assert outside(predicted, {stage: of for stage, of in run.peaks.items() if stage in predicted}) == {}


def test_resident_size(runs: dict[str, Counted]) -> None:
    """The stages of the report's `memory` are those of the formulas: a renamed one would not be compared."""
    memory = runs["all parts"].report.memory
    assert memory is not None
    if memory.stages:
        assert set(peaks(runs["all parts"].network, runs["all parts"].run)) <= set(memory.stages)


def test_what_grows_with_the_batch(runs: dict[str, Counted]) -> None:
    run = runs["wide"]
    few, many = (
        flops(run.network, replace(run.run, e=replace(run.run.e, prompts=n), u=replace(run.run.update, prompts=n)))
        for n in (32, 64)
    )
    ratios = {stage: many[stage] / of for stage, of in few.items() if of}
    assert {stage for stage, ratio in ratios.items() if ratio > 1.5} == set(GROWING) - {"rollouts"}


@pytest.mark.parametrize(
    ("kind", "wrong", "stage"),
    [("JVP", FORWARD, "slopes"), ("LOOP", FORWARD, "witnesses")],
)
def test_a_wrong_pass_is_outside(
    runs: dict[str, Counted], monkeypatch: pytest.MonkeyPatch, kind: str, wrong: Any, stage: str
) -> None:
    monkeypatch.setattr(computation, kind, wrong)
    found = [outside(flops(run.network, run.run), of_matrices(run.flops)) for run in runs.values()]
    assert any(stage in of for of in found)


@pytest.mark.parametrize("name", ["prompts", "group", "response"])
def test_a_wrong_exponent_is_outside(runs: dict[str, Counted], name: str) -> None:
    run = runs["wide"]
    squared = replace(run.run.e, **{name: getattr(run.run.e, name) ** 2})
    found = outside(flops(run.network, replace(run.run, e=squared)), of_matrices(run.flops))
    assert {"scores", "gradients", "slopes", "entropy change"} <= set(found)


def test_a_forgotten_stage_is_outside(runs: dict[str, Counted]) -> None:
    run = runs["wide"]
    predicted = flops(run.network, run.run)
    for stage in ("gradients", "slopes", "entropy change"):
        assert stage in outside(predicted | {stage: 0.0}, run.flops)


@pytest.mark.parametrize("parts", [{"X, Y"}, {"θ in float64", "Ȳ", "P"}, {"v", "v₀, D"}], ids=lambda parts: min(parts))
def test_forgotten_bytes_are_outside(
    runs: dict[str, Counted], monkeypatch: pytest.MonkeyPatch, parts: set[str]
) -> None:
    whole = tensors.held
    monkeypatch.setattr(tensors, "held", lambda *of: whole(*of) | dict.fromkeys(parts, 0))
    run = runs["full"]
    predicted = peaks(run.network, run.run)
    assert outside(predicted, {stage: of for stage, of in run.peaks.items() if stage in predicted}) != {}


@pytest.mark.parametrize("sizes", [SIZES["small"], SIZES["wide"], Sizes(layers=3, vocabulary=8192)], ids=str)
def test_sampling(tmp_path: Path, sizes: Sizes) -> None:
    """Without an EOS, so that all responses have one length."""
    model = load_checkpoint(sizes.checkpoint(tmp_path)).model
    counter, batch = Counter(), Batch(4, sizes.group, sizes.prompt, sizes.response)
    with counter:
        sample(
            bind(model),
            [[3] * sizes.prompt] * batch.prompts,
            num_return_sequences=batch.group,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=sizes.response,
            eos_ids=[],
            seed=0,
            gen_batch_size=32,
        )
    network = Network.of(model)
    run = replace(sizes.run(network, ProbeConfig(), 1), e=Batch(2, sizes.group, 1, 0), u=batch, sampled=True)
    assert computation.sampling(network, run, batch) == pytest.approx(counter.flops, rel=TOLERANCE)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_sent(tmp_path: Path, size: int) -> None:
    names = ("small", "full", "wide")
    for name in names:
        (tmp_path / name).mkdir()
        SIZES[name].checkpoint(tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    torch_alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, counted.__file__, str(tmp_path), *names], env=torch_alone, check=True, timeout=120)
    for name in names:
        sizes = SIZES[name]
        report = ProbeReport.from_json(tmp_path / name / f"{size}.json")
        assert report.distributed is not None
        network = Network.of(load_checkpoint(tmp_path / name / "checkpoint").model)
        config = ProbeConfig.from_mapping(SMOKE)
        run = sizes.run(network, config, len(report.entropy_change), ranks=size)
        predicted = vars(sent(network, run))
        measured = {key: getattr(report.distributed, key) for key in predicted}
        assert outside(predicted, measured) == {}, name
        if size == 2:
            twice = vars(sent(replace(network, trainable=2 * network.trainable), run))
            assert "bytes_sent_per_rank" in outside(twice, measured)
