"""The direction v of the next optimizer step per unit learning rate, from the checkpoint's own Adam state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.estimators.adam import AdamHyper, adam_direction, preconditioner
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.registry import Registry
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.made import Made, held_or_made

_DEFAULT_LR = 1e-4


@dataclass(frozen=True)
class UpdateDirection:
    """v = v₀ + D·Ȳ by name, in float64 on the CPU; ‖g‖ before clipping; the factor that clipping applied to g.

    v is held, because every pass along it reads it; v₀ and D are made where they are used, if they are large.
    """

    v: Mapping[str, Tensor]
    v0: Mapping[str, Tensor]
    diagonal: Mapping[str, Tensor]
    grad_norm: float
    clip_factor: float

    @property
    def norm(self) -> float:
        return norm(self.v)

    @property
    def momentum_share(self) -> float:
        """v₀ᵀv/‖v‖²; 0 where v is 0."""
        size = self.norm
        along = sum(float(torch.dot(self.v0[n].flatten(), v.flatten())) for n, v in self.v.items())
        return along / size**2 if size > 0 else 0.0


def learning_rate(adam: Mapping[str, AdamState], configured: float | None) -> tuple[float, str]:
    """(lr, where it came from): `first_order.lr` if set, else the optimizer's, else `initial_lr` (a scheduler that has
    ended leaves lr = 0), else 1e-4. The optimizer's is the largest over its groups."""
    if configured is not None:
        return configured, "first_order.lr"
    lr = max((state.lr for state in adam.values()), default=0.0)
    if lr > 0:
        return lr, "optimizer"
    initial = max((state.initial_lr or 0.0 for state in adam.values()), default=0.0)
    if initial > 0:
        return initial, "initial_lr: the optimizer's lr is 0, its scheduler has ended"
    return _DEFAULT_LR, f"default {_DEFAULT_LR:g}: the optimizer's lr is 0 and it has no initial_lr"


def _lr(state: AdamState, *, ended: bool) -> float:
    return (state.initial_lr or 0.0) if ended else state.lr


def lr_shares(adam: Mapping[str, AdamState]) -> dict[str, float]:
    """Each parameter's lr over the largest one; `initial_lr` where the scheduler has ended; 1 without any."""
    ended = all(state.lr == 0 for state in adam.values())
    largest = max((_lr(state, ended=ended) for state in adam.values()), default=0.0)
    return {
        name: _lr(state, ended=ended) / largest if largest > 0 else 1.0
        for name, state in adam.items()
    }


def adam_preconditioner(
    adam: Mapping[str, AdamState], world: World = ALONE
) -> Mapping[str, Tensor]:
    """P by name in float64, scaled like v where groups have different learning rates, so that −lr·X̄ᵀPȲ is the effect
    of each group's own; 1 where a parameter has no state (`missing_state: identity`)."""
    shares = lr_shares(adam)

    def of(name: str) -> Tensor:
        state = adam[name]
        if state.step == 0:
            return torch.full_like(state.exp_avg_sq, shares[name], dtype=torch.float64)
        second = (
            state.max_exp_avg_sq
            if state.amsgrad and state.max_exp_avg_sq is not None
            else state.exp_avg_sq
        )
        beta2, step = state.betas[1], state.step if state.bias_correction else math.inf
        eps = state.eps / math.sqrt(1 - beta2**step) if state.of_transformers else state.eps
        return shares[name] * preconditioner(second, step, beta2, eps)

    shapes = {name: tuple(state.exp_avg_sq.shape) for name, state in adam.items()}
    return held_or_made(shapes, of, world)


def clip_factor(grad_norm: float, max_grad_norm: float | None) -> float:
    """min(1, max_grad_norm/(‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does; 1 without clipping."""
    return 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (grad_norm + 1e-6))


def compute_update_vector_adamw(
    registry: Registry,
    adam: Mapping[str, AdamState],
    ascent: Mapping[str, Tensor],
    max_grad_norm: float | None = None,
    lr: float | None = None,
    world: World = ALONE,
) -> UpdateDirection:
    """v = (θ' − θ)/lr of one step of the checkpoint's Adam on the gradient g = −Ȳ, for the optimizer's parameters.

    `ascent` is Ȳ by name, in any shape. Where groups have different learning rates, v of a group is scaled by its lr
    over the largest, so that θ + lr·v is the optimizer's step. Clipping, where asked for, acts on g first. `lr`, the
    largest of the step, is the optimizer's own where it is not given; v depends on it in Transformers' form alone.
    Of a `world` that holds such vectors once every process makes some tensors of v.
    """
    registry.require_trainable(adam)
    grad_norm = norm(Made(adam, lambda name: ascent[name]))
    clip, shares = clip_factor(grad_norm, max_grad_norm), lr_shares(adam)
    largest = learning_rate(adam, None)[0] if lr is None else lr

    def parts(name: str) -> tuple[Tensor, Tensor, Tensor]:
        """v, v₀ and D of a tensor."""
        state, share = adam[name], shares[name]
        parameter = registry.parameters[name].detach().cpu()
        y = clip * ascent[name].double().reshape(parameter.shape).cpu()
        hyper = AdamHyper(
            lr=share * largest,
            beta1=state.betas[0],
            beta2=state.betas[1],
            eps=state.eps,
            weight_decay=state.weight_decay,
            decoupled=state.decoupled,
            amsgrad=state.amsgrad,
            maximize=state.maximize,
            bias_correction=state.bias_correction,
            of_transformers=state.of_transformers,
        )
        rest, d = adam_direction(
            parameter, y, state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq, state.step, hyper
        )
        v0 = share * rest
        return v0 + share * d * y, v0, share * clip * d

    shapes = {name: registry.parameters[name].shape for name in adam}
    v = world.made(shapes, lambda name: parts(name)[0])
    v0, diagonal = (held_or_made(shapes, lambda name, k=k: parts(name)[k], world) for k in (1, 2))
    return UpdateDirection(v, v0, diagonal, grad_norm, clip)
