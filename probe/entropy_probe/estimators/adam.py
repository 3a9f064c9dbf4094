"""Adam's geometry for one parameter: the preconditioner P, and the direction v = v₀ + D·Ȳ of the next step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class AdamHyper:
    """Hyper-parameters of the parameter's own group.

    `of_transformers`: the form that Transformers' own AdamW had, `AdamState` says how it differs.
    `lr` is that of the step, which v depends on in this form alone.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    bias_correction: bool = True
    of_transformers: bool = False


def preconditioner(
    exp_avg_sq: Float[Tensor, "*shape"], step: float, beta2: float, eps: float
) -> Float[Tensor, "*shape"]:
    """P = 1/(√v̂ + ε), v̂ = exp_avg_sq/(1 − β₂^step). Under AMSGrad give `max_exp_avg_sq`. In float64.

    Without bias correction give an infinite `step`: v̂ = exp_avg_sq.
    """
    return 1.0 / ((exp_avg_sq.double() / (1.0 - beta2**step)).sqrt() + eps)


def adam_direction(
    param: Float[Tensor, "*shape"],
    ascent: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    max_exp_avg_sq: Float[Tensor, "*shape"] | None,
    step: float,
    hyper: AdamHyper,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(v₀, D) in float64, with v = v₀ + D·Ȳ the change of the parameter per unit learning rate.

        g = −Ȳ (negated under `maximize`; + weight_decay·θ if the decay is coupled),   t = step + 1
        m = β₁·exp_avg + (1−β₁)g,   s = β₂·exp_avg_sq + (1−β₂)g²
        v = −[m/(1−β₁^t)] / [√s/√(1−β₂^t) + ε] − weight_decay·θ (if decoupled)
        D = ±(1−β₁) / [(1−β₁^t)·denominator],   v₀ = v − D·Ȳ: momentum and decay

    Without bias correction t is infinite. Transformers' form divides ε by √(1−β₂^t) too, and multiplies the first term
    of v by 1 − lr·weight_decay: its decay acts on what the step has made of θ.

    `ascent` is Ȳ after gradient clipping. v equals (θ' − θ)/lr of `torch.optim.AdamW`
    (tests/test_against_reference.py::test_update, and `stages/witnesses/torch_step.py` at every run).
    """
    theta, gradient = param.double(), -ascent.double()
    sign = -1.0 if hyper.maximize else 1.0
    gradient = sign * gradient
    decay = hyper.weight_decay * theta
    if not hyper.decoupled:
        gradient = gradient + decay
    t = step + 1 if hyper.bias_correction else math.inf
    second = hyper.beta2 * exp_avg_sq.double() + (1 - hyper.beta2) * gradient.square()
    if hyper.amsgrad and max_exp_avg_sq is not None:
        second = torch.maximum(second, max_exp_avg_sq.double())
    correction = math.sqrt(1 - hyper.beta2**t)
    if hyper.of_transformers:
        denominator = (second.sqrt() + hyper.eps) / correction
        kept = 1 - hyper.lr * hyper.weight_decay
    else:
        denominator, kept = second.sqrt() / correction + hyper.eps, 1.0
    scale = kept / ((1 - hyper.beta1**t) * denominator)
    diagonal = sign * (1 - hyper.beta1) * scale
    rest = -hyper.beta1 * exp_avg.double() * scale
    rest = rest - decay if hyper.decoupled else rest - (1 - hyper.beta1) * decay * scale
    return rest, diagonal
