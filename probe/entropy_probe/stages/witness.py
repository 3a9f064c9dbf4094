"""Two prompts' gradients by the naive loop, beside those of the fast path, on the user's own model at every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients import UnitGradients, gram, response_weights, unit_gradients
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, score_rows
from entropy_probe.stages.update import norm


@dataclass(frozen=True)
class Witness:
    """U_cross of the two prompts by the naive loop and by the fast path, and the larger of the two prompts'
    ‖X_fast − X_naive‖/‖X_naive‖, and the same of Y; norms over all trainable parameters."""

    u_cross: float
    u_cross_fast: float
    x_difference: float
    y_difference: float


def gradient_witness(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    config: ProbeConfig,
    units: UnitGradients,
    precond: Mapping[str, Tensor],
) -> Witness:
    """The two prompts with the largest weights in Y, so that both sides have something to compare.

    for n in prompts:  X_n = autograd.grad(Σ_g c_ng S_ng),   Y_n = autograd.grad(Σ_g a_ng S_ng)
    """
    weights_x, weights_y = response_weights(rollouts, scores, config)
    prompts = weights_y.abs().sum(1).topk(2).indices.sort().values
    naive_x = _naive(bound, rollouts, prompts, weights_x, config, true=not bound.autograd_is_derivative)
    naive_y = _naive(bound, rollouts, prompts, weights_y, config, true=False)
    if units.mode == "exact":
        fast_x, fast_y = ({name: side[name][prompts] for name in side} for side in (units.x, units.y))
    else:
        exact = config.model_copy(update={"first_order": config.first_order.model_copy(update={"mode": "exact"})})
        alone = unit_gradients(bound, rollouts.of_prompts(prompts), scores.of_prompts(prompts), exact)
        fast_x, fast_y = alone.x, alone.y
    return Witness(
        u_cross=cross_moments(gram(naive_x, naive_y, precond)).u_cross,
        u_cross_fast=cross_moments(gram(fast_x, fast_y, precond)).u_cross,
        x_difference=_difference(fast_x, naive_x),
        y_difference=_difference(fast_y, naive_y),
    )


def _naive(
    bound: BoundModel, rollouts: Rollouts, prompts: Tensor, weights: Tensor, config: ProbeConfig, *, true: bool
) -> dict[str, Tensor]:
    """[2, numel] by name, one backward pass for each prompt and microbatch."""
    parameters, group = bound.registry.trainable, rollouts.num_responses
    totals = {name: torch.zeros(len(prompts), p.numel(), dtype=bound.dtype) for name, p in parameters.items()}
    for i, n in enumerate(prompts.tolist()):
        for g in torch.arange(group).split(config.generation.tf_batch_size):
            logp = score_rows(bound, rollouts, n * group + g, config, true_derivative=true).logp
            loss = (weights[n, g].to(bound.device) * logp.double().sum(-1)).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    totals[name][i] += gradient.reshape(-1).to("cpu", bound.dtype)
    return totals


def _difference(fast: Mapping[str, Tensor], naive: Mapping[str, Tensor]) -> float:
    """Largest ‖fast − naive‖/‖naive‖ of a prompt; infinite where only one of the two is zero."""
    ratios = []
    for i in range(2):
        size = norm({name: value[i] for name, value in naive.items()})
        off = norm({name: fast[name][i].double() - value[i].double() for name, value in naive.items()})
        ratios.append(off / size if size > 0 else (0.0 if off == 0 else float("inf")))
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)
