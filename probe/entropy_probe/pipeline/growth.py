"""More prompts of E until the predicted change is as certain as asked for: `batch.target_se`.

v is known once U is measured, so that the standard error of the change along it is known before E is differentiated.
What was sampled and derived of the first prompts stays; each further part is sampled and derived alone. All of E is
scored again: scores at θ + ηv are of all of it too, and at η = 0 no bit may differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.config.values import OF_THE_CHANGE
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.prediction import predicted_change
from entropy_probe.estimators.resolution import prompts_to_draw
from entropy_probe.pipeline.clock import Clock
from entropy_probe.stages.gradients.units import units_of
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.share import Share
from entropy_probe.stages.slopes import (
    Slopes,
    cross_fitted_slope,
    derived,
    slopes_of,
    spread_per_token,
    units_per_token,
)
from entropy_probe.stages.update import UpdateDirection

if TYPE_CHECKING:
    from entropy_probe.pipeline.measured import Batch, Models


@dataclass(frozen=True)
class Growth:
    """E as it is in the end, with the scores of the own prompts, and the slopes along v; how it came to be: the target,
    the terms of the update's own slope where that is made of them, and the looks."""

    share: Share
    tokens: Scores
    along: Slopes
    target: float
    of_update: Tensor | None
    looks: list[r.Look]


def grown(
    models: Models,
    share: Share,
    tokens: Scores,
    u: Batch,
    direction: UpdateDirection,
    lr: float,
    config: ProbeConfig,
    clock: Clock,
) -> Growth:
    """Look at the SE, and draw more while it is above the target. All processes take part.

    The SE of few prompts is small by chance where the few that decide are not among them, and a value that stops there
    is biased with it. So E stops where the spread over the prompts of U, which has no part in the value, agrees.
    """
    bound, float64, v, world = models.bound, models.float64, direction.v, clock.world
    draw, asked = share.rollouts.further, share.rollouts.num_prompts
    assert draw is not None
    target, of_update = world.told(_target(models, u, direction, lr, config, clock))
    of_u = world.told(_spread_of_u(models, u, v, lr, config, clock))
    looks: list[r.Look] = []
    with clock("slopes"):
        known = derived(bound, float64, share, v, config, clock.progress)
    while True:
        with clock("slopes"):
            along = slopes_of(share, tokens, known, config)
        of_tokens = along.per_token, along.per_token_curvature
        se = world.told(predicted_change(lr, *of_tokens, share.units.of_prompt).se)
        size = share.rollouts.num_prompts
        looks.append(r.Look(num_prompts=size, se=se))
        doubted = max(se, of_u / math.sqrt(size))
        count = prompts_to_draw(size, doubted, target, config.batch.max_prompts)
        with clock("rollouts"):
            more = draw(size - asked, count) if count else None
        if more is None:
            return Growth(share, tokens, along, target, of_update, looks)
        whole = share.rollouts.followed_by(more)
        part = Share.of(more, units_of(bound, more, config), world)
        larger = Share.of(whole, units_of(bound, whole, config), world)
        with clock("scores"):
            tokens = score(bound, larger.own, config, with_features=True)
        with clock("slopes"):
            then = derived(bound, float64, part, v, config, clock.progress)
            known = known.followed_by(share, (part, then), larger)
        share = larger


def _spread_of_u(
    models: Models, u: Batch, v: Mapping[str, Tensor], lr: float, config: ProbeConfig, clock: Clock
) -> float:
    """What the SE of one prompt is on the U batch; 0 where that is too small or has gaps."""
    if len(u.share.units.sizes) < 2 or not bool(u.rollouts.present.all()):
        return 0.0
    with clock("slopes"):
        return lr * spread_per_token(models.bound, models.float64, u.share, u.tokens, v, config)


def _target(
    models: Models,
    u: Batch,
    direction: UpdateDirection,
    lr: float,
    config: ProbeConfig,
    clock: Clock,
) -> tuple[float, Tensor | None]:
    """In nats per token, and the terms that it is made of. Half of the predicted change is that of the U batch by
    cross-fitting, in which E has no part: a target that E's own change decides would stop where chance makes it large.
    """
    asked = config.batch.target_se
    if asked != OF_THE_CHANGE:
        assert isinstance(asked, float)
        return asked, None
    if len(u.share.units.sizes) < 2:
        raise MeasurementError(
            "batch.target_se",
            f"{OF_THE_CHANGE} needs an update batch of two prompts or more, this one has one",
            "give the standard error in nats per token",
        )
    with clock("gradients"):
        crossed = units_per_token(models.bound, u.share, u.scores, config, u.gradients)
        slope = cross_fitted_slope(crossed, direction)
        return lr * abs(slope.value) / 2, slope.per_prompt
