"""The coefficients R_{≥t} − b_t against loops over prompts, responses and steps; what b_t may and may not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_probe.errors import MeasurementError
from entropy_probe.estimators import baselines
from entropy_probe.estimators.baselines import BASELINES, Baseline, rb_coefficients

FAST = settings(derandomize=True, database=None, deadline=None, max_examples=60)
FEATURES = 7

Batch = tuple[Tensor, Tensor, Tensor]


def batch(prompts: int, group: int, steps: int, seed: int) -> Batch:
    """(H_t, lengths, φ); NaN past the end of a response, where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (prompts, group), generator=generator)
    entropy = torch.rand(prompts, group, steps, generator=generator, dtype=torch.float64)
    entropy += 2 * torch.rand(prompts, 1, 1, generator=generator, dtype=torch.float64)
    phi = torch.randn(prompts, group, steps, FEATURES, generator=generator, dtype=torch.float64)
    phi = phi * 10.0 ** torch.arange(-3, 4) + torch.arange(FEATURES)
    phi[..., 3] = 0.1
    past = torch.arange(steps) >= lengths[..., None]
    return entropy.masked_fill(past, math.nan), lengths, phi.masked_fill(past[..., None], math.nan)


def augmented_fit(phi: np.ndarray, target: np.ndarray, phi_new: np.ndarray) -> float:
    """Ridge as least squares of augmented rows: √(λ·rows)·e_j for each feature, the target 0, and a free intercept."""
    mean, deviation = phi.mean(0), phi.std(0)
    constant = np.ptp(phi, axis=0) == 0
    deviation[constant] = 1.0

    def standardised(x: np.ndarray) -> np.ndarray:
        cut = baselines.MAX_DEVIATIONS
        return np.where(constant, 0.0, np.clip((x - mean) / deviation, -cut, cut))

    rows = np.hstack([np.ones((len(phi), 1)), standardised(phi)])
    extra = np.hstack([np.zeros((FEATURES, 1)), math.sqrt(baselines.RIDGE * len(phi)) * np.eye(FEATURES)])
    solution = np.linalg.lstsq(np.vstack([rows, extra]), np.concatenate([target, np.zeros(FEATURES)]), rcond=None)[0]
    return float(solution[0] + standardised(phi_new) @ solution[1:])


def shrunk(later: dict[tuple[int, int, int], float], n: int, g: int, t: int) -> float:
    """By least squares where it can be said so: the best linear predictor of a new value of prompt n at step t from its
    other responses, under value = mean of the step + prompt (variance τ²) + response (σ²), variances by moments."""
    others = {key: value for key, value in later.items() if key[0] != n}
    cells: dict[tuple[int, int], list[float]] = {}
    for (m, _, k), value in others.items():
        cells.setdefault((k, m), []).append(value)
    own = [value for (m, h, k), value in later.items() if m == n and h != g and k == t]
    at_t = [value for (_, _, k), value in others.items() if k == t]
    if not at_t:
        return float(np.mean(own)) if own else 0.0
    degrees = sum(len(values) - 1 for values in cells.values())
    sigma2 = sum(len(values) * np.var(values) for values in cells.values()) / max(degrees, 1)
    between = spread = 0.0
    for step in {k for k, _ in cells}:
        groups = [values for (k, _), values in cells.items() if k == step]
        sizes = np.array([len(values) for values in groups], float)
        means = np.array([np.mean(values) for values in groups])
        between += (sizes * (means - np.average(means, weights=sizes)) ** 2).sum() - (len(groups) - 1) * sigma2
        spread += sizes.sum() - (sizes**2).sum() / sizes.sum()
    tau2 = between / max(spread, 1.0)
    steps = {k for k, _ in cells}
    largest = max(abs(np.mean([v for (k, _), values in cells.items() if k == s for v in values])) for s in steps)
    if tau2 <= (1e-6 * largest) ** 2:
        tau2 = 0.0
    level = float(np.mean(at_t))
    if not own or tau2 == 0.0:
        return level
    covariance = tau2 + sigma2 * np.eye(len(own))
    return level + float(tau2 * np.ones(len(own)) @ np.linalg.pinv(covariance) @ (np.array(own) - level))


def naive(entropy: Tensor, lengths: Tensor, baseline: Baseline, features: Tensor) -> list[list[list[float]]]:
    prompts, group, steps = entropy.shape
    folds = min(5, prompts)

    def later(n: int, g: int, t: int) -> float:
        return sum(float(entropy[n, g, k]) for k in range(t + 1, int(lengths[n, g])))

    def beyond_own_entropy(n: int, g: int, t: int) -> float:
        others = [(m, h, k) for m in range(prompts) for h in range(group) for k in range(int(lengths[m, h]))]
        if baseline == "hk_ema":
            at_t = [later(m, h, k) for m, h, k in others if m != n and k == t]
            return sum(at_t) / len(at_t) if at_t else 0.0
        if baseline == "hk_group":
            return shrunk({row: later(*row) for row in others}, n, g, t)
        fit = [row for row in others if row[0] % folds != n % folds]
        if baseline == "hk" or not fit:
            return 0.0
        phi = np.array([features[row].tolist() for row in fit])
        return augmented_fit(phi, np.array([later(*row) for row in fit]), features[n, g, t].numpy())

    def coefficient(n: int, g: int, t: int) -> float:
        if t >= int(lengths[n, g]):
            return 0.0
        if baseline == "none":
            return float(entropy[n, g, t]) + later(n, g, t)
        return later(n, g, t) - beyond_own_entropy(n, g, t)

    return [[[coefficient(n, g, t) for t in range(steps)] for g in range(group)] for n in range(prompts)]


def b_of(entropy: Tensor, lengths: Tensor, baseline: Baseline, features: Tensor) -> Tensor:
    """b_t − H_t = R_{>t} − c_t."""
    return rb_coefficients(entropy, lengths, "hk") - rb_coefficients(entropy, lengths, baseline, features)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(
    ("prompts", "group", "steps"), [(1, 2, 3), (2, 1, 4), (2, 3, 4), (3, 4, 5), (5, 2, 4), (7, 2, 3), (11, 3, 2)]
)
def test_coefficients_are_those_of_the_loops(baseline: Baseline, prompts: int, group: int, steps: int) -> None:
    """To 1e-9: the normal equations square a condition number of at most 1/RIDGE times the features."""
    entropy, lengths, features = batch(prompts, group, steps, seed=prompts)
    found = rb_coefficients(entropy, lengths, baseline, features)
    expected = torch.tensor(naive(entropy, lengths, baseline, features), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_a_batch_by_hand() -> None:
    """The second prompt's responses have R_{>0} = 2, 0 and R_{>1} = 0: nobody there has a step 2, and the one that
    ended after a step does not lower the mean at step 1."""
    entropy = torch.tensor([[[1.0, 2.0, 4.0]] * 2, [[3.0, 2.0, 9.0]] * 2])
    lengths = torch.tensor([[3, 3], [2, 1]])
    expected = {"none": [7.0, 6.0, 4.0], "hk": [6.0, 4.0, 0.0], "hk_ema": [5.0, 4.0, 0.0]}
    for baseline in ("none", "hk", "hk_ema"):
        assert rb_coefficients(entropy, lengths, baseline)[0].tolist() == [expected[baseline]] * 2
    assert rb_coefficients(entropy, lengths, "hk_ema")[1].tolist() == [[2.0 - 6.0, -4.0, 0.0], [-6.0, 0.0, 0.0]]


@FAST
@given(st.sampled_from(BASELINES), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_past_the_end_there_is_nothing(baseline: Baseline, prompts: int, group: int, steps: int, seed: int) -> None:
    """Float64 without gradient, zero past the end, and the same to 1e-12 with T padded."""
    entropy, lengths, features = batch(prompts, group, steps, seed)
    found = rb_coefficients(entropy.requires_grad_(), lengths, baseline, features.requires_grad_())
    past = torch.arange(steps) >= lengths[..., None]
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert bool(torch.isfinite(found).all())
    assert not found[past].any()
    wide = torch.nn.functional.pad(entropy, (0, 3)), lengths, baseline, torch.nn.functional.pad(features, (0, 0, 0, 3))
    padded = rb_coefficients(*wide)
    assert torch.allclose(padded[..., :steps], found, rtol=0, atol=1e-12)
    assert not padded[..., steps:].any()


@FAST
@given(st.sampled_from(BASELINES), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10_000))
def test_a_baseline_knows_the_prefix_and_other_prompts(baseline: Baseline, prompts: int, group: int, seed: int) -> None:
    """Another future of a response (entropies, φ, length after step t) leaves its b_k, k ≤ t, as they were, and so do
    other responses of the prompt, but for `hk_group`. To 1e-12: b is recovered as a difference."""
    steps, t = 5, seed % 5
    entropy, lengths, features = batch(prompts, group, steps, seed)
    lengths[-1, 0] = steps
    entropy, features = entropy.nan_to_num(0.5), features.nan_to_num(0.5)
    other_entropy, other_lengths, other_features = batch(prompts, group, steps, seed + 1)
    changed = [values.clone() for values in (entropy, lengths, features)]
    rows = 0 if baseline == "hk_group" else slice(None)
    for values, others in zip(changed, (other_entropy, other_lengths, other_features), strict=True):
        values[-1, rows] = others[-1, rows].nan_to_num(0.25) if others.is_floating_point() else others[-1, rows]
    changed[0][-1, 0, : t + 1], changed[2][-1, 0, : t + 1] = entropy[-1, 0, : t + 1], features[-1, 0, : t + 1]
    changed[1][-1, 0] = t + 1
    before = b_of(entropy, lengths, baseline, features)[-1, 0, : t + 1]
    after = b_of(changed[0], changed[1], baseline, changed[2])[-1, 0, : t + 1]
    if baseline == "none":  # b = 0, so b − H_t is −H_t
        before, after = before + entropy[-1, 0, : t + 1], after + changed[0][-1, 0, : t + 1]
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def test_a_baseline_uses_other_prompts() -> None:
    """The same change in another prompt does move it."""
    entropy, lengths, features = batch(4, 2, 3, seed=0)
    more = entropy.clone()
    more[1] += 1.0
    lengths = lengths.clamp(min=2)
    entropy, more, features = (x.nan_to_num(0.5) for x in (entropy, more, features))
    for baseline in ("hk_ema", "hk_ridge", "hk_group"):
        moved = b_of(more, lengths, baseline, features) - b_of(entropy, lengths, baseline, features)
        assert float(moved[0, :, 0].abs().min()) > 1e-3


def test_with_one_prompt_there_are_no_others() -> None:
    entropy, lengths, features = batch(1, 4, 5, seed=2)
    own = rb_coefficients(entropy, lengths, "hk")
    for baseline in ("hk_ema", "hk_ridge"):
        assert torch.equal(rb_coefficients(entropy, lengths, baseline, features), own)


def test_the_group_counts_as_much_as_prompts_differ() -> None:
    """R_{>0} of 400 prompts with 4 responses, prompt effects of sd 3 and noise of sd 1: what remains is the noise and
    what three others leave open, 1 + τ²σ²/(3τ² + σ²) = 1.32; without prompt effects, or with ones that are all, the
    mean of the others, or of the own group: 1 + 1/1600 and 4/3."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.full((400, 4), 2)
    for tau, expected in ((3.0, 1.0 + 9 / 28), (0.0, 1.0), (1e6, 4 / 3)):
        entropy = torch.randn(400, 4, 2, generator=generator, dtype=torch.float64)
        entropy[..., 1] += tau * torch.randn(400, 1, generator=generator, dtype=torch.float64)
        left = rb_coefficients(entropy, lengths, "hk_group")[..., 0]
        assert float(left.square().mean()) == pytest.approx(expected, rel=0.1)  # 1600 squares: 3.5 % each


def test_prompts_that_do_not_differ_do_not_pull() -> None:
    """One response is shorter, all else is one number: among the other prompts nothing varies, so that the own group
    counts for nothing, whatever rounding leaves of a variance."""
    lengths = torch.full((4, 4), 9)
    lengths[0, 0] = 3
    for level in (0.1, 1.0, 6.2):
        entropy = torch.full((4, 4, 9), level, dtype=torch.float64)
        pair = (rb_coefficients(entropy, lengths, baseline) for baseline in ("hk_group", "hk_ema"))
        assert torch.allclose(*(c[0] for c in pair), rtol=0, atol=1e-12)


def test_the_ridge_finds_a_line() -> None:
    """R_{>t} = 2 + 3φ₀ exactly, φ₁ … φ₆ noise: what remains is what the penalty takes off φ₀, a share
    RIDGE/(1 + RIDGE) of its part, and a little more where noise goes along with it by chance."""
    generator = torch.Generator().manual_seed(0)
    entropy, lengths = torch.rand(40, 4, 2, generator=generator, dtype=torch.float64), torch.full((40, 4), 2)
    features = torch.randn(40, 4, 2, FEATURES, generator=generator, dtype=torch.float64)
    features[..., 0] = (rb_coefficients(entropy, lengths, "hk") - 2.0) / 3.0
    left = rb_coefficients(entropy, lengths, "hk_ridge", features)
    assert float(left.std() / rb_coefficients(entropy, lengths, "hk").std()) < 2 * baselines.RIDGE


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e12])
def test_a_feature_that_is_constant_elsewhere_counts_for_nothing(value: float) -> None:
    """Also where this prompt alone has another value: nothing is divided by a deviation of rounding size."""
    entropy, lengths, features = batch(5, 3, 4, seed=3)
    features[..., 1] = 0.0
    without = rb_coefficients(entropy, lengths, "hk_ridge", features)
    features[..., 1] = value
    assert torch.allclose(rb_coefficients(entropy, lengths, "hk_ridge", features), without, rtol=0, atol=1e-12)
    features[2, ..., 1] = value + 7.0
    of_prompt = rb_coefficients(entropy, lengths, "hk_ridge", features)[2]
    assert torch.allclose(of_prompt, without[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e4, 1e12, 1e76])
def test_a_huge_feature_moves_the_baseline_by_little(size: float) -> None:
    """b stays within a few times the largest R_{>t}, wherever the one huge entry stands (1e76: the variance of logits
    at the limits of float32)."""
    entropy, lengths, features = batch(6, 4, 5, seed=4)
    largest = float(rb_coefficients(entropy, lengths, "hk").max())
    for n in range(6):
        one = features.clone()
        one[n, 0, 0, 5] = size
        assert float(b_of(entropy, lengths, "hk_ridge", one).abs().max()) < 5 * largest


def test_the_ridge_needs_features() -> None:
    with pytest.raises(MeasurementError, match=r"^hk_ridge: no features were given; give those of token_stats\.base"):
        rb_coefficients(torch.ones(2, 2, 2), torch.full((2, 2), 2), "hk_ridge")
