"""The step that a live optimizer is about to take, from the gradients as they stand in `.grad`."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.errors import MeasurementError
from entropy_probe.model.sharded import copies, is_spread, local, require_one_layout
from entropy_probe.processes import of_training

_BY_ENTRY = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""Those of torch that step every entry by itself, so that a part of a tensor is stepped as in the whole."""
_PLAIN = {"foreach": False, "fused": False}
_OWN_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True)
class LiveStep:
    """`move` is θ' − θ by name, on the CPU; of a tensor that FSDP2 has spread, this process's part. `grad_norm` is
    ‖g‖ as the optimizer sees it, after clipping.

    `momentum_share` is v₀ᵀv/‖v‖² with v₀ what momentum and decay alone would move: the part of the step that stays as
    it is when the gradient changes its sign. `lr` is the largest of the groups. `in_float64`: the step was computed in
    float64, and not in the dtypes of the optimizer's own state.
    """

    move: dict[str, Tensor]
    lr: float
    grad_norm: float
    norm: float
    momentum_share: float
    kind: str
    in_float64: bool

    @property
    def finite(self) -> bool:
        """Whether gradient and step are; a scaler leaves out a step that is not."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.norm)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def live_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient_scale: float = 1.0,
) -> LiveStep:
    """θ' − θ of the optimizer's own class, run on copies of parameter, gradient and state, one parameter at a time.

        copy.deepcopy((model, optimizer)); optimizer.step()        θ' − θ of that

    so that no copy of the model is held, for any optimizer that treats its parameters one by one. Those of torch are
    run in float64, others (8-bit state) in their own dtypes. `gradient_scale` is what a GradScaler that has not yet
    unscaled them has multiplied the gradients by. Nothing of the optimizer or the model is changed. Raises
    `MeasurementError` for a parameter that the model does not have, and where nothing has a gradient.

    Where FSDP2 has spread parameters, each process steps its own parts, and the norms are of all of them. All processes
    call this, and an error of one is raised in all. An optimizer that does not step every entry by itself is refused.
    """
    optimizer = unwrapped(optimizer)
    if not any(map(is_spread, parameters.values())):
        return _summed(_of_own(optimizer, parameters, gradient_scale), optimizer)
    own = of_training.agreed(lambda: _of_shards(optimizer, parameters, gradient_scale))
    sums = of_training.of_all((own.squares, list(own.move)))
    for _, names in sums:
        if names != sums[0][1]:
            problem = "has gradients for other parameters than in the first process"
            raise MeasurementError("the optimizer", problem, "probe the checkpoints instead")
    total = {key: sum(squares[key] for squares, _ in sums) for key in own.squares}
    return _summed(_Own(own.move, total), optimizer)


@dataclass(frozen=True)
class _Own:
    """The step of what one process has, and its sums over entries: ‖g‖², ‖v‖², v₀ᵀv."""

    move: dict[str, Tensor]
    squares: dict[str, float]


def _of_shards(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
) -> _Own:
    kind = type(optimizer)
    if kind.__name__ not in _BY_ENTRY or kind is not getattr(torch.optim, kind.__name__):
        problem = f"is {kind.__name__}, which may need whole tensors, and each process has a part"
        remedy = "train with Adam, AdamW or SGD of torch, or probe the checkpoints"
        raise MeasurementError("the optimizer", problem, remedy)
    return _of_own(optimizer, parameters, gradient_scale)


def _of_own(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
) -> _Own:
    names = {id(p): name for name, p in parameters.items()}
    spread = any(map(is_spread, parameters.values()))
    exact = _is_exact(optimizer)
    move: dict[str, Tensor] = {}
    squares: dict[str, float] = dict.fromkeys(("gradient", "step", "of_rest"), 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if id(parameter) not in names:
                raise MeasurementError(
                    "the optimizer",
                    f"trains a tensor of shape {tuple(parameter.shape)} that the model does not have",
                    "give the model whose parameters it trains",
                )
            name = names[id(parameter)]
            if spread:
                state = {"the gradient": parameter.grad, **optimizer.state.get(parameter, {})}
                require_one_layout(name, state, parameter)
            gradient = local(parameter.grad.detach())
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient) / gradient_scale
            along = _moved(optimizer, group, parameter, gradient, exact=exact)
            against = _moved(optimizer, group, parameter, -gradient, exact=exact)
            rest = 0.5 * (along + against)
            share = 1 / copies(parameter) if spread else 1
            squares["gradient"] += share * float(gradient.double().square().sum())
            squares["step"] += share * float(along.square().sum())
            squares["of_rest"] += share * float((rest * along).sum())
            kept = torch.promote_types(parameter.dtype, torch.float32)
            move[name] = along.to("cpu", kept)
    if not move:
        raise MeasurementError(
            "the optimizer",
            "none of its parameters has a gradient",
            "ask after the backward pass, before `optimizer.step()`",
        )
    return _Own(move, squares)


def _summed(own: _Own, optimizer: torch.optim.Optimizer) -> LiveStep:
    squares, step = own.squares, own.squares["step"]
    return LiveStep(
        own.move,
        lr=max(float(group["lr"]) for group in optimizer.param_groups),
        grad_norm=math.sqrt(squares["gradient"]),
        norm=math.sqrt(step),
        momentum_share=squares["of_rest"] / step if step > 0 else 0.0,
        kind=type(optimizer).__name__,
        in_float64=_is_exact(optimizer),
    )


def _is_exact(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _moved(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    gradient: Tensor,
    *,
    exact: bool,
) -> Tensor:
    """θ' − θ of one parameter, or of this process's part of it, in float64."""
    dtype = torch.float64 if exact else parameter.dtype
    theta = local(parameter.detach())
    own = nn.Parameter(theta.to(dtype, copy=True))
    own.grad = gradient.to(dtype, copy=True)
    stepping: Any = object.__new__(type(optimizer))
    stepping.__dict__.update(vars(optimizer))
    stepping.__dict__.update({name: OrderedDict() for name in _OWN_HOOKS})
    plain = {key: value for key, value in _PLAIN.items() if exact and key in group}
    stepping.param_groups = [{k: _copied(v) for k, v in group.items() if k != "params"} | plain]
    stepping.param_groups[0]["params"] = [own]
    stepping.state = defaultdict(dict)
    state = optimizer.state.get(parameter)
    if state:
        wider = dtype if exact else None
        stepping.state[own] = {key: _copied(v, theta, wider) for key, v in state.items()}
    with (
        torch.no_grad()
    ):  # by the class: an lr scheduler has put a `step` on the optimizer, bound to the live one
        type(optimizer).step(stepping)
    return own.detach().double() - theta.double()


def _copied(value: Any, parameter: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
    """A tensor's copy; in `dtype` where it is a moment, with an entry for each of the parameter's."""
    if not isinstance(value, Tensor):
        return value
    value = local(value)
    is_moment = parameter is not None and value.shape == parameter.shape and value.dim() > 0
    if dtype is not None and is_moment and value.is_floating_point():
        return value.detach().to(dtype, copy=True)
    return value.detach().clone()
