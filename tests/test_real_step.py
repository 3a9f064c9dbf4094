"""A step that is taken, in place or by torch's optimizer, against the functional path; and what is left of it after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.errors import MeasurementError
from entropy_probe.memory import live_tensors
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.forward import bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.model.registry import Registry, checksum
from entropy_probe.report import RealStepSection
from entropy_probe.stages import entropy_change, update
from entropy_probe.stages.gradients.payloads import payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score
from entropy_probe.stages.witnesses import real_step

LIMIT = 1e-12
"""4500 ulp of the terms. Rounding takes 2 of them in these models and 25 in 32 random layers; a moment that is off by
0.1 % moves S by 1e-9 of them at lr = 1e-6."""
KINDS: dict[str, Callable[[Path], Path]] = {
    "llama+lora": lambda folder: models.adapter_checkpoint(folder, "llama"),
    "llama+dora": lambda folder: models.adapter_checkpoint(folder, "llama", use_dora=True, modules_to_save=["lm_head"]),
    "gpt2 full, tied": lambda folder: models.full_checkpoint(folder, "gpt2"),
    "gpt2 full, Adam": lambda folder: models.full_checkpoint(folder, "gpt2", torch.optim.Adam),
    "qwen2 full, AMSGrad": lambda folder: models.full_checkpoint(folder, "qwen2", amsgrad=True),
    "llama full, maximize": lambda folder: models.full_checkpoint(folder, "llama", maximize=True),
}
Adam = dict[str, AdamState]


class Subject:
    """A tiny checkpoint with E scores and Ȳ, in float64."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = KINDS[kind](folder / "ckpt")
        self.checkpoint = load_checkpoint(self.path)
        self.adam = self.checkpoint.adam
        self.float64 = bind(self.checkpoint.model, torch.float64)
        e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        u = models.random_rollouts(folder / "u.jsonl", prompts=4, responses=3, seed=2)
        self.e, of_u = (read_rollouts(path, self.float64, None) for path in (e, u))
        self.scores = score(self.float64, self.e, ProbeConfig())
        scores_u = score(self.float64, of_u, ProbeConfig(), with_features=True)
        of_u_and_y = payloads(of_u, scores_u, ProbeConfig())
        alone = models.alone(self.float64, of_u)
        self.ascent = unit_gradients(self.float64, alone, ProbeConfig(), *of_u_and_y).mean_y()

    def direction(self, adam: Adam | None = None, max_grad_norm: float | None = None) -> dict[str, torch.Tensor]:
        adam = self.adam if adam is None else adam
        return update.compute_update_vector_adamw(self.float64.registry, adam, self.ascent, max_grad_norm).v

    def step(
        self, v: dict[str, torch.Tensor] | None = None, adam: Adam | None = None, lr: float = 1e-3, **config: Any
    ) -> RealStepSection:
        adam = self.adam if adam is None else adam
        v = self.direction(adam) if v is None else v
        settings = ProbeConfig.from_mapping(config)
        return real_step.real_step(self.float64, self.e, self.scores, v, self.ascent, adam, lr, settings)


@pytest.fixture(scope="module", params=list(KINDS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("real"), request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("real-gpt2"), "gpt2 full, tied")


def is_the_functional_path(step: RealStepSection) -> bool:
    virtual = step.virtual_difference == 0.0 and step.virtual_undone
    return virtual and step.real_relative <= LIMIT and step.real_seq_logp <= LIMIT


def unequal_lrs(adam: Adam, **settings: Any) -> Adam:
    factors = (1.0, 0.3, 0.0)
    return {n: dataclasses.replace(s, lr=s.lr * factors[i % 3], **settings) for i, (n, s) in enumerate(adam.items())}


@pytest.mark.parametrize("lr", [1e-2, 1e-7])
def test_three_ways_agree(subject: Subject, lr: float) -> None:
    before = checksum(subject.float64.module)
    step = subject.step(lr=lr)
    assert is_the_functional_path(step), step
    assert checksum(subject.float64.module) == before
    assert step.delta_h != 0.0


def test_delta_h_is_that_of_the_sweep(subject: Subject) -> None:
    few = subject.e.of_prompts(torch.tensor([0, 4]), 2)
    at_theta = score(subject.float64, few, ProbeConfig())
    v = subject.direction()
    (swept,) = entropy_change.sweep(
        subject.float64, models.alone(subject.float64, few), at_theta, v, [1e-3], ProbeConfig()
    )
    assert subject.step(v, lr=1e-3).delta_h == pytest.approx(swept.rb.value, rel=1e-12)


@pytest.mark.parametrize("lr", [1e-3, 4e-5])
def test_groups_keep_their_own_learning_rate(subject: Subject, lr: float) -> None:
    adam = unequal_lrs(subject.adam)
    assert is_the_functional_path(subject.step(adam=adam, lr=lr))


def test_learning_rate_after_the_scheduler_has_ended(subject: Subject) -> None:
    ended = {n: dataclasses.replace(s, lr=0.0, initial_lr=s.lr) for n, s in unequal_lrs(subject.adam).items()}
    lr, _ = update.learning_rate(ended, None)
    assert lr == pytest.approx(1e-3)
    assert is_the_functional_path(subject.step(adam=ended, lr=lr))
    never = {n: dataclasses.replace(s, lr=0.0) for n, s in subject.adam.items()}
    assert is_the_functional_path(subject.step(adam=never, lr=1e-4))


def test_clipping(subject: Subject) -> None:
    limit = 0.1 * update.norm(subject.ascent)
    clipped = subject.direction(max_grad_norm=limit)
    assert is_the_functional_path(subject.step(clipped, update={"max_grad_norm": limit}))
    assert not is_the_functional_path(subject.step(subject.direction(), update={"max_grad_norm": limit}))


def test_fresh_optimizer_and_both_kinds_of_decay_at_once(gpt2: Subject) -> None:
    mixed = {n: dataclasses.replace(s, decoupled=bool(i % 2)) for i, (n, s) in enumerate(gpt2.adam.items())}
    assert is_the_functional_path(gpt2.step(adam=mixed))
    zeros = {n: torch.zeros_like(s.exp_avg) for n, s in gpt2.adam.items()}
    fresh = {n: dataclasses.replace(s, step=0.0, exp_avg=zeros[n], exp_avg_sq=zeros[n]) for n, s in gpt2.adam.items()}
    assert is_the_functional_path(gpt2.step(adam=fresh))


def test_step_is_that_of_the_saved_optimizer(subject: Subject) -> None:
    """The trainer's groups and `load_state_dict`, in float32, on the same gradient: bit for bit."""
    saved = torch.load(subject.path / "optimizer.pt", weights_only=True)
    float32 = bind(subject.checkpoint.model)
    own, theirs = (real_step.copied(float32, subject.adam).registry for _ in range(2))
    names = iter(subject.adam)
    groups = [{"params": [theirs.parameters[next(names)] for _ in group["params"]]} for group in saved["param_groups"]]
    optimizer = (torch.optim.AdamW if saved["param_groups"][0]["decoupled_weight_decay"] else torch.optim.Adam)(groups)
    optimizer.load_state_dict(saved)
    for name in subject.adam:
        p = theirs.parameters[name]
        p.grad = -subject.ascent[name].reshape(p.shape).to(p)
    optimizer.step()
    real_step.take_real_step(own, subject.ascent, subject.adam, 1e-3, None)
    for name in subject.adam:
        assert torch.equal(own.parameters[name], theirs.parameters[name]), name
        assert not torch.equal(own.parameters[name], float32.registry.parameters[name]), name


FAULTS: dict[str, Callable[[AdamState], AdamState]] = {
    "sign of the decay": lambda s: dataclasses.replace(s, weight_decay=-s.weight_decay),
    "stale moment": lambda s: dataclasses.replace(s, exp_avg=0.999 * s.exp_avg),
    "second moment not yet decayed": lambda s: dataclasses.replace(
        s,
        exp_avg_sq=s.exp_avg_sq / s.betas[1],
        max_exp_avg_sq=None if s.max_exp_avg_sq is None else s.max_exp_avg_sq / s.betas[1],
    ),
    "step counted twice": lambda s: dataclasses.replace(s, step=s.step + 1),
    "kind of decay": lambda s: dataclasses.replace(s, decoupled=not s.decoupled),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_direction_of_another_optimizer_is_seen(subject: Subject, fault: str) -> None:
    step = subject.step(subject.direction({n: FAULTS[fault](s) for n, s in subject.adam.items()}), lr=1e-6)
    assert step.real_relative > LIMIT, step
    assert step.real_seq_logp > 50 * LIMIT, step
    assert step.virtual_difference == 0.0
    assert step.virtual_undone


def test_ignored_shares_are_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    adam = unequal_lrs(subject.adam)
    monkeypatch.setattr(update, "lr_shares", lambda adam: dict.fromkeys(adam, 1.0))
    step = subject.step(adam=adam, lr=1e-6)
    assert step.real_relative > LIMIT
    assert step.real_seq_logp > 50 * LIMIT


@pytest.mark.parametrize("where", ["step", "undo"])
def test_forgotten_tensor_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    original, calls = real_step._write, []

    def forgetful(registry: Registry, values: Any) -> None:
        calls.append(1)
        forgets = len(calls) == (1 if where == "step" else 2)
        original(registry, dict(list(values.items())[1:]) if forgets else values)

    monkeypatch.setattr(real_step, "_write", forgetful)
    step = subject.step()
    assert len(calls) == 2
    if where == "step":
        assert step.virtual_difference > 0.0
        assert step.virtual_undone
    else:
        assert step.virtual_difference == 0.0
        assert not step.virtual_undone
        assert step.real_relative > LIMIT


@pytest.mark.parametrize("training", [True, False])
def test_virtual_step_is_undone_on_the_module_itself(subject: Subject, training: bool) -> None:
    """Bit for bit, with requires_grad, training flags, absent gradients and ties; also when scoring raises."""
    bound = bind(load_checkpoint(subject.path).model)
    module, v = bound.module.train(training), subject.direction()
    before, storage = checksum(module), {n: p.data_ptr() for n, p in module.named_parameters(remove_duplicate=False)}
    real_step.after_virtual_step(bound, subject.e, v, 1e-3, ProbeConfig())
    assert checksum(module) == before
    changed = ""

    def interrupted() -> None:
        nonlocal changed
        with real_step.virtually_stepped(bound, v, 1e-3):
            changed = checksum(module)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert checksum(module) == before != changed
    with pytest.raises(MeasurementError, match="not finite"):
        real_step.after_virtual_step(bound, subject.e, {n: t * 1e30 for n, t in v.items()}, 1e30, ProbeConfig())
    assert checksum(module) == before
    assert storage == {n: p.data_ptr() for n, p in module.named_parameters(remove_duplicate=False)}


def test_virtual_step_gives_the_scores_of_the_override(subject: Subject) -> None:
    bound, v = bind(subject.checkpoint.model), subject.direction()
    override = theta_plus_eta_v(bound.registry, v, 1e-3, bound.dtype)
    functional = score(bound, subject.e, ProbeConfig(), override)
    in_place = real_step.after_virtual_step(real_step.copied(bound, v), subject.e, v, 1e-3, ProbeConfig())
    for name in ("token_logp", "token_logq", "rb_entropy"):
        assert torch.equal(getattr(in_place, name), getattr(functional, name))


@pytest.mark.parametrize("stage", ["after_virtual_step", "after_real_step"])
def test_model_is_untouched_when_a_step_raises(subject: Subject, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    before, original = checksum(subject.float64.module), real_step.score
    modules = []

    def failing(bound: Any, *args: Any) -> Any:
        modules.append(bound.module)
        if len(modules) == (3 if stage == "after_virtual_step" else 4):
            raise RuntimeError("out of memory")
        return original(bound, *args)

    monkeypatch.setattr(real_step, "score", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        subject.step()
    assert modules[0] is subject.float64.module is not modules[-1]
    assert checksum(subject.float64.module) == before
    stepped = {n: p for n, p in modules[-1].named_parameters() if n in subject.adam}
    kept = all(torch.equal(p, subject.float64.registry.parameters[n]) for n, p in stepped.items())
    assert kept == (stage == "after_virtual_step")


def test_copy_shares_what_no_step_moves(subject: Subject) -> None:
    own = real_step.copied(subject.float64, subject.adam)
    for name, p in subject.float64.registry.parameters.items():
        assert (own.registry.parameters[name] is p) == (name not in subject.adam)
    ties = [len(dict(m.named_parameters(remove_duplicate=False))) for m in (own.module, subject.float64.module)]
    assert ties[0] == ties[1]
    assert len(own.registry.parameters) == len(subject.float64.registry.parameters)


def test_token_outside_the_nucleus_at_the_new_parameters(gpt2: Subject) -> None:
    """log q is that of the sampler: where θ + lr·v would not have sampled a token, or float64 would not, nothing
    raises."""
    assert is_the_functional_path(gpt2.step(lr=1e-2, generation={"top_p": 0.01}))


def test_clipped_log_weights(gpt2: Subject) -> None:
    assert is_the_functional_path(gpt2.step(lr=1e-2, true_delta_h={"clip_log_weight": 1e-3}))


def test_needed_bytes(subject: Subject) -> None:
    moments = 3 if next(iter(subject.adam.values())).amsgrad else 2
    sizes = [subject.float64.registry.parameters[n].numel() for n in subject.adam]
    buffers = sum(b.numel() * b.element_size() for b in subject.float64.module.buffers())
    stepped = sum(sizes) + max(sizes) * (1 + moments)
    assert real_step.needed_bytes(subject.float64, subject.adam) == 8 * stepped + buffers


def test_the_whole_gradient_is_never_held(gpt2: Subject) -> None:
    """A step holds the gradient and the moments of one parameter at a time; θ + lr·v in place holds one tensor."""
    own, v = real_step.copied(gpt2.float64, gpt2.adam), gpt2.direction()
    registry, theta = own.registry, gpt2.float64.registry.parameters
    largest = 8 * max(registry.parameters[n].numel() for n in gpt2.adam)
    assert 6 * largest < 8 * sum(registry.parameters[n].numel() for n in gpt2.adam)

    def stepped() -> None:
        with real_step.virtually_stepped(own, v, 1e-3, theta):
            pass

    works: list[Any] = [stepped, lambda: real_step.take_real_step(registry, gpt2.ascent, gpt2.adam, 1e-3, 1.0)]
    for work in works:
        assert live_tensors(work, torch.device("cpu")).most <= 6 * largest


def test_too_little_memory_is_said_before_anything_is_copied(gpt2: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_step, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(real_step, "copied", None)
    monkeypatch.setattr(real_step, "score", None)
    with pytest.raises(MeasurementError) as caught:
        gpt2.step()
    needed = real_step.needed_bytes(gpt2.float64, gpt2.adam) / 2**30
    assert str(caught.value) == (
        f"optimizer step on a copy: the copy, its gradient and its optimizer need {needed:.2g} GiB, 9.3e-07 are "
        "available; free memory, or choose another --probe-device"
    )


def test_memory_that_suffices_or_is_not_known() -> None:
    real_step.require_memory(2**30, 2**30)
    real_step.require_memory(2**60, None)


def test_model_that_cannot_be_copied(gpt2: Subject) -> None:
    module: Any = gpt2.float64.module
    module.state = torch.ones(1, requires_grad=True) * 2
    try:
        with pytest.raises(MeasurementError, match="the model: cannot be copied") as caught:
            gpt2.step()
    finally:
        del module.state
    assert "\n" not in str(caught.value)
