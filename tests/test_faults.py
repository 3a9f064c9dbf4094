"""Planted faults: each turns the criterion red that is there for it, and leaves the others as they were."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.model import forward, precision
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages import continuity, entropy_change, gradients, scores, update
from entropy_probe_checks.criteria import CRITERIA


class Subject:
    """A tiny checkpoint, its batches, and the failing criteria of a run on it."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.checkpoint = models.full_checkpoint(folder / "ckpt", architecture, lr=1e-5)
        self.e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        self.u = models.random_rollouts(folder / "u.jsonl", prompts=6, responses=3, seed=2)

    def run(self, **config: Any) -> ProbeReport:
        return run_probe(self.checkpoint, ProbeConfig.from_mapping(config), self.e, self.u)

    def red(self, **config: Any) -> set[str]:
        report = self.run(**config)
        return {name for name, criterion in CRITERIA.items() if criterion(report).status == "fail"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("faults"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("faults-llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("faults-gpt2"), "gpt2")


def test_without_a_fault_nothing_is_red(subject: Subject) -> None:
    assert subject.red() == set()


def test_mapping_that_is_not_theta_at_zero(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = continuity.theta_plus_eta_v
    monkeypatch.setattr(continuity, "theta_plus_eta_v", lambda *a: {n: t * (1 + 1e-6) for n, t in original(*a).items()})
    assert "zero_check" in subject.red()


def test_dropout_left_on(gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundModel, "_evaluating", lambda self: contextlib.nullcontext())
    checkpoint = load_checkpoint(gpt2.checkpoint)
    checkpoint.model.train()
    report = run_probe(checkpoint, ProbeConfig.from_mapping({}), gpt2.e, gpt2.u)
    assert {name for name in ("zero_check", "zero_step_change") if CRITERIA[name](report).status == "fail"} == {
        "zero_check",
        "zero_step_change",
    }


def test_float32_islands_in_float64(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        precision.TrueFloat64, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **(k or {}))
    )
    assert "logit_scaling" in llama.red()


def test_addition_in_float32(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = continuity.theta_plus_eta_v

    def rounded(*a: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.float().to(tensor.dtype) for name, tensor in original(*a).items()}

    monkeypatch.setattr(continuity, "theta_plus_eta_v", rounded)
    assert {"param_scaling", "logit_scaling"} <= llama.red()


def test_positions_count_padding(gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BoundModel._arguments
    monkeypatch.setattr(
        BoundModel,
        "_arguments",
        lambda *a: {k: v for k, v in original(*a).items() if k != "position_ids"},
    )
    assert gpt2.red() == {"padding_invariance"}


def test_mask_lets_padding_through(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BoundModel._arguments
    monkeypatch.setattr(
        BoundModel,
        "_arguments",
        lambda *a: {k: torch.ones_like(v) if k == "attention_mask" else v for k, v in original(*a).items()},
    )
    assert llama.red() == {"padding_invariance"}


def _after_sweep(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    original = entropy_change.sweep

    def sweep(bound: BoundModel, *a: Any) -> Any:
        result = original(bound, *a)
        with torch.no_grad():
            spoil(bound)
        return result

    monkeypatch.setattr(entropy_change, "sweep", sweep)


def test_live_model_changed(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_sweep(monkeypatch, lambda bound: next(bound.module.parameters()).view(-1)[0].add_(1e-4))
    assert llama.red() == {"live_model_unmodified"}


def test_own_copy_changed(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_sweep(monkeypatch, lambda bound: next(bound.module.parameters()).view(-1)[0].add_(1e-9))
    dtype = {key: {"dtype": "float64"} for key in ("func_override", "tf_nograd", "tf_withgrad")}
    assert llama.red(precision=dtype) == {"live_model_unmodified"}


def test_buffers_overridden(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    original = scores.read_rows

    def read_rows(bound: BoundModel, *a: Any, override: Any = None, **k: Any) -> Any:
        buffers = {name: b.clone() for name, b in bound.module.named_buffers()}
        return original(bound, *a, override={**(override or {}), **buffers}, **k)

    monkeypatch.setattr(scores, "read_rows", read_rows)
    assert llama.red() == {"buffers_overridden"}


def test_stale_scores(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores at θ come from other parameters than those of the sweep."""
    original = entropy_change.sweep

    def stale(s: scores.Scores) -> scores.Scores:
        read = ("token_logp", "token_logq", "rb_entropy", "rb_entropy_q")
        return dataclasses.replace(s, **{name: getattr(s, name) * 1.001 for name in read})

    monkeypatch.setattr(entropy_change, "sweep", lambda bound, rollouts, s, *a: original(bound, rollouts, stale(s), *a))
    assert {"zero_step_change", "zero_step_ess"} <= subject.red()


def test_unused_parameter(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached part of the forward: its parameters get no gradient from X nor from Y, and the difference of D_v sees
    them move where no derivative does."""
    checkpoint = load_checkpoint(llama.checkpoint)
    layer: Any = checkpoint.model.model.layers[0].mlp  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    report = run_probe(checkpoint, ProbeConfig.from_mapping({}), llama.e, llama.u)
    assert {n for n, c in CRITERIA.items() if c(report).status == "fail"} == {
        "x_coverage",
        "y_coverage",
        "curvature_witness",
        "change_identity",
        "taylor_order",
    }
    uncovered = {name.split(".")[-2] for name in report.registry.uncovered}
    assert uncovered == {"down_proj", "gate_proj", "up_proj", "post_attention_layernorm"}


def test_autocast_outside_changes_nothing(llama: Subject) -> None:
    expected = llama.run().model_dump(exclude={"timing"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llama.run().model_dump(exclude={"timing"}) == expected


def test_tied_parameter_in_a_dict_is_refused() -> None:
    """`functional_call` would leave θ + ηv in the live module."""
    from peft import LoraConfig, get_peft_model

    model = models.tiny_model("qwen2")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 5], task_type="CAUSAL_LM")
    with pytest.raises(Exception, match="is tied, in a ParameterDict") as caught:
        forward.bind(get_peft_model(model, config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rest, diagonal: (-rest, diagonal), {"optimizer_step_cosine", "real_step"}),
        (lambda rest, diagonal: (1.001 * rest, 1.001 * diagonal), {"optimizer_step_norm", "real_step"}),
        (lambda rest, diagonal: (rest, 0.9 * diagonal), {"optimizer_step_cosine", "optimizer_step_norm", "real_step"}),
    ],
)
def test_direction_of_another_step(
    llama: Subject, monkeypatch: pytest.MonkeyPatch, change: Any, expected: set[str]
) -> None:
    original = update.adam_direction
    monkeypatch.setattr(update, "adam_direction", lambda *a: change(*original(*a)))
    red = llama.red()
    assert expected <= red <= {"optimizer_step_cosine", "optimizer_step_norm", "real_step"}


def test_per_prompt_gradients_that_are_mixed_up(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of another row's tokens: every parameter gets a gradient, and every identity of U_cross still holds."""
    original = Capture.add_outer

    def shifted(self: Capture, weight: Any, left: torch.Tensor, right: torch.Tensor, rows: torch.Tensor) -> None:
        original(self, weight, left, right.roll(1, 0), rows)

    monkeypatch.setattr(Capture, "add_outer", shifted)
    assert llama.red() == {"gradient_witness", "projections_agree"}


def test_gradients_of_blocks_that_are_mixed_up(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that holds another block's prompts: each of X and Y is seen by itself."""
    original = gradients.unit_gradients
    for side in ("x", "y"):

        def rolled(*a: Any, side: str = side, **k: Any) -> Any:
            units = original(*a, **k)
            return dataclasses.replace(units, **{side: {n: v.roll(1, 0) for n, v in getattr(units, side).items()}})

        with monkeypatch.context() as patch:
            patch.setattr(gradients, "unit_gradients", rolled)
            red = llama.red(first_order={"mode": "block", "num_blocks": 3})
        assert red == {"gradient_witness"} | ({"projections_agree"} if side == "x" else set())
