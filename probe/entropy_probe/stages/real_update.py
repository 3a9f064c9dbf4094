"""The step that the trainer made: a checkpoint and the next one, against v and the gradient it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.errors import MeasurementError
from entropy_probe.model.checkpoint import AdamState, Checkpoint
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.entropy_change import EntropyChange
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.made import Made, held_or_made
from entropy_probe.stages.slopes import Slopes
from entropy_probe.stages.update import UpdateDirection, clip_factor

if TYPE_CHECKING:
    from collections.abc import Iterable

_UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-9, "float16": 2.0**-12}


@dataclass(frozen=True)
class MadeStep:
    """(θ′ − θ)/lr by name, and −g, the ascent direction that Adam was given; `None` where several steps lie between.

    `rounding` is the size of what the stored dtypes leave open of (θ′ − θ)/lr, relative to it; `of_gradient` of g.
    """

    v: Mapping[str, Tensor]
    ascent: Mapping[str, Tensor] | None
    steps: int
    rounding: float
    of_gradient: float


def made_step(before: Checkpoint, after: Checkpoint, lr: float, world: World = ALONE) -> MadeStep:
    """From the weights and the moments of two checkpoints of one run:

    v = (θ′ − θ)/lr,     g = (m′ − β₁m)/(1 − β₁), less decay·θ where it is part of the gradient
    """
    theta, later = (dict(c.model.named_parameters()) for c in (before, after))
    names = list(before.adam)
    for name in names:
        if name not in later or later[name].shape != theta[name].shape or name not in after.adam:
            problem = f"has no tensor {name} like this checkpoint's"
            raise MeasurementError(after.info.path, problem, "give a later one of the same run")
    steps = _steps_between(before, after)
    shapes = {n: theta[n].shape for n in names}
    v = world.made(shapes, lambda n: (_wide(later[n]) - _wide(theta[n])) / lr)

    def given(name: str) -> Tensor:
        return _given(before.adam[name], after.adam[name], _wide(theta[name]))

    gradient = held_or_made(shapes, given, world)
    unit = max(_UNIT.get(dtype.strip(), 2.0**-24) for dtype in _dtypes(before, after))
    sizes = norm({n: theta[n].detach() for n in names}), norm(v)
    moments = sum(
        norm(Made(names, lambda n, state=state: state[n].rounding("exp_avg")))
        / (1 - state[names[0]].betas[0])
        for state in (before.adam, after.adam)
    )
    size = norm(gradient)
    return MadeStep(
        v=v,
        ascent=Made(names, lambda n: -gradient[n]) if steps == 1 else None,
        steps=steps,
        rounding=unit * sizes[0] / (lr * sizes[1]) if sizes[1] > 0 else math.inf,
        of_gradient=moments / size if size > 0 else math.inf,
    )


def real_update_section(
    made: MadeStep,
    direction: UpdateDirection,
    ascent: Mapping[str, Tensor],
    after: Checkpoint,
    change: EntropyChange,
    along: Slopes,
    *,
    own_batch: bool,
    logged: float | None,
    max_grad_norm: float | None,
) -> r.RealUpdateSection:
    """v and the clipped gradient beside those of the step that was made, and ΔH along that."""
    clipped = Made(made.v, lambda n: direction.clip_factor * ascent[n].double())
    cosine, ratio = compared(direction.v, made.v)
    of_gradient = (None, None) if made.ascent is None else compared(clipped, made.ascent)
    eta = change.eta
    slope, bent = along.slope, along.curvature
    per_token, bent_token = along.per_token, along.per_token_curvature
    return r.RealUpdateSection(
        path=str(after.info.path),
        steps_between=made.steps,
        own_batch=own_batch,
        cosine=cosine,
        norm_ratio=ratio,
        rounding=made.rounding,
        gradient_cosine=of_gradient[0],
        gradient_norm_ratio=of_gradient[1],
        gradient_rounding=made.of_gradient,
        clip_factor=None if logged is None else clip_factor(logged, max_grad_norm),
        logged_grad_norm=logged,
        delta_h=change.realised.value,
        delta_h_se=change.realised.se,
        delta_h_per_token=change.realised_per_token.value,
        delta_h_per_token_se=change.realised_per_token.se,
        predicted=eta * slope.value + eta**2 / 2 * bent.value,
        predicted_se=math.hypot(eta * slope.se, eta**2 / 2 * bent.se),
        predicted_per_token=eta * per_token.value + eta**2 / 2 * bent_token.value,
        predicted_per_token_se=math.hypot(eta * per_token.se, eta**2 / 2 * bent_token.se),
    )


def compared(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """(cosine, ratio of the norms), as 1 − ½‖a − b‖² of unit vectors: 1 − cosine keeps its digits."""
    sizes = norm(own), norm(other)
    if min(sizes) == 0:
        return math.nan, math.nan
    off = norm(Made(other, lambda n: _flat(own[n]) / sizes[0] - _flat(other[n]) / sizes[1]))
    return 1 - off**2 / 2, sizes[0] / sizes[1]


def _given(before: AdamState, after: AdamState, theta: Tensor) -> Tensor:
    beta = before.betas[0]
    given = (after.exp_avg.double() - beta * before.exp_avg.double()) / (1 - beta)
    given = given.reshape(theta.shape).cpu()
    if before.maximize:
        given = -given
    return given if before.decoupled else given - before.weight_decay * theta


def _steps_between(before: Checkpoint, after: Checkpoint) -> int:
    steps = [max(state.step for state in c.adam.values()) for c in (before, after)]
    count = round(steps[1] - steps[0])
    if count < 1:
        problem = (
            f"is at step {steps[1]:g} of the optimizer, but this checkpoint is at {steps[0]:g}"
        )
        raise MeasurementError(after.info.path, problem, "give a later one of the same run")
    return count


def _dtypes(*checkpoints: Checkpoint) -> Iterable[str]:
    for checkpoint in checkpoints:
        yield from checkpoint.info.weights_dtype.split(",")


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().double().cpu()


def _flat(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().double().reshape(-1).cpu()
