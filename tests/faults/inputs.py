"""Faults of what is asked and of what is worth how much: messages, columns, groups of unequal size, what is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from entropy_probe.estimators.update_weights import UpdateBatch
from entropy_probe.pipeline import next_step
from entropy_probe.stages import entropy, slopes
from entropy_probe.stages.derivatives import Derivatives
from entropy_probe.stages.responses import rewards
from entropy_probe.stages.responses.ids import Door
from entropy_probe.stages.share import Share
from faults.catalogue import Patch, everywhere
from faults.more import FIGURE, fault, published


@fault("chat", "prompts_as_given")
def answer_is_not_opened(patch: Patch) -> None:
    """Messages are rendered without what opens the answer: the policy goes on as if it were the user."""
    original = Door.rendered
    opening = "<|im_start|>assistant\n"
    patch.setattr(Door, "rendered", lambda door, *of: original(door, *of).removesuffix(opening))


@fault("chat", "prompts_as_given")
def system_message_is_lost(patch: Patch) -> None:
    """Messages are rendered without the system's."""
    original = Door.rendered
    patch.setattr(
        Door,
        "rendered",
        lambda door, messages, columns: original(door, [m for m in messages if m["role"] != "system"], columns),
    )


@fault("chat", "rewards_again", also="gradient_witness")
def columns_of_the_next_prompt(patch: Patch) -> None:
    """Every response is rewarded by the columns of the prompt that follows its own."""
    original = rewards._by_trl

    def shifted(function: Any, name: str, asked: Any) -> Any:
        prompts = list(dict.fromkeys(id(one.prompt) for one in asked))
        of = {id(one.prompt): one.prompt for one in asked}
        after = {key: of[prompts[(k + 1) % len(prompts)]] for k, key in enumerate(prompts)}
        moved = [
            dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, columns=after[id(one.prompt)].columns))
            for one in asked
        ]
        return original(function, name, moved)

    everywhere(patch, original, shifted)


@fault("uneven", f"gradient_witness {FIGURE}")
def missing_responses_count(patch: Patch) -> None:
    """What a smaller group lacks counts as responses of no token with the reward 0."""
    patch.setattr(UpdateBatch, "present", property(lambda batch: torch.ones_like(batch.lengths, dtype=torch.bool)))


@fault("uneven", FIGURE)
def spread_of_prompts_for_that_of_batches(patch: Patch) -> None:
    """The spread of ΔH over update batches is that over prompts."""
    published(
        patch,
        slopes.update_section,
        lambda u: {"spread_over_batches": u.spread_over_batches * len(u.slope_by_unit) ** 0.5},
    )


@fault("llama", FIGURE)
def one_se_is_resolved(patch: Patch) -> None:
    """What the noise resolves is one standard error for two, so that too few prompts seem to be needed."""
    original = next_step._resolution

    def halved(*args: Any) -> Any:
        made = original(*args)
        return made.model_copy(update={"per_token": made.per_token / 2, "prompts_needed": made.prompts_needed // 4})

    patch.setattr(next_step, "_resolution", halved)


@fault("grown", "slope_identity sweep_identity")
def derivatives_of_the_rest_come_first(patch: Patch) -> None:
    """Of an E batch that grew, the derivatives of the added prompts stand before those of the first ones."""
    original = Share.joined

    def exchanged(whole: Share, first: Any, then: Any) -> Any:
        found = original(whole, first, then)
        if not isinstance(found, Derivatives):
            return found
        order = torch.arange(whole.rollouts.num_prompts).roll(1)
        return dataclasses.replace(
            found, **{name: values[order] for name, values in vars(found).items() if values is not None}
        )

    patch.setattr(Share, "joined", exchanged)


@fault("llama", "slope_identity")
def length_has_no_part_in_the_gradient_per_token(patch: Patch) -> None:
    """X̄ per token without the coefficients of the length: the entropy per response over the mean length."""
    original = slopes.gradient_per_token

    def without(bound: Any, share: Any, scores: Any, along: Any, config: Any) -> Any:
        c = torch.stack([along.coefficients[0], torch.zeros_like(along.coefficients[1])])
        return original(bound, share, scores, dataclasses.replace(along, coefficients=c), config)

    patch.setattr(slopes, "gradient_per_token", without)


@fault("llama", FIGURE)
def surprises_are_all_tokens(patch: Patch) -> None:
    """Every token counts as less likely than not, so that no standard error is doubted."""
    published(patch, entropy.entropy_section, lambda of: {"surprises": of.surprises + 1000})
