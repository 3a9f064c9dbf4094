"""Every statistical claim of the estimators, on a policy whose responses can be enumerated (tests/oracle.py).

At least 4000 replications under fixed seeds; "unbiased" is |z| < 4 against the exact value. Wherever a claim could pass
for lack of power, the same test plants the wrong formula and sees it fail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property, partial

import pytest
import torch
from scipy import stats
from torch import Tensor

import oracle
from entropy_probe import ProbeConfig
from entropy_probe.config import FirstOrderConfig, RecipeConfig, UpdateConfig
from entropy_probe.estimators import importance, performance_difference, slope, two_batch, ustat
from entropy_probe.estimators.advantages import x_weights
from entropy_probe.estimators.baselines import BASELINES, Baseline, rb_coefficients
from entropy_probe.estimators.prediction import predict
from entropy_probe.estimators.resolution import next_step_interval, prompts_to_draw
from entropy_probe.estimators.token_stats import baseline_features
from entropy_probe.estimators.update_weights import UpdateBatch, update_weights
from entropy_probe.stages import entropy_change
from entropy_probe.stages.gradients.payloads import per_token_payload
from entropy_probe.stages.gradients.unit_gradients import UnitGradients
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.share import Units
from entropy_probe.stages.slopes import cross_fitted_slope
from entropy_probe.stages.update import UpdateDirection
from oracle import LIMIT, NUM_PARAMETERS, Draw, Oracle, PerToken, Regime

REPLICATIONS, GROUP = 4000, 4
CASES = [("strong", 8), ("strong", 16), ("strong", 32), ("strong", 64), ("sharpening", 16), ("sharpening", 64)]
CASES += [("weak", 8), ("weak", 16), ("weak", 64)]
REGIMES = {f.__name__: f for f in (oracle.strong, oracle.sharpening, oracle.weak, oracle.solved)}


def z_score(values: Tensor, exact: Tensor | float) -> Tensor:
    """(mean − exact)/(sd/√R) over the first axis; 0 where every replication gives the exact value."""
    off = values.mean(0) - exact
    error = values.std(0) / math.sqrt(len(values))
    return torch.where((off.abs() < 1e-12) & (error < 1e-12), 0.0, off / error)


def unbiased(values: Tensor, exact: Tensor | float) -> bool:
    return bool((z_score(values, exact).abs() < 4).all())


def per_group(values: Tensor) -> Tensor:
    """[R, B, G, ...] → [R·B, G, ...]: what acts within a prompt's group takes all replications at once."""
    return values.flatten(0, 1)


def x_of(model: Oracle, draw: Draw) -> Tensor:
    weights = x_weights(per_group(draw.of(model.seq_logp)))
    return model.weighted_gradient(draw, weights.reshape(draw.responses.shape))


def y_of(model: Oracle, draw: Draw, advantage: str = "centered", loss: str = "lmax", limit: int = LIMIT) -> Tensor:
    first_order = FirstOrderConfig.model_validate({"advantage": advantage, "loss": loss})
    rewards = per_group(draw.of(model.rewards))
    nothing = torch.zeros(rewards.shape, dtype=torch.long)
    batch = UpdateBatch(rewards, per_group(draw.lengths), nothing.bool(), nothing, limit)
    found = update_weights(RecipeConfig().of(first_order, UpdateConfig()), batch).of_responses
    assert found is not None
    weights = len(rewards) * found
    return model.weighted_gradient(draw, weights.reshape(draw.responses.shape))


def grams(regime: Regime, units: int, seed: int) -> Tensor:
    """K = XPYᵀ of every replication [R, U, U], a unit is a prompt."""
    draw = regime.oracle.draw(REPLICATIONS, units, GROUP, seed)
    return (x_of(regime.oracle, draw) * regime.precond) @ y_of(regime.oracle, draw).transpose(1, 2)


def first_order(regime: Regime) -> float:
    """The population value of U_cross: E[X]ᵀP E[Y]."""
    return float(regime.oracle.mean_x @ (regime.precond * regime.oracle.mean_y(GROUP)))


@cache
def kernel_variances(name: str) -> tuple[float, float]:
    """(ζ₁, ζ₂) of h = ½(X₁ᵀPY₂ + X₂ᵀPY₁): ζ₁ = Var E[h|1] with the exact means, ζ₂ = Var h, over 5·10⁴ units."""
    regime = REGIMES[name]()
    model, p = regime.oracle, regime.precond
    draw = model.draw(50_000, 1, GROUP, seed=90)
    x, y = x_of(model, draw)[:, 0], y_of(model, draw)[:, 0]
    zeta1 = float((0.5 * (x @ (p * model.mean_y(GROUP)) + y @ (p * model.mean_x))).var())
    xx, yy, xy = ((p.sqrt() * a).T @ (p.sqrt() * b) / len(a) for a, b in ((x, x), (y, y), (x, y)))
    return zeta1, 0.5 * float((xx * yy).sum() + (xy * xy.T).sum()) - first_order(regime) ** 2


@dataclass(frozen=True)
class Replicated:
    """What `u_statistic` says in each replication [R], and the exact value."""

    u_cross: Tensor
    se_plugin: Tensor
    se_jackknife: Tensor
    var_unbiased: Tensor
    exact: float
    units: int

    @property
    def true_se(self) -> float:
        return math.sqrt(float((self.u_cross - self.exact).square().mean()))

    def ratio(self, se: Tensor) -> float:
        """√E[SE²] over the true SE. Its own Monte Carlo error is 0.011 for normal values."""
        return math.sqrt(float(se.square().mean())) / self.true_se

    def coverage(self, se: Tensor) -> float:
        """Share of U_cross ± t_{U−1}·SE that hold the exact value. Its own standard error is 0.0035 at 0.95."""
        half = float(stats.t.ppf(0.975, self.units - 1)) * se
        return float(((self.u_cross - self.exact).abs() <= half).double().mean())


@cache
def replicated(name: str, units: int) -> Replicated:
    regime = REGIMES[name]()
    columns = []
    for gram in grams(regime, units, seed=units):
        s = ustat.u_statistic(ustat.cross_moments(gram), gram)
        columns.append((s.u_cross, s.se_plugin, s.se_jackknife, s.var_unbiased))
    values = torch.tensor(columns, dtype=torch.float64).T
    return Replicated(values[0], values[1], values[2], values[3], first_order(regime), units)


# The oracle itself


def test_the_enumeration_is_complete() -> None:
    """Probabilities sum to 1 and E[∇S] = 0 to rounding; E[X] = −∇H by autograd is −E[S∇S] by summation; δH₁, curvature
    and ΔH(η) agree: ΔH is cubic beyond slope and curvature (remainder 8-fold smaller at η/2)."""
    model = oracle.strong().oracle
    p = model.probability
    assert torch.allclose(p.sum(-1), torch.ones(oracle.PROMPTS, dtype=torch.float64), atol=1e-14)
    assert float(torch.einsum("ps,psd->pd", p, model.gradient).abs().max()) < 1e-14
    covariance = torch.einsum("ps,ps,psd->d", p, model.seq_logp, model.gradient) / oracle.PROMPTS
    assert torch.allclose(model.mean_x, covariance, atol=1e-13)
    assert torch.allclose((p * model.rb_sum).sum(-1).mean(), model.entropy(model.theta), atol=1e-13)
    v = oracle.strong().precond * model.mean_y(GROUP)
    v = v / v.norm()

    def remainder(eta: float) -> float:
        change = model.entropy(model.theta + eta * v) - model.entropy(model.theta)
        return float(change - eta * model.entropy_gradient @ v - 0.5 * eta**2 * model.curvature(v))

    assert remainder(0.02) / remainder(0.01) == pytest.approx(8, rel=0.05)


def test_the_regimes_are_what_they_are_called() -> None:
    """ζ₂ ≤ (U−1)ζ₁/10 from U = 32 in `strong`, at U = 64 in `sharpening`; ζ₂ > 6·64·ζ₁ in `weak`. ζ₂ ≥ 2ζ₁ always."""
    ratio = {name: kernel_variances(name)[1] / kernel_variances(name)[0] for name in REGIMES}
    assert 2 <= ratio["strong"] <= 3.1
    assert 2 <= ratio["sharpening"] <= 6.3
    assert ratio["weak"] > 6 * 64
    model = oracle.solved().oracle
    assert float((model.probability * model.rewards).sum(-1).mean()) > 0.98


# Per-prompt gradients


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_x_is_minus_the_gradient_of_the_entropy(name: str) -> None:
    """E[X] = −∇H in every parameter. Seen to fail: gradients through the bracket of L_X = mean((S − loo)·S) give 2X."""
    model = REGIMES[name]().oracle
    draw = model.draw(REPLICATIONS, 8, GROUP, seed=1)
    assert unbiased(x_of(model, draw).mean(1), model.mean_x)

    def through_autograd(*, detached: bool) -> Tensor:
        s = per_group(draw.of(model.seq_logp)).requires_grad_()
        others = (s.sum(1, keepdim=True) - s) / (GROUP - 1)
        bracket = (s - others).detach() if detached else s - others
        weights = torch.autograd.grad((bracket * s).mean(1).sum(), s)[0]
        return model.weighted_gradient(draw, weights.reshape(draw.responses.shape)).mean(1)

    assert unbiased(through_autograd(detached=True), model.mean_x)
    undetached = through_autograd(detached=False)
    assert not unbiased(undetached, model.mean_x)
    assert unbiased(undetached, 2 * model.mean_x)


@pytest.mark.parametrize("advantage", ["centered", "grpo", "raw"])
@pytest.mark.parametrize("loss", ["lmax", "sequence_mean", "token_mean", "constant"])
def test_y_has_its_exact_mean(advantage: str, loss: str) -> None:
    """E[Y] of every rule, whose divisor may depend on the whole group, in every parameter. Seen to fail: the mean of a
    group of two."""
    model = oracle.strong().oracle
    y = y_of(model, model.draw(REPLICATIONS, 4, GROUP, seed=2), advantage, loss).mean(1)
    assert unbiased(y, model.mean_y(GROUP, advantage, loss))
    if (advantage, loss) not in {("raw", "sequence_mean"), ("raw", "constant")}:  # these two do not depend on G
        assert not unbiased(y, model.mean_y(2, advantage, loss))


# U_cross and its standard errors


@pytest.mark.parametrize(("name", "units"), CASES)
def test_u_cross_and_its_unbiased_variance_are_unbiased(name: str, units: int) -> None:
    """E[U_cross] = E[X]ᵀP E[Y]; E[var_unbiased] = E(U_cross − exact)², which is Hoeffding's
    [4(U−2)ζ₁ + 2ζ₂]/(U(U−1)) within 8 % (over three Monte Carlo errors of a variance from 4000 replications)."""
    r = replicated(name, units)
    assert unbiased(r.u_cross, r.exact)
    assert unbiased(r.var_unbiased - (r.u_cross - r.exact).square(), 0.0)
    zeta1, zeta2 = kernel_variances(name)
    hoeffding = (4 * (units - 2) * zeta1 + 2 * zeta2) / (units * (units - 1))
    assert r.true_se**2 == pytest.approx(hoeffding, rel=0.08)


@pytest.mark.parametrize("units", [5, 7])
def test_variances_have_their_exact_means(units: int) -> None:
    """Three kinds of unit, every sample of U of them with its probability: E[var_unbiased] is the variance of U_cross,
    Hoeffding's, and E[Q/(U−1)] its formula, to 1e-12: no Monte Carlo error hides a term of order 1/U²."""
    k = torch.randn(3, 3, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    h = 0.5 * (k + k.T)
    mean, projection = float(p @ h @ p), h @ p
    zeta1, zeta2 = float(p @ projection.square()) - mean**2, float(p @ h.square() @ p) - mean**2
    samples = torch.cartesian_prod(*[torch.arange(3)] * units)
    chance = p[samples].prod(1)
    found = [ustat.u_statistic(ustat.cross_moments(k[s][:, s]), k[s][:, s]) for s in samples]
    u, v, zeta = torch.tensor([(f.u_cross, f.var_unbiased, f.zeta1_plugin) for f in found], dtype=torch.float64).T
    variance = (4 * (units - 2) * zeta1 + 2 * zeta2) / (units * (units - 1))
    assert float(chance @ u) == pytest.approx(mean, rel=1e-12)
    assert float(chance @ (u - mean).square()) == pytest.approx(variance, rel=1e-12)
    assert float(chance @ v) == pytest.approx(variance, rel=1e-12)
    expected = (units - 2) * (zeta2 + (units - 4) * zeta1) / (units - 1) ** 2
    assert float(chance @ zeta) == pytest.approx(expected, rel=1e-12)


def test_wrong_first_order_terms_are_seen() -> None:
    """P twice, the diagonal left in, and a fixed set of prompts (P mostly on what prompts do not share) are each
    biased: |z| > 4."""

    def u_cross(gram: Tensor) -> Tensor:
        return torch.tensor([ustat.cross_moments(k).u_cross for k in gram], dtype=torch.float64)

    regime = oracle.sharpening()
    model, exact = regime.oracle, first_order(regime)
    draw = model.draw(REPLICATIONS, 16, GROUP, seed=3)
    x, y = x_of(model, draw), y_of(model, draw).transpose(1, 2)
    once = (x * regime.precond) @ y
    assert unbiased(u_cross(once), exact)
    assert not unbiased(u_cross((x * regime.precond**2) @ y), exact)
    assert not unbiased(once.mean((1, 2)), exact)
    own = torch.full((NUM_PARAMETERS,), 0.01, dtype=torch.float64)
    own[: oracle.SIZES["prompt"]] = 1.0
    exact = first_order(Regime(model, own))
    for fixed_set in (False, True):
        draw = model.draw(REPLICATIONS, oracle.PROMPTS, GROUP, seed=4, fixed_set=fixed_set)
        gram = (x_of(model, draw) * own) @ y_of(model, draw).transpose(1, 2)
        assert unbiased(u_cross(gram), exact) != fixed_set


@pytest.mark.parametrize(("name", "units"), [("strong", 32), ("strong", 64), ("sharpening", 64)])
def test_plugin_and_jackknife_where_the_signal_is_strong(name: str, units: int) -> None:
    """Both within 5 % of the true SE where ζ₂ ≤ (U−1)ζ₁/10. Seen to fail: ζ̂₁ = U/(4(U−1))·Q makes the SE √U/2 too
    large."""
    zeta1, zeta2 = kernel_variances(name)
    r = replicated(name, units)
    assert zeta2 <= (units - 1) * zeta1 / 10
    assert r.ratio(r.se_plugin) == pytest.approx(1, abs=0.05)
    assert r.ratio(r.se_jackknife) == pytest.approx(1, abs=0.05)
    assert r.ratio(r.se_plugin * math.sqrt(units) / 2) > 2


@pytest.mark.parametrize(("name", "units"), CASES)
def test_standard_errors_are_where_the_formula_puts_them(name: str, units: int) -> None:
    """E[Q/(U−1)] = (U−2)[ζ₂+(U−4)ζ₁]/(U−1)². With ζ₂ ≥ 2ζ₁, plug-in/true is at least (U−2)/(U−1), and the jackknife,
    (U−1)/(U−2) times it, never below the truth. The plug-in is below 0.95 of it only for U ≤ 20.
    0.04: three Monte Carlo errors of the ratio."""
    zeta1, zeta2 = kernel_variances(name)
    mean_square = 4 / units * (units - 2) * (zeta2 + (units - 4) * zeta1) / (units - 1) ** 2
    hoeffding = (4 * (units - 2) * zeta1 + 2 * zeta2) / (units * (units - 1))
    expected = math.sqrt(mean_square / hoeffding)
    r = replicated(name, units)
    assert r.ratio(r.se_plugin) == pytest.approx(expected, abs=0.04)
    assert expected >= (units - 2) / (units - 1)
    assert r.ratio(r.se_jackknife) >= 0.95
    assert units <= 20 or r.ratio(r.se_plugin) >= 0.95


@pytest.mark.parametrize("units", [16, 64])
@pytest.mark.parametrize("name", ["strong", "weak"])
def test_intervals_cover(name: str, units: int) -> None:
    """U_cross ± t_{U−1}·se_plugin holds the exact value in at least 93 %. Seen to fail: half the SE."""
    r = replicated(name, units)
    assert r.coverage(r.se_plugin) >= 0.93
    assert r.coverage(r.se_plugin / 2) < 0.93


def test_intervals_fall_short_where_the_kernel_skews() -> None:
    """A known limit: at U = 16 the interval of `sharpening` covers 90 to 93 %, and of `solved`, where most batches hold
    no group with two different rewards, less than 60 % (80 % at U = 64), although the SE is above the truth."""
    r = replicated("sharpening", 16)
    assert 0.90 < r.coverage(r.se_plugin) < 0.93
    for units, most in ((16, 0.6), (64, 0.8)):
        r = replicated("solved", units)
        assert r.coverage(r.se_plugin) < most
        assert r.ratio(r.se_plugin) > 1


# Two batches


@pytest.mark.parametrize(("size_e", "size_u"), [(16, 16), (16, 64)])
@pytest.mark.parametrize("name", ["strong", "weak"])
def test_two_batches(name: str, size_e: int, size_u: int) -> None:
    """E[bars_dot] = E[X]ᵀP E[Y]. s²(s_k)/B_E + s²(t_m)/B_U − s²_int/(B_E·B_U) is unbiased for its variance; √E[SE²] is
    0.95 to 1.10 of the truth, in `weak` too, where the floor keeps one estimate in six from being negative;
    t-intervals cover 93 % and more. Seen to fail in `weak`: without subtracting s²_int, over 1.30; with the larger
    single term for a floor, over 1.15."""
    regime = REGIMES[name]()
    model, exact = regime.oracle, first_order(regime)
    x = x_of(model, model.draw(REPLICATIONS, size_e, GROUP, seed=5)) * regime.precond
    y = y_of(model, model.draw(REPLICATIONS, size_u, GROUP, seed=6)).transpose(1, 2)
    grams = x @ y
    ones_e, ones_u = (torch.ones(size, dtype=torch.long) for size in (size_e, size_u))
    moments = [two_batch.two_batch_moments(gram, ones_e, ones_u) for gram in grams]
    values = torch.tensor([m.bars_dot for m in moments], dtype=torch.float64)
    total = torch.tensor([m.total_se for m in moments], dtype=torch.float64)
    squared_error = (values - exact).square()
    assert unbiased(values, exact)
    over_e, over_u = grams.mean(2), grams.mean(1)
    residual = grams - over_e[:, :, None] - over_u[:, None, :] + values[:, None, None]
    interaction = residual.square().sum((1, 2)) / ((size_e - 1) * (size_u - 1) * size_e * size_u)
    single = over_e.var(1) / size_e + over_u.var(1) / size_u
    assert unbiased(single - interaction - squared_error, 0.0)

    def ratio(variance: Tensor) -> float:
        return math.sqrt(float(variance.mean() / squared_error.mean()))

    assert 0.95 <= ratio(total.square()) <= 1.10
    half = float(stats.t.ppf(0.975, min(size_e, size_u) - 1)) * total
    assert float(((values - exact).abs() <= half).double().mean()) >= 0.93
    if name == "weak":
        assert ratio(single) > 1.30
        larger = torch.maximum(over_e.var(1) / size_e, over_u.var(1) / size_u)
        assert ratio(torch.maximum(single - interaction, larger)) > 1.15


def test_two_batches_given_the_update() -> None:
    """s²(s_k)/B_E is the variance over E batches for one and the same Ȳ: SE within 5 % of the truth."""
    regime = oracle.strong()
    model = regime.oracle
    x = x_of(model, model.draw(REPLICATIONS, 16, GROUP, seed=5)) * regime.precond
    y = y_of(model, model.draw(1, 8, GROUP, seed=6))[0].T
    sizes = torch.ones(16, dtype=torch.long), torch.ones(8, dtype=torch.long)
    moments = [two_batch.two_batch_moments(gram, *sizes) for gram in x @ y]
    values, se = torch.tensor([(m.bars_dot, m.conditional_se) for m in moments], dtype=torch.float64).T
    assert unbiased(values, float(model.mean_x @ (regime.precond * y.mean(1))))
    assert float(se.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.05)


# Slope and curvature along a fixed v


def fixed_direction(regime: Regime) -> Tensor:
    """P·E[Y], and something of a direction that no gradient has: v of length 1."""
    towards = regime.precond * regime.oracle.mean_y(GROUP)
    v = towards / towards.norm() + 0.1 * torch.sin(torch.arange(NUM_PARAMETERS, dtype=torch.float64))
    return v / v.norm()


def coefficients_of(model: Oracle, draw: Draw, baseline: Baseline, features: Tensor | None = None) -> Tensor:
    """c_t [R, B, G, LIMIT], replication by replication: others are others of the same batch."""
    entropy = draw.of(model.tokens.entropy)
    if baseline != "hk_ridge":  # its folds have as many rows as there are tokens
        of_one = partial(rb_coefficients, baseline=baseline)
        return torch.vmap(of_one)(entropy, draw.lengths)
    if features is None:
        features = draw.of(baseline_features(model.step_logp, 1.0, 1.0, LIMIT))
    batches = zip(entropy, draw.lengths, features, strict=True)
    return torch.stack([rb_coefficients(entropy, lengths, baseline, phi) for entropy, lengths, phi in batches])


@dataclass(frozen=True)
class SlopeTerms:
    """Per-prompt terms of ∇Hᵀv [R, B]."""

    per_prompt: Tensor

    @property
    def values(self) -> Tensor:
        return self.per_prompt.mean(1)

    @property
    def se_ratio(self) -> float:
        """√E[SE²] of `PromptMean` over the true SE. Its own Monte Carlo error is 0.011 for normal values."""
        se = torch.tensor([slope.PromptMean(row).se for row in self.per_prompt], dtype=torch.float64)
        return float(se.square().mean().sqrt() / self.values.std())


def rb_terms(draw: Draw, first: PerToken, coefficients: Tensor) -> SlopeTerms:
    tables = (per_group(values) for values in (coefficients, draw.of(first.logp), draw.of(first.entropy)))
    return SlopeTerms(slope.rb_slope(*tables).per_prompt.reshape(draw.prompts.shape))


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_slopes_are_unbiased(name: str) -> None:
    """Naive, and RB with each baseline, have mean ∇Hᵀv, and RB has mean ∇H in every parameter; √E[SE²] = sd/√B is
    within 5 % of the true SE; `hk_ema`, `hk_ridge` and `hk_group` have at most 0.7 of the SE of `hk`, which has at most
    0.7 of that of `none`. Seen to fail: the mean over the whole group for a baseline (its factor is 1 − 1/G), R_{≥t} of
    the next step, no D_vH_t."""
    regime = REGIMES[name]()
    model, v = regime.oracle, fixed_direction(regime)
    exact = float(model.entropy_gradient @ v)
    first, _ = model.along(v)
    draw = model.draw(REPLICATIONS, 16, GROUP, seed=7)
    seq_logp, d_seq_logp = per_group(draw.of(model.seq_logp)), per_group(draw.of(first.logp).sum(-1))

    def of_replication(per_prompt: Tensor) -> Tensor:
        return per_prompt.reshape(REPLICATIONS, 16)

    naive = SlopeTerms(of_replication(slope.naive_slope(seq_logp, d_seq_logp).per_prompt))
    coefficients = {baseline: coefficients_of(model, draw, baseline) for baseline in BASELINES}
    gradients = model.rb_gradients(draw, coefficients.values())
    assert all(unbiased(gradient, model.entropy_gradient) for gradient in gradients)
    rb = {baseline: rb_terms(draw, first, c) for baseline, c in coefficients.items()}
    for terms in (naive, *rb.values()):
        assert unbiased(terms.values, exact)
        assert terms.se_ratio == pytest.approx(1, abs=0.05)
    none, hk, ema, ridge, group = (float(terms.values.std()) for terms in rb.values())
    assert max(hk / none, ema / hk, ridge / hk, group / hk) < 0.7
    whole_group = of_replication(-((seq_logp - seq_logp.mean(1, keepdim=True)) * d_seq_logp).mean(1))
    entropy = draw.of(model.tokens.entropy)
    later = entropy.flip(-1).cumsum(-1).flip(-1) - entropy
    next_step = rb_terms(draw, first, later.roll(-1, -1)).per_prompt
    without_own = rb["hk"].per_prompt - of_replication(per_group(draw.of(first.entropy)).sum(-1).mean(1))
    for wrong in (whole_group, next_step, without_own):
        assert name != "strong" or not unbiased(wrong.mean(1), exact)


def test_baselines_from_three_other_prompts() -> None:
    """Few others weigh most: E = ∇H in every parameter, and its product with v is the slope along v. `hk_ema`,
    `hk_ridge` and `hk_group` couple the prompts, and sd/√B leaves their covariance out: along this steep v it is 0.82
    to 0.94 of the true SE (0.90 and 0.86 over 10⁴ replications; 0.95 and 0.92 with eight prompts), for `none` and `hk`
    within 5 % of it. 0.04: three Monte Carlo errors of the ratio."""
    regime = oracle.sharpening()
    model, v = regime.oracle, fixed_direction(regime)
    first, _ = model.along(v)
    draw = model.draw(REPLICATIONS, 4, GROUP, seed=15)
    of_each = {baseline: coefficients_of(model, draw, baseline) for baseline in BASELINES}
    gradients = model.rb_gradients(draw, of_each.values())
    for (baseline, coefficients), gradient in zip(of_each.items(), gradients, strict=True):
        terms = rb_terms(draw, first, coefficients)
        assert unbiased(gradient, model.entropy_gradient)
        assert unbiased(terms.values, model.entropy_gradient @ v)
        assert torch.allclose(gradient @ v, terms.values, rtol=0, atol=1e-12)
        low, high = (0.95, 1.05) if baseline in ("none", "hk") else (0.82, 0.94)
        assert low <= terms.se_ratio <= high


@pytest.mark.parametrize(("baseline", "fault"), [("hk_ema", "own"), ("hk_ridge", "own"), ("hk_ridge", "t/T")])
def test_a_baseline_that_sees_the_response_is_biased(baseline: Baseline, fault: str) -> None:
    """`own`: every prompt stands twice in the batch, in two folds, so that its own responses enter the mean and the
    fit. `t/T`: the position is relative to the response's own length. 1000 replications show both, in the gradient and
    in the slope along v."""
    regime = oracle.strong()
    model, v = regime.oracle, fixed_direction(regime)
    draw = model.draw(1000, 4, GROUP, seed=16)
    if fault == "own":
        twice = Draw(draw.prompts.repeat(1, 2), draw.responses.repeat(1, 2, 1))
        wrong = coefficients_of(model, twice, baseline)[:, :4]
    else:
        features = draw.of(baseline_features(model.step_logp, 1.0, 1.0, LIMIT))
        features[..., -1] *= LIMIT / draw.lengths[..., None]
        wrong = coefficients_of(model, draw, baseline, features)
    gradient = model.rb_gradient(draw, wrong)
    assert not unbiased(gradient, model.entropy_gradient)
    assert not unbiased(gradient @ v, model.entropy_gradient @ v)


@dataclass(frozen=True)
class ByTokens:
    """A policy, a direction, and 4000 batches of 16 × 6 responses with the coefficients of `hk_group`."""

    model: Oracle
    v: Tensor
    draw: Draw
    coefficients: Tensor

    @classmethod
    @cache
    def of(cls, name: str) -> ByTokens:
        regime = REGIMES[name]()
        model, v = regime.oracle, fixed_direction(regime)
        draw = model.draw(REPLICATIONS, 16, 6, seed=8)
        batches = zip(draw.of(model.tokens.entropy), draw.lengths, strict=True)
        return cls(
            model, v, draw, torch.stack([performance_difference.coefficients(*b, "hk_group") for b in batches], 1)
        )

    def expansions(self, coefficients: Tensor | None = None) -> list[performance_difference.Expansion]:
        first, second = self.model.along(self.v)
        tables = [self.draw.of(of) for of in (first.logp, first.entropy, second.logp, second.entropy)]
        c = self.coefficients if coefficients is None else coefficients
        return [
            performance_difference.expansion(*of_one, c[:, i]) for i, of_one in enumerate(zip(*tables, strict=True))
        ]

    def terms(self, eta: float, coefficients: Tensor | None = None) -> Tensor:
        """[2, R, B, G]"""
        moved = Oracle(self.model.theta + eta * self.v, self.model.rewards).tokens
        tables = [self.model.tokens.logp, self.model.tokens.entropy, moved.logp, moved.entropy]
        c = self.coefficients if coefficients is None else coefficients
        of_all = performance_difference.change_terms(*(per_group(self.draw.of(t)) for t in tables), c.flatten(1, 2))
        return of_all.reshape(2, *self.draw.responses.shape)

    @cached_property
    def sums(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.draw.of(self.model.rb_sum), self.draw.lengths.double(), strict=True))


def covered(found: list[importance.Change] | list[slope.PromptMean], exact: float, prompts: int = 16) -> float:
    """Share of value ± t·SE that hold the exact value. Its own standard error is 0.0034 at 0.95."""
    half = float(stats.t.ppf(0.975, prompts - 1))
    return sum(abs(one.value - exact) <= half * one.se for one in found) / len(found)


def values_of(found: list[importance.Change] | list[slope.PromptMean]) -> Tensor:
    return torch.tensor([one.value for one in found], dtype=torch.float64)


@pytest.mark.parametrize("name", ["strong", "weak"])
@pytest.mark.parametrize("spread", [0.055, 0.17, 0.5])
def test_the_change_by_tokens(name: str, spread: float) -> None:
    """At ESS/N of 0.997, 0.97 and 0.78: ΔH is unbiased, and per token to within a fifth of its SE (a ratio); the 95 %
    interval holds in 93 to 97 % of the batches; per token in `weak` in 91 %, as the terms of prompts are skewed there
    and the interval is symmetric (√E[SE²] is right, below). In `strong` four slips are seen: weights that include the
    own token, the coefficient of the next step, no weight of the prefix, and a mean over the own response too."""
    of = ByTokens.of(name)
    model, draw = of.model, of.draw
    eta = step_size(model, of.v, spread)
    theta = model.theta + eta * of.v
    exact = float(model.entropy(theta) - model.entropy(model.theta))
    of_token = float(model.entropy_per_token(theta) - model.entropy_per_token(model.theta))
    terms = of.terms(eta)
    changes = [performance_difference.change_per_response(terms[:, i], r) for i, (r, _) in enumerate(of.sums)]
    tokens = [performance_difference.change_per_token(terms[:, i], *sums) for i, sums in enumerate(of.sums)]
    log_w = draw.of(Oracle(theta, model.rewards).seq_logp - model.seq_logp)
    ess = torch.stack([torch.tensor(importance.snis_weights(w).ess) for w in log_w[:200]]).mean() / log_w[0].numel()
    assert float(ess) == pytest.approx(math.exp(-(spread**2)), abs=0.08)
    assert unbiased(values_of(changes), exact)
    of_tokens = values_of(tokens)
    assert abs(float(of_tokens.mean()) - of_token) < float(of_tokens.std()) / 5
    assert 0.93 <= covered(changes, exact) <= 0.97
    assert (0.93 if name == "strong" else 0.9) <= covered(tokens, of_token) <= 0.97
    if name == "strong" and spread == 0.5:
        moved = Oracle(theta, model.rewards).tokens
        d = draw.of(moved.logp - model.tokens.logp)
        change = draw.of(moved.entropy - model.tokens.entropy)
        c, so_far = of.coefficients[0], d.cumsum(-1)
        entropy = draw.of(model.tokens.entropy)
        own_mean = (entropy.flip(-1).cumsum(-1).flip(-1) - entropy).mean(2, keepdim=True)
        present = torch.arange(LIMIT) < draw.lengths[..., None]
        later = (entropy.flip(-1).cumsum(-1).flip(-1) - entropy) * present
        wrong = {
            "own token": so_far.exp() * (change + torch.expm1(d) * c),
            "no prefix": change + torch.expm1(d) * c,
            "next step": (so_far - d).exp() * (change + torch.expm1(d) * c.roll(-1, -1)),
            "own response": (so_far - d).exp() * (change + torch.expm1(d) * (later - own_mean * present)),
        }
        for slip, terms_of in wrong.items():
            assert not unbiased(terms_of.sum(-1).mean((1, 2)), exact), slip


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_slope_and_curvature_of_the_change(name: str) -> None:
    """Slope and curvature are unbiased, and per token their bias, of order 1/N, is below a fifth of the SE; √E[SE²] is
    within 6 % of the true SE, and the slope's 95 % interval holds in 93 to 97 %, but for `weak` per token. They are the
    derivatives of the very terms of the change, by differences, to 1e-6 of their size. Seen to fail: 2s·D_vH_t once, no
    d²."""
    of = ByTokens.of(name)
    model, v = of.model, of.v
    expansions = of.expansions()
    pairs = [performance_difference.slopes_per_response(one) for one in expansions]
    tokens = [performance_difference.slopes_per_token(one, *of.sums[i]) for i, one in enumerate(expansions)]
    step = 1e-3 / float(v.norm())
    up, still, down = (float(model.entropy_per_token(model.theta + k * step * v)) for k in (1, 0, -1))
    exact = (
        (float(model.entropy_gradient @ v), model.curvature(v)),
        ((up - down) / 2 / step, (up - 2 * still + down) / step**2),
    )
    for found, truth, ratio in ((pairs, exact[0], False), (tokens, exact[1], True)):
        for k in range(2):
            each = [one[k] for one in found]
            values, se = values_of(each), torch.tensor([one.se for one in each], dtype=torch.float64)
            if ratio:
                assert abs(float(values.mean()) - truth[k]) < float(values.std()) / 5
            else:
                assert unbiased(values, truth[k])
            assert float(se.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.06)
        low = 0.9 if ratio and name == "weak" else 0.93
        assert low <= covered([one[0] for one in found], truth[0]) <= 0.97
    h = step_size(model, v, 1e-3)
    above, below = of.terms(h)[:, :50], of.terms(-h)[:, :50]
    first = torch.stack([one.first for one in expansions[:50]], 1)
    second = torch.stack([one.second for one in expansions[:50]], 1)
    assert torch.allclose((above - below) / (2 * h), first, rtol=0, atol=1e-5 * float(first.abs().max()))
    assert torch.allclose((above + below) / h**2, second, rtol=0, atol=1e-4 * float(second.abs().max()))


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_intervals_of_a_batch_that_grew(name: str) -> None:
    """Prompts are drawn from 16 on, up to 64, until the SE of the slope per token is 0.7 of what 16 have on average.
    The 95 % interval of slope and change, per token and per response, holds in 93 to 97 % of 4000 batches (per token
    in `weak` in 91 %, as of a batch that did not grow). Every step has the mean of what is still to come as its
    baseline, and the first 16 of another batch stand for the update's prompts. Worse by 1.5 % in `weak`, where few
    prompts decide: to stop by the own SE alone."""
    model, v = REGIMES[name]().oracle, fixed_direction(REGIMES[name]())
    first, second = model.along(v)
    eta = step_size(model, v, 0.17)
    theta = model.theta + eta * v
    moved = Oracle(theta, model.rewards).tokens
    half = 1e-4 / float(v.norm())
    ends = [float(model.entropy_per_token(model.theta + k * half * v)) for k in (1, -1)]
    exact = (
        (ends[0] - ends[1]) / 2 / half,
        float(model.entropy_gradient @ v),
        float(model.entropy_per_token(theta) - model.entropy_per_token(model.theta)),
        float(model.entropy(theta) - model.entropy(model.theta)),
    )
    most = 64
    draw = model.draw(REPLICATIONS, most, 6, seed=33)
    r, lengths = draw.of(model.rb_sum), draw.lengths.double()
    present = torch.arange(LIMIT) < draw.lengths[..., None]
    c = []
    for of in (draw.of(model.tokens.entropy), present.double()):
        later = of.flip(-1).cumsum(-1).flip(-1) - of
        mean = (later * present).sum((0, 1, 2)) / present.sum((0, 1, 2)).clamp(min=1)
        c.append((later - mean) * present)
    tables = [draw.of(of) for of in (first.logp, first.entropy, second.logp, second.entropy)]
    along = performance_difference.expansion(*map(per_group, tables), torch.stack(list(map(per_group, c))))
    pair = [draw.of(of) for of in (model.tokens.logp, model.tokens.entropy, moved.logp, moved.entropy)]
    terms = performance_difference.change_terms(*map(per_group, pair), torch.stack(list(map(per_group, c))))
    shape = 2, *draw.responses.shape
    along = [
        performance_difference.Expansion(*(t.reshape(shape)[:, i] for t in vars(along).values()))
        for i in range(REPLICATIONS)
    ]
    terms = terms.reshape(shape)

    def look(i: int, size: int) -> slope.PromptMean:
        part = performance_difference.Expansion(along[i].first[:, :size], along[i].second[:, :size])
        return performance_difference.slopes_per_token(part, r[i, :size], lengths[i, :size])[0]

    begun = [look(i, 16) for i in range(REPLICATIONS)]
    target = 0.7 * float(values_of(begun).std())
    held, sizes = torch.zeros(2, 4), []
    for k, doubting in enumerate((True, False)):
        for i in range(REPLICATIONS if doubting or name == "weak" else 0):
            of_update, size, found = begun[i - 1].se * 4, 16, begun[i]
            while more := prompts_to_draw(
                size, max(found.se, of_update / math.sqrt(size) if doubting else 0.0), target, most
            ):
                size += more
                found = look(i, size)
            cut = performance_difference.Expansion(along[i].first[:, :size], along[i].second[:, :size])
            estimates = (
                found,
                performance_difference.slopes_per_response(cut)[0],
                performance_difference.change_per_token(terms[:, i, :size], r[i, :size], lengths[i, :size]),
                performance_difference.change_per_response(terms[:, i, :size], r[i, :size]),
            )
            width = float(stats.t.ppf(0.975, size - 1))
            held[k] += torch.tensor([abs(e.value - x) <= width * e.se for e, x in zip(estimates, exact, strict=True)])
            sizes += [size] if doubting else []
    held /= REPLICATIONS
    assert 20 < sum(sizes) / len(sizes) < 50
    least = torch.tensor([0.91, 0.93, 0.91, 0.93] if name == "weak" else [0.93] * 4)
    assert bool(((held[0] >= least) & (held[0] <= 0.97)).all()), held
    if name == "weak":
        assert held[1][0] < held[0][0] - 0.015, held


def per_token_slopes(model: Oracle, draw: Draw, first: PerToken) -> list[slope.PromptMean]:
    """`per_token_slope` of every replication."""
    tables = (draw.of(model.rb_sum), draw.lengths.double(), draw.of(first.logp).sum(-1), draw.of(first.entropy).sum(-1))
    return [slope.per_token_slope(*of_one) for of_one in zip(*tables, strict=True)]


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_per_token_slope_is_the_derivative_per_token(name: str) -> None:
    """With every response weighted by its probability (R, T and D_vR times p, in which it is linear), the derivative of
    H/E[T] to rounding; over replications its bias is of order 1/N: below a fifth of the SE from 32 prompts, and less
    than a third of that from 8 (the bias itself may be as small as its Monte Carlo error, 1/63 of the SE). Seen to
    fail: without h̄T."""
    model, v = REGIMES[name]().oracle, fixed_direction(REGIMES[name]())
    first, _ = model.along(v)
    d_s, d_r = first.logp.sum(-1), first.entropy.sum(-1)
    p, lengths, exact = model.probability, oracle.LENGTHS.double().expand(oracle.PROMPTS, -1), model.slope_per_token(v)
    assert slope.per_token_slope(p * model.rb_sum, p * lengths, d_s, p * d_r).value == pytest.approx(exact, rel=1e-10)
    without = float((p * (model.rb_sum * d_s + d_r)).sum() / (p * lengths).sum())
    assert without != pytest.approx(exact, rel=0.1)
    few, more = (
        torch.tensor(
            [s.value for s in per_token_slopes(model, model.draw(REPLICATIONS, size, GROUP, seed=18), first)],
            dtype=torch.float64,
        )
        for size in (8, 32)
    )
    error = float(more.std()) / math.sqrt(REPLICATIONS)
    assert abs(float(more.mean()) - exact) < float(more.std()) / 5
    assert abs(float(more.mean()) - exact) < max(abs(float(few.mean()) - exact) / 3, 4 * error)


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_per_token_slope_has_the_right_standard_error(name: str) -> None:
    """√E[SE²] within 5 % of the true SE at 32 prompts. Seen to fail: h̄ and T̄ taken as constants (1.31 in `strong`)."""
    model, v = REGIMES[name]().oracle, fixed_direction(REGIMES[name]())
    found = per_token_slopes(model, model.draw(REPLICATIONS, 32, GROUP, seed=18), model.along(v)[0])
    values, se = torch.tensor([(s.value, s.se) for s in found], dtype=torch.float64).T
    assert float(se.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.05)


@dataclass(frozen=True)
class Linear:
    """v = v₀ + D·Ȳ, with D fixed and momentum against E[Y]: most of v is the noise of its batch."""

    regime: Regime
    v0: Tensor
    diagonal: Tensor

    def along(self, mean_y: Tensor) -> Tensor:
        return self.v0 + mean_y * self.diagonal


def linear(regime: Regime, diagonal: Tensor) -> Linear:
    return Linear(regime, -0.9 * diagonal * regime.oracle.mean_y(GROUP), diagonal)


@pytest.mark.parametrize(("name", "units"), [("strong", 8), ("sharpening", 32), ("weak", 8)])
def test_cross_fitted_slope_is_unbiased(name: str, units: int) -> None:
    """One batch for both sides, D fixed: E[slope_cross] = ∇Hᵀ(v₀ + D·E[Y]). Seen to fail: −X̄ᵀ(v₀ + DȲ), which keeps the
    diagonal X_nᵀDY_n."""
    regime = REGIMES[name]()
    model = regime.oracle
    step = linear(regime, regime.precond)
    exact = float(model.entropy_gradient @ step.along(model.mean_y(GROUP)))
    draw = model.draw(REPLICATIONS, units, GROUP, seed=9)
    x, y = x_of(model, draw), y_of(model, draw)
    direction = UpdateDirection({"θ": step.v0}, {"θ": step.v0}, {"θ": step.diagonal}, grad_norm=0.0, clip_factor=1.0)
    own = Units("exact", torch.arange(units))
    crossed = [
        cross_fitted_slope(UnitGradients({"θ": x[i]}, {"θ": y[i]}, own), direction).value for i in range(REPLICATIONS)
    ]
    assert unbiased(torch.tensor(crossed, dtype=torch.float64), exact)
    plain = -(x.mean(1) * step.along(y.mean(1))).sum(-1)
    assert not unbiased(plain, exact)


@pytest.mark.parametrize("name", ["strong", "sharpening"])
def test_the_interval_of_a_step_by_another_update_batch(name: str) -> None:
    """The first-order change by v₀ + D·Ȳ of a fresh U batch lies within `next_step_interval`, which is made of one E
    and one U batch of 16, in 93 to 97 % of 4000 pairs. Seen to fail: the spread counted once."""
    regime = REGIMES[name]()
    model = regime.oracle
    step = linear(regime, regime.precond)
    e, u, after = (model.draw(REPLICATIONS, 16, GROUP, seed=seed) for seed in (41, 42, 43))
    y, fresh = y_of(model, u), y_of(model, after).mean(1)
    terms = -(x_of(model, e) * (step.v0 + y.mean(1, keepdim=True) * step.diagonal)).sum(-1)
    se = terms.std(1) / 4
    mean_x = x_of(model, e).mean(1, keepdim=True)
    spread = (mean_x * step.diagonal * y).sum(-1).std(1) / 4
    truth = (step.v0 + fresh * step.diagonal) @ model.entropy_gradient

    def held(times: float) -> float:
        ends = [
            next_step_interval(float(t.mean()), float(s), times * float(w), 16)
            for t, s, w in zip(terms, se, spread, strict=True)
        ]
        return sum(low <= float(x) <= high for (low, high), x in zip(ends, truth, strict=True)) / REPLICATIONS

    assert 0.93 <= held(1.0) <= 0.97, held(1.0)
    assert held(0.5**0.5) < 0.93


def test_cross_fitted_slope_per_token() -> None:
    """One batch of 8 for both sides, D fixed: the derivative of H/E[T] along v₀ + D·E[Y], to a bias below a fifth of
    the SE. Seen to fail: the diagonal kept, by ten Monte Carlo errors and more."""
    regime = oracle.sharpening()
    model, own = regime.oracle, Units("exact", torch.arange(8))
    step = linear(regime, regime.precond)
    exact = model.slope_per_token(step.along(model.mean_y(GROUP)))
    draw = model.draw(REPLICATIONS, 8, GROUP, seed=24)
    weights = torch.stack([per_token_payload(of_one).weights for of_one in scores_of(model, draw)])
    x, y = model.weighted_gradient(draw, weights), y_of(model, draw)
    direction = UpdateDirection({"θ": step.v0}, {"θ": step.v0}, {"θ": step.diagonal}, grad_norm=0.0, clip_factor=1.0)
    found = [cross_fitted_slope(UnitGradients({"θ": x[i]}, {"θ": y[i]}, own), direction) for i in range(REPLICATIONS)]
    values, se = torch.tensor([(s.value, s.se) for s in found], dtype=torch.float64).T
    assert abs(float(values.mean()) - exact) < float(values.std()) / 5
    assert float(se.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.1)
    plain = -(x.mean(1) * step.along(y.mean(1))).sum(-1)
    assert abs(float(plain.mean()) - exact) > 10 * float(plain.std()) / math.sqrt(REPLICATIONS)


def test_x_per_token_is_minus_the_gradient_of_the_entropy_per_token() -> None:
    """−X̄ᵀv is the derivative of H/E[T] along v to less than a fifth of its SE at 64 prompts, where that of H is off by
    two SE and more."""
    model, v = oracle.strong().oracle, fixed_direction(oracle.strong())
    draw = model.draw(REPLICATIONS, 64, GROUP, seed=25)
    weights = torch.stack([per_token_payload(of_one).weights for of_one in scores_of(model, draw)])
    along = -(model.weighted_gradient(draw, weights).mean(1) * v).sum(-1)
    assert float(along.mean()) == pytest.approx(model.slope_per_token(v), abs=float(along.std()) / 5)
    assert abs(float(along.mean() - model.entropy_gradient @ v)) > 2 * float(along.std())


# Realised change


def changes(
    model: Oracle, draw: Draw, theta: Tensor, kinds: tuple[str, ...] = ("naive", "rb")
) -> tuple[dict[str, Tensor], Tensor]:
    """ΔĤ and its SE per replication [R, 2], naive, RB and RB per token, and ESS/N [R], put together as in
    `stages.entropy_change`."""
    (s, r), (s_after, r_after) = model.scores(draw, model.theta), model.scores(draw, theta)
    even, lengths = torch.full_like(s[0], 1 / s[0].numel()), draw.lengths.double()
    out: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    ess = []
    for i in range(len(s)):
        weights = importance.snis_weights(s_after[i] - s[i])
        ess.append(weights.ess / s[i].numel())
        for kind in kinds:
            before, after = (-s[i], -s_after[i]) if kind == "naive" else (r[i], r_after[i])
            units = lengths[i] if kind == "per_token" else None
            change = importance.entropy_change(before, after, even, weights.normalised, units)
            out[kind].append((change.value, change.se))
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in out.items()}, torch.tensor(ess, dtype=torch.float64)


def coverage(estimates: Tensor, exact: Tensor, prompts: int) -> float:
    half = float(stats.t.ppf(0.975, prompts - 1)) * estimates[:, 1]
    return float(((estimates[:, 0] - exact).abs() <= half).double().mean())


def step_size(model: Oracle, v: Tensor, spread: float) -> float:
    """η at which the log-weights of v [D], or of the median of v [R, D], have this spread: ESS/N is near
    exp(−spread²)."""
    d_s = (v.reshape(-1, NUM_PARAMETERS) @ model.gradient.flatten(0, 1).T).square()
    return float(spread / ((d_s * model.probability.flatten()).sum(-1) / oracle.PROMPTS).sqrt().median())


def test_change_is_consistent() -> None:
    """With every response weighted by its probability, the batch of infinite size, ΔĤ is ΔH(η) to rounding, naive and
    RB; and the change of H/E[T], with lengths for units. Seen to fail: log-weights old minus new; the lengths at θ⁺
    weighted as those at θ, which misses the change of E[T]."""
    regime = oracle.strong()
    model, v = regime.oracle, fixed_direction(regime)
    theta = model.theta + step_size(model, v, 0.5) * v
    every = Draw(torch.arange(oracle.PROMPTS)[None], torch.arange(len(oracle.RESPONSES)).expand(1, oracle.PROMPTS, -1))
    (s, r), (s_after, r_after) = model.scores(every, model.theta), model.scores(every, theta)
    p = model.probability / oracle.PROMPTS
    exact = float(model.entropy(theta) - model.entropy(model.theta))
    for sign, agrees in ((1, True), (-1, False)):
        weights = importance.snis_weights(p.log() + sign * (s_after - s)[0]).normalised
        for before, after in ((-s[0], -s_after[0]), (r[0], r_after[0])):
            assert (abs(importance.entropy_change(before, after, p, weights).value - exact) < 1e-12) == agrees
        of_token = importance.entropy_change(r[0], r_after[0], p, weights, every.lengths[0].double()).value
        exact_of_token = float(model.entropy_per_token(theta) - model.entropy_per_token(model.theta))
        assert (abs(of_token - exact_of_token) < 1e-12) == agrees
        still = float((p * every.lengths[0]).sum())
        assert abs(exact / still - exact_of_token) > 1e-3 * abs(exact_of_token)


@pytest.mark.parametrize("spread", [-0.25, 0.03, 0.1, 0.28])
@pytest.mark.parametrize("prompts", [16, 64])
@pytest.mark.parametrize("name", ["strong", "weak"])
def test_intervals_of_the_change_cover(name: str, prompts: int, spread: float) -> None:
    """Fresh batch, ESS/N from 0.9 to 0.999 on average: the t-interval of ΔH(η), naive, RB and RB per
    token, covers 93 to 97 %, and the bias, of order 1/N, is below a fifth of the SE. Seen to fail: half the SE."""
    regime = REGIMES[name]()
    model, v = regime.oracle, fixed_direction(regime)
    theta = model.theta + math.copysign(step_size(model, v, abs(spread)), spread) * v
    exact_of_response = model.entropy(theta) - model.entropy(model.theta)
    exact_of_token = model.entropy_per_token(theta) - model.entropy_per_token(model.theta)
    draw = model.draw(REPLICATIONS, prompts, GROUP, seed=10)
    estimates, ess = changes(model, draw, theta, ("naive", "rb", "per_token"))
    assert float(ess.mean()) >= 0.9
    for kind, values in estimates.items():
        exact = exact_of_token if kind == "per_token" else exact_of_response
        assert 0.93 <= coverage(values, exact, prompts) <= 0.97
        assert coverage(values * torch.tensor([1.0, 0.5]), exact, prompts) < 0.93
        assert abs(float(values[:, 0].mean() - exact)) < float(values[:, 0].std()) / 5


@pytest.mark.parametrize("same_batch", [False, True])
def test_the_direction_must_come_from_another_batch(same_batch: bool) -> None:
    """v = v₀ + DȲ of another batch: intervals cover the exact ΔH(η) of each v in 93 to 97 %. Of the same batch:
    less than 75 %."""
    model = oracle.sharpening().oracle
    step = linear(oracle.sharpening(), torch.ones(NUM_PARAMETERS, dtype=torch.float64))
    draw, other = (model.draw(REPLICATIONS, 16, GROUP, seed=seed) for seed in (11, 12))
    v = step.along(y_of(model, draw if same_batch else other).mean(1))
    theta = model.theta + step_size(model, v, 0.2) * v
    exact = model.entropy(theta) - model.entropy(model.theta)
    estimates, ess = changes(model, draw, theta)
    assert float(ess.mean()) >= 0.9
    for values in estimates.values():
        covered = coverage(values, exact, 16)
        assert covered < 0.75 if same_batch else 0.93 <= covered <= 0.97


def test_responses_of_one_prompt_are_not_independent() -> None:
    """The SE that clusters by prompt is within 5 % of the true SE; one that takes responses as independent is below
    0.8, along a v that moves each prompt by itself."""
    model = oracle.strong().oracle
    v = torch.sin(torch.arange(NUM_PARAMETERS, dtype=torch.float64))
    v[oracle.SIZES["prompt"] :] = 0.0
    theta = model.theta + step_size(model, v, 0.25) * v
    draw = model.draw(REPLICATIONS, 64, GROUP, seed=13)
    (_, r), (s_after, r_after) = model.scores(draw, model.theta), model.scores(draw, theta)
    log_weights = s_after - draw.of(model.seq_logp)
    even = torch.full_like(r[0], 1 / r[0].numel())
    found = [
        importance.entropy_change(r[i], r_after[i], even, importance.snis_weights(log_weights[i]).normalised)
        for i in range(REPLICATIONS)
    ]
    true = float(torch.tensor([c.value for c in found], dtype=torch.float64).std())
    clustered = torch.tensor([c.se for c in found], dtype=torch.float64).square().mean().sqrt()
    alone = torch.tensor([importance.cluster_se(c.influence.reshape(-1, 1)) for c in found], dtype=torch.float64)
    assert float(clustered) / true == pytest.approx(1, abs=0.05)
    assert float(alone.square().mean().sqrt()) / true < 0.8


# Fallbacks


def tied_at_the_edge(log_weights: Tensor) -> bool:
    """Whether the first quarter of the tail (the largest N/5 or 3√N, whichever is fewer) is one and the same weight."""
    ordered, size = log_weights.flatten().sort().values, log_weights.numel()
    tail = int(min(0.2 * size, 3 * math.sqrt(size)))
    return bool(ordered[-tail - 1] == ordered[-tail + int(tail / 4 + 0.5) - 1])


def test_smoothed_weights_err_no_more() -> None:
    """ESS/N of 0.2 to 0.4: smoothed weights have at most the RMSE of plain ones at N = 256, and at most 1.1 of it at
    N = 64, where their larger bias (0.11 against 0.05 nats) still outweighs their smaller spread; that bias falls to
    less than half from 16 to 64 prompts. Ties at the edge of the tail (1 in 4000 here) are left out: what the fit makes
    of them is held in tests/test_estimators.py."""
    model, v = oracle.strong().oracle, fixed_direction(oracle.strong())
    theta = model.theta + step_size(model, v, 1.1) * v
    exact = float(model.entropy(theta) - model.entropy(model.theta))
    bias = []
    for prompts in (16, 64):
        draw = model.draw(REPLICATIONS, prompts, GROUP, seed=19)
        (s, r), (s_after, r_after) = model.scores(draw, model.theta), model.scores(draw, theta)
        even = torch.full_like(r[0], 1 / r[0].numel())
        found, ess = [], []
        for before, after, log_weights in zip(r, r_after, s_after - s, strict=True):
            if tied_at_the_edge(log_weights):
                continue
            plain = importance.snis_weights(log_weights)
            smooth = importance.snis_weights(importance.smoothed(log_weights))
            ess.append(plain.ess / r[0].numel())
            changed = (importance.entropy_change(before, after, even, w.normalised) for w in (plain, smooth))
            found.append([change.value for change in changed])
        assert 0.2 < sum(ess) / len(ess) < 0.4
        off = torch.tensor(found, dtype=torch.float64) - exact
        plain, smooth = off.square().mean(0).sqrt().tolist()
        assert smooth <= (plain if prompts == 64 else 1.1 * plain)
        assert len(found) > 0.99 * REPLICATIONS
        bias.append(abs(float(off[:, 1].mean())))
    assert bias[1] < bias[0] / 2


def scores_of(model: Oracle, draw: Draw) -> list[Scores]:
    """What `stages.scores` would find for every replication."""
    tables = draw.of(model.tokens.logp), draw.of(model.tokens.entropy), draw.lengths
    return [Scores(logp, logp, entropy, entropy, lengths) for logp, entropy, lengths in zip(*tables, strict=True)]


def test_fresh_responses_measure_the_change() -> None:
    """Responses drawn at θ⁺, where ESS/N would be 0.1: ΔH, naive and RB, is unbiased, per token to within a fifth of
    its SE, and √E[SE²] is within 5 % of the true SE. Seen to fail: the lengths at θ for the responses at θ⁺."""
    regime = oracle.strong()
    model, v = regime.oracle, fixed_direction(regime)
    theta = model.theta + step_size(model, v, 1.5) * v
    moved = Oracle(theta, model.rewards)
    draw = model.draw(REPLICATIONS, 16, GROUP, seed=20)
    pairs = list(zip(scores_of(model, draw), scores_of(moved, moved.redraw(draw, seed=21)), strict=True))
    config = ProbeConfig()
    first = entropy_change.change_at(*pairs[0], 1.0, config)
    found = [entropy_change.resampled(first, before, after, config) for before, after in pairs]
    exact = float(model.entropy(theta) - model.entropy(model.theta))
    of_token = float(model.entropy_per_token(theta) - model.entropy_per_token(model.theta))
    for kind, truth in (("naive", exact), ("rb", exact), ("per_token", of_token)):
        each = [getattr(change, kind) for change in found]
        values, se = torch.tensor([(c.value, c.se) for c in each], dtype=torch.float64).T
        if kind == "per_token":
            assert abs(float(values.mean()) - truth) < float(values.std()) / 5
        else:
            assert unbiased(values, truth)
        assert float(se.square().mean().sqrt() / values.std()) == pytest.approx(1, abs=0.05)
    even = torch.full((16, GROUP), 1 / (16 * GROUP), dtype=torch.float64)
    stale = [importance.entropy_change(a.rb_sum, b.rb_sum, even, even, a.gen_lens.double()).value for a, b in pairs]
    assert abs(sum(stale) / len(stale) - of_token) > float(torch.tensor(stale).std()) / 5


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_realised_minus_predicted_has_its_own_standard_error(name: str) -> None:
    """At a step whose third order is far below the SE (ESS/N ≥ 0.99): √E[SE²] of the difference is within 5 % of the
    true SE. Seen to fail: the SE of two independent numbers is off by more than 15 %. A false alarm beyond 4 SE has the
    probability of a t with 15 degrees of freedom, 1.2e-3, and skew doubles it at most; beyond the t with that of
    4 normal deviations (5.4 SE) less than 1 in 1000."""
    regime = REGIMES[name]()
    model, v = regime.oracle, fixed_direction(regime)
    eta = step_size(model, v, 0.05)
    first, second = model.along(v)
    draw = model.draw(REPLICATIONS, 16, GROUP, seed=22)
    (s, r), (s_after, r_after) = model.scores(draw, model.theta), model.scores(draw, model.theta + eta * v)
    c = coefficients_of(model, draw, "hk")
    derivatives = [draw.of(t) for t in (first.logp, first.entropy, second.logp, second.entropy)]
    even, own = torch.full_like(r[0], 1 / r[0].numel()), torch.arange(16)
    found = []
    for i in range(REPLICATIONS):
        weights = importance.snis_weights(s_after[i] - s[i])
        rb = importance.entropy_change(r[i], r_after[i], even, weights.normalised)
        along = performance_difference.expansion(*(d[i] for d in derivatives), torch.stack([c[i], c[i]]))
        p = predict(eta, rb, *performance_difference.slopes_per_response(along), own)
        found.append((p.difference, p.difference_se, math.hypot(p.se, rb.se), weights.ess / r[i].numel()))
    difference, se, independent, ess = torch.tensor(found, dtype=torch.float64).T
    assert float(ess.mean()) >= 0.99
    true = float(difference.std())
    assert abs(float(difference.mean())) < true / 10
    assert float(se.square().mean().sqrt()) / true == pytest.approx(1, abs=0.05)
    assert abs(float(independent.square().mean().sqrt()) / true - 1) > 0.15
    beyond = difference.abs() / se
    assert float((beyond > 4).double().mean()) < 3e-3
    assert float((beyond > float(stats.t.isf(stats.norm.sf(4), 15))).double().mean()) < 1e-3
