"""Fewer passes for the same numbers: products without zeros in forward mode, D_v from two points, two gradients of one
forward. Each against the way that takes more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from counted import Counter
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.estimators.policy import score_tokens, scores_along
from entropy_probe.model.forward import bind
from entropy_probe.stages import slopes
from entropy_probe.stages.derivatives import Derivatives, directional_derivatives
from entropy_probe.stages.gradients.payloads import x_payload
from entropy_probe.stages.gradients.unit_gradients import can_share_a_forward, unit_gradients
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score
from test_projections import relu_model

CONFIG = ProbeConfig.from_mapping({"generation": {"num_return_sequences": 3, "tf_batch_size": 6}})
KINDS: dict[str, Any] = {
    "llama+lora": lambda folder: models.adapter_checkpoint(folder, "llama"),
    "gpt2+lora": lambda folder: models.adapter_checkpoint(folder, "gpt2"),
    "llama+dora": lambda folder: models.adapter_checkpoint(folder, "llama", use_dora=True),
    "llama": lambda folder: models.full_checkpoint(folder, "llama"),
}


class Subject:
    def __init__(self, folder: Path, model: Any) -> None:
        self.bound, self.float64 = bind(model), bind(model, torch.float64)
        file = models.random_rollouts(folder / "e.jsonl", prompts=4, responses=3, seed=1)
        self.share = models.alone(self.float64, read_rollouts(file, self.float64, None))
        generator = torch.Generator().manual_seed(2)
        trained = self.bound.registry.trainable
        self.v = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in trained.items()}


@pytest.fixture(params=list(KINDS))
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return Subject(tmp_path, load_checkpoint(KINDS[request.param](tmp_path / "ckpt")).model)


def of_terms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest term."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_products_that_are_zero_are_left_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same D_v to rounding; with an adapter in less than three quarters of the flops."""

    def counted() -> tuple[Derivatives, int]:
        counter = Counter()
        with counter:
            found = directional_derivatives(subject.float64, subject.share.own, subject.v, CONFIG)
        return found, counter.flops

    directional_derivatives(subject.float64, subject.share.own, subject.v, CONFIG)  # the output layer is tried once
    lean, few = counted()
    monkeypatch.setitem(vars(subject.float64.registry), "has_frozen", False)
    whole, many = counted()
    for name in ("d_logp", "d_entropy", "logit", "d_logit"):
        assert of_terms(getattr(lean, name), getattr(whole, name)) < 1e-13
    if len(subject.v) < len(subject.bound.registry.parameters):
        assert few < 0.75 * many
    else:
        assert few == many


def test_derivatives_from_two_points_are_those_at_theta(subject: Subject) -> None:
    """In float32 D_v is the mean of those at θ ± hv in float64, off by (1e-5)² of the terms; D²_v is the same number as
    with a pass at θ, up to the rounding that another h leaves, 1e-16/1e-5 of D_v over D²_v."""
    given = subject.share, subject.v, CONFIG
    found = slopes.derived(subject.bound, subject.float64, *given)
    expected = slopes.derived(subject.float64, subject.float64, *given)
    assert found.num_kinked == expected.num_kinked == 0
    for name in ("d_logp", "d_entropy"):
        assert of_terms(getattr(found.at_theta, name), getattr(expected.at_theta, name)) < 1e-9
    for name in ("logp", "entropy"):
        assert of_terms(getattr(found.twice, name), getattr(expected.twice, name)) < 1e-7


def test_the_step_is_corrected_where_a_short_response_moves_fastest(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is looked up on one response of each prompt; a hundred times as long it would cost eight digits."""
    original = slopes.directional_derivatives

    def slower(*given: Any, some: Any = None, **options: Any) -> Any:
        found = original(*given, some=some, **options)
        if some is None:
            return found
        shrunk = {name: getattr(found, name) / 100 for name in ("d_logp", "d_entropy", "d_logit")}
        return Derivatives(**(vars(found) | shrunk))

    monkeypatch.setattr(slopes, "directional_derivatives", slower)
    test_derivatives_from_two_points_are_those_at_theta(subject)


def test_a_kink_between_the_two_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a ReLU bends within ±h the mean of both sides is no derivative; those responses are asked at θ itself."""
    subject = Subject(tmp_path, relu_model())
    monkeypatch.setattr(slopes, "JVP_CHANGE", 1e-2)  # a long step crosses some
    given = subject.share, subject.v, CONFIG
    found = slopes.derived(subject.bound, subject.float64, *given)
    expected = directional_derivatives(subject.float64, subject.share.own, subject.v, CONFIG)
    assert found.num_kinked > 0
    off = (found.at_theta.d_seq_logp - expected.d_seq_logp).abs() / expected.d_seq_logp.abs().max()
    assert float(off.max()) < 1e-3  # h² = 1e-4 where it is smooth


def test_two_gradients_of_one_forward(subject: Subject) -> None:
    """X, and X̄ per token, each as it is made alone; in float64 to rounding."""
    bound, share = subject.float64, subject.share
    scores = score(bound, share.own, CONFIG, with_features=True)
    of_x = x_payload(share.own, scores, CONFIG)
    c = slopes.coefficients_of(share, scores, CONFIG)
    beside = slopes.whole_per_token_payload(share, scores, c)
    along = slopes.slopes_along(bound, bound, share, scores, subject.v, CONFIG)
    expected = slopes.gradient_per_token(bound, share, scores, along, CONFIG)
    alone = unit_gradients(bound, share, CONFIG, of_x)
    assert alone.mean_beside is None
    trains_all = len(subject.v) == len(bound.registry.parameters)
    assert can_share_a_forward(bound, share, of_x) == (not trains_all)
    if trains_all:
        return
    both = unit_gradients(bound, share, CONFIG, of_x, beside=beside)
    assert both.mean_beside is not None
    for name, value in expected.items():
        size = max(float(value.abs().max()), 1e-12)
        assert float((both.mean_beside[name] - value).abs().max()) < 1e-11 * size, name
        assert torch.allclose(both.x[name], alone.x[name], rtol=0, atol=1e-12 * float(alone.x[name].abs().max())), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_along_a_tangent_are_those_of_forward_mode(temperature: float) -> None:
    """The derivatives of `score_tokens` by torch's own forward mode; with tokens that cannot be."""
    generator = torch.Generator().manual_seed(4)
    z, tangent = (5 * torch.randn(7, 1000, generator=generator, dtype=torch.float64) for _ in range(2))
    z[1, 5:] = -torch.inf
    tokens = torch.tensor([3, 4, 5, 6, 7, 8, 9])
    tokens[1] = 2

    def scores(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = score_tokens(at, tokens, temperature, 1.0)
        return found.logp, found.entropy

    values, derivatives = torch.func.jvp(scores, (z,), (tangent,))
    found = scores_along(z, tangent, tokens, temperature)
    for one, other in zip(found, (*values, *derivatives), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_scores_along_a_tangent_where_there_is_little() -> None:
    """Of no rows there is nothing; a row that is not a number spoils no other."""
    assert [len(of) for of in scores_along(*torch.zeros(2, 0, 5), torch.zeros(0, dtype=torch.long), 1.0)] == [0] * 4
    z = torch.tensor([[0.0, 1.0, -torch.inf], [torch.nan, 0.0, 0.0]])
    found = scores_along(z, torch.ones(2, 3), torch.tensor([0, 1]), 1.0)
    assert all(bool(of[0].isfinite()) and bool(of[1].isnan()) for of in found)
