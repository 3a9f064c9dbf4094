"""All that needs Adam's second moment: U_cross and δH₁, the direction v of the next step, slopes along it, ΔH(η)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.errors import NoCopyError, ProbeError
from entropy_probe.estimators import prediction, resolution
from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
from entropy_probe.model.checkpoint.files import logged_grad_norm
from entropy_probe.pipeline.clock import Clock
from entropy_probe.pipeline.measured import Measured
from entropy_probe.stages import entropy_change, slopes, update
from entropy_probe.stages.first_order import first_order_section, two_batch_section
from entropy_probe.stages.made import held_or_made
from entropy_probe.stages.moments import moments_match, preconditioner_section
from entropy_probe.stages.real_update import made_step, real_update_section
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.witnesses.real_step import real_step
from entropy_probe.stages.witnesses.torch_step import (
    optimizer_step_agreement,
    preconditioner_agreement,
)

Redraw = Callable[[Mapping[str, Tensor]], Rollouts]


@dataclass(frozen=True)
class Sections:
    """The sections of the report that are made of the next step; `None` where it cannot be known."""

    entropy_change: list[r.EntropyChangeRow]
    first_order: r.FirstOrderSection | None = None
    two_batch: r.TwoBatchSection | None = None
    update: r.UpdateSection | None = None
    preconditioner: r.PreconditionerSection | None = None
    resolution: r.ResolutionSection | None = None
    real_step: r.RealStepSection | None = None
    real_step_missing: str | None = None


@dataclass(frozen=True)
class NextStep:
    """P and v by name, the slopes along v, the changes, how they are predicted, X̄ of the entropy per token, lr, and the
    sections, which are rank 0's alone. Without a second moment there is no `direction`, and v is some way that will do
    for tests of the model."""

    precond: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    changes: list[entropy_change.EntropyChange]
    sections: Sections | None
    along: slopes.Slopes | None = None
    direction: update.UpdateDirection | None = None
    predicting: slopes.Predictors | None = None
    x_per_token: Mapping[str, Tensor] = field(default_factory=dict)
    lr: float | None = None
    of_match: Mapping[str, Tensor] = field(default_factory=dict)


def without_second_moment(of: Measured) -> NextStep:
    """P = 1 and v = −sign(X̄), the way in which the entropy rises: for tests of the model that any P and v will do for.

    Every value moves by 1, as in a first step of Adam's, so that a tiny η is resolved in each. Where X̄ is 0, v is 1.
    """
    x, parameters = of.e.gradients.mean_x(), of.bound.registry.trainable
    shapes, world = {name: p.shape for name, p in parameters.items()}, of.e.share.world
    v = world.made(
        shapes, lambda name: torch.where(x[name] > 0, -1.0, 1.0).double().reshape(shapes[name])
    )
    still = entropy_change.sweep(of.bound, of.e.share, of.e.scores, v, [0.0], of.config)
    min_ess = of.config.true_delta_h.min_ess_fraction
    rows = [entropy_change.change_row(change, None, None, 0.0, min_ess) for change in still]
    precond = held_or_made(shapes, lambda name: torch.ones_like(v[name]), world)
    return NextStep(precond, v, still, Sections(rows))


def next_step(of: Measured, clock: Clock, redraw: Redraw | None) -> NextStep:
    """By the checkpoint's own Adam state. Every process takes part; what goes through no batch rank 0 does alone."""
    config, adam, registry = of.config, of.checkpoint.adam, of.bound.registry
    e, u, first = of.e, of.u, clock.world.first
    with clock("first order"):
        precond = update.adam_preconditioner(adam, clock.world)
        lr, lr_source = update.learning_rate(adam, config.first_order.lr)
        of_u = first_order_section(
            u.gradients, precond, lr, lr_source, config.first_order.estimator
        )
        across = None
        if not of.same_batch:
            across = two_batch_section(e.gradients, u.gradients, precond, lr)
    with clock("update"):
        clip, direction = config.whose_update.max_grad_norm, of.direction
        if direction is None:
            direction = update.compute_update_vector_adamw(
                registry, adam, of.ascent, clip, lr, clock.world
            )
        v = direction.v
        agreement = of_torch = stepped = None
        if first:
            agreement, stepped = optimizer_step_agreement(registry, adam, of.ascent, direction, lr)
            of_torch = preconditioner_agreement(adam, precond)
        match, of_match = moments_match(adam, u.gradients.y, clock.world)
        if stepped is not None:
            of_match = {**of_match, "stepped": stepped}
    with clock("slopes"):
        along = (
            slopes.slopes_along(of.bound, of.float64, e.share, e.tokens, v, config, clock.progress)
            if of.growth is None
            else of.growth.along
        )
        predicting = slopes.predictors(
            of.bound, u.share, u.scores, config, u.gradients, direction, along,
            same_batch=of.same_batch,
        )  # fmt: skip
        x_per_token = e.gradients.mean_beside
        if x_per_token is None:
            x_per_token = slopes.gradient_per_token(of.bound, e.share, e.tokens, along, config)
        of_response, of_token = (
            slopes.slope_sources(of_all, u.gradients, direction)
            for of_all in (e.gradients.mean_x(), x_per_token)
        )
    with clock("entropy change"):
        etas = entropy_change.grid(config, lr, along.d_seq_logp, predicting.reach)
        etas = clock.world.told(etas)
        changes = entropy_change.sweep(
            of.bound, e.share, e.scores, v, etas, config, clock.progress, redraw,
            tokens=e.tokens, coefficients=along.coefficients,
        )  # fmt: skip
        rows = [_row(of, change, predicting) for change in changes]
    if agreement is None:
        return NextStep(
            precond, v, changes, None, along, direction, predicting, x_per_token, lr, of_match
        )
    with clock("real step"):
        taken, missing = _real_step(of, v, lr)
    sections = Sections(
        entropy_change=rows,
        first_order=of_u,
        two_batch=across,
        update=slopes.update_section(
            direction,
            along,
            predicting,
            (of_response, of_token),
            agreement,
            lr,
            _logged(of.checkpoint),
        ),
        preconditioner=preconditioner_section(adam, precond, registry, of_torch, match),
        resolution=_resolution(of, rows, lr, predicting, of_token),
        real_step=taken,
        real_step_missing=missing,
    )
    return NextStep(
        precond, v, changes, sections, along, direction, predicting, x_per_token, lr, of_match
    )


def _resolution(
    of: Measured,
    rows: Sequence[r.EntropyChangeRow],
    lr: float,
    predicting: slopes.Predictors,
    of_token: slopes.SlopeSources,
) -> r.ResolutionSection | None:
    """Of the prediction at η = lr; `None` where there is none."""
    row = next((row for row in rows if row.eta == lr), None)
    if row is None or row.predicted_per_token is None or row.predicted_per_token_se is None:
        return None
    num_prompts, u = of.e.rollouts.num_prompts, of.u.rollouts
    predicted, se = row.predicted_per_token, row.predicted_per_token_se
    of_response = prediction.predicted_change(
        lr, *predicting.of_response, of.e.share.units.of_prompt
    )
    interval = None
    if u.source == "sampled" and of_token.spread is not None:
        fewer = min(num_prompts, u.num_prompts)
        interval = resolution.next_step_interval(predicted, se, lr * of_token.spread, fewer)
    growth = of.growth
    return r.ResolutionSection(
        per_token=2 * se,
        per_response=2 * of_response.se,
        prompts_needed=resolution.prompts_needed(num_prompts, predicted, se),
        next_step=interval,
        target_se=None if growth is None else growth.target,
        looks=[] if growth is None else growth.looks,
    )


def _logged(checkpoint: Checkpoint) -> float | None:
    try:
        return logged_grad_norm(checkpoint.info.path)
    except (ProbeError, OSError):  # a damaged log is found where the checkpoint is inspected
        return None


def after_the_real_step(
    of: Measured, step: NextStep, next_checkpoint: Path, clock: Clock
) -> r.RealUpdateSection | None:
    """The trainer's own step beside v, and ΔH along it. All processes take part, in `together`; rank 0 has it."""
    if step.direction is None:
        return None
    config, e, direction = of.config, of.e, step.direction
    with clock("real update"):
        missing = config.first_order.missing_state
        base = of.checkpoint.info.base_model
        world = clock.world
        after = world.one(lambda: load_checkpoint(next_checkpoint, base, missing_state=missing))
        lr, _ = update.learning_rate(of.checkpoint.adam, None)  # the trainer's, whatever is set
        made = made_step(of.checkpoint, after, lr, world)
        along = slopes.slopes_along(of.bound, of.float64, e.share, e.tokens, made.v, config)
        (change,) = entropy_change.sweep(
            of.bound,
            e.share,
            e.scores,
            made.v,
            [lr],
            config,
            tokens=e.tokens,
            coefficients=along.coefficients,
        )
    return real_update_section(
        made,
        direction,
        of.ascent,
        after,
        change,
        along,
        own_batch=of.u.rollouts.after_step == of.checkpoint.info.global_step is not None,
        logged=_logged(after) if made.steps == 1 else None,
        max_grad_norm=config.whose_update.max_grad_norm,
    )


def _row(
    of: Measured, change: entropy_change.EntropyChange, by: slopes.Predictors
) -> r.EntropyChangeRow:
    """A change beside its prediction, which says nothing about a policy that is cut to its nucleus."""
    predicted = of_tokens = None
    if not change.weights.restricted:
        unit_of = of.e.share.units.of_prompt
        predicted = prediction.predict(change.eta, change.realised, *by.asked, unit_of)
        of_tokens = prediction.predict(
            change.eta, change.realised_per_token, *by.of_tokens, unit_of
        )
    min_ess = of.config.true_delta_h.min_ess_fraction
    return entropy_change.change_row(change, predicted, of_tokens, by.reach, min_ess)


def _real_step(
    of: Measured, v: Mapping[str, Tensor], lr: float
) -> tuple[r.RealStepSection | None, str | None]:
    """The step on a copy; where it does not fit, why: the rest of the report does not need it."""
    if "real step" in of.config.left_out:
        return None, None
    adam, e = of.checkpoint.adam, of.e
    try:
        return real_step(of.float64, e.rollouts, e.scores, v, of.ascent, adam, lr, of.config), None
    except NoCopyError as error:
        return None, str(error)
