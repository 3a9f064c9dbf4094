"""Gates: each bound turns red beyond noise and never within it; what they hold is what the report says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import models
from entropy_probe import ProbeConfig, ProbeError, ProbeReport, Verdict, load_checkpoint, run_probe
from entropy_probe.model.forward import bind
from entropy_probe.report import BaselineSection, Estimate
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe_checks.bounds import COUNTS, GATES, NOISE, OF_A_BASELINE
from entropy_probe_checks.criteria import CRITERIA
from entropy_probe_checks.criteria import GATES as GATE_CRITERIA
from entropy_probe_checks.criteria.gate import baseline_of
from entropy_probe_checks.thresholds import in_force, require_known

LR = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    path = models.adapter_checkpoint(folder / "ckpt", "llama", adamw={"lr": LR})
    model = load_checkpoint(path).model
    models.sampled_rollouts(folder / "e.jsonl", model, prompts=5, responses=3, seed=1)
    models.sampled_rollouts(folder / "u.jsonl", model, prompts=6, responses=3, seed=2)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> ProbeReport:
    config = ProbeConfig.from_mapping({"budget": "smoke"})
    return run_probe(folder / "ckpt", config, folder / "e.jsonl", folder / "u.jsonl")


def changed(report: ProbeReport, section: str, **values: Any) -> ProbeReport:
    return report.model_copy(update={section: getattr(report, section).model_copy(update=values)})


def step_changed(report: ProbeReport, **values: Any) -> ProbeReport:
    rows = [row.model_copy(update=values) if row.eta == LR else row for row in report.entropy_change]
    return report.model_copy(update={"entropy_change": rows})


def holding(report: ProbeReport, gate: str, value: float, se: float) -> ProbeReport:
    """The report with another value of what a gate holds."""
    if gate == "entropy":
        return changed(report, "entropy", per_token=Estimate(value=value, se=se))
    if gate == "predicted_change":
        report = changed(report, "entropy", per_token=Estimate(value=1.0, se=0.0))
        return changed(report, "update", delta_h1_per_lr_per_token=value / LR, delta_h1_per_lr_per_token_se=se / LR)
    if gate == "realised_ratio":
        numbers = {"predicted_per_token": 1.0, "predicted_per_token_se": 0.0, "difference_per_token_se": se}
        return step_changed(report, **numbers, delta_h_per_token_pd=value, reliable=True)
    assert gate == "reward"
    return changed(report, "batch", mean_reward=value, mean_reward_se=se)


def judged(report: ProbeReport, gate: str, bounds: dict[str, float], before: Estimate | None = None) -> Verdict:
    quantities = {} if before is None else {gate: before}
    return GATE_CRITERIA[gate](
        report.model_copy(
            update={
                "config": {**report.config, "limits": {gate: bounds}},
                "baseline": BaselineSection(name="before", fingerprint="0", not_chosen="", quantities=quantities),
            }
        )
    )


NOISY = ("entropy", "predicted_change", "realised_ratio", "reward")
BOUNDS = [
    # bounds, baseline, a value that misses by 4.1 of its SE, one that misses by 3.9
    ({"min": 0.5}, None, 0.5 - 0.041, 0.5 - 0.039),
    ({"max": 0.5}, None, 0.5 + 0.041, 0.5 + 0.039),
    ({"fall": 0.5}, Estimate(value=1.0, se=0.0), 0.5 - 0.041, 0.5 - 0.039),
    ({"rise": 0.5}, Estimate(value=1.0, se=0.0), 1.5 + 0.041, 1.5 + 0.039),
    ({"fall_se": 4.0}, Estimate(value=0.5, se=0.0), 0.5 - 0.041, 0.5 - 0.039),
    ({"rise_se": 4.0}, Estimate(value=0.5, se=0.0), 0.5 + 0.041, 0.5 + 0.039),
    ({"rise_se": 2.0}, Estimate(value=0.5, se=0.0), 0.5 + 0.021, 0.5 + 0.019),
    ({"max": 0.5, "noise": 1.0}, None, 0.5 + 0.011, 0.5 + 0.009),
    ({"min": 0.1, "max": 0.5, "fall": 0.9}, Estimate(value=1.0, se=0.0), 0.5 + 0.041, 0.5 + 0.039),
]


@pytest.mark.parametrize("gate", NOISY)
@pytest.mark.parametrize(("bounds", "before", "beyond", "within"), BOUNDS)
def test_a_bound_is_missed_beyond_noise_alone(
    report: ProbeReport, gate: str, bounds: dict[str, float], before: Estimate | None, beyond: float, within: float
) -> None:
    missed = judged(holding(report, gate, beyond, 0.01), gate, bounds, before)
    assert missed.status == "fail"
    assert missed.family == "gate"
    assert isinstance(missed.value, float)
    assert missed.limit in bounds.values()
    assert missed.hint.startswith(f"[limits.{gate}.")
    assert judged(holding(report, gate, within, 0.01), gate, bounds, before).status == "pass"
    assert judged(holding(report, gate, math.nan, 0.01), gate, bounds, before).status == "fail"
    assert judged(holding(report, gate, within, math.nan), gate, bounds, before).status == "fail"


number = st.floats(-10, 10, allow_nan=False)


@given(x=number, se=st.floats(1e-6, 1), b=number, se_b=st.floats(0, 1), bound=st.floats(0, 3), shift=st.floats(-1, 1))
def test_a_change_smaller_than_its_noise_never_fails(
    report: ProbeReport, x: float, se: float, b: float, se_b: float, bound: float, shift: float
) -> None:
    """x and a baseline at most one SE of their difference apart, or x at most one SE beyond an absolute bound."""
    near = Estimate(value=x + shift * math.hypot(se, se_b), se=se_b)
    for bounds in ({"fall": bound}, {"rise": bound}, {"fall_se": 1 + bound}, {"rise_se": 1 + bound}):
        assert judged(holding(report, "entropy", x, se), "entropy", bounds, near).status == "pass"
    for key in ("min", "max"):
        assert judged(holding(report, "entropy", x, se), "entropy", {key: x + shift * se}).status == "pass"


def test_the_standard_error_of_a_relative_bound() -> None:
    """Beside draws of both: x − (1 ∓ f)·b has the spread that `fall` and `rise` allow for."""
    rng = np.random.default_rng(0)
    x, b = rng.normal(0.4, 0.02, 100_000), rng.normal(1.0, 0.05, 100_000)
    assert np.std(x - 0.5 * b) == pytest.approx(math.hypot(0.02, 0.05 * 0.5), rel=0.02)


@pytest.mark.parametrize(("value", "status"), [(0.52, "pass"), (0.40, "pass"), (0.30, "fail")])
def test_a_noisy_baseline_counts_by_its_share(report: ProbeReport, value: float, status: str) -> None:
    """fall 0.5 of 1.0 ± 0.04: the threshold is 0.5 ± 0.02, and with 0.02 of its own a fall counts below 0.387."""
    before = Estimate(value=1.0, se=0.04)
    assert judged(holding(report, "entropy", value, 0.02), "entropy", {"fall": 0.5}, before).status == status


def test_counts_have_no_noise(report: ProbeReport) -> None:
    steps = changed(report, "checkpoint", global_step=report.checkpoint.optimizer.step)
    assert judged(steps, "adam_step", {"max": 0}).status == "pass"
    later = changed(report, "checkpoint", global_step=(report.checkpoint.optimizer.step or 0) + 2)
    assert judged(later, "adam_step", {"max": 0}).value == 2
    assert judged(later, "adam_step", {"max": 0}).status == "fail"
    assert judged(later, "adam_step", {"max": 2}).status == "pass"
    assert judged(changed(report, "checkpoint", global_step=None), "adam_step", {"max": 0}).status == "not_applicable"
    assert judged(report, "finite_moments", {"max": 0}).status == "pass"
    poisoned = changed(report, "preconditioner", num_nonfinite=1)
    assert judged(poisoned, "finite_moments", {"max": 0}).status == "fail"


@pytest.mark.parametrize(
    ("share", "prompts", "status"),
    [(1.0, 32, "fail"), (1.0, 16, "pass"), (0.75, 32, "pass"), (0.8, 200, "fail"), (math.nan, 16, "fail")],
)
def test_zero_advantage_knows_how_few_prompts_it_is_of(
    report: ProbeReport, share: float, prompts: int, status: str
) -> None:
    batch = changed(report, "update_batch", zero_advantage_fraction=share, num_prompts=prompts)
    assert judged(batch, "zero_advantage", {"max": 0.65}).status == status


@pytest.mark.parametrize("prompts", [3, 16, 64])
def test_zero_advantage_is_rarely_red_by_chance(report: ProbeReport, prompts: int) -> None:
    """Where the bound is the truth, `max` fails less than once in 4000: binomial probabilities, no approximation."""
    counts = range(prompts + 1)
    of = [changed(report, "update_batch", zero_advantage_fraction=k / prompts, num_prompts=prompts) for k in counts]
    for truth in np.linspace(0.05, 0.95, 19).tolist():
        red = [k for k in counts if judged(of[k], "zero_advantage", {"max": truth}).status == "fail"]
        assert stats.binom.pmf(red, prompts, truth).sum() < 1 / 4000


@pytest.mark.parametrize("key", ["fall", "rise", "fall_se", "rise_se"])
def test_a_change_without_a_unit_is_infinite(report: ProbeReport, key: str) -> None:
    """From a baseline of 0 and without noise, any change is beyond any bound, and is not shown as within it."""
    value = -0.25 if key.startswith("fall") else 0.25
    found = judged(holding(report, "reward", value, 0.0), "reward", {key: 2.0}, Estimate(value=0.0, se=0.0))
    assert (found.status, found.value, found.limit) == ("fail", math.inf, 2.0)
    same = judged(holding(report, "reward", 0.0, 0.0), "reward", {key: 2.0}, Estimate(value=0.0, se=0.0))
    assert (same.status, same.value) == ("pass", 0.0)


@pytest.mark.parametrize(("se", "se_b"), [(math.inf, 0.1), (math.nan, math.inf), (math.inf, math.nan)])
def test_infinite_noise_never_passes(report: ProbeReport, se: float, se_b: float) -> None:
    for bounds in ({"min": 0.5}, {"fall": 0.5}, {"rise_se": 4.0}):
        noisy = judged(holding(report, "entropy", 1.0, se), "entropy", bounds, Estimate(value=1.0, se=se_b))
        assert noisy.status in ("fail", "inconclusive")


def test_a_baseline_without_the_step_of_the_optimizer_lacks_the_ratio(report: ProbeReport) -> None:
    for other in (report.model_copy(update={"entropy_change": []}), changed(report, "update", lr=math.nan)):
        assert "realised_ratio" not in baseline_of(other).quantities


def test_quantities_are_those_of_the_report(report: ProbeReport, folder: Path) -> None:
    found = baseline_of(report).quantities
    assert found["entropy"] == report.entropy.per_token
    step = next(row for row in report.entropy_change if row.eta == LR)
    update = report.update
    predicted = LR * update.delta_h1_per_lr_per_token + LR**2 / 2 * update.curvature_per_token
    first = abs(LR * update.delta_h1_per_lr_per_token) / report.entropy.per_token.value
    assert found["predicted_change"].value == pytest.approx(first, rel=1e-12)
    assert found["realised_ratio"].value == pytest.approx(step.delta_h_per_token_pd / predicted, rel=1e-9)
    rewards = read_rollouts(folder / "e.jsonl", bind(load_checkpoint(folder / "ckpt").model), None).rewards.numpy()
    assert found["reward"].value == pytest.approx(rewards.mean(), rel=1e-6)
    assert found["reward"].se == pytest.approx(rewards.mean(1).std(ddof=1) / math.sqrt(5), rel=1e-6)
    assert set(found) == set(GATES) - set(COUNTS)


def test_one_batch_is_predicted_by_the_cross_fitted_slope(folder: Path) -> None:
    one = run_probe(folder / "ckpt", ProbeConfig.from_mapping({"budget": "smoke"}), folder / "e.jsonl")
    crossed, in_sample = one.update.delta_h1_per_lr_cross_per_token, one.update.delta_h1_per_lr_per_token
    assert abs(crossed - in_sample) > 0.1 * abs(in_sample)  # the diagonal is left out
    value = LR * abs(crossed) / one.entropy.per_token.value
    assert baseline_of(one).quantities["predicted_change"].value == value


def test_the_standard_error_of_the_ratio_bounds_that_of_its_numerator(report: ProbeReport) -> None:
    """Whatever the correlation of realised R and predicted P, SE(R − l·P) ≤ SE(R − P) + |1 − l|·SE(P)."""
    rng = np.random.default_rng(1)
    for correlation in (-0.9, 0.0, 0.9):
        p = rng.normal(1.0, 0.1, 100_000)
        r = 3.0 * p + correlation * (p - 1) + rng.normal(0, 0.05, p.size)
        ses = {"predicted_per_token_se": float(p.std()), "difference_per_token_se": float((r - p).std())}
        numbers = {"predicted_per_token": 1.0, "delta_h_per_token_pd": 3.0, "reliable": True} | ses
        se = baseline_of(step_changed(report, **numbers)).quantities["realised_ratio"].se
        assert se >= 0.99 * float((r - 3.0 * p).std())


@pytest.mark.parametrize(
    ("poisoned", "gate", "status"),
    [
        (lambda r: step_changed(r, predicted_per_token=None), "realised_ratio", "not_applicable"),
        (lambda r: step_changed(r, reliable=False), "realised_ratio", "inconclusive"),
        (lambda r: step_changed(r, predicted_per_token=0.0), "realised_ratio", "inconclusive"),
        (lambda r: changed(r, "entropy", per_token=Estimate(value=0.0, se=0.0)), "predicted_change", "inconclusive"),
    ],
)
def test_what_cannot_be_asked(report: ProbeReport, poisoned: Any, gate: str, status: str) -> None:
    verdict = judged(poisoned(report), gate, {"max": 1.0})
    assert verdict.status == status
    assert verdict.hint


def test_gates_are_off_without_bounds_and_inconclusive_without_their_baseline(report: ProbeReport) -> None:
    assert tuple(GATE_CRITERIA) == GATES
    assert not set(GATES) & set(CRITERIA)
    for name, gate in GATE_CRITERIA.items():
        assert gate(report).status == "not_applicable"
        assert gate.measures
        assert gate.meaning
        if name not in COUNTS:
            for key in OF_A_BASELINE:
                assert judged(report, name, {key: 4.0}).status == "inconclusive"


def test_limits_in_force_name_the_bounds() -> None:
    config = ProbeConfig.from_mapping({"limits": {"entropy": {"min": "8e-2", "fall": 0.5}}})
    shown = in_force(config.model_dump(mode="json"))
    assert shown["entropy"] == ("min 0.08, fall 0.5", "limits.entropy of the configuration")
    assert "reward" not in shown
    assert NOISE == 4.0


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"entropy": 0.05}, "`limits.entropy` is 0.05; write `entropy: {min: ..}`"),
        ({"ess_": {"min": 1}}, "unknown criterion `ess_` under `limits`"),
        ({"logit_scaling": {"max": 2}}, "`limits.logit_scaling` is {'max': 2}; give a number"),
        ({"entropy": {}}, "`limits.entropy` has no bound"),
        ({"entropy": {"noise": 2}}, "`limits.entropy` has no bound"),
        ({"entropy": {"min": 2, "max": 1}}, "min is above max"),
        ({"entropy": {"fall": 0.5}}, "`limits.entropy.fall` needs a baseline; give --probe-baseline=report.json"),
        ({"entropy": {"min": 1, "noise": 0.5}}, "`limits.entropy.noise` is 0.5; give 1 or more"),
        ({"adam_step": {"min": 0}}, "`limits.adam_step.min`: the gate is a count; give only `max`"),
        ({"finite_moments": {"max": 0, "noise": 4}}, "the gate is a count"),
        ({"finite_moments": {"max": -1}}, "`limits.finite_moments.max` is -1; give 0 or more"),
        ({"predicted_change": {"max": -0.2}}, "`limits.predicted_change.max` is -0.2; give 0 or more"),
        ({"zero_advantage": {"max": 80}}, "`limits.zero_advantage.max` is 80; give a share from 0 to 1"),
    ],
)
def test_bounds_that_make_no_sense(limits: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ProbeError) as error:
        require_known(limits)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_bounds_of_a_baseline_are_fine_with_one() -> None:
    require_known({"entropy": {"fall": 0.5, "rise_se": 4}}, ["entropy", "ess"], has_baseline=True)
    with pytest.raises(ProbeError, match=r"entropy.fall` is -0.5; give 0 or more"):
        require_known({"entropy": {"fall": -0.5}}, has_baseline=True)
    with pytest.raises(
        ProbeError, match=r"entropy.fall` is 50, and nothing can fall by its whole size; give a share below 1"
    ):
        require_known({"entropy": {"fall": 50}}, has_baseline=True)
    require_known({"reward": {"fall": 2, "max": -1}}, has_baseline=True)


@pytest.mark.parametrize("limit", [{"mn": 1}, {"min": "x"}, [1], None, {"min": math.inf}])
def test_limits_of_another_shape_are_named(limit: Any) -> None:
    with pytest.raises(ProbeError) as error:
        ProbeConfig.from_mapping({"limits": {"entropy": limit}})
    assert str(error.value).startswith("configuration: `limits.entropy")
    assert "\n" not in str(error.value)
