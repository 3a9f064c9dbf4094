"""The pure estimators against slow enumeration, torch's own code, and their exact identities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from entropy_probe.config import FirstOrderConfig, Recipe, RecipeConfig, UpdateConfig
from entropy_probe.estimators import adam, advantages, baselines, importance, slope, two_batch, update_weights, ustat

FAST = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# U-statistic


@FAST
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_u_statistic_against_its_definition(units: int, seed: int) -> None:
    k = random_matrix(units, units, seed)
    pairs = [k[i, j].item() for i, j in itertools.permutations(range(units), 2)]
    moments = ustat.cross_moments(k)
    assert moments.u_cross == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert float(moments.row_means.mean()) == pytest.approx(moments.u_cross, abs=1e-12)
    statistic = ustat.u_statistic(moments, k)
    if units < 3:
        assert statistic.se_jackknife is None
        return

    def without(u: int) -> float:
        left = [i for i in range(units) if i != u]
        return sum(k[i, j].item() for i, j in itertools.permutations(left, 2)) / (len(left) * (len(left) - 1))

    deleted = [without(u) for u in range(units)]
    mean = sum(deleted) / units
    jackknife = math.sqrt((units - 1) / units * sum((d - mean) ** 2 for d in deleted))
    assert statistic.se_jackknife == pytest.approx(jackknife, rel=1e-9)
    assert statistic.se_plugin == pytest.approx(jackknife * (units - 2) / (units - 1), rel=1e-9)
    assert (statistic.var_unbiased is None) == (units < 5)


@pytest.mark.parametrize("signal", [0.0, 0.3, 2.0])
def test_unbiased_variance_is_unbiased(signal: float) -> None:
    """Kernels X_nᵀY_m of independent normal units: unbiased within |z| < 4 over 4000 replications; the plug-in has its
    known mean (U−2)[ζ₂+(U−4)ζ₁]/(U−1)² within 5 %: conservative without signal, too small for a strong one at U = 8."""
    units, replications = 8, 4000
    generator = torch.Generator().manual_seed(7)
    values, variances, plugins = [], [], []
    for _ in range(replications):
        x = torch.randn(units, 3, generator=generator, dtype=torch.float64) + signal
        y = torch.randn(units, 3, generator=generator, dtype=torch.float64) + signal
        moments = ustat.cross_moments(x @ y.T)
        statistic = ustat.u_statistic(moments, x @ y.T)
        values.append(moments.u_cross)
        variances.append(statistic.var_unbiased)
        plugins.append(statistic.se_plugin)
    u, v = (torch.tensor(t, dtype=torch.float64) for t in (values, variances))
    assert abs(float(u.mean()) - 3 * signal**2) < 4 * float(u.std()) / math.sqrt(replications)
    spread = (u - u.mean()).square() - v
    assert abs(float(spread.mean())) < 4 * float(spread.std()) / math.sqrt(replications)
    zeta1, zeta2 = 1.5 * signal**2, (3 + 6 * signal**2) / 2
    expected = (units - 2) * (zeta2 + (units - 4) * zeta1) / (units - 1) ** 2
    plugin = float((torch.tensor(plugins, dtype=torch.float64).square() * units / 4).mean())
    assert abs(plugin / expected - 1) < 0.05


def test_two_batch_variance_counts_the_interaction_once() -> None:
    """Var(mean K) of X_kᵀY_m over both batches, 4000 replications: ratio of the mean estimate to the truth."""
    generator = torch.Generator().manual_seed(8)
    values, total, conditional = [], [], []
    for _ in range(4000):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64) + 0.5
        y = torch.randn(9, 4, generator=generator, dtype=torch.float64) + 0.5
        moments = two_batch.two_batch_moments(x @ y.T, torch.ones(6).long(), torch.ones(9).long())
        values.append(moments.bars_dot)
        total.append(moments.total_se**2)
        conditional.append(moments.conditional_se**2)
        assert moments.bars_dot == pytest.approx(float(moments.projections.mean()))
    truth = float(torch.tensor(values, dtype=torch.float64).var())
    assert 0.95 < sum(total) / len(total) / truth < 1.1
    assert sum(conditional) / len(conditional) < truth


# importance


def test_zero_step_is_exactly_zero() -> None:
    f = random_matrix(5, 3, 1)
    weights = importance.snis_weights(torch.zeros(5, 3, dtype=torch.float64))
    change = importance.entropy_change(f, f.clone(), weights.normalised, weights.normalised.clone())
    assert (change.value, change.se, weights.ess) == (0.0, 0.0, 15.0)


@FAST
@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(0, 3))
def test_weights_are_shift_invariant_and_ess_is_bounded(seed: int, shift: float, spread: float) -> None:
    log_weights = spread * random_matrix(4, 3, seed)
    a, b = importance.snis_weights(log_weights), importance.snis_weights(log_weights + shift)
    assert torch.allclose(a.normalised, b.normalised, rtol=1e-10)
    assert 1 - 1e-12 <= a.ess <= 12 + 1e-9
    assert float(a.normalised.sum()) == pytest.approx(1.0)
    clipped = importance.snis_weights(log_weights, clip=0.5)
    assert clipped.clip_fraction == float((log_weights.abs() > 0.5).double().mean())


def test_cluster_se_covers_what_independence_does_not() -> None:
    """Responses of a prompt share a component: the SE by prompts is right, the one by responses too small."""
    generator = torch.Generator().manual_seed(3)
    truth = 4 / 8 + 1 / 32  # variance of the mean of 8 prompts with a shared sd of 2, 32 responses with an own sd of 1
    clustered, independent = [], []
    for _ in range(2000):
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        x = x + 2 * torch.randn(8, 1, generator=generator, dtype=torch.float64)
        clustered.append(importance.cluster_se(x - x.mean()) ** 2)
        independent.append(float(x.var()) / x.numel())
    assert 0.93 < sum(clustered) / len(clustered) / truth < 1.07
    assert sum(independent) / len(independent) / truth < 0.5


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_recovers_a_known_tail(k: float) -> None:
    """Mean over 20 samples of 8000; one sample scatters by about 0.17. With the sign turned it is 0.7 whatever k is."""
    measured = []
    for seed in range(20):
        log_weights = torch.tensor(stats.genpareto(k).rvs(size=(1000, 8), random_state=seed)).log()
        measured.append(importance.pareto_k(log_weights, 10.0))
    assert sum(measured) / 20 == pytest.approx(k, abs=0.12)


def test_pareto_k_is_null_where_it_means_nothing() -> None:
    assert importance.pareto_k(torch.zeros(16, 8), 128.0) is None
    assert importance.pareto_k(random_matrix(7, 9, 1), 10.0) is None


@pytest.mark.parametrize("size", [64, 256])
def test_tail_of_responses_that_repeat(size: int) -> None:
    """A response that was drawn often has one weight many times, at the edge of the tail too: k̂ is a number or `None`,
    smoothed weights are finite, and nothing is divided by zero."""
    log_weights = random_matrix(size, 1, 4).flatten().sort().values
    tail = int(min(0.2 * size, 3 * math.sqrt(size)))
    log_weights[-tail - 1 : -tail // 2] = log_weights[-tail - 1].item()
    log_weights = log_weights.reshape(-1, 4)
    k = importance.pareto_k(log_weights, size / 10)
    assert k is None or math.isfinite(k)
    assert bool(torch.isfinite(importance.smoothed(log_weights)).all())


@FAST
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 10_000), st.booleans())
def test_change_per_token_against_loops(prompts: int, group: int, seed: int, own_lengths: bool) -> None:
    """φ = N[ŵ⁺(f⁺ − h⁺T⁺)/Σŵ⁺T⁺ − ŵ(f − hT)/Σŵ T], one response at a time; units of 1 give ΔH per response, equal
    arguments exactly 0. Seen to fail: h⁺ for h in the second term."""
    size, number = prompts * group, range(prompts * group)
    f, f_after, w, w_after = (random_matrix(prompts, group, seed + i) for i in range(4))
    w, w_after = w.exp() / w.exp().sum(), w_after.exp() / w_after.exp().sum()
    generator = torch.Generator().manual_seed(seed)
    t, t_after = (torch.randint(1, 9, (prompts, group), generator=generator).double() for _ in range(2))
    t_after = t_after if own_lengths else t
    change = importance.entropy_change(f, f_after, w, w_after, (t, t_after) if own_lengths else t)
    sides = [[x.flatten().tolist() for x in side] for side in ((w, f, t), (w_after, f_after, t_after))]
    count = [math.fsum(a * c for a, c in zip(side[0], side[2], strict=True)) for side in sides]
    h = [
        math.fsum(a * b for a, b in zip(*side[:2], strict=True)) / total
        for side, total in zip(sides, count, strict=True)
    ]

    def term(side: int, i: int, of: float) -> float:
        weight, payload, units = (x[i] for x in sides[side])
        return size * weight * (payload - of * units) / count[side]

    phi = [term(1, i, h[1]) - term(0, i, h[0]) for i in number]
    clusters = [math.fsum(phi[n * group : (n + 1) * group]) for n in range(prompts)]
    se = math.sqrt(prompts / (prompts - 1) * math.fsum(x * x for x in clusters)) / size
    assert change.value == pytest.approx(h[1] - h[0], abs=1e-12)
    assert change.influence.flatten().tolist() == pytest.approx(phi, abs=1e-10)
    assert change.se == pytest.approx(se, abs=1e-12)
    assert phi != pytest.approx([term(1, i, h[1]) - term(0, i, h[1]) for i in number], abs=1e-10)
    plain = importance.entropy_change(f, f_after, w, w_after)
    ones = importance.entropy_change(f, f_after, w, w_after, torch.ones_like(f))
    assert (ones.value, ones.se) == pytest.approx((plain.value, plain.se), abs=1e-13)
    assert torch.allclose(ones.influence, plain.influence, rtol=0, atol=1e-12)
    still = importance.entropy_change(f, f.clone(), w, w.clone(), (t, t.clone()))
    assert (still.value, still.se) == (0.0, 0.0)


@pytest.mark.parametrize("prompts", [2, 5, 16])
def test_interval_of_a_change_is_that_of_t(prompts: int) -> None:
    """ΔĤ ± t_{B−1}·SE; a normal quantile, or N−1 degrees of freedom, is seen to be narrower."""
    change = importance.Change(1.0, 0.3, 0.2, torch.zeros(prompts, 4, dtype=torch.float64))
    for level in (0.5, 0.95):
        expected = stats.t.interval(level, prompts - 1, loc=0.3, scale=0.2)
        assert change.interval(level) == pytest.approx(tuple(map(float, expected)), rel=1e-12)
        narrower = (stats.norm.interval(level, 0.3, 0.2), stats.t.interval(level, 4 * prompts - 1, 0.3, 0.2))
        assert all(change.interval(level)[1] > high * (1 + 1e-3) for _, high in narrower)
    assert change.interval() == change.interval(0.95)


# advantages, slopes


def recipe_of(**first_order: Any) -> Recipe:
    return RecipeConfig().of(FirstOrderConfig(**first_order), UpdateConfig())


def batch_of(rewards: Tensor, lengths: Tensor) -> update_weights.UpdateBatch:
    nothing = torch.zeros(rewards.shape, dtype=torch.long)
    return update_weights.UpdateBatch(rewards.double(), lengths, nothing.bool(), nothing, 10)


def advantages_of(rewards: Tensor, rule: str) -> Tensor:
    return update_weights.advantages(recipe_of(advantage=rule), batch_of(rewards, torch.ones_like(rewards).long()))


def test_advantages_and_weights() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    assert advantages_of(rewards, "centered")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages_of(rewards, "raw").equal(rewards)
    grpo = advantages_of(rewards, "grpo")
    assert grpo[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert grpo[1].tolist() == [0.0] * 4
    for rule, expected in (("centered", [False, True]), ("grpo", [False, True]), ("raw", [False, False])):
        assert advantages.zero_advantage(advantages_of(rewards, rule), rewards).tolist() == expected
    thirds = torch.full((1, 7), 0.1, dtype=torch.float64)
    assert advantages.zero_advantage(advantages_of(thirds, "centered"), thirds).tolist() == [True]
    lengths = torch.tensor([[2, 4, 1, 1], [3, 3, 3, 3]])
    expected = {
        "lmax": [1 / 16] * 4,
        "sequence_mean": [1 / 8, 1 / 16, 1 / 4, 1 / 4],
        "token_mean": [1 / 8] * 4,
        "constant": [1 / 40] * 4,
    }
    for rule, weights in expected.items():
        recipe = recipe_of(loss=rule)
        found = 2 * update_weights.normaliser(recipe, batch_of(torch.zeros(2, 4), lengths))
        assert found[0].tolist() == pytest.approx(weights, rel=1e-15), rule


def test_x_weights_leave_one_out_and_carry_no_gradient() -> None:
    s = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64, requires_grad=True)
    weights = advantages.x_weights(s)
    assert weights[0].tolist() == pytest.approx([-1.0, -0.5, 1.5])
    assert not weights.requires_grad


def test_rb_slope_counts_later_entropies_only() -> None:
    entropy = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=torch.float64)
    d_logp = torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64)
    coefficients = baselines.rb_coefficients(entropy, torch.tensor([[3]]), "hk")
    assert slope.rb_slope(coefficients, d_logp, torch.zeros_like(entropy)).value == 1 * 6 + 10 * 4 + 100 * 0


def test_per_token_slope_against_loops() -> None:
    """(1/ΣT)·[Σ(R − h̄T)·D_vS + ΣD_vR]; its per-prompt terms add up to it. Seen to fail: R − h̄ for R − h̄T."""
    r, d_s, d_r = (random_matrix(4, 3, seed) for seed in (1, 2, 3))
    lengths = torch.randint(1, 9, (4, 3), generator=torch.Generator().manual_seed(4)).double()
    rows = list(zip(*(x.flatten().tolist() for x in (r, lengths, d_s, d_r)), strict=True))
    count = math.fsum(t for _, t, _, _ in rows)
    h = math.fsum(x for x, _, _, _ in rows) / count
    found = slope.per_token_slope(r, lengths, d_s, d_r)
    assert found.value == pytest.approx(math.fsum((x - h * t) * s + d for x, t, s, d in rows) / count, abs=1e-14)
    assert found.value != pytest.approx(math.fsum((x - h) * s + d for x, _, s, d in rows) / count, rel=1e-3)
    assert found.per_prompt.shape == (4,)


# Adam


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_direction_is_torchs_own_step(cls: type, amsgrad: bool, maximize: bool, weight_decay: float) -> None:
    """(θ' − θ)/lr of a real step in float64, after steps that filled the moments: equal to 1e-12 of ‖v‖."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    lr = 1e-4
    optimizer = cls([parameter], lr=lr, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, eps=1e-6)
    for size in (1.0, 3.0, 0.1):
        parameter.grad = size * torch.randn_like(parameter)
        optimizer.step()
    state = optimizer.state[parameter]
    hyper = adam.AdamHyper(
        lr, 0.9, 0.999, 1e-6, weight_decay, decoupled=cls is torch.optim.AdamW, amsgrad=amsgrad, maximize=maximize
    )
    ascent = torch.randn_like(parameter)
    v0, diagonal = adam.adam_direction(
        parameter.detach(),
        ascent,
        state["exp_avg"].clone(),
        state["exp_avg_sq"].clone(),
        state["max_exp_avg_sq"].clone() if amsgrad else None,
        float(state["step"]),
        hyper,
    )
    before = parameter.detach().clone()
    parameter.grad = -ascent
    optimizer.step()
    step = (parameter.detach() - before) / lr
    v = v0 + diagonal * ascent
    cosine = float((v * step).sum() / (v.norm() * step.norm()))
    # θ is of order 1 and lr 1e-4: the difference θ' − θ keeps 1e-16/1e-4 = 1e-12 of v
    assert 1 - cosine < 1e-12
    assert abs(float(v.norm() / step.norm()) - 1) < 1e-10
    assert torch.allclose(v, step, rtol=0, atol=1e-11)


def test_preconditioner_is_bias_corrected() -> None:
    p = adam.preconditioner(torch.tensor([0.0, 1e-3]), step=5, beta2=0.999, eps=1e-8)
    assert p.tolist() == pytest.approx([1e8, 1 / (math.sqrt(1e-3 / (1 - 0.999**5)) + 1e-8)], rel=1e-7)
