"""Derivatives along v where the scores jump: a step that crosses a router's choice is made shorter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from entropy_probe.stages.derivatives import (
    FIVE_POINTS,
    TWO_POINTS,
    Derivatives,
    stencil_derivative,
    stencil_without_jumps,
)
from entropy_probe.stages.responses.rollouts import Rollouts

PROMPTS, GROUP = 4, 2


def rollouts() -> Rollouts:
    """One token for each response; the first token of a row is its number."""
    ids = torch.stack([torch.arange(PROMPTS * GROUP), torch.zeros(PROMPTS * GROUP, dtype=torch.long)], 1)
    ones = torch.ones(PROMPTS * GROUP, dtype=torch.long)
    return Rollouts(ids, ones, ones, torch.zeros(PROMPTS, GROUP), None, None, "drawn", 0)


def response(some: Rollouts, eta: float, jump: float, at: float) -> torch.Tensor:
    """S = sin(3η + n + ½) of response n, and `jump` more from η = `at` on for response 5."""
    n = some.per_prompt(some.ids[:, 0]).double()
    return (torch.sin(3 * eta + n + 0.5) + jump * (n == 5) * (eta > at))[..., None]


@pytest.mark.parametrize("at", [2e-4, 5e-5, -7e-4, -1.5e-3])
@pytest.mark.parametrize("by_scores", [True, False])
def test_one_response_jumps(at: float, by_scores: bool) -> None:
    points, change = (FIVE_POINTS, 1e-3) if by_scores else (TWO_POINTS, 1e-5)
    at = at if by_scores else at * 1e-2

    def along(some: Rollouts, eta: float, h: float) -> Derivatives:
        if by_scores:
            d: Any = stencil_derivative({k: response(some, eta + k * h, 1.0, at) for k in FIVE_POINTS}, h)
        else:
            n = some.per_prompt(some.ids[:, 0]).double()
            d = (3 * torch.cos(3 * eta + n + 0.5) + 1.0 * (n == 5) * (eta > at))[..., None]
        noise = torch.full_like(d, 1e-15 / h if by_scores else 1e-15)
        return Derivatives(d, d, torch.ones_like(d), d.abs(), noise)

    batch = rollouts()
    n = torch.arange(8.0, dtype=torch.float64).reshape(PROMPTS, GROUP)
    at_theta, second, kinked = stencil_without_jumps(along, batch, along(batch, 0.0, change), change, points)
    expected = 3 * torch.cos(n + 0.5) + (1.0 * (n == 5) * (at < 0) if not by_scores else 0.0)
    torch.testing.assert_close(at_theta.d_seq_logp, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.logp.sum(-1), -9 * torch.sin(n + 0.5), rtol=1e-3, atol=1e-3)
    assert kinked == (1 if abs(at) < (3 if by_scores else 1) * change else 0)
