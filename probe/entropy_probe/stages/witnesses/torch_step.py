"""A step of torch's own optimizer with the checkpoint's state, and v and P beside what it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.registry import Registry
from entropy_probe.report import StepAgreement
from entropy_probe.stages.update import UpdateDirection

if TYPE_CHECKING:
    from jaxtyping import Float

_VANISHING = 1e-100  # its square is 0 beside any second moment


def optimizer_step_agreement(
    registry: Registry,
    adam: Mapping[str, AdamState],
    ascent: Mapping[str, Tensor],
    direction: UpdateDirection,
    lr: float | None = None,
) -> tuple[StepAgreement, Float[Tensor, "N 3"]]:
    """One step of `torch.optim.AdamW` (`Adam` where the decay is coupled) on a copy of each parameter in float64, with
    the checkpoint's state, on the gradient −Ȳ after clipping; (θ' − θ)/lr against v. And, as evidence, v·step, v² and
    step² of every tensor.

    One tensor at a time, so that no copy of the model is held. At lr = 1: the step is linear in lr, and θ' − θ loses
    the fewest digits there. In Transformers' form the decay acts on θ after a step at `lr`, or the optimizer's own.
    """
    shares, own_lr = learning_rates(adam, 1.0), _own_lr(adam) if lr is None else lr
    whole, products = [0.0, 0.0, 0.0], list[list[float]]()
    found: list[tuple[float, float, str]] = []
    for name, state in adam.items():
        parameter = registry.parameters[name].detach().cpu()
        gradient = -direction.clip_factor * ascent[name].double().reshape(parameter.shape).cpu()
        if state.of_transformers:
            moved = torch_step(parameter, gradient, replace(state, weight_decay=0.0))
            decayed = parameter.double() + shares[name] * own_lr * moved
            step = shares[name] * (moved - state.weight_decay * decayed)
        else:
            step = shares[name] * torch_step(parameter, gradient, state)
        v = direction.v[name].double()
        sums = [float((v * step).sum()), float(v.square().sum()), float(step.square().sum())]
        products.append(sums)
        whole = [a + b for a, b in zip(whole, sums, strict=True)]
        found.append((*_compared(*sums), name))
    of_tensors = torch.tensor(products, dtype=torch.float64).reshape(-1, 3)
    if not found:
        return _agreement(math.nan, math.nan, ""), of_tensors
    found.append((*_compared(*whole), "the whole"))
    cosine, _, where = min(found, key=lambda f: f[0] if not math.isnan(f[0]) else -math.inf)
    _, ratio, where_norm = max(
        found, key=lambda f: abs(f[1] - 1) if not math.isnan(f[1]) else math.inf
    )
    worst = where if 1 - cosine > abs(ratio - 1) else where_norm
    return _agreement(cosine, ratio, worst), of_tensors


def _agreement(cosine: float, norm_ratio: float, worst: str) -> StepAgreement:
    return StepAgreement(
        cosine_with_optimizer_step=cosine,
        norm_ratio_with_optimizer_step=norm_ratio,
        worst_parameter=worst,
    )


def torch_step(theta: Tensor, gradient: Tensor, state: AdamState) -> Tensor:
    """θ' − θ of one step of torch's optimizer at lr = 1, in float64."""
    parameter = nn.Parameter(theta.double().clone())
    parameter.grad = gradient.double().clone()
    take_step({"": parameter}, {"": state}, {"": 1.0})
    return parameter.detach() - theta.double()


def take_step(
    parameters: Mapping[str, nn.Parameter], adam: Mapping[str, AdamState], lrs: Mapping[str, float]
) -> None:
    """One step of `torch.optim.AdamW` (`Adam` where the decay is coupled) on each parameter's `.grad`, with the
    checkpoint's state and a group for each parameter. The state is copied, in the parameter's dtype.

    Without bias correction torch is told of infinitely many steps: β^∞ = 0. In Transformers' form, which torch lacks,
    it is given ε/√(1 − β₂^t) and no decay, and the decay acts on what the step has made.
    """
    for kind, decoupled in ((torch.optim.AdamW, True), (torch.optim.Adam, False)):
        names = [name for name in parameters if adam[name].decoupled == decoupled]
        if not names:
            continue
        groups = [_group(parameters[name], adam[name], lrs[name]) for name in names]
        optimizer = kind(groups, foreach=False)
        for name in names:
            optimizer.state[parameters[name]] = _state(parameters[name], adam[name])
        optimizer.step()
        for name in names:
            if adam[name].of_transformers:
                with torch.no_grad():
                    parameters[name].mul_(1 - lrs[name] * adam[name].weight_decay)


def _own_lr(adam: Mapping[str, AdamState]) -> float:
    """The largest, or where all are 0 the largest `initial_lr`; 1e-4 without any, as in the report."""
    of_now, at_first = (
        {getattr(s, key) or 0.0 for s in adam.values()} for key in ("lr", "initial_lr")
    )
    return max(of_now, default=0.0) or max(at_first, default=0.0) or 1e-4


def learning_rates(adam: Mapping[str, AdamState], lr: float) -> dict[str, float]:
    """The largest is `lr`, the others keep their ratio to it; where all are 0, those of `initial_lr`.

    Found without `update.lr_shares`, whose witness this is.
    """
    found = {name: state.lr for name, state in adam.items()}
    if not any(found.values()):
        found = {name: state.initial_lr or 0.0 for name, state in adam.items()}
    largest = max(found.values(), default=0.0)
    return {name: lr * (own / largest) if largest > 0 else lr for name, own in found.items()}


def _group(parameter: nn.Parameter, state: AdamState, lr: float) -> dict[str, object]:
    of_group = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
    group = {"params": [parameter], "lr": lr} | {key: getattr(state, key) for key in of_group}
    if state.of_transformers:
        after = _steps(state) + 1
        group |= {"weight_decay": 0.0, "eps": state.eps * (1 - state.betas[1] ** after) ** -0.5}
    return group


def _steps(state: AdamState) -> float:
    return float(state.step) if state.bias_correction else math.inf


def _state(parameter: nn.Parameter, state: AdamState) -> dict[str, Tensor]:
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    if state.amsgrad:
        largest = state.max_exp_avg_sq
        moments["max_exp_avg_sq"] = state.exp_avg_sq if largest is None else largest
    own = {k: of.to(parameter, copy=True).reshape(parameter.shape) for k, of in moments.items()}
    return {"step": torch.tensor(_steps(state)), **own}


def preconditioner_agreement(
    adam: Mapping[str, AdamState], precond: Mapping[str, Tensor]
) -> float | None:
    """max|P_torch/P − 1| over all entries, in float64; `None` where no tensor has state.

    P is what a step of torch's Adam divides a vanishing gradient δ by: at θ = 0 with no momentum (β₁ = 0), with
    `exp_avg_sq`/β₂ so that it is `exp_avg_sq` after the step, and at lr = 1, θ' = −δ·P.
    """
    shares, found = learning_rates(adam, 1.0), []
    for name, state in adam.items():
        if state.step == 0:
            continue
        before = {
            "exp_avg": torch.zeros_like(state.exp_avg),
            "exp_avg_sq": state.exp_avg_sq.double() / state.betas[1],
            "max_exp_avg_sq": state.exp_avg_sq
            if state.max_exp_avg_sq is None
            else state.max_exp_avg_sq,
            "betas": (0.0, state.betas[1]),
            "step": state.step - 1,
            "weight_decay": 0.0,
            "maximize": False,
        }
        delta = torch.full(precond[name].shape, _VANISHING, dtype=torch.float64)
        of_torch = (
            -torch_step(torch.zeros_like(delta), delta, replace(state, **before))
            / _VANISHING
            * shares[name]
        )
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
