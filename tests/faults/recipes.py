"""Faults of the update: another recipe than the trainer's, parts of it made wrongly, and the step that it made."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from entropy_probe.estimators import update_weights
from entropy_probe.pipeline import next_step
from entropy_probe.stages import real_update
from entropy_probe.stages.responses import rollouts
from entropy_probe.trainers import settings, trl
from faults.catalogue import Patch, everywhere, then
from faults.more import fault

REAL = "real_update_cosine"
MASKED = {"recipe": {"name": "trl-grpo", "mask_truncated": True}}
FEW = {"recipe": {"name": "trl-bnpo", "top_entropy_quantile": 0.3, "micro_batch_size": 6, "entropy_coef": 0.1}}
BONUS = {"recipe": {"name": "trl-dapo", "entropy_coef": 0.5}}
KL = {"recipe": {"name": "trl-dapo", "kl_coef": 0.5}}


def found(patch: Patch, **changes: Any) -> None:
    """What TRL's arguments are taken to say."""
    original = trl.found
    sources = tuple(
        dataclasses.replace(
            source,
            read=lambda path: (
                dataclasses.replace(of, **{k: c(of) for k, c in changes.items()}) if (of := original(path)) else None
            ),
        )
        if source.read is original
        else source
        for source in settings.SOURCES
    )
    patch.setattr(settings, "SOURCES", sources)


@fault("trl", REAL, also="real_update_norm")
def loss_taken_for_another(patch: Patch) -> None:
    """The loss `dapo` is read as `grpo`, so responses of other lengths have other weights."""
    found(patch, name=lambda of: "trl-grpo")


@fault("trl", "real_update_norm", also=REAL)
def clipping_of_the_trainer_unread(patch: Patch) -> None:
    """max_grad_norm is not read, and the gradient is taken as it is."""
    found(patch, parts=lambda of: {**of.parts, "max_grad_norm": None})


@fault("trl", REAL, also="real_update_norm")
def scale_of_rewards_unread(patch: Patch) -> None:
    """Advantages are not divided by the standard deviation of their prompt's rewards."""
    found(patch, parts=lambda of: {**of.parts, "scale": "none"})


@fault("trl", "real_update_norm", also=REAL)
def step_over_half_of_its_rate(patch: Patch) -> None:
    """The step that was made is divided by half of its learning rate."""
    original = next_step.made_step
    patch.setattr(next_step, "made_step", lambda before, after, lr, world: original(before, after, lr / 2, world))


@fault("trl", REAL, also="real_update_norm")
def gradient_with_momentum_in_it(patch: Patch) -> None:
    """The gradient that Adam was given is taken to be its next first moment."""
    patch.setattr(real_update, "_given", lambda before, after, theta: after.exp_avg.double().reshape(theta.shape))


@fault("trl", REAL, also="real_update_norm")
def step_takes_half_of_its_batch(patch: Patch) -> None:
    """Every second response of the captured step is left out, in the measurement and in its witness."""
    original = rollouts.assembled

    def halved(*a: Any, **k: Any) -> Any:
        made = original(*a, **k)
        if made.in_step is None:
            return made
        even = (torch.arange(made.in_step.numel()) % 2 == 0).reshape(made.in_step.shape)
        return dataclasses.replace(made, in_step=made.in_step & even)

    everywhere(patch, original, halved)


@fault("llama", "gradient_witness", **MASKED)
def truncated_responses_count(patch: Patch) -> None:
    """Responses without an end keep their weight, although the recipe masks them."""
    everywhere(patch, update_weights._of_responses, lambda recipe, batch: torch.ones_like(batch.rewards))


@fault("llama", "gradient_witness", **FEW)
def tokens_of_low_entropy_act(patch: Patch) -> None:
    """The tokens with the smallest entropy have a weight, in place of those with the largest."""
    then(patch, update_weights.high_entropy, lambda acts: 1 - acts)


@fault("llama", "gradient_witness", **FEW)
def micro_batches_are_one(patch: Patch) -> None:
    """The normaliser of a micro-batch counts the tokens of all micro-batches."""
    original = update_weights.of_micro_batches
    everywhere(patch, original, lambda tokens, micro: original(tokens, torch.zeros_like(micro)))


@fault("llama", "gradient_witness", **BONUS)
def entropy_bonus_the_other_way(patch: Patch) -> None:
    """The entropy bonus is a penalty."""
    original = update_weights._of_entropy
    everywhere(patch, original, lambda *a: -original(*a))


@fault("lora", "gradient_witness", **KL)
def kl_term_pulls_away(patch: Patch) -> None:
    """The KL term moves the policy away from its reference."""
    original = update_weights._penalty
    everywhere(patch, original, lambda *a: -original(*a))


@fault("llama", "gradient_witness", recipe={"name": "nemo-rl"})
def deviation_of_the_whole_group(patch: Patch) -> None:
    """The standard deviation that divides an advantage includes the response's own reward."""
    original = update_weights.advantages
    other = {"scale": "group"}
    everywhere(patch, original, lambda recipe, batch: original(recipe.model_copy(update=other), batch))
