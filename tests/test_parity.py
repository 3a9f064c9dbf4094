"""Sampler parity against plain loops, and on what it is for: temperature or top_p on one side only."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import models
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe.estimators.parity import sampler_parity
from entropy_probe.model.forward import bind
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score
from entropy_probe_checks.criteria import CRITERIA


def test_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    scored = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) * 3
    reported = scored + 0.1 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    inside = torch.rand(2, 3, 4, generator=generator) < 0.7
    reported[~inside] = 99.0
    parity = sampler_parity(scored, reported, inside)
    pairs = list(zip(scored[inside].tolist(), reported[inside].tolist(), strict=True))
    differences = [b - a for a, b in pairs]
    ratios = [math.exp(a - b) for a, b in pairs]
    assert parity.num_tokens == len(pairs)
    assert parity.mean_abs_difference == pytest.approx(statistics.fmean(map(abs, differences)), rel=1e-12)
    assert parity.max_abs_difference == pytest.approx(max(map(abs, differences)), rel=1e-12)
    assert parity.kl == pytest.approx(statistics.fmean(differences), rel=1e-12)
    k3 = statistics.fmean(r - 1 + d for r, d in zip(ratios, differences, strict=True))
    assert parity.k3 == pytest.approx(k3, rel=1e-9)
    correlation = statistics.correlation([math.exp(a) for a, _ in pairs], [math.exp(b) for _, b in pairs])
    assert parity.pearson == pytest.approx(correlation, rel=1e-9)
    assert (parity.ratio_min, parity.ratio_max) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)))
    assert parity.ratio_mean == pytest.approx(statistics.fmean(ratios))
    assert parity.share_outside == sum(not 0.9 <= r <= 1.1 for r in ratios) / len(ratios)


def test_equal_is_perfect() -> None:
    scored = torch.full((1, 2, 3), -0.5)
    parity = sampler_parity(scored, scored.clone(), torch.ones(1, 2, 3, dtype=torch.bool))
    assert (parity.mean_abs_difference, parity.kl, parity.k3, parity.share_outside) == (0.0, 0.0, 0.0, 0.0)
    assert parity.pearson is None


@pytest.mark.parametrize(
    ("sampled", "scored", "status"),
    [
        ({}, {}, "pass"),
        ({"temperature": 0.8}, {"temperature": 0.8}, "pass"),
        ({"temperature": 0.8}, {}, "fail"),
        ({}, {"temperature": 0.8}, "fail"),
        ({"nucleus_mass": 0.9}, {}, "fail"),
    ],
)
def test_policy_on_one_side_only(
    tmp_path: Path, sampled: dict[str, float], scored: dict[str, float], status: str
) -> None:
    """An engine that reports log q under `sampled`, judged by a probe that is told `scored`."""
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    file = models.random_rollouts(tmp_path / "plain.jsonl", prompts=4, responses=3, seed=1)
    bound = bind(load_checkpoint(path).model)
    rollouts = read_rollouts(file, bound, None)
    engine = dict(sampled)
    mass = engine.pop("nucleus_mass", 1.0)
    reported = score(bound, rollouts, ProbeConfig.from_mapping({"generation": engine})).token_logp
    reported = reported - math.log(mass)  # what renormalising over a nucleus of that mass adds to every sampled token
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for n, line in enumerate(lines):
        line["logprobs"] = [reported[n, g, : len(r)].tolist() for g, r in enumerate(line["response_ids"])]
    with_logprobs = tmp_path / "reported.jsonl"
    with_logprobs.write_text("\n".join(map(json.dumps, lines)))
    report = run_probe(path, ProbeConfig.from_mapping({"generation": scored}), with_logprobs)
    assert CRITERIA["sampler_parity"](report).status == status
    assert report.sampler_parity is not None
    assert report.sampler_parity.num_tokens == report.batch.num_tokens


def test_without_logprobs_it_is_not_applicable(tmp_path: Path) -> None:
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    report = run_probe(path, None, models.random_rollouts(tmp_path / "r.jsonl", prompts=3, responses=2, seed=1))
    assert report.sampler_parity is None
    assert CRITERIA["sampler_parity"](report).status == "not_applicable"
