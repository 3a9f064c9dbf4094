"""A part of long rows, for what is differentiated twice: that holds a graph of every layer for each token of a row.

Both sides of a comparison are computed on the same part. What it cannot see is a fault that needs more tokens than it
has; the projections by a JVP, the gradient witness and the slopes along v are on whole rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from entropy_probe.stages.responses.rollouts import Rollouts

LONGEST = 128
"""Tokens of a row that is differentiated twice. The second derivative of a model of 7 billion parameters holds 64 MiB
for each of them in float64, 8 GiB in all, where its weights take 29; of the bundled checkpoint no row is longer."""


def shortened(rollouts: Rollouts) -> Rollouts:
    """The last tokens of each prompt and the first of its responses, at most `LONGEST` in a row and at least half of
    them generated, where there are as many; `rollouts` itself where no row is longer.

        t = min(T, max(LONGEST − P, LONGEST/2)),     p = min(P, LONGEST − t)

    of a prompt of P tokens whose longest response has T: all its responses follow the same p tokens.
    """
    longest = LONGEST
    totals = rollouts.prompt_lens + rollouts.gen_lens
    if int(totals.max()) <= longest:
        return rollouts
    most = rollouts.per_prompt(rollouts.gen_lens).amax(1).repeat_interleave(rollouts.num_responses)
    generated = most.minimum((longest - rollouts.prompt_lens).clamp(min=longest // 2))
    before = rollouts.prompt_lens.minimum(longest - generated)
    gen_lens = torch.minimum(rollouts.gen_lens, generated)
    columns = torch.arange(int((before + gen_lens).max()))
    at = (rollouts.prompt_lens - before)[:, None] + columns
    ids = rollouts.ids.gather(1, at.clamp(max=rollouts.ids.shape[1] - 1))
    return replace(
        rollouts,
        ids=ids.masked_fill(columns >= (before + gen_lens)[:, None], 0),
        prompt_lens=before,
        gen_lens=gen_lens,
        advantages=None,
        logprobs=None,
        weighed=False,
    )
