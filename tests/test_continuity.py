"""Logits and ΔĤ move with η as they must on every architecture, and a planted fault breaks the order that sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import oracle
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.estimators import importance
from entropy_probe.estimators import taylor as series
from entropy_probe.estimators.advantages import leave_one_out_mean
from entropy_probe.model import precision
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.report import TaylorTests
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.scores import score
from entropy_probe.stages.witnesses import continuity
from entropy_probe.stages.witnesses import taylor as tests_of_order
from test_projections import relu_model
from test_rollouts import OneToken

CONFIG = ProbeConfig()
KINDS: dict[str, Any] = {
    "llama": lambda folder: models.full_checkpoint(folder, "llama"),
    "qwen3": lambda folder: models.full_checkpoint(folder, "qwen3"),
    "gpt2": lambda folder: models.full_checkpoint(folder, "gpt2"),
    "gemma2": lambda folder: models.full_checkpoint(folder, "gemma2"),
    "llama+lora": lambda folder: models.adapter_checkpoint(folder, "llama"),
    "llama+dora": lambda folder: models.adapter_checkpoint(folder, "llama", use_dora=True),
}


class Subject:
    """A tiny model in float32 and in float64, random responses, and a random direction."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.model = load_checkpoint(KINDS[kind](folder / "ckpt")).model
        self.bound, self.float64 = bind(self.model), bind(self.model, torch.float64)
        file = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        self.rollouts: Rollouts = read_rollouts(file, self.bound, None)
        generator = torch.Generator().manual_seed(2)
        self.v = {n: torch.randn(p.shape, generator=generator) for n, p in self.bound.registry.trainable.items()}

    def taylor(self, **changes: Any) -> TaylorTests:
        given = {"float64": self.float64, "bound": self.bound, "rollouts": self.rollouts, "v": self.v, "config": CONFIG}
        given |= changes
        return tests_of_order.taylor(scores=score(given["bound"], given["rollouts"], given["config"]), **given)[0]


@functools.cache
def subject_of(kind: str, folder: Path) -> Subject:
    return Subject(folder / kind, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("continuity")


@pytest.fixture(params=list(KINDS))
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    return subject_of(request.param, folder)


@pytest.fixture(params=["llama", "gpt2"])
def either(request: pytest.FixtureRequest, folder: Path) -> Subject:
    return subject_of(request.param, folder)


@pytest.fixture
def llama(folder: Path) -> Subject:
    return subject_of("llama", folder)


def wrong(found: TaylorTests) -> set[str]:
    """What is outside the limits that the project sets: 1 ± 0.02, 2 ± 0.1, 1e-6; NaN is outside."""
    targets = {"logit_slope": (1, 0.02), "delta_h_slope": (1, 0.02), "taylor_order": (2, 0.1)}
    targets |= {"identity_error_naive": (0, 1e-6), "identity_error_rb": (0, 1e-6), "logit_monotone": (1, 0)}
    values = {name: getattr(found, name) for name in targets}
    return {n for n, (target, by) in targets.items() if values[n] is not None and not abs(values[n] - target) <= by}


# Sound models


def test_every_order_is_as_it_must_be(subject: Subject) -> None:
    found = subject.taylor()
    assert None not in vars(found).values()
    assert wrong(found) == set()
    assert found.logit_slope == pytest.approx(1, abs=1e-4)
    # five points err by (1e-3)⁴ and a factor, of few responses
    assert max(found.identity_error_naive, found.identity_error_rb) < 1e-9  # type: ignore[type-var]
    assert found.taylor_eta_max / found.taylor_eta_min == pytest.approx(10**7.5)
    # float32 knows S to some 1e-6: 10 % of ΔĤ need changes of log p from there to a few 1e-3
    assert 1e-7 * found.taylor_eta_max < found.trusted_eta_min < 0.03 * found.taylor_eta_max  # type: ignore[operator]


def test_scale_of_v_changes_eta_alone(llama: Subject) -> None:
    found, scaled = llama.taylor(), llama.taylor(v={name: 2.0**20 * value for name, value in llama.v.items()})
    for name in ("taylor_eta_min", "taylor_eta_max", "trusted_eta_min", "taylor_radius"):
        assert getattr(scaled, name) * 2.0**20 == pytest.approx(getattr(found, name), rel=1e-3)
    assert scaled.taylor_order == pytest.approx(found.taylor_order, abs=1e-3)


def test_weights_that_are_not_uniform(llama: Subject) -> None:
    """At top_p < 1 the identity and the orders are those of π restricted to the nucleus; clipping has no part in it."""
    values = {"top_p": 0.7, "num_return_sequences": 4, "max_new_tokens": 8}
    config = ProbeConfig.from_mapping({"generation": values, "true_delta_h": {"clip_log_weight": 1e-4}})
    prompts = [Prompt(f"p{i}") for i in range(4)]
    sampled = sample_rollouts(
        llama.bound, OneToken(), prompts, config.generation, seed=1, reward=lambda text, gold: float(len(text))
    )
    found = llama.taylor(rollouts=sampled, config=config)
    assert found.taylor_order is not None
    assert wrong(found) == set()


def test_direction_of_zero(llama: Subject) -> None:
    found = llama.taylor(v={name: torch.zeros_like(value) for name, value in llama.v.items()})
    assert {name for name, value in vars(found).items() if value is None} == {
        "logit_slope",
        "logit_monotone",
        "delta_h_slope",
        "taylor_order",
        "identity_error_naive",
        "identity_error_rb",
        "identity_error_per_token",
    }
    assert (found.taylor_slope, found.taylor_radius) == (0, 0)


def test_direction_that_moves_no_probability(llama: Subject) -> None:
    """One vector added to every row of the output layer adds the same to all logits of a position."""
    v = {name: torch.zeros_like(value) for name, value in llama.v.items()}
    v["lm_head.weight"] += torch.randn(v["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(3))
    found = llama.taylor(v=v)
    assert found.logit_slope == pytest.approx(1, abs=1e-4)
    assert found.logit_monotone
    assert (found.delta_h_slope, found.taylor_order) == (None, None)
    assert (found.identity_error_naive, found.identity_error_rb) == (None, None)


def test_model_without_forward_mode(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llama.taylor()

    def refuse(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(tests_of_order, "directional_derivatives", refuse)
    found = llama.taylor()
    none = {name for name, value in vars(found).items() if value is None}
    identities = {f"identity_error_{name}" for name in ("naive", "rb", "per_token")}
    assert none == {"taylor_order", "taylor_slope", *identities}
    assert found.taylor_eta_max == pytest.approx(whole.taylor_eta_max, rel=1e-3)
    assert wrong(found) == set()


def test_run_in_float64_is_trusted_everywhere(llama: Subject) -> None:
    found = llama.taylor(bound=llama.float64)
    assert (found.trusted_eta_min, found.trusted_eta_max) == (found.taylor_eta_min, found.taylor_eta_max)


def test_longest_run() -> None:
    """Of equally long stretches, the last; nothing where it never holds."""
    for holds, expected in (("1101110", "0001110"), ("1100110", "0000110"), ("0000", "0000"), ("111", "111")):
        given = torch.tensor([c == "1" for c in holds])
        assert "".join("01"[int(x)] for x in series.longest_run(given)) == expected


# Planted faults


def test_derivative_with_another_baseline(either: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_one_out(weights: Tensor, payload: Tensor, d_payload: Tensor, d_seq_logp: Tensor) -> Tensor:
        return torch.stack([weights * (payload - leave_one_out_mean(payload)) * d_seq_logp, weights * d_payload])

    monkeypatch.setattr(tests_of_order, "snis_terms", leave_one_out)
    found = either.taylor()
    assert wrong(found) == {"taylor_order", "identity_error_naive", "identity_error_rb"}
    assert found.taylor_order == pytest.approx(1, abs=0.1)


def test_derivative_slightly_off(either: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tests_of_order.directional_derivatives

    def off(*a: Any) -> Any:
        found = original(*a)
        return dataclasses.replace(found, d_logp=(1 + 1e-3) * found.d_logp)

    monkeypatch.setattr(tests_of_order, "directional_derivatives", off)
    assert wrong(either.taylor()) == {"taylor_order", "identity_error_naive", "identity_error_rb"}


def test_derivative_that_stops_at_detach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundModel, "autograd_is_derivative", True)
    subject = subject_of("llama+dora", folder)
    found = subject.taylor(float64=dataclasses.replace(subject.float64))
    assert wrong(found) == {"taylor_order", "identity_error_naive", "identity_error_rb"}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama+lora"])
def test_float32_islands(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        precision.TrueFloat64, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **(k or {}))
    )
    assert {"logit_slope", "taylor_order", "identity_error_rb"} <= wrong(subject_of(kind, folder).taylor())


def test_addition_in_float32(either: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tests_of_order.theta_plus_eta_v

    def rounded(*a: Any) -> dict[str, Tensor]:
        return {name: tensor.float().to(tensor.dtype) for name, tensor in original(*a).items()}

    monkeypatch.setattr(tests_of_order, "theta_plus_eta_v", rounded)
    assert {"logit_slope", "taylor_order", "identity_error_rb"} <= wrong(either.taylor())


def test_reversed_log_weights(either: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importance.snis_weights
    monkeypatch.setattr(importance, "snis_weights", lambda log_weights, clip=None: original(-log_weights, clip))
    assert wrong(either.taylor()) == {"taylor_order", "identity_error_naive", "identity_error_rb"}


def test_dropout_left_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundModel, "_evaluating", lambda self: contextlib.nullcontext())
    subject = Subject(folder / "dropout", "gpt2")
    for model in (subject.bound, subject.float64):
        model.module.train()
    assert {"logit_slope", "logit_monotone"} <= wrong(subject.taylor())


def noisy(size: float) -> Callable[..., Any]:
    """`score` with a log p that is off by another random number at every call."""
    original, generator = tests_of_order.score, torch.Generator().manual_seed(0)

    def score(*a: Any) -> Any:
        scores = original(*a)
        noise = torch.randn(scores.token_logp.shape, generator=generator, dtype=torch.float64)
        inside = scores.token_logp != 0
        return dataclasses.replace(scores, token_logp=scores.token_logp + size * inside * noise)

    return score


def test_noise_in_the_scores(either: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests_of_order, "score", noisy(1e-8))
    assert {"delta_h_slope", "taylor_order"} <= wrong(either.taylor())


def test_noise_in_the_configured_dtype_alone(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with noise of 1e-3 nats a token: trusted later than without, or nowhere."""
    sound, original, spoilt = llama.taylor(), tests_of_order.score, noisy(1e-3)
    monkeypatch.setattr(
        tests_of_order, "score", lambda model, *a: (original if model is llama.float64 else spoilt)(model, *a)
    )
    found = llama.taylor()
    assert wrong(found) == set()
    assert found.trusted_eta_min is None or found.trusted_eta_min > 10 * sound.trusted_eta_min  # type: ignore[operator]


# The estimator's own derivative, exactly


@pytest.mark.parametrize("regime", [oracle.strong, oracle.sharpening, oracle.weak, oracle.solved])
def test_derivative_is_that_of_the_policy(regime: Any) -> None:
    """Over all responses with their exact probabilities it is ∇Hᵀv; over any draw it is that of the drawn estimate."""
    policy: oracle.Oracle = regime().oracle
    v = torch.randn(oracle.NUM_PARAMETERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, _ = policy.along(v)
    d_s, d_r = first.logp.sum(-1), first.entropy.sum(-1)
    whole = policy.probability / oracle.PROMPTS
    for payload, d_payload in ((-policy.seq_logp, -d_s), (policy.rb_sum, d_r)):
        terms = series.snis_terms(whole, payload, d_payload, d_s)
        assert float(terms.sum()) == pytest.approx(
            float(policy.entropy_gradient @ v), abs=1e-9 * float(terms.abs().sum())
        )

    draw = policy.draw(1, 6, 4, seed=3)
    seq_logp, rb_sum, d_seq_logp, d_rb_sum = (draw.of(table)[0] for table in (policy.seq_logp, policy.rb_sum, d_s, d_r))
    uniform = torch.full_like(rb_sum, 1 / rb_sum.numel())

    def delta_h(eta: float) -> float:
        after_s, after_r = (values[0] for values in policy.scores(draw, policy.theta + eta * v))
        weights = importance.snis_weights(after_s - seq_logp).normalised
        return importance.entropy_change(rb_sum, after_r, uniform, weights).value

    terms = series.snis_terms(uniform, rb_sum, d_rb_sum, d_seq_logp)
    unit = 1 / float(d_seq_logp.abs().max())
    slope, second, third = series.stencil_derivatives(
        {k: delta_h(k * 1e-3 * unit) for k in series.STENCIL}, 1e-3 * unit
    )
    assert series.identity_error(slope, terms, 0.0) == pytest.approx(0, abs=1e-9)
    etas = unit * 10 ** torch.arange(-7.0, -0.9, 0.5, dtype=torch.float64)
    remainder = torch.tensor([delta_h(eta) for eta in etas.tolist()], dtype=torch.float64) - etas * terms.sum()
    floor = 1e3 * torch.finfo(torch.float64).eps * float(rb_sum.mean())
    found = series.order(etas, remainder, floor, 0.1 * series.radius(slope, second, third), 1.5)
    assert found == pytest.approx(2, abs=0.1)


# Fits alone

ETAS = 10 ** torch.arange(-9.0, -0.9, 0.5, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_slope_of_a_power_law(power: float) -> None:
    assert series.loglog_slope(ETAS, -7 * ETAS**power) == pytest.approx(power, abs=1e-12)
    assert math.isnan(series.loglog_slope(ETAS, ETAS**power * (ETAS > 1e-8)))
    assert math.isnan(series.loglog_slope(ETAS, ETAS**power * torch.where(ETAS > 1e-2, math.inf, 1.0)))


@pytest.mark.parametrize(("power", "noise"), [(1.0, 1e-8), (2.0, 1e-13), (2.0, 1e-11)])
def test_order_above_a_floor_of_noise(power: float, noise: float) -> None:
    rough = noise * torch.randn(ETAS.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = ETAS**power + rough + 3 * ETAS ** (power + 1)
    assert series.order(ETAS, values, 1e3 * noise, 0.01, 1.5) == pytest.approx(power, abs=0.02)
    assert abs(series.loglog_slope(ETAS, values) - power) > 0.02


def test_order_of_too_short_a_range() -> None:
    assert series.order(ETAS, ETAS**2, 0.9e-7, 1e-2, 1.5) is not None  # from 10^-3.5
    assert series.order(ETAS, ETAS**2, 1.1e-7, 1e-2, 1.5) is None  # from 1e-3
    assert series.order(ETAS, ETAS**2, 1e-8, 0.0, 1.5) is None
    assert series.order(ETAS, 0 * ETAS, 0.0, math.inf, 1.5) is None


def test_order_begins_above_the_last_value_below_the_floor() -> None:
    """A zero crossing is no power law; what stands above the end of the range does not count."""
    crossing = ETAS - ETAS**2 / 1e-7
    assert series.order(ETAS, crossing, 1e-9, 1e-2, 1.5) == pytest.approx(2, abs=0.05)
    assert series.order(ETAS, ETAS * (ETAS < 1e-2), 1e-8, 2e-3, 1.5) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("values", "eta_max"), [(ETAS * math.nan, 1.0), (ETAS / 0.0, 1.0), (ETAS, math.nan)])
def test_order_of_what_is_not_finite(values: Tensor, eta_max: float) -> None:
    found = series.order(ETAS, values, 0.0, eta_max, 1.5)
    assert found is not None
    assert math.isnan(found)


def test_stencil_of_a_polynomial() -> None:
    f = {k: 3.0 * k + 5.0 * k**2 - 7.0 * k**3 for k in series.STENCIL}
    assert series.stencil_derivatives(f, 1.0) == pytest.approx((3.0, 10.0, -42.0))
    assert series.stencil_derivatives(f, 0.5) == pytest.approx((6.0, 40.0, -336.0))


def test_radius() -> None:
    assert series.radius(2.0, -8.0, 3.0) == 0.5
    assert series.radius(2.0, 8.0, -240.0) == pytest.approx(0.1)
    assert series.radius(0.0, 8.0, 1.0) == series.radius(2.0, 0.0, 1.0) == series.radius(0.0, 0.0, 0.0) == 0.0
    assert series.radius(2.0, 8.0, 0.0) == 0.5
    assert math.isnan(series.radius(1.0, math.nan, 1.0))


def test_from_which_on() -> None:
    assert series._from_which_on(torch.tensor([True, False, True, True])).tolist() == [False, False, True, True]
    assert series._from_which_on(torch.tensor([True, False])).tolist() == [False, False]


def test_identity_error() -> None:
    terms = torch.tensor([2.0, -3.0], dtype=torch.float64).reshape(2, 1, 1)
    assert series.identity_error(-0.999, terms, 1e-8) == pytest.approx(2e-4)
    assert series.identity_error(1e-30, 0 * terms, 0.0) == math.inf
    assert series.identity_error(1e-9, 1e-9 * terms, 1e-8) is None
    assert series.identity_error(1e-7, 0 * terms, 1e-8) == math.inf


def test_kinks_are_no_fault(tmp_path: Path) -> None:
    """A wide ReLU network: derivative and difference of the step before are off by 1e-3, and nothing is said of it."""
    bound = bind(relu_model(), torch.float64)
    rollouts = read_rollouts(models.random_rollouts(tmp_path / "e.jsonl", prompts=6, responses=3, seed=1), bound, None)
    generator = torch.Generator().manual_seed(1)
    v = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in bound.registry.trainable.items()
    }
    found, _ = tests_of_order.taylor(bound, bound, rollouts, score(bound, rollouts, ProbeConfig()), v, ProbeConfig())
    assert found.taylor_order is None
    assert found.delta_h_slope is None
    errors = (found.identity_error_naive, found.identity_error_rb)
    assert all(error is None or error < 1e-6 for error in errors)
    assert found.logit_slope == pytest.approx(1, abs=0.02)


def test_a_jump_ends_the_range() -> None:
    """From 3e-3 on something is added on one side of θ, as where a router chooses anew: the order is that below it."""
    jump = 1e-3 * (ETAS > 3e-3)
    clean = series.order(ETAS, ETAS**2, 1e-12, 0.1, 1.5, ETAS**2)
    assert series.order(ETAS, ETAS**2 + jump, 1e-12, 0.1, 1.5, ETAS**2) == pytest.approx(2, abs=1e-9)
    assert clean == pytest.approx(2, abs=1e-9)
    without = series.order(ETAS, ETAS**2 + jump, 1e-12, 0.1, 1.5)
    assert without is not None
    assert abs(without - 2) > 0.1


def test_a_wrong_derivative_is_no_jump() -> None:
    """It is of opposite sign on the other side at the smallest η: nothing is left out, and the order is 1."""
    off = 1e-2 * ETAS
    found = series.order(ETAS, ETAS**2 + off, 1e-8, 0.1, 1.5, ETAS**2 - off)
    assert found == series.order(ETAS, ETAS**2 + off, 1e-8, 0.1, 1.5)


@pytest.mark.parametrize("edge", [3e-6, 3e-7])
def test_a_step_stays_below_a_jump(edge: float) -> None:
    """Noise is linear nowhere, and is judged at the step itself."""
    direction = torch.ones(3, dtype=torch.float64)
    eta, size = continuity.smooth_step(lambda eta: direction * (eta + 10 * (eta > edge)), 1e-5)
    assert eta == pytest.approx(1e-6 if edge > 1e-6 else 1e-7)
    assert size == pytest.approx(eta * 3**0.5)
    generator = torch.Generator().manual_seed(0)
    noise = continuity.smooth_step(lambda _: torch.randn(3, generator=generator), 1e-5)
    assert noise[0] == 1e-5
