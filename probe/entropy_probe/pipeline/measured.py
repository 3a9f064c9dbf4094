"""What is known of both batches before the next step: scores and gradients, in the models that measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.update_weights import UpdateBatch
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.forward import BoundModel
from entropy_probe.pipeline.clock import Clock
from entropy_probe.pipeline.growth import Growth, grown
from entropy_probe.pipeline.prepared import bound_in
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.gradients.payloads import (
    Payload,
    update_batch,
    x_payload,
    y_payload,
)
from entropy_probe.stages.gradients.unit_gradients import (
    UnitGradients,
    can_share_a_forward,
    unit_gradients,
)
from entropy_probe.stages.gradients.units import Rows, bytes_of_units, pairs_fit, units_of
from entropy_probe.stages.memory.memory_limit import Plan, lends_frozen, planned
from entropy_probe.stages.reference import reference_logp
from entropy_probe.stages.responses.ids import eos_ids
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.share import Share
from entropy_probe.stages.slopes import coefficients_of, whole_per_token_payload
from entropy_probe.stages.update import UpdateDirection, compute_update_vector_adamw, learning_rate


@dataclass(frozen=True)
class Models:
    """The checkpoint's model in the configured precision and in true float64: one, where that is float64."""

    bound: BoundModel
    float64: BoundModel

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, bound: BoundModel, config: ProbeConfig, world: World = ALONE
    ) -> Models:
        if bound.dtype is torch.float64:
            return cls(bound, bound)
        lent = lends_frozen(bound, config)
        return cls(bound, bound_in(world, checkpoint.model, torch.float64, lend_frozen=lent))

    def planned(
        self, batches: tuple[Rollouts, ...], config: ProbeConfig, clock: Clock
    ) -> tuple[Models, ProbeConfig, Plan | None]:
        """Models and configuration with sizes that keep to the limit of memory; without one as they are."""
        if config.memory_limit is None:
            if config.recompute != "always":
                return self, config, None
            bound = replace(self.bound, recompute=True)
            one = self.float64 is self.bound
            return (
                Models(bound, bound if one else replace(self.float64, recompute=True)),
                config,
                None,
            )
        with clock("memory limit"):
            plan = planned(self.bound, self.float64, batches, config, clock.world)
        chosen = {"logits_at_once": plan.logits_at_once, "recompute": plan.recompute}
        limited = (replace(m, **chosen) for m in (self.bound, self.float64))
        return Models(*limited), plan.config, plan


@dataclass(frozen=True)
class Batch:
    """One batch: `tokens` are the scores of this process's own prompts, `scores` those of all (`Share.scores`);
    `of_x` is what X of the own prompts is made of, and of U `as_update` what Y of all is made of."""

    share: Share
    tokens: Scores
    scores: Scores
    of_x: Payload
    gradients: UnitGradients
    as_update: UpdateBatch | None = None

    @property
    def rollouts(self) -> Rollouts:
        """The whole batch."""
        return self.share.rollouts


@dataclass(frozen=True)
class Measured:
    """The models, and both batches: `e` and `u` are one object where one batch serves as both. Where E grew towards a
    target, how it did, and the direction v that this took."""

    checkpoint: Checkpoint
    config: ProbeConfig
    models: Models
    e: Batch
    u: Batch
    growth: Growth | None = None
    direction: UpdateDirection | None = None

    @property
    def bound(self) -> BoundModel:
        return self.models.bound

    @property
    def float64(self) -> BoundModel:
        return self.models.float64

    @property
    def same_batch(self) -> bool:
        return self.e is self.u

    @cached_property
    def ascent(self) -> Mapping[str, Tensor]:
        """Ȳ of the U batch, the ascent direction of the policy objective."""
        return self.u.gradients.mean_y()


def measured(
    checkpoint: Checkpoint,
    models: Models,
    e: Rollouts,
    u: Rollouts,
    config: ProbeConfig,
    clock: Clock,
) -> Measured:
    """Score and differentiate U, which gives X and Y, and E, which gives X.

    Every process does so with its own prompts.
    """
    bound, same_batch = models.bound, e is u
    share_u = Share.of(u, units_of(bound, u, config), clock.world)
    units = len(share_u.units.sizes)
    Rows.of(bound, units, config).require_room(bytes_of_units(bound, units))
    share_e = share_u if same_batch else Share.of(e, units_of(bound, e, config), clock.world)
    with clock("scores"):
        tokens_e = score(bound, share_e.own, config, with_features=True, with_mean_s=same_batch)
        tokens_u = tokens_e
        if not same_batch:
            with_features = config.first_order.estimator == "rb"
            tokens_u = score(
                bound, share_u.own, config, with_features=with_features, with_mean_s=True
            )
    with clock("gradients"):
        as_update = _as_update(checkpoint, bound, share_u, tokens_u, config)
        of_x = x_payload(share_u.own, tokens_u, config, share_u.among)
        of_y = y_payload(as_update, config).of_prompts(share_u.prompts)
        paired = pairs_fit(bound, share_u, config)
        shown = {"stage": "gradients of U", "progress": clock.progress, "paired": paired}
        gradients = unit_gradients(bound, share_u, config, of_x, of_y, **shown)
        scores_u = share_u.scores(tokens_u)
        batch_u = Batch(share_u, tokens_u, scores_u, of_x, gradients, as_update)
    if same_batch:
        return Measured(checkpoint, config, models, batch_u, batch_u)
    growth = direction = None
    if e.further is not None:
        with clock("update"):
            ascent, adam = gradients.mean_y(), checkpoint.adam
            clip, lr = (
                config.whose_update.max_grad_norm,
                learning_rate(adam, config.first_order.lr)[0],
            )
            direction = compute_update_vector_adamw(
                bound.registry, adam, ascent, clip, lr, clock.world
            )
        growth = grown(models, share_e, tokens_e, batch_u, direction, lr, config, clock)
        share_e, tokens_e = growth.share, growth.tokens
    with clock("gradients"):
        of_x = x_payload(share_e.own, tokens_e, config, share_e.among)
        shown["stage"] = "gradients of E"
        if checkpoint.other is None and can_share_a_forward(bound, share_e, of_x):
            c = coefficients_of(share_e, tokens_e, config)
            shown["beside"] = whole_per_token_payload(share_e, tokens_e, c)
        gradients = unit_gradients(bound, share_e, config, of_x, **shown)
        batch_e = Batch(share_e, tokens_e, share_e.scores(tokens_e), of_x, gradients)
    return Measured(checkpoint, config, models, batch_e, batch_u, growth, direction)


def _as_update(
    checkpoint: Checkpoint, bound: BoundModel, share: Share, tokens: Scores, config: ProbeConfig
) -> UpdateBatch:
    """The U batch with what its recipe asks for: scores of all tokens, which others have in part, and a reference's."""
    recipe, needed = config.whose_update, {}
    if recipe.by_token or recipe.needs_reference or recipe.importance != "none":
        needed["logp"] = share.all_tokens(tokens.token_logp)
        needed["entropy"] = share.all_tokens(tokens.rb_entropy)
    if recipe.needs_reference:
        reference = reference_logp(checkpoint.model, bound, share.own, config, share.world)
        needed["reference"] = share.all_tokens(reference)
    ends = set(eos_ids(bound.language_model, checkpoint.tokenizer))
    return update_batch(share.rollouts, config, ends, needed)
