"""Gradients and curvature of a few prompts by slow ways, beside those of the run, on the user's own model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients import Payload, UnitGradients, gram
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, score_rows
from entropy_probe.stages.slopes import Slopes
from entropy_probe.stages.update import norm

FEWER_ROWS = 4
"""With so many times fewer rows the graph of a gradient takes less memory than the pass behind X with all of them."""

_NO_DERIVATIVE = re.compile(r"derivative .*not implemented|once_differentiable|double backward")


@dataclass(frozen=True)
class Witness:
    """U_cross of two units by the naive loop and by the fast path, and the larger of their ‖X_fast − X_naive‖, relative
    to the sum of the norms of the terms, Σ_i ‖w_i ∇f_i‖; the same of Y. Norms over all trainable parameters."""

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
    """The two units with the largest weights in Y, so that both sides have something to compare: prompts, or blocks.

    for n in unit, for g in responses:  X += w_ng · autograd.grad(f_ng),   Y += a_ng · autograd.grad(S_ng)
    """
    chosen = largest(of_y, units, 2)
    fast_x, fast_y = ({name: values[chosen] for name, values in side.items()} for side in (units.x, units.y))
    if of_x.coefficients is None and bound.autograd_is_derivative:
        sums = _naive(bound, rollouts, units, chosen, [of_x, of_y], config, true=True)
    else:
        sums = _naive(bound, rollouts, units, chosen, [of_x], config, true=True)
        sums += _naive(bound, rollouts, units, chosen, [of_y], config, true=bound.autograd_is_derivative)
    (naive_x, scale_x), (naive_y, scale_y) = sums
    return Witness(
        u_cross=cross_moments(gram(naive_x, naive_y, precond)).u_cross,
        u_cross_fast=cross_moments(gram(fast_x, fast_y, precond)).u_cross,
        x_difference=_difference(fast_x, naive_x, scale_x),
        y_difference=_difference(fast_y, naive_y, scale_y),
    )


def largest(payload: Payload, units: UnitGradients, count: int) -> Int[Tensor, " u"]:
    """The units with the largest mean of |weight|, in ascending order; all of them if there are fewer."""
    sums = torch.zeros(len(units.sizes), dtype=torch.float64)
    sums.index_add_(0, units.unit_of, payload.weights.double().abs().sum(1))
    return (sums / units.sizes).topk(min(count, len(sums))).indices.sort().values


def _naive(
    bound: BoundModel,
    rollouts: Rollouts,
    units: UnitGradients,
    chosen: Tensor,
    payloads: list[Payload],
    config: ProbeConfig,
    *,
    true: bool,
) -> list[tuple[dict[str, Tensor], list[float]]]:
    """For each payload (of the same f) [u, numel] by name, and Σ_i ‖w_i ∇f_i‖ of each unit; one backward pass for each
    response."""
    parameters, group = bound.registry.trainable, rollouts.num_responses
    sums = [
        {n: torch.zeros(len(chosen), p.numel(), dtype=bound.dtype) for n, p in parameters.items()} for _ in payloads
    ]
    scales = [[0.0] * len(chosen) for _ in payloads]
    for i, unit in enumerate(chosen.tolist()):
        prompts = (units.unit_of == unit).nonzero()[:, 0]
        for n, g in itertools.product(prompts.tolist(), range(group)):
            row = torch.tensor([n * group + g])
            scored = score_rows(bound, rollouts, row, config, true_derivative=true)
            loss = payloads[0].sums(scored.logp, scored.entropy, row).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            found = {k: d.reshape(-1).cpu() for k, d in zip(parameters, gradients, strict=True) if d is not None}
            size = norm(found)
            for payload, total, scale in zip(payloads, sums, scales, strict=True):
                weight = float(payload.weights[n, g]) / len(prompts)
                scale[i] += abs(weight) * size
                for name, gradient in found.items():
                    total[name][i] += weight * gradient
    return list(zip(sums, scales, strict=True))


def _difference(fast: Mapping[str, Tensor], naive: Mapping[str, Tensor], scales: Sequence[float]) -> float:
    """Largest ‖fast − naive‖/scale of a unit; infinite where there is a difference and the scale is zero."""
    ratios = []
    for i, scale in enumerate(scales):
        off = norm({name: fast[name][i].double() - value[i].double() for name, value in naive.items()})
        ratios.append(0.0 if off == 0 else off / scale if scale > 0 else float("inf"))
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)


def curvature_witness(
    float64: BoundModel, rollouts: Rollouts, scores: Scores, along: Slopes, v: Mapping[str, Tensor], config: ProbeConfig
) -> float | None:
    """|Σ by central difference − Σ by `twice_in_reverse`| / Σ_i[|D²_vR_i| + |ρ_i·D²_vS_i|], in true float64, where

        Σ = Σ_i [D²_vR_i + ρ_i·D²_vS_i],   ρ_i = R_i − mean of R over the batch's other responses

    over the two prompts with the largest |ρ|. `None` where an operation of the model has no second derivative.
    """
    rb_sum = scores.rb_sum
    rho = rb_sum - (rb_sum.sum() - rb_sum) / (rb_sum.numel() - 1)
    prompts = rho.abs().sum(1).topk(min(2, len(rho))).indices
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
