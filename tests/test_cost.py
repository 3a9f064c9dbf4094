"""The formulas of cost against what is counted: live tensors within 15 %, flops and bytes sent within 25 %."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import counted
import forked
from counted import SIZES, SMOKE, Counted, Counter, Sizes, count
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint
from entropy_probe.cost import computation, tensors
from entropy_probe.cost.computation import FORWARD, GROWING, flops
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.cost.tensors import peaks
from entropy_probe.cost.traffic import sent
from entropy_probe.model.forward import bind
from entropy_probe.stages.gradients.payloads import Payload
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampling import Stream, sample
from entropy_probe.stages.witnesses.projections import by_alpha
from entropy_probe.stages.witnesses.witness import terms, twice_in_reverse

TOLERANCE = 0.25
OF_BYTES = 0.15
STANDARD = {"invariance": {"max_examples": 2}}
BLOCKS = SMOKE | {"first_order": {"estimator": "rb", "mode": "block", "num_blocks": 2}}
RUNS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "all parts": (SIZES["small"], STANDARD),
    "full": (SIZES["full"], SMOKE | {"true_delta_h": {"normalize": "per_token"}}),
    "wide": (SIZES["wide"], SMOKE),
    "long": (SIZES["long"], SMOKE),
    "blocks": (Sizes(e=4, u=4), BLOCKS),
    "prompts read once": (Sizes(hidden=128, intermediate=384, e=4, u=4, group=4, prompt=40, response=24), SMOKE),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    return {name: count(tmp_path_factory.mktemp("cost"), *of) for name, of in RUNS.items()}


def outside(
    predicted: Mapping[str, float], measured: Mapping[str, float], tolerance: float = TOLERANCE
) -> dict[str, float]:
    """predicted/measured of the stages where the two are not within the tolerance; what is 0 must be."""
    ratios = {stage: predicted[stage] / of if of else 1.0 + predicted[stage] for stage, of in measured.items()}
    return {stage: ratio for stage, ratio in ratios.items() if not abs(ratio - 1) <= tolerance}


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
    assert outside(predicted, {stage: of for stage, of in run.peaks.items() if stage in predicted}, OF_BYTES) == {}


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


def test_prompts_read_again_are_outside(runs: dict[str, Counted]) -> None:
    """Formulas of whole rows are wrong where each prompt was read once, and that it was is in the report."""
    run = runs["prompts read once"]
    memory = run.report.memory
    assert memory is not None
    assert memory.prompts_unshared is None
    assert "fewer than 16 responses" in str(runs["all parts"].report.memory)
    found = outside(flops(run.network, replace(run.run, share_prompts=False)), of_matrices(run.flops))
    assert set(found) == {"scores", "slopes", "entropy change"}


@pytest.mark.parametrize(
    "parts", [{"X, Y"}, {"θ in float64"}, {"Ȳ", "P"}, {"v", "v₀, D"}], ids=lambda parts: min(parts)
)
def test_forgotten_bytes_are_outside(
    runs: dict[str, Counted], monkeypatch: pytest.MonkeyPatch, parts: set[str]
) -> None:
    whole = tensors.held
    monkeypatch.setattr(tensors, "held", lambda *of: whole(*of) | dict.fromkeys(parts, 0))
    found = []
    for run in runs.values():
        predicted = peaks(run.network, run.run)
        measured = {stage: of for stage, of in run.peaks.items() if stage in predicted}
        found.append(outside(predicted, measured, OF_BYTES))
    assert any(found)


PASSES = {
    "few logits": Sizes(hidden=128, vocabulary=64, prompt=16, response=48),
    "pieces of logits": Sizes(vocabulary=32_768, prompt=8, response=40),
    "Llama": Sizes(hidden=128, intermediate=256, layers=3, vocabulary=4096, prompt=16, response=32, kind="Llama"),
}
KINDS = [("LOOP", "naive"), ("LOOP", "rb"), ("ALPHA", "naive"), ("ALPHA", "rb"), ("SECOND", "naive")]


@dataclass(frozen=True)
class OfPass:
    """Flops and the most bytes of one pass with a graph over one response (LOOP) or two."""

    network: Network
    run: Run
    kind: str
    flops: int
    bytes: int

    @property
    def ratios(self) -> tuple[float, float]:
        """predicted/measured"""
        rows, bytes_of = self.run.e.rows, 8 if self.kind == "SECOND" else 4
        computed = computation.with_graph(
            self.network, getattr(computation, self.kind), self.run, self.run.e, rows_at_once=rows
        )
        kept = getattr(tensors, self.kind)
        held = tensors.graph_of(self.network, self.run, kept, self.run.e, rows, bytes_of, self.kind.lower())
        return computed / self.flops, held / self.bytes


def of_pass(folder: Path, sizes: Sizes, kind: str, estimator: str) -> OfPass:
    model = load_checkpoint(sizes.checkpoint(folder)).model
    config = ProbeConfig.from_mapping({"first_order": {"estimator": estimator}})
    bound, rows = bind(model, torch.float64 if kind == "SECOND" else torch.float32), 1 if kind == "LOOP" else 2
    v = {name: torch.ones_like(p) for name, p in bound.registry.trainable.items()}
    made = sizes.rollouts(folder / "rollouts.jsonl", 2, 1)
    rollouts = read_rollouts(made, bound, None).of_prompts(torch.tensor([0]))
    weights = torch.ones(1, sizes.group, dtype=torch.float64)
    payload = Payload(weights, torch.ones(1, sizes.group, sizes.response) if estimator == "rb" else None)
    works: dict[str, Callable[[], object]] = {
        "LOOP": lambda: torch.autograd.grad(
            terms(bound, rollouts, torch.arange(rows), payload, config, true=True, once=True).sum(),
            list(bound.registry.trainable.values()),
        ),
        "ALPHA": lambda: by_alpha(bound, rollouts, payload, v, config),
        "SECOND": lambda: twice_in_reverse(bound, rollouts, weights, v, config),
    }
    first = torch.tensor([0])
    bound.read_logits(first[None], first, first, lambda logits, _: (logits,))  # tries the output layer
    counter = Counter()
    for tensor in (*bound.module.parameters(), *bound.module.buffers(), *v.values()):
        counter.add(tensor)
    before = counter.now
    with counter:
        works[kind]()
    run = Run(Batch(1, rows, sizes.prompt, sizes.response), rb=estimator == "rb")
    return OfPass(Network.of(model), run, kind, counter.flops, counter.peak - before)


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], OfPass]:
    return {
        (name, *kind): of_pass(tmp_path_factory.mktemp("passes"), sizes, *kind)
        for name, sizes in PASSES.items()
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_with_a_graph(passes: dict[tuple[str, str, str], OfPass], name: str, kind: tuple[str, str]) -> None:
    assert passes[name, *kind].ratios == pytest.approx((1, 1), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        *((kind, FORWARD) for kind in ("LOOP", "ALPHA", "SECOND")),
        *((f"{kind}.{field}", 0.0) for kind in ("LOOP", "ALPHA", "SECOND") for field in ("h", "f")),
        *((f"BYTES_OF_A_LOGIT.{kind}", 2.0) for kind in ("loop", "alpha", "second")),
        ("BYTES_IN_GRAPH.alpha", 2.0),
        ("BYTES_IN_GRAPH.second", 2.0),
        ("BYTES_IN_GRAPH_WITH_ENTROPY.alpha", 9 / 25),
    ],
)
def test_a_wrong_number_of_a_pass_is_outside(
    passes: dict[tuple[str, str, str], OfPass], monkeypatch: pytest.MonkeyPatch, where: str, wrong: Any
) -> None:
    name, _, part = where.partition(".")
    if not part:
        monkeypatch.setattr(computation, name, wrong)
    elif isinstance(of := getattr(tensors, name), dict):
        monkeypatch.setitem(of, part, wrong * of[part])
    else:
        monkeypatch.setattr(tensors, name, replace(of, **{part: wrong * getattr(of, part)}))
    assert any(abs(ratio - 1) > TOLERANCE for of in passes.values() for ratio in of.ratios)


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
            noise=Stream.of(0, batch.prompts),
            gen_batch_size=32,
        )
    network = Network.of(model)
    run = replace(sizes.run(network, ProbeConfig(), 1), e=Batch(2, sizes.group, 1, 0), u=batch, sampled=True)
    assert computation.sampling(network, run, batch) == pytest.approx(counter.flops, rel=TOLERANCE)


@pytest.mark.parametrize(("size", "names"), [(2, ("small", "full", "wide")), (3, ("wide",))], ids=["2", "3"])
def test_bytes_sent(tmp_path: Path, size: int, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        SIZES[name].checkpoint(tmp_path / name)
    forked.python(counted.__file__, tmp_path, str(size), *names, timeout=120).check_returncode()
    for name in names:
        sizes, network = SIZES[name], Network.of(load_checkpoint(tmp_path / name / "checkpoint").model)
        for sharding in ("prompt", "parameter") if name == "full" else ("prompt",):
            report = ProbeReport.from_json(tmp_path / name / f"{sharding}-{size}.json")
            assert report.distributed is not None
            config, once = ProbeConfig.from_mapping(SMOKE), sharding == "parameter"
            run = sizes.run(network, config, len(report.entropy_change), ranks=size, one_copy=once)
            predicted = vars(sent(network, run))
            measured = {key: getattr(report.distributed, key) for key in predicted}
            assert outside(predicted, measured, 0.1 if once else TOLERANCE) == {}, (name, sharding)
            if once:  # not even one vector of the parameters
                assert sum(measured.values()) < 4 * network.trainable
            elif size == 2:
                twice = vars(sent(replace(network, trainable=2 * network.trainable), run))
                assert "bytes_sent_per_rank" in outside(twice, measured)
