"""Sampler parity against plain loops, and on what it is for: temperature or top_p on one side only."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from entropy_probe.estimators.parity import sampler_parity


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
