"""The predictors of the report: of the batch that makes the step, and the parts of the slope along v."""

from __future__ import annotations

import torch

from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.estimators import predictors
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.stages.gradients.payloads import response_advantages
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.share import Share
from entropy_probe.stages.slopes import Slopes


def of_update_batch(
    share: Share, tokens: Scores, config: ProbeConfig
) -> dict[str, predictors.Predicted]:
    """`share` and `tokens` (of the own prompts) are those of U. All processes take part.

    A is as the file has it, of a response or of a token (its weight, where it has weights); else by the recipe from the
    rewards.
    """
    assert tokens.mean_s is not None
    rollouts = share.rollouts
    a = rollouts.advantages
    if a is None:
        a = response_advantages(rollouts, config)
    counts = torch.arange(tokens.token_logp.shape[-1]) < tokens.gen_lens[..., None]
    if rollouts.in_step is not None:
        counts = counts & rollouts.in_step[share.prompts][..., None]
    own = a[share.prompts]
    if own.dim() == 3:
        own = own[..., : counts.shape[-1]]
    sums = predictors.prompt_sums(tokens.token_logp, tokens.rb_entropy, tokens.mean_s, own, counts)
    return predictors.of_scores(share.whole(sums))


def of_slopes(along: Slopes, scores: Scores, lr: float) -> dict[str, predictors.Predicted]:
    """lr times the parts of the slope; `scores` are those of all responses of E."""
    lengths = scores.gen_lens.double()
    per_token = predictors.parts_of_slope(along.per_token, along.d_rb_sum, lengths)
    per_response = predictors.parts_of_slope(along.slope, along.d_rb_sum)
    names = ("of_entropies", "of_visits")
    parts: dict[str, PromptMean] = dict(zip(names, per_token, strict=True))
    parts |= {f"{n}_per_response": of for n, of in zip(names, per_response, strict=True)}
    return {name: predictors.Predicted(lr * of.value, lr * of.se) for name, of in parts.items()}


def predictors_section(
    of_batch: dict[str, predictors.Predicted], of_slope: dict[str, predictors.Predicted]
) -> r.PredictorsSection:
    """Without a direction v there are no parts of a slope."""
    fields: dict[str, float | None] = dict.fromkeys(r.PredictorsSection.model_fields)
    for name, of in (of_batch | of_slope).items():
        fields[name], fields[f"{name}_se"] = of.value, of.se
    return r.PredictorsSection.model_validate(fields)
