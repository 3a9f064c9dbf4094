"""All that needs Adam's second moment: U_cross and δH₁, the direction v of the next step, slopes along it, ΔH(η)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe import sections
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import NoCopyError
from entropy_probe.estimators import prediction
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages import entropy_change, gradients, slopes, update
from entropy_probe.stages.moments import moments_match
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.share import Share
from entropy_probe.stages.witnesses.real_step import real_step
from entropy_probe.stages.witnesses.torch_step import optimizer_step_agreement, preconditioner_agreement

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Measured:
    """What is known before: the model in the configured precision and in float64, scores and gradients of the batches.

    `own_e` and `own_u` are one object where one batch serves as both, and so are `units_e` and `units_u`. `ascent` is
    Ȳ. `tokens_e` are the scores of this process's prompts, `scores_e` and `scores_u` those of all (`Share.scores`).
    """

    checkpoint: Checkpoint
    config: ProbeConfig
    bound: BoundModel
    float64: BoundModel
    own_e: Share
    own_u: Share
    tokens_e: Scores
    scores_e: Scores
    scores_u: Scores
    units_e: gradients.UnitGradients
    units_u: gradients.UnitGradients
    ascent: dict[str, Tensor]


@dataclass(frozen=True)
class NextStep:
    """P and v by name, the slopes along v, and the sections of the report that are made of them: rank 0's alone."""

    precond: dict[str, Tensor]
    v: dict[str, Tensor]
    along: slopes.Slopes | None
    sections: dict[str, Any]


def without_second_moment(of: Measured) -> NextStep:
    """P = 1 and v = −sign(X̄), the way in which the entropy rises: for tests of the model that any P and v will do for.

    Every value moves by 1, as in a first step of Adam's, so that a tiny η is resolved in each. Where X̄ is 0, v is 1.
    """
    x, parameters = of.units_e.mean_x(), of.bound.registry.trainable
    v = {name: torch.where(x[name] > 0, -1.0, 1.0).double().reshape(p.shape) for name, p in parameters.items()}
    still = entropy_change.sweep(of.bound, of.own_e.own, of.scores_e, v, [0.0], of.config, share=of.own_e)
    min_ess = of.config.true_delta_h.min_ess_fraction
    absent = ("first_order", "two_batch", "update", "real_step", "real_step_missing", "preconditioner")
    return NextStep(
        precond={name: torch.ones_like(direction) for name, direction in v.items()},
        v=v,
        along=None,
        sections={
            **dict.fromkeys(absent),
            "entropy_change": [sections.change_row(change, None, 0.0, min_ess) for change in still],
        },
    )


def next_step(
    of: Measured, clock: Clock, progress: Progress | None, redraw: Callable[[Mapping[str, Tensor]], Rollouts] | None
) -> NextStep:
    """By the checkpoint's own Adam state. Every process takes part; what goes through no batch rank 0 does alone."""
    checkpoint, config, bound, float64 = of.checkpoint, of.config, of.bound, of.float64
    own_e, own_u, units_e, units_u, ascent = of.own_e, of.own_u, of.units_e, of.units_u, of.ascent
    scores_e, world, same_batch = of.scores_e, own_e.world, own_e is own_u
    with clock("first order"):
        precond = update.adam_preconditioner(checkpoint.adam)
        lr, lr_source = update.learning_rate(checkpoint.adam, config.first_order.lr)
        first_order = sections.first_order_section(units_u, precond, lr, lr_source, config.first_order.estimator)
        across = None if same_batch else sections.two_batch_section(units_e, units_u, precond, lr)
    with clock("update"):
        direction = update.compute_update_vector_adamw(
            bound.registry, checkpoint.adam, ascent, config.update.max_grad_norm
        )
        agreement = of_torch = None
        if world.first:
            agreement = optimizer_step_agreement(bound.registry, checkpoint.adam, ascent, direction)
            of_torch = preconditioner_agreement(checkpoint.adam, precond)
        match = moments_match(checkpoint.adam, units_u.y, world)
    with clock("slopes"):
        along = slopes.slopes_along(bound, float64, own_e.own, of.tokens_e, direction.v, config, progress, own_e)
        cross = slopes.cross_fitted_slope(units_u, direction) if same_batch else None
        slope, curvature = slopes.predictors(
            bound, own_u.rollouts, of.scores_u, config, units_u, direction, along, cross, own_u
        )
        reach = prediction.reach(slope, curvature)
        sources = slopes.slope_sources(units_e, units_u, direction)
    with clock("entropy change"):
        etas = world.told(entropy_change.grid(config, lr, along.d_seq_logp, reach))
        changes = entropy_change.sweep(bound, own_e.own, scores_e, direction.v, etas, config, progress, redraw, own_e)
        predicted = [
            None if c.restricted else prediction.predict(c.eta, c.rb, slope, curvature, units_e.unit_of)
            for c in changes
        ]
    if agreement is None:
        return NextStep(precond, direction.v, along, sections={})
    with clock("real step"):
        taken, missing = None, None
        try:
            if "real step" not in config.left_out:
                taken = real_step(float64, own_e.rollouts, scores_e, direction.v, ascent, checkpoint.adam, lr, config)
        except NoCopyError as error:  # the rest of the report does not need it
            missing = str(error)
    baseline, min_ess = config.first_order.baseline, config.true_delta_h.min_ess_fraction
    return NextStep(
        precond=precond,
        v=direction.v,
        along=along,
        sections={
            "first_order": first_order,
            "two_batch": across,
            "update": sections.update_section(
                direction, along, cross, (slope, curvature), agreement, sources, baseline
            ),
            "entropy_change": [
                sections.change_row(*row, reach, min_ess) for row in zip(changes, predicted, strict=True)
            ],
            "real_step": None if taken is None else r.RealStepSection(**asdict(taken)),
            "real_step_missing": missing,
            "preconditioner": sections.preconditioner_section(checkpoint, precond, bound, of_torch, match),
        },
    )
