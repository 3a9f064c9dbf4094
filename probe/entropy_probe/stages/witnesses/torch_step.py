"""v and P beside what torch's own optimizer does with the same state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.registry import Registry
from entropy_probe.stages.update import UpdateDirection, lr_shares

_VANISHING = 1e-100  # its square is 0 beside any second moment


@dataclass(frozen=True)
class StepAgreement:
    """cos(v, step) and ‖v‖/‖step‖, the worst over the whole and over every parameter; and which one that was.

    Cosine 1 and ratio 1 where nothing moves; NaN without parameters.
    """

    cosine: float
    norm_ratio: float
    worst: str


def optimizer_step_agreement(
    registry: Registry, adam: Mapping[str, AdamState], ascent: Mapping[str, Tensor], direction: UpdateDirection
) -> StepAgreement:
    """One step of `torch.optim.AdamW` (`Adam` where the decay is coupled) on a copy of each parameter in float64, with
    the checkpoint's state, on the gradient −Ȳ after clipping; (θ' − θ)/lr against v.

    One tensor at a time, so that no copy of the model is held. At lr = 1: the step is linear in lr, and θ' − θ loses
    the fewest digits there.
    """
    shares = lr_shares(adam)
    whole = [0.0, 0.0, 0.0]
    found: list[tuple[float, float, str]] = []
    for name, state in adam.items():
        parameter = registry.parameters[name].detach().cpu()
        gradient = -direction.clip_factor * ascent[name].double().reshape(parameter.shape).cpu()
        step = shares[name] * torch_step(parameter.double(), gradient, state)
        v = direction.v[name].double()
        sums = [float((v * step).sum()), float(v.square().sum()), float(step.square().sum())]
        whole = [a + b for a, b in zip(whole, sums, strict=True)]
        found.append((*_compared(*sums), name))
    if not found:
        return StepAgreement(math.nan, math.nan, "")
    found.append((*_compared(*whole), "the whole"))
    cosine, _, where = min(found, key=lambda f: f[0] if not math.isnan(f[0]) else -math.inf)
    _, ratio, where_norm = max(found, key=lambda f: abs(f[1] - 1) if not math.isnan(f[1]) else math.inf)
    return StepAgreement(cosine, ratio, where if 1 - cosine > abs(ratio - 1) else where_norm)


def torch_step(theta: Tensor, gradient: Tensor, state: AdamState) -> Tensor:
    """θ' − θ of one step of torch's optimizer at lr = 1, in float64."""
    parameter = nn.Parameter(theta.double().clone())
    parameter.grad = gradient.double().clone()
    optimizer = (torch.optim.AdamW if state.decoupled else torch.optim.Adam)(
        [parameter],
        lr=1.0,
        betas=state.betas,
        eps=state.eps,
        weight_decay=state.weight_decay,
        amsgrad=state.amsgrad,
        maximize=state.maximize,
        foreach=False,
    )
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if state.amsgrad:
        moments["max_exp_avg_sq"] = state.exp_avg_sq if state.max_exp_avg_sq is None else state.max_exp_avg_sq
    copies = {key: value.double().reshape(theta.shape).clone() for key, value in moments.items()}
    optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **copies}
    optimizer.step()
    return parameter.detach() - theta.double()


def preconditioner_agreement(adam: Mapping[str, AdamState], precond: Mapping[str, Tensor]) -> float | None:
    """max|P_torch/P − 1| over all entries, in float64; `None` where no tensor has state.

    P is what a step of torch's Adam divides a vanishing gradient δ by: at θ = 0 with no momentum (β₁ = 0), with
    `exp_avg_sq`/β₂ so that it is `exp_avg_sq` after the step, and at lr = 1, θ' = −δ·P.
    """
    shares, found = lr_shares(adam), []
    for name, state in adam.items():
        if state.step == 0:
            continue
        before = {
            "exp_avg": torch.zeros_like(state.exp_avg),
            "exp_avg_sq": state.exp_avg_sq.double() / state.betas[1],
            "max_exp_avg_sq": state.exp_avg_sq if state.max_exp_avg_sq is None else state.max_exp_avg_sq,
            "betas": (0.0, state.betas[1]),
            "step": state.step - 1,
            "weight_decay": 0.0,
            "maximize": False,
        }
        delta = torch.full(precond[name].shape, _VANISHING, dtype=torch.float64)
        of_torch = -torch_step(torch.zeros_like(delta), delta, replace(state, **before)) / _VANISHING * shares[name]
        p = precond[name].double().cpu()
        off = torch.where(of_torch == p, 0.0, (of_torch / p - 1).abs())
        found.append(float(off.max()))
    return max(found, key=lambda value: math.inf if math.isnan(value) else value, default=None)


def _compared(product: float, square_v: float, square_step: float) -> tuple[float, float]:
    if square_v == square_step == 0.0:
        return 1.0, 1.0
    if square_v == 0.0 or square_step == 0.0:
        return 0.0, math.inf if square_step == 0.0 else 0.0
    return product / math.sqrt(square_v) / math.sqrt(square_step), math.sqrt(square_v / square_step)
