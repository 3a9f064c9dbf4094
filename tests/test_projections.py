"""Projections three ways, and second derivatives along v two ways; a fault in one of them is seen, and nothing is left.

Float64 throughout. Projections agree to 1e-9 of ‖X_k‖_P·‖Ȳ‖_P (measured: 5e-16).
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import models
import reference as ref
from entropy_probe import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model import forward
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages import derivatives, slopes
from entropy_probe.stages.derivatives import directional_derivatives
from entropy_probe.stages.gradients.payloads import Payload, payloads
from entropy_probe.stages.gradients.products import prompt_mean
from entropy_probe.stages.gradients.unit_gradients import UnitGradients, unit_gradients
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, score, score_rows
from entropy_probe.stages.share import Share
from entropy_probe.stages.slopes import Slopes, slopes_along
from entropy_probe.stages.witnesses import projections, witness
from entropy_probe.stages.witnesses.projections import ProjectionAgreement, projection_agreement
from entropy_probe.stages.witnesses.witness import curvature_witness, largest, twice_in_reverse

TOLERANCE = 1e-9
# What `derivatives.JVP_CHANGE` claims for the central difference; measured: 1e-10, the rule's truncation.
CURVATURE_TOLERANCE = 1e-9


def adapter(**lora: Any) -> Any:
    return models.add_adapter(models.tiny_model("llama"), "llama", **lora)


def relu_model() -> Any:
    """An OPT with many kinks: ReLU over 512 units in each of two layers."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    config = transformers.OPTConfig(vocab_size=models.VOCABULARY, max_position_embeddings=64, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: models.tiny_model(name) for name in ("llama", "qwen3", "gpt2", "gemma2")},
    "opt": lambda: relu_model(),
    "lora": adapter,
    "dora": lambda: adapter(use_dora=True),
    "dora, modules_to_save": lambda: adapter(use_dora=True, modules_to_save=["lm_head"]),
}
RHO = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
ESTIMATORS = [{"estimator": "naive"}, {"estimator": "rb"}, {"estimator": "rb", "baseline": "hk_ema"}]


@dataclass(frozen=True)
class Subject:
    """E batch, X of its units, and P, Ȳ (of another batch) and v by name."""

    bound: BoundModel
    file: Path
    rollouts: Rollouts
    scores: Scores
    of_x: Payload
    config: ProbeConfig
    units: UnitGradients
    precond: dict[str, Tensor]
    ascent: dict[str, Tensor]

    @property
    def share(self) -> Share:
        return models.alone(self.bound, self.rollouts, self.config)

    @cached_property
    def along(self) -> Slopes:
        return slopes_along(self.bound, self.bound, self.share, self.scores, self.v, self.config)

    @classmethod
    def of(cls, model: Any, folder: Path, **first_order: Any) -> Subject:
        bound, config = bind(model, torch.float64), ProbeConfig.from_mapping({"first_order": first_order})
        file = models.random_rollouts(folder / "e.jsonl", prompts=6, responses=3, seed=1)
        e = read_rollouts(file, bound, None)
        u = read_rollouts(models.random_rollouts(folder / "u.jsonl", prompts=5, responses=3, seed=2), bound, None)
        scores_e, scores_u = (score(bound, batch, config, with_features=True) for batch in (e, u))
        units_u = unit_gradients(bound, models.alone(bound, u, config), config, *payloads(u, scores_u, config))
        of_x, _ = payloads(e, scores_e, config)
        generator = torch.Generator().manual_seed(3)
        precond = {
            name: 100 * (0.1 + torch.rand(p.shape, dtype=torch.float64, generator=generator))
            for name, p in bound.registry.trainable.items()
        }
        units_e = unit_gradients(bound, models.alone(bound, e, config), config, of_x)
        return cls(bound, file, e, scores_e, of_x, config, units_e, precond, prompt_mean(units_u.y, units_u.sizes))

    @property
    def v(self) -> dict[str, Tensor]:
        return {name: p * self.ascent[name].reshape(p.shape) for name, p in self.precond.items()}

    @property
    def agreement(self) -> ProjectionAgreement:
        return projection_agreement(
            self.bound,
            self.share,
            self.of_x,
            self.config,
            self.units,
            self.precond,
            self.ascent,
            self.v,
            self.along.at_theta,
        )

    @property
    def curvature(self) -> float | None:
        along = slopes_along(self.bound, self.bound, self.share, self.scores, self.v, self.config)
        return curvature_witness(self.bound, self.rollouts, self.scores, along, self.v, self.config)

    def with_x(self, x: dict[str, Tensor]) -> Subject:
        return replace(self, units=replace(self.units, x=x))


def agrees(found: ProjectionAgreement) -> tuple[bool, bool, bool]:
    assert found.projections_jvp is not None
    assert found.projections_alpha is not None
    ways = (found.projections_jvp, found.projections_alpha, found.projections_v)
    return ways[0] < TOLERANCE, ways[1] < TOLERANCE, ways[2] < TOLERANCE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of(models.tiny_model("llama"), tmp_path_factory.mktemp("projections"))


@pytest.mark.parametrize(
    ("name", "first_order"),
    [*((name, ESTIMATORS[0]) for name in MODELS), ("gpt2", ESTIMATORS[1]), ("dora, modules_to_save", ESTIMATORS[2])],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_three_ways_agree(name: str, first_order: dict[str, Any], tmp_path: Path) -> None:
    subject = Subject.of(MODELS[name](), tmp_path, **first_order)
    assert agrees(subject.agreement) == (True, True, True)


@pytest.mark.parametrize("first_order", ESTIMATORS[::2], ids=lambda options: "-".join(options.values()))
def test_blocks(first_order: dict[str, Any], tmp_path: Path) -> None:
    subject = Subject.of(adapter(), tmp_path, mode="block", num_blocks=3, **first_order)
    assert agrees(subject.agreement) == (True, True, True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "dora"])
def test_each_way_is_the_naive_loop(name: str, tmp_path: Path) -> None:
    subject = Subject.of(MODELS[name](), tmp_path)
    loop = ref.Reference(subject.bound.module, subject.file)
    along = directional_derivatives(subject.bound, subject.rollouts, subject.v, subject.config)
    by_alpha = projections.by_alpha(subject.bound, subject.rollouts, subject.of_x, subject.v, subject.config)
    for found in (projections.projections_of(subject.of_x, along), by_alpha):
        for n, got in enumerate(found.tolist()):
            expected, scale = ref.dot(loop.x(n), subject.v)
            assert abs(got - expected) < TOLERANCE * scale


def test_vocabulary_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of five positions: the second derivative goes through what is computed again."""
    again: list[int] = []
    original = forward.checkpoint
    monkeypatch.setattr(forward, "_CHUNK", 1)
    monkeypatch.setattr(forward, "_ROWS", 5)
    monkeypatch.setattr(forward, "checkpoint", lambda *a, **k: again.append(1) or original(*a, **k))
    subject = Subject.of(MODELS["dora, modules_to_save"](), tmp_path)
    again.clear()
    assert agrees(subject.agreement) == (True, True, True)
    assert again
    again.clear()
    assert subject.curvature is not None
    assert subject.curvature < CURVATURE_TOLERANCE
    assert again


def test_one_prompt_of_x_is_off(llama: Subject) -> None:
    """By 1e-3: seen as that much of its projection, which is a few hundredths of ‖X_k‖_P·‖Ȳ‖_P; beyond the two that
    are gone other ways for, along v alone."""
    gone = largest(llama.of_x, llama.units.units, 2).tolist()
    for row in largest(llama.of_x, llama.units.units, 4).tolist():
        x = {name: values.clone() for name, values in llama.units.x.items()}
        for values in x.values():
            values[row] *= 1 + 1e-3
        found = llama.with_x(x).agreement
        assert agrees(found) == ((False, False, False) if row in gone else (True, True, False))
        seen = found.projections_jvp if row in gone else found.projections_v
        assert 1e-6 < float(seen or 0) < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda name, values: -values,
        lambda name, values: values.roll(1, 0),
        lambda name, values: values if "layers.0.mlp.down_proj" not in name else torch.zeros_like(values),
        lambda name, values: values * float("nan"),
    ],
    ids=["sign", "prompts mixed up", "a parameter lost", "nan"],
)
def test_x_is_wrong(llama: Subject, change: Callable[[str, Tensor], Tensor]) -> None:
    assert agrees(llama.with_x({name: change(name, x) for name, x in llama.units.x.items()}).agreement) == (
        False,
        False,
        False,
    )


def test_one_way_is_wrong(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = projections.directional_derivatives
    with monkeypatch.context() as patch:
        patch.setattr(
            projections, "directional_derivatives", lambda b, r, v, c: original(b, r, {n: -d for n, d in v.items()}, c)
        )
        assert agrees(llama.agreement) == (False, True, True)


def test_no_gradient_is_an_error(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(*a: Any, **k: Any) -> Any:
        with torch.no_grad():
            return witness.terms(*a, **k)

    monkeypatch.setattr(projections, "terms", detached)
    with pytest.raises(MeasurementError, match="no parameter gets a gradient") as caught:
        llama.agreement  # noqa: B018
    assert str(caught.value).count(";") == 1


def test_nothing_else_is_swallowed(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*a: Any, **k: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    for module, name in ((projections, "terms"), (witness, "score_rows")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                llama.agreement if module is projections else llama.curvature  # noqa: B018


class Opaque(torch.autograd.Function):
    """2x, whose backward pass leaves no graph, as that of a Triton kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.no_grad():
            return 2 * gradient


class Once(Opaque):
    """The same, and torch is told."""

    backward = staticmethod(once_differentiable(lambda ctx, gradient: 2 * gradient))  # pyright: ignore[reportAssignmentType]


class Forward(Opaque):
    """The same with a forward mode."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * tangent


@pytest.mark.parametrize(("function", "has_forward"), [(Opaque, False), (Once, False), (Forward, True)])
def test_operation_without_that_derivative(function: Any, has_forward: bool, tmp_path: Path) -> None:
    model: Any = models.tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: function.apply(output))
    subject = Subject.of(model, tmp_path)
    found = subject.agreement
    assert found.projections_alpha is None
    assert (found.projections_jvp is not None) == has_forward
    assert has_forward == (found.projections_jvp is not None and found.projections_jvp < TOLERANCE)


def test_nothing_is_left(llama: Subject) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    parameters = llama.bound.registry.parameters.values()
    assert (llama.agreement, llama.curvature)[1] is not None
    before = tensors()
    assert (llama.agreement, llama.curvature)[1] is not None
    assert tensors() == before
    assert all(p.grad is None and p.requires_grad for p in parameters)


def forward_over_reverse(subject: Subject, rho: Tensor) -> float:
    """vᵀ∇²f v of f = Σ_i [R_i + ρ_i S_i]: the tangent along v of the gradient of f, times v. With a graph of the
    gradient, because torch has no forward mode for the fused backward passes that it takes without one (SiLU)."""
    point, total = theta_plus_eta_v(subject.bound.registry, subject.v, 0.0, torch.float64), 0.0
    for rows in batches_by_length(subject.rollouts, 6):
        with forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(value.requires_grad_(), subject.v[n]) for n, value in point.items()}
            scored = score_rows(
                subject.bound, subject.rollouts, rows, subject.config, override=dual, true_derivative=True
            )
            f = (scored.entropy.sum(-1) + rho.reshape(-1)[rows] * scored.logp.sum(-1)).sum()
            gradients = torch.autograd.grad(f, list(dual.values()), create_graph=True, allow_unused=True)
            for name, gradient in zip(dual, gradients, strict=True):
                tangent = None if gradient is None else forward_ad.unpack_dual(gradient).tangent
                if tangent is not None:
                    total += float((tangent.detach() * subject.v[name]).sum())
    return total


@pytest.mark.parametrize("name", MODELS)
def test_second_derivative(name: str, tmp_path: Path) -> None:
    """Reverse twice with respect to η is forward over reverse, to rounding; the central difference, to its error."""
    subject = Subject.of(MODELS[name](), tmp_path)
    found = twice_in_reverse(subject.bound, subject.rollouts, RHO, subject.v, subject.config)
    assert abs(found - forward_over_reverse(subject, RHO)) < 1e-12 * abs(found)
    assert subject.curvature is not None
    assert subject.curvature < CURVATURE_TOLERANCE


def test_second_derivative_is_the_naive_loop(tmp_path: Path) -> None:
    subject = Subject.of(adapter(use_dora=True), tmp_path)
    reference = ref.Reference(subject.bound.module, subject.file)
    terms = []
    for n, g in itertools.product(*map(range, RHO.shape)):
        d2_r, d2_s = reference.second(n, g, subject.v)
        terms.append((d2_r, float(RHO[n, g] * d2_s)))
    found = twice_in_reverse(subject.bound, subject.rollouts, RHO, subject.v, subject.config)
    assert abs(found - sum(map(sum, terms))) < 1e-12 * sum(abs(r) + abs(s) for r, s in terms)


def test_second_derivative_is_wrong(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    step, derivative = slopes.step_of, derivatives.stencil_derivative
    faults: list[tuple[Any, str, Any, float]] = [
        (slopes, "step_of", lambda *a: 3e4 * step(*a), 1e-8),  # too long a step
        (derivatives, "stencil_derivative", lambda at, h: (1 + 1e-3) * derivative(at, h), 1e-5),
        (derivatives, "stencil_derivative", lambda at, h: -derivative(at, h), 1e-2),
    ]
    for place, name, fault, least in faults:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            assert llama.curvature is not None
            assert llama.curvature > least
