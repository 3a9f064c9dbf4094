"""A live model's next step: the model beside it, the step that its optimizer takes, and what that does to entropy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from trl.trainer.utils import add_fused_lm_head

import trl_runs
from entropy_probe.errors import MeasurementError, NoCopyError, ProbeError
from entropy_probe.integrations.figures import FIGURES
from entropy_probe.live import ProbedStep, measure_step
from entropy_probe.model.beside import beside
from entropy_probe.model.forward import bind
from entropy_probe.model.live_step import live_step
from entropy_probe.model.registry import checksum
from entropy_probe.report import Estimate
from entropy_probe.schema import step_schema
from entropy_probe.stages.slopes import gradient_per_token
from entropy_probe.step_report import StepReport
from entropy_probe_checks.step_gates import baseline_of_step, judged_step

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]
SMALL: dict[str, Any] = {"budget": "smoke", "generation": {"max_new_tokens": 8}}


def with_gradient(model: Any, seed: int = 0) -> Any:
    """The model after a backward pass of its own loss on random text."""
    ids = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return model


def trained(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype = torch.float32, steps: int = 3
) -> tuple[Any, torch.optim.Optimizer]:
    """A model whose optimizer has taken some steps, with the gradient of the next."""
    model = trl_runs.tiny_model().to(dtype)
    optimizer = make(model)
    for step in range(steps):
        with_gradient(model, step)
        optimizer.step()
    return with_gradient(model, steps), optimizer


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def measured(model: Any, optimizer: Any, config: dict[str, Any] | None = None, **options: Any) -> ProbedStep:
    found = measure_step(model, optimizer, trl_runs.tokenizer(), PROMPTS, SMALL | (config or {}), **options)
    assert found is not None
    return found


# The model beside the model


def test_the_copy_shares_memory_and_nothing_else() -> None:
    model = with_gradient(trl_runs.tiny_model()).train()
    model.register_forward_hook(lambda *_: 1 / 0)
    before = checksum(model)
    clone = beside(model)
    for one, other in zip(model.parameters(), clone.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert one is not other
        assert other.grad is None
    assert not any(part.training for part in clone.modules())
    assert clone.config is not model.config
    ids = torch.tensor([[3, 4, 5]])
    clone(ids)  # without the hook, which would raise
    clone.train()
    clone.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    clone.lm_head.weight.requires_grad_(False)
    assert checksum(model) == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert torch.equal(clone.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_tied_weights_stay_tied() -> None:
    model = trl_runs.tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    clone = beside(model)
    assert clone.lm_head.weight is clone.model.embed_tokens.weight


def test_weight_norm_is_computed_by_its_hook() -> None:
    """torch's own hooks are a part of the forward."""
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    x, clone = torch.randn(4, 3), beside(layer)
    still = clone(x)
    assert torch.equal(still, layer(x))
    with torch.no_grad():
        layer.weight_g.mul_(2.0)
    assert not torch.equal(clone(x), still)
    assert torch.equal(clone(x), layer(x))


def test_layers_that_are_computed_again_are_bare_in_the_copy() -> None:
    """FSDP's own activation checkpointing stands in the names of the parameters."""
    model, bare = trl_runs.tiny_model(), trl_runs.tiny_model()
    for k, layer in enumerate(model.model.layers):
        model.model.layers[k] = checkpoint_wrapper(layer)
    assert [*dict(model.named_parameters())] != [*dict(bare.named_parameters())]
    assert [*dict(beside(model).named_parameters())] == [*dict(bare.named_parameters())]
    assert all(type(one) is type(other) for one, other in zip(beside(model).modules(), bare.modules(), strict=True))


def test_a_step_of_layers_that_are_computed_again() -> None:
    """Every number is that of the bare model."""
    found = []
    for wraps in (False, True):
        model, optimizer = trained(adamw)
        for k, layer in enumerate(model.model.layers):
            model.model.layers[k] = checkpoint_wrapper(layer) if wraps else layer
        found.append(measured(model, optimizer).report.model_dump(exclude={"timing", "environment"}))
    assert found[0] == found[1]


def as_it_is(model: Any) -> Any:
    return model


def in_trl(model: Any) -> Any:
    add_fused_lm_head(model, temperature=1.0)
    return model


def in_accelerates_autocast(model: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer in this process has made its own
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    return accelerator.prepare_model(model, evaluation_mode=True)


def in_both(model: Any) -> Any:
    return in_accelerates_autocast(in_trl(model))


def in_a_method(model: Any) -> Any:
    inner = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


FORWARDS = (as_it_is, in_trl, in_accelerates_autocast, in_both, in_a_method, compiled)


@pytest.mark.parametrize("wrap", FORWARDS, ids=lambda of: of.__name__)
def test_whatever_was_put_around_the_forward(wrap: Callable[[Any], Any]) -> None:
    """The copy, and copies of the copy in other dtypes, use their own parameters, in their own mode, without autocast:
    logits at θ are those of a bare model, and those at other parameters are those of a bare model with these."""
    bare, wrapped = trl_runs.tiny_model().eval(), wrap(trl_runs.tiny_model())
    wrapped.train()
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(bare)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        bound = bind(beside(wrapped), dtype, lend_frozen=True)
        override = {name: p.detach().to(dtype) for name, p in other.named_parameters()}
        expected, elsewhere = (bind(of, dtype).logits(ids) for of in (bare, other))
        assert torch.allclose(bound.logits(ids), expected, rtol=0, atol=tolerance)
        assert torch.allclose(bound.logits(ids, override=override), elsewhere, rtol=0, atol=tolerance)
    assert wrapped.training


def test_what_cannot_be_copied_is_said() -> None:
    model = trl_runs.tiny_model()
    model.stream = (number for number in range(3))
    with pytest.raises(NoCopyError, match="the live model: cannot be copied"):
        beside(model)


def test_a_forward_of_other_parameters_is_found_out() -> None:
    """Where something hides the live model so well that the copy still calls it, no logit moves along the step."""

    class Hidden:
        def __init__(self, of: Any) -> None:
            self.inner = [of]

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner[0](*args, **kwargs)

    model, optimizer = trained(adamw)
    model.forward = Hidden(model.forward)
    with pytest.raises(MeasurementError, match="no logit moves along the step"):
        measured(model, optimizer)


# The step

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True),
    "AdamW, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, foreach=True),
    "AdamW, lr a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3), foreach=False),
    "Adam, AMSGrad, coupled": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "two groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.dim() > 1], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.dim() == 1], "lr": 1e-4},
        ]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_the_one_that_is_taken(name: str, dtype: torch.dtype) -> None:
    """θ' − θ beside the real one, which rounds θ' twice, for decay and step, and the moments: one and a half ulps of θ,
    and some 20 of the step. A part of the update that is wrong is a hundredth of it. All is as it was before."""
    model, optimizer = trained(OPTIMIZERS[name], dtype)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))  # puts a `step` on it
    optimizer.register_step_pre_hook(lambda *_: None)
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    state, before = copy.deepcopy(optimizer.state_dict()), checksum(model)
    step = live_step(optimizer, dict(model.named_parameters()))
    assert checksum(model) == before
    assert called == []
    assert repr(optimizer.state_dict()) == repr(state)
    optimizer.step()
    assert called == [1]
    eps = torch.finfo(dtype).eps
    for name_, parameter in model.named_parameters():
        made = parameter.detach().double() - theta[name_].double()
        allowed = 1.5 * eps * parameter.detach().double().abs() + 20 * eps * made.abs().max()
        assert bool(((step.move[name_] - made).abs() <= allowed).all())
    scheduler.step()


@pytest.mark.parametrize("make", [adamw, OPTIMIZERS["SGD"]], ids=["AdamW", "SGD"])
def test_the_share_of_momentum(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """v₀ᵀv/‖v‖² with v₀ by the formula: momentum over the new denominator, and decay."""
    model, optimizer = trained(make, torch.float64)
    step = live_step(optimizer, dict(model.named_parameters()))
    along = size = 0.0
    for name, p in model.named_parameters():
        group, state, v = optimizer.param_groups[0], optimizer.state[p], step.move[name]
        if make is adamw:
            (b1, b2), t = group["betas"], float(state["step"]) + 1
            second = b2 * state["exp_avg_sq"] + (1 - b2) * p.grad**2
            denominator = (second / (1 - b2**t)).sqrt() + group["eps"]
            v0 = -group["lr"] * (b1 * state["exp_avg"] / (1 - b1**t) / denominator + group["weight_decay"] * p.detach())
        else:  # Nesterov: g + μ·(μ·buffer + g), with weight decay in g
            decayed = group["weight_decay"] * p.detach()
            v0 = -group["lr"] * (decayed + 0.9 * (0.9 * state["momentum_buffer"] + decayed))
        along += float((v0 * v).sum())
        size += float((v * v).sum())
    assert step.momentum_share == pytest.approx(along / size, rel=1e-9)


class SignSgd(torch.optim.Optimizer):
    """An optimizer of somebody's own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_an_optimizer_of_ones_own_is_run_in_its_own_dtypes() -> None:
    model, optimizer = trained(lambda m: SignSgd(m.parameters(), 1e-3))
    step = live_step(optimizer, dict(model.named_parameters()))
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert not step.in_float64
    for name, p in model.named_parameters():
        assert torch.equal(step.move[name], (p.detach().double() - theta[name].double()).float())


def test_a_gradient_that_a_scaler_has_scaled() -> None:
    model, optimizer = trained(adamw)
    expected = live_step(optimizer, dict(model.named_parameters()))
    for p in model.parameters():
        p.grad.mul_(64.0)
    found = live_step(optimizer, dict(model.named_parameters()), 64.0)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert all(torch.allclose(found.move[name], expected.move[name]) for name in found.move)


# What it does to the entropy


def test_slope_by_the_gradient_of_the_entropy() -> None:
    """−X̄ᵀv with X̄ by backward passes; the measurement's own is one forward-mode pass."""
    model, optimizer = trained(adamw)
    found = measured(model, optimizer)
    bound = bind(beside(model))
    x = gradient_per_token(bound, found.share, found.scores, found.along, found.config)
    move = live_step(optimizer, dict(model.named_parameters())).move
    slope = -sum(float(x[name].double() @ move[name].double().flatten()) for name in move)
    assert found.report.predicted_per_token.first_order.value == pytest.approx(slope, rel=1e-4)


def test_small_steps_come_as_predicted() -> None:
    """In float64 the change that came differs from the slope by a second order: by a hundredth as much, relative to it,
    where the step is a hundredth as long. With the curvature, by a third."""
    off: dict[str, list[float]] = {"first_order": [], "second_order": []}
    for lr in (1e-3, 1e-5):
        model, optimizer = trained(adamw, torch.float64)
        optimizer.param_groups[0]["lr"] = lr
        step = measured(model, optimizer, {"budget": "standard", "precision": PRECISE, **FEW})
        optimizer.step()
        report = step.after(model)
        assert report.came is not None
        came = report.came.realised_per_token[0]
        for order in off:
            told = getattr(report.predicted_per_token, order).value
            off[order].append(abs(came - told) / abs(came))
    assert off["first_order"][1] == pytest.approx(off["first_order"][0] / 100, rel=0.1)
    assert off["second_order"][0] < off["first_order"][0] / 10
    assert off["second_order"][1] < off["second_order"][0] / 1000


PRECISE = {part: {"dtype": "float64"} for part in ("func_override", "tf_nograd", "tf_withgrad")}
FEW = {"batch": {"num_prompts": 6}, "generation": {"max_new_tokens": 8, "num_return_sequences": 4}}


@pytest.mark.parametrize("wrap", [in_trl, in_both], ids=lambda of: of.__name__)
@pytest.mark.parametrize("budget", ["smoke", "standard"])
def test_a_wrapped_model_is_measured_as_a_bare_one(wrap: Callable[[Any], Any], budget: str) -> None:
    model, optimizer = trained(adamw)
    expected = measured(model, optimizer, {"budget": budget, **FEW}).report
    found = measured(wrap(model), optimizer, {"budget": budget, **FEW}).report
    assert found.batch == expected.batch
    told = {name: value for name, value in expected.figures.items() if name != "seconds"}
    assert {name: value for name, value in found.figures.items() if name != "seconds"} == pytest.approx(told, rel=1e-9)


def test_weights_in_bf16_are_measured_in_float32() -> None:
    """θ' rounds the step away where it is small: what came is not what the step would have brought, and says so."""
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-5), torch.bfloat16)
    before = checksum(model)
    step = measured(in_trl(model), optimizer)
    assert checksum(model) == before
    assert step.report.realised.realised_per_token[0] != 0.0
    optimizer.step()
    came = step.after(model).came
    assert came is not None
    assert abs(came.realised_per_token[0]) != abs(step.report.realised.realised_per_token[0])


def test_nothing_is_touched_and_no_number_is_drawn() -> None:
    model, optimizer = trained(adamw)
    model.train()
    before, generator = checksum(model), torch.get_rng_state()
    gradients = [p.grad.clone() for p in model.parameters()]
    step = measured(model, optimizer)
    step.after(model)
    assert checksum(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_the_seed_chooses_prompts_and_responses() -> None:
    model, optimizer = trained(adamw)
    one, again, other = (measured(model, optimizer, after_step=n).report for n in (0, 0, 1))
    assert one.batch == again.batch
    assert one.batch.fingerprint != other.batch.fingerprint
    assert one.predicted_per_token == again.predicted_per_token


def test_a_step_that_moves_nothing() -> None:
    """A schedule that begins at 0: the change is 0, and nothing is divided by it."""
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), lr=0.0), steps=0)
    report = measured(model, optimizer).report
    assert report.update.norm == report.update.momentum_share == 0.0
    assert report.predicted_per_token.first_order == Estimate(value=0.0, se=0.0)
    assert report.realised.realised_per_token == (0.0, 0.0)


def test_a_step_that_a_scaler_leaves_out() -> None:
    model, optimizer = trained(adamw)
    next(model.parameters()).grad[0] = torch.inf
    assert measure_step(model, optimizer, trl_runs.tokenizer(), PROMPTS, SMALL) is None


def test_responses_end_where_the_model_does() -> None:
    model, optimizer = trained(adamw)
    report = measured(model, optimizer, {"generation": {"max_new_tokens": 500}, "batch": {"num_prompts": 2}}).report
    assert report.config["generation"]["max_new_tokens"] == 64 - 4


def without_gradient(model: Any, optimizer: Any) -> Any:
    model.zero_grad()
    return model


def another(model: Any, optimizer: Any) -> Any:
    return trl_runs.tiny_model()


@pytest.mark.parametrize(
    ("change", "prompts", "config", "said"),
    [
        (without_gradient, PROMPTS, {}, "the optimizer: none of its parameters has a gradient; ask after the backward"),
        (another, PROMPTS, {}, "trains a tensor of shape (42, 16) that the model does not have"),
        (None, [], {}, "prompts: there are none; give at least two"),
        (None, ["a"], {}, "prompts: there is one, and a standard error needs two"),
        (None, iter(PROMPTS), {}, "which has no length; give a list, a data set or a file"),
        (None, [1, 2], {}, "prompts: entry"),
        (None, PROMPTS, {"generation": {"top_p": 0.9}}, "generation.top_p: is below 1"),
        (None, PROMPTS, {"batsch": {}}, "batsch"),
    ],
)
def test_errors(change: Callable[[Any, Any], Any] | None, prompts: Any, config: dict[str, Any], said: str) -> None:
    model, optimizer = trained(adamw, steps=0)
    model = model if change is None else change(model, optimizer)
    with pytest.raises(ProbeError) as caught:
        measure_step(model, optimizer, trl_runs.tokenizer(), prompts, SMALL | config)
    assert said in str(caught.value)


def test_messages_are_rendered_by_the_template() -> None:
    model, optimizer = trained(adamw, steps=0)
    tokenizer = trl_runs.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    chats = [[{"role": "user", "content": text[:-1]}] for text in PROMPTS]
    rows = [{"prompt": chat, "gold": "1"} for chat in chats]
    found = [measure_step(model, optimizer, tokenizer, of, SMALL) for of in (chats, rows, PROMPTS)]
    fingerprints = {step.report.batch.fingerprint for step in found if step is not None}
    assert len(fingerprints) == 1


# The report and its gates


def test_the_report_as_a_file(tmp_path: Path) -> None:
    import jsonschema

    model, optimizer = trained(adamw)
    step = measured(model, optimizer)
    optimizer.step()
    report = step.after(model)
    report.to_json(tmp_path / "step.json")
    again = StepReport.from_json(tmp_path / "step.json")
    assert again == report
    jsonschema.validate(again.model_dump(mode="json"), step_schema())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ProbeError, match="is not the report of a step: probe_version"):
        StepReport.from_json(tmp_path / "broken.json")
    with pytest.raises(ProbeError, match="cannot be read"):
        StepReport.from_json(tmp_path / "none.json")


@pytest.fixture(scope="module")
def report() -> StepReport:
    model, optimizer = trained(adamw)
    step = measured(model, optimizer)
    optimizer.step()
    return step.after(model)


def test_gates_hold_what_was_measured(report: StepReport) -> None:
    """Each quantity by hand, against bounds on either side of it."""
    h, change = report.entropy.per_token, report.predicted_per_token.first_order
    share = abs(change.value) / h.value
    noise = (change.se + share * h.se) / h.value
    assert report.came is not None
    assert report.came.predicted_per_token is not None
    assert report.came.difference_per_token_se is not None
    assert report.came.predicted_per_token_se is not None
    ratio = report.came.realised_per_token[0] / report.came.predicted_per_token
    of_ratio = report.came.difference_per_token_se + abs(1 - ratio) * report.came.predicted_per_token_se
    of_ratio /= abs(report.came.predicted_per_token)
    by_hand = {
        "entropy": (h.value, h.se),
        "predicted_change": (share, noise),
        "realised_ratio": (ratio, of_ratio),
        "ess": (report.realised.unclipped_ess_fraction, 0.0),
    }
    for name, (value, se) in by_hand.items():
        for beyond, status in ((3.9, "pass"), (4.1, "fail")):
            gates = {name: {"max": value - beyond * se}}
            if se == 0.0:  # without noise a bound is the limit itself
                gates = {name: {"min": value + 1e-9 * (beyond - 4)}}
            (verdict,) = judged_step(report, gates, {})
            assert (verdict.criterion, verdict.family, verdict.status) == (name, "gate", status)
            assert verdict.value == pytest.approx(value, rel=1e-9)


def test_gates_of_a_fall(report: StepReport) -> None:
    h = report.entropy.per_token
    before = {"entropy": Estimate(value=2 * h.value, se=h.se)}
    for fall, status in ((0.3, "fail"), (0.6, "pass")):
        (verdict,) = judged_step(report, {"entropy": {"fall": fall}}, before)
        assert (verdict.status, verdict.value) == (status, pytest.approx(0.5))
    (verdict,) = judged_step(report, {"entropy": {"fall": 0.3}}, baseline_of_step(report))
    assert (verdict.status, verdict.value) == ("pass", 0.0)


def test_figures_are_those_of_the_report(report: StepReport) -> None:
    figures = report.figures
    assert figures["entropy"] == report.entropy.per_token.value
    assert figures["resolves"] == 2 * figures["delta_h_se"]
    assert figures["seconds"] == sum(report.timing.values())
    assert report.came is not None
    assert figures["delta_h_came"] == report.came.delta_h_per_token_pd
    assert "delta_h_since" not in figures
    assert all(isinstance(value, float) for value in figures.values())
    # what a checkpoint's report has too is logged under the same name; these are of a step inside of the loop alone
    assert figures.keys() - FIGURES.keys() == {"gates_failed", "seconds", "delta_h_came", "delta_h_came_se"}
    assert figures["ess"] == report.realised.unclipped_ess_fraction


def test_frozen_parameters_stay_out() -> None:
    model, optimizer = trained(adamw, steps=0)
    frozen = model.model.layers[0].self_attn.q_proj.weight
    frozen.requires_grad_(False)
    frozen.grad = None
    measured(model, optimizer)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(live_step(optimizer, dict(model.named_parameters())).move) == names
