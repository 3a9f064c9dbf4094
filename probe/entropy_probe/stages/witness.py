"""Gradients and curvature of two prompts by slow ways, beside those of the run, on the user's own model every time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients import Payload, UnitGradients, gram, unit_gradients
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, score_rows
from entropy_probe.stages.slopes import Slopes
from entropy_probe.stages.update import norm

FEWER_ROWS = 4
"""With so many times fewer rows the graph of a gradient takes less memory than the pass behind X with all of them."""

_NO_DERIVATIVE = re.compile(r"derivative .*not implemented|once_differentiable|double backward")


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
    of_x: Payload,
    of_y: Payload,
    config: ProbeConfig,
    units: UnitGradients,
    precond: Mapping[str, Tensor],
) -> Witness:
    """The two prompts with the largest weights in Y, so that both sides have something to compare.

    for n in prompts:  X_n = autograd.grad(Σ_g w_ng f_ng),   Y_n = autograd.grad(Σ_g a_ng S_ng)
    """
    prompts = largest(of_y, 2)
    naive_x = _naive(bound, rollouts, prompts, of_x, config, true=True)
    naive_y = _naive(bound, rollouts, prompts, of_y, config, true=bound.autograd_is_derivative)
    fast = units_of_prompts(bound, rollouts, config, units, prompts, of_x, of_y)
    return Witness(
        u_cross=cross_moments(gram(naive_x, naive_y, precond)).u_cross,
        u_cross_fast=cross_moments(gram(fast.x, fast.y, precond)).u_cross,
        x_difference=_difference(fast.x, naive_x),
        y_difference=_difference(fast.y, naive_y),
    )


def largest(payload: Payload, count: int) -> Int[Tensor, " b"]:
    """The prompts with the largest Σ_g |weight|, in ascending order; all of them if there are fewer."""
    weights = payload.weights
    return weights.abs().sum(1).topk(min(count, len(weights))).indices.sort().values


def units_of_prompts(
    bound: BoundModel,
    rollouts: Rollouts,
    config: ProbeConfig,
    units: UnitGradients,
    prompts: Int[Tensor, " b"],
    of_x: Payload,
    of_y: Payload | None = None,
) -> UnitGradients:
    """X and Y of some prompts by the fast path: rows of `units`, or computed anew where its units are blocks."""
    if units.mode == "exact":
        x, y = ({name: values[prompts] for name, values in side.items()} for side in (units.x, units.y))
        return UnitGradients(x, y, units.sizes[prompts], "exact")
    whatever_fits = {"mode": "exact", "max_gradient_gib": math.inf}  # they have been counted in
    exact = config.model_copy(update={"first_order": config.first_order.model_copy(update=whatever_fits)})
    sides = of_x.of_prompts(prompts), None if of_y is None else of_y.of_prompts(prompts)
    return unit_gradients(bound, rollouts.of_prompts(prompts), exact, *sides)


def _naive(
    bound: BoundModel, rollouts: Rollouts, prompts: Tensor, payload: Payload, config: ProbeConfig, *, true: bool
) -> dict[str, Tensor]:
    """[2, numel] by name, one backward pass for each prompt and microbatch."""
    parameters, group = bound.registry.trainable, rollouts.num_responses
    totals = {name: torch.zeros(len(prompts), p.numel(), dtype=bound.dtype) for name, p in parameters.items()}
    for i, n in enumerate(prompts.tolist()):
        for g in torch.arange(group).split(config.generation.tf_batch_size):
            rows = n * group + g
            scored = score_rows(bound, rollouts, rows, config, true_derivative=true)
            loss = (payload.weights[n, g].to(bound.device) * payload.sums(scored.logp, scored.entropy, rows)).sum()
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


def curvature_witness(
    float64: BoundModel, rollouts: Rollouts, scores: Scores, along: Slopes, v: Mapping[str, Tensor], config: ProbeConfig
) -> float | None:
    """|Σ by five-point difference − Σ by `twice_in_reverse`| / Σ_i[|D²_vR_i| + |ρ_i·D²_vS_i|], in true float64, where

        Σ = Σ_i [D²_vR_i + ρ_i·D²_vS_i],   ρ_i = R_i − mean of R over the batch's other responses

    over the two prompts with the largest |ρ|. `None` where an operation of the model has no second derivative.
    """
    rb_sum = scores.rb_sum
    rho = rb_sum - (rb_sum.sum() - rb_sum) / (rb_sum.numel() - 1)
    prompts = largest(Payload(rho), 2)
    by_difference = along.d2_rb_sum[prompts] + (rho * along.d2_seq_logp)[prompts]
    try:
        expected = twice_in_reverse(float64, rollouts.of_prompts(prompts), rho[prompts], v, config)
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise
        return None
    off = abs(float(by_difference.sum()) - expected)
    size = float((along.d2_rb_sum.abs() + (rho * along.d2_seq_logp).abs())[prompts].sum())
    return 0.0 if off == 0 else off / size if size > 0 else float("inf")


def twice_in_reverse(
    float64: BoundModel, rollouts: Rollouts, rho: Float[Tensor, "B G"], v: Mapping[str, Tensor], config: ProbeConfig
) -> float:
    """d²/dη² of Σ_i [R_i(θ + ηv) + ρ_i·S_i(θ + ηv)] at η = 0: one number, differentiated twice in reverse mode."""
    theta, total = float64.registry.parameters, 0.0
    for rows in batches_by_length(rollouts, max(1, config.generation.tf_batch_size // FEWER_ROWS)):
        eta = torch.zeros((), dtype=torch.float64, device=float64.device, requires_grad=True)
        override = {name: theta[name].detach() + eta * d.to(float64.device, torch.float64) for name, d in v.items()}
        scored = score_rows(float64, rollouts, rows, config, override=override, true_derivative=True)
        weights = rho.reshape(-1)[rows].to(float64.device)
        f = (scored.entropy.double().sum(-1) + weights * scored.logp.double().sum(-1)).sum()
        (first,) = torch.autograd.grad(f, eta, create_graph=True)
        if first.requires_grad:
            total += float(torch.autograd.grad(first, eta)[0])
    return total


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether torch says that an operation has no forward-mode or no second derivative."""
    return isinstance(error, NotImplementedError) or _NO_DERIVATIVE.search(str(error)) is not None
