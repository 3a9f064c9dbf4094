"""The entropy at θ, by every estimator; and whether the sampler's own log-probabilities agree with it."""

from __future__ import annotations

import math

from torch import Tensor

from entropy_probe import report as r
from entropy_probe.estimators import importance, parity
from entropy_probe.estimators.token_stats import LOGIT_VAR
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.share import Share


def surprises(share: Share, tokens: Scores) -> int:
    """How many tokens of the whole batch were less likely than not; `tokens` are the scores of the own prompts."""
    return int(share.world.total((tokens.token_logp < math.log(0.5)).sum()))


def entropy_section(scores: Scores, temperature: float, surprises: int) -> r.EntropySection:
    """Ĥ per response and per token, with standard errors over prompts. `scores` have features."""
    assert scores.features is not None
    logit_var = scores.features[..., LOGIT_VAR]
    surprise = importance.surprise(scores.seq_logq, scores.rb_sum_q, logit_var, temperature)
    return r.EntropySection(
        naive=_estimate(*importance.mean_and_se(-scores.seq_logp)),
        rb=_estimate(*importance.mean_and_se(scores.rb_sum)),
        rb_q=_estimate(*importance.mean_and_se(scores.rb_sum_q)),
        surprise=_estimate(*surprise),
        per_token=_estimate(*importance.ratio_and_se(scores.rb_sum, scores.gen_lens)),
        rb_by_prompt=scores.rb_sum.mean(1).tolist(),
        per_token_by_prompt=importance.ratio_by_prompt(scores.rb_sum, scores.gen_lens).tolist(),
        surprises=surprises,
    )


def _estimate(value: float, se: float) -> r.Estimate:
    return r.Estimate(value=value, se=se)


def sampler_parity_section(
    rollouts: Rollouts, token_logq: Tensor | None
) -> r.SamplerParitySection | None:
    """`None` where the rollouts came without the sampler's log-probabilities."""
    if rollouts.logprobs is None or token_logq is None:
        return None
    reported = rollouts.per_prompt(rollouts.logprobs)
    return parity.sampler_parity(token_logq, reported, rollouts.per_prompt(rollouts.gen_mask))
