"""The probability integral transform of sampled tokens: the mass before a token, and what its statistics see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from entropy_probe.afresh.plain import _halved
from entropy_probe.estimators.placing import halving_ranks, mass_before
from entropy_probe.stages.responses.drawing import draw, masses
from entropy_probe_checks.uniform import departures, in_common

SHAPES = [(4, 2, 5), (8, 8, 20), (3, 16, 3), (30, 2, 2)]


def evidence(
    shape: tuple[int, int, int], seed: int, temperature: float = 1.0, shared: str = "", vocabulary: int = 13
) -> dict[str, np.ndarray]:
    """Tokens of E and U drawn from random distributions, the sampler's being at a `temperature`; `shared` names whose
    numbers are shared."""
    chance = torch.Generator().manual_seed(seed)
    arrays = {}
    levels = (vocabulary - 1).bit_length()
    first = torch.rand(*shape, levels, generator=chance)
    for which in ("e", "u"):
        logits = 2 * torch.randn(math.prod(shape), vocabulary, generator=chance)
        numbers = torch.rand(*shape, levels, generator=chance)
        if shared == "prompts":
            numbers[:] = numbers[:1].clone()
        if shared == "responses":
            numbers[:] = numbers[:, :1].clone()
        if shared == "batches":
            numbers = first
        tokens = draw(masses(logits, temperature, 1.0), numbers.reshape(-1, levels).double())
        logp = logits.double().log_softmax(-1)
        lengths = torch.randint(1, shape[2] + 1, shape[:2], generator=chance)
        arrays |= {
            f"{which}.before": mass_before(logits, tokens, 1.0, 1.0).reshape(*shape, 2).numpy(),
            f"{which}.logq": logp.gather(-1, tokens[:, None]).reshape(shape).numpy(),
            f"{which}.entropy_q": -(logp.exp() * logp).sum(-1).reshape(shape).numpy(),
            f"{which}.gen_lens": lengths.flatten().numpy(),
        }
    return arrays


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_mass_before_is_a_loop_over_the_vocabulary(top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 11)
    logits[:8, 3] = logits[:8, 6]  # ties: the smaller id is first
    tokens = torch.randint(0, 11, (40,))
    tokens[:8] = torch.tensor([3, 6]).repeat(4)
    found = mass_before(logits, tokens, 0.8, top_p)
    order = _halved(11)
    for z, y, (likelier, halved) in zip(logits, tokens.tolist(), found.tolist(), strict=True):
        q = torch.softmax(z.double() / 0.8, -1).tolist()
        ranked = sorted(range(11), key=lambda x: (-float(z[x]), x))
        held = 0.0
        for x in ranked:
            if held >= top_p:
                q[x] = 0.0
            held += q[x]
        total = math.fsum(q)
        assert likelier == pytest.approx(math.fsum(q[x] for x in ranked[: ranked.index(y)]) / total, abs=1e-6)
        assert halved == pytest.approx(math.fsum(q[x] for x in order[: order.index(y)]) / total, abs=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 3, 5, 8, 13, 64, 100])
def test_the_sampler_inverts_sums_in_this_order(vocabulary: int) -> None:
    """Its first number alone decides in which half of the order a token is, the second in which quarter."""
    ranks, levels = halving_ranks(vocabulary), (vocabulary - 1).bit_length()
    assert ranks.argsort().tolist() == _halved(vocabulary)
    torch.manual_seed(vocabulary)
    mass = torch.rand(1, vocabulary).expand(500, -1)
    numbers = torch.rand(500, levels, dtype=torch.float64)
    rank = ranks[draw(mass, numbers)]
    upper = rank >= 2 ** (levels - 1)
    assert upper[numbers[:, 0].argsort()].diff().count_nonzero() == 1
    if levels > 1:
        of_lower = (rank[~upper] >= 2 ** (levels - 2))[numbers[~upper, 1].argsort()]
        assert of_lower.diff().count_nonzero() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_alone_is_as_rare_as_of_a_normal(shape: tuple[int, int, int]) -> None:
    """Of 4000 draws, as many are above 2 and 3 standard errors as of a normal, and no more than a half more."""
    chance = np.random.default_rng(1)
    draws = 4000
    weight = np.minimum(1.0, chance.exponential(0.5, shape))
    found = np.array([in_common(weight * math.sqrt(12) * (chance.random(shape) - 0.5)) for _ in range(draws)])
    for limit in (2.0, 3.0):
        expected = draws * ndtr(-limit)
        assert (found > limit).sum() <= 1.5 * expected + 4 * math.sqrt(expected)
    assert abs(found.mean()) < 0.1
    assert 0.7 < found.std() < 1.2


@pytest.mark.parametrize("seed", range(10))
def test_independent_draws_pass(seed: int) -> None:
    assert max(departures(evidence((8, 6, 12), seed), ("e", "u")).values()) < 4.5


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        ("scale of E by likelihood", {"temperature": 0.8}),
        ("scale of U by likelihood", {"temperature": 1.3}),
        ("prompts of E by halves", {"shared": "prompts"}),
        ("responses of U by halves", {"shared": "responses"}),
        ("batches by halves", {"shared": "batches"}),
    ],
)
def test_a_slip_is_seen_by_its_statistic(seen: str, options: dict[str, object]) -> None:
    """Even of distributions that have nothing in common but the numbers they are drawn with."""
    found = departures(evidence((12, 8, 24), 3, **options), ("e", "u"))  # pyright: ignore[reportArgumentType]
    assert found[seen] > 5, found


def test_of_certain_tokens_nothing_is_said() -> None:
    arrays = evidence((4, 4, 6), 0)
    arrays |= {name: np.zeros_like(values) for name, values in arrays.items() if "entropy" in name}
    assert set(departures(arrays, ("e", "u")).values()) == {0.0}


@pytest.mark.parametrize("far", [1e-8, 1e-19, 1e-60, 1e-105, 1e-200])
def test_numbers_of_certain_tokens_are_far_apart(far: float) -> None:
    """Two members have no third moment, whatever their sizes: x₁·x₂ over its standard deviation is ±1. As a square of
    sums less a sum of squares it was rounding: 1e41 standard errors, or no number."""
    assert in_common(np.array([[1.0], [far]])) == pytest.approx(1.0 if far > 1e-160 else 0.0)
    assert in_common(np.array([[1.0], [-far]])) == pytest.approx(-1.0 if far > 1e-160 else 0.0)
    assert in_common(far * np.array([[1.0], [1.0]])) == pytest.approx(1.0)
    assert abs(in_common(np.array([[1.0], [far], [far]]))) < 3
